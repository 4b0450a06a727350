"""Pairs of an image and a caption to a contrastive loss: one tower for patches and words (LIMoE), or one for each."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ModelOutput
from transformers.models.clip.modeling_clip import CLIPEncoder

from ..moe import tell

__all__ = ["IMAGE", "TEXT", "ContrastiveConfig", "ContrastiveModel", "ContrastiveOutput"]

IMAGE, TEXT = 0, 1
"""The ids of the modalities in `Context`."""
_LARGEST_SCALE = 100.0


class ContrastiveConfig(PretrainedConfig):
    """The sizes of a `ContrastiveModel`.

    Args:
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size: of a tower.
        towers: 1 for both modalities together, 2 for one each.
        image_size, patch_size, num_channels: of the images, which are square.
        vocab_size: of the words.
        caption_tokens: words of a caption at most.
        hidden_act, attention_dropout, layer_norm_eps, initializer_range: as in CLIP.
    """

    model_type = "shunter_contrastive"
    model_class: ClassVar[Any] = None

    def __init__(
        self,
        hidden_size: int = 64,
        num_hidden_layers: int = 2,
        num_attention_heads: int = 2,
        intermediate_size: int = 128,
        towers: int = 1,
        image_size: int = 32,
        patch_size: int = 8,
        num_channels: int = 3,
        vocab_size: int = 257,
        caption_tokens: int = 12,
        hidden_act: str = "gelu",
        attention_dropout: float = 0.0,
        layer_norm_eps: float = 1e-5,
        initializer_range: float = 0.02,
        **rest: Any,
    ) -> None:
        self.hidden_size, self.num_hidden_layers = hidden_size, num_hidden_layers
        self.num_attention_heads, self.intermediate_size = num_attention_heads, intermediate_size
        self.towers = towers
        self.image_size, self.patch_size, self.num_channels = image_size, patch_size, num_channels
        self.vocab_size, self.caption_tokens = vocab_size, caption_tokens
        self.hidden_act, self.attention_dropout = hidden_act, attention_dropout
        self.layer_norm_eps, self.initializer_range = layer_norm_eps, initializer_range
        super().__init__(**rest)

    @property
    def patches(self) -> int:
        """Of an image."""
        return (self.image_size // self.patch_size) ** 2


@dataclass
class ContrastiveOutput(ModelOutput):
    """What a `ContrastiveModel` gives.

    Args:
        loss: scalar; None where one modality alone is given.
        logits: (B, B) scaled cosine of each image with each caption; likewise.
        image_embeds, text_embeds: (B, d) of length 1; None where not given.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None


class ContrastiveModel(PreTrainedModel):
    """Images and captions to vectors that are near each other where they belong together.

    In one tower a pair is one sequence, its patches and then its words, so that a sparse layer sees both modalities at
    once; attention keeps each within itself. The layers are told modality, padding and places of these tokens. The mean
    over a modality's tokens goes through a map of its own.

    Source: Mustafa et al. 2022 (LIMoE), section 2; Radford et al. 2021 (CLIP), figure 3 (loss, learned temperature).
    """

    config_class = ContrastiveConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    _supports_sdpa = True

    def __init__(self, config: ContrastiveConfig) -> None:
        super().__init__(config)
        d = config.hidden_size
        shape: Any = config  # which has what CLIP's encoder asks for
        self.patches = nn.Conv2d(config.num_channels, d, config.patch_size, config.patch_size)
        self.patch_places = nn.Embedding(config.patches, d)
        self.words = nn.Embedding(config.vocab_size, d)
        self.word_places = nn.Embedding(config.caption_tokens, d)
        self.towers = nn.ModuleList(CLIPEncoder(shape) for _ in range(config.towers))
        self.norms = nn.ModuleList(nn.LayerNorm(d, eps=config.layer_norm_eps) for _ in range(config.towers))
        self.image_head = nn.Linear(d, d, bias=False)
        self.text_head = nn.Linear(d, d, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """Of the words."""
        return self.words

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> ContrastiveOutput:
        """Embed what is given; with both, the mean of the losses of finding the caption and of finding the image.

        Pairs of a batch with the same caption are not each other's negatives.

        Args:
            pixel_values: (B, channels, height, width), as the image processor has them.
            input_ids: (B, S) int64.
            attention_mask: (B, S), 1 at words and 0 at padding; None where all are words.

        Raises:
            ValueError: where neither images nor words are given.
        """
        parts: list[tuple[int, Tensor, Tensor]] = []  # modality, hidden states, which are real
        if pixel_values is not None:
            x = self.patches(pixel_values.to(self.dtype)).flatten(2).mT + self.patch_places.weight
            real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
            parts.append((IMAGE, x, real))
        if input_ids is not None:
            x = self.words(input_ids) + self.word_places.weight[: input_ids.shape[1]]
            real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            parts.append((TEXT, x, real.bool()))
        if not parts:
            raise ValueError("ContrastiveModel: give pixel_values, input_ids, or both")
        groups = [parts] if self.config.towers == 1 else [[part] for part in parts]
        embedded: dict[int, Tensor] = {}
        for group in groups:
            tower = 0 if self.config.towers == 1 else group[0][0]
            embedded |= self._encode(tower, group)
        image, text = embedded.get(IMAGE), embedded.get(TEXT)
        if image is None or text is None or input_ids is None:
            return ContrastiveOutput(image_embeds=image, text_embeds=text)
        logits = self.scale * image @ text.mT
        same = (input_ids[:, None] == input_ids).all(-1).fill_diagonal_(False)
        rivals = logits.masked_fill(same, float("-inf"))
        right = torch.arange(len(logits), device=logits.device)
        loss = (F.cross_entropy(rivals, right) + F.cross_entropy(rivals.mT, right)) / 2
        return ContrastiveOutput(loss, logits, image, text)

    @property
    def scale(self) -> Tensor:
        """The reciprocal of the learned temperature, 100 at most."""
        return self.log_scale.exp().clamp_max(_LARGEST_SCALE)

    def _encode(self, tower: int, group: list[tuple[int, Tensor, Tensor]]) -> dict[int, Tensor]:
        """The vectors (B, d) of each modality of a group, whose tokens pass a tower together."""
        lengths = [x.shape[1] for _, x, _ in group]
        hidden, real = torch.cat([x for _, x, _ in group], 1), torch.cat([some for _, _, some in group], 1)
        device = hidden.device
        places = torch.cat([torch.arange(n, device=device) for n in lengths])
        modality = torch.cat([torch.full((x.shape[1],), kind, device=device) for kind, x, _ in group])
        sees = (modality[:, None] == modality) & real[:, None, :]  # (B, queries, keys)
        forbidden = torch.zeros(sees.shape, dtype=hidden.dtype, device=device)
        forbidden = forbidden.masked_fill(~sees, torch.finfo(hidden.dtype).min)[:, None]
        shape = real.shape
        known = {
            "mask": real,
            "modality": modality.expand(shape),
            "sequence": 2 * torch.arange(shape[0], device=device)[:, None] + modality,
            "position": places.expand(shape),
        }
        with tell(self, **known):
            hidden = self.towers[tower](hidden, forbidden).last_hidden_state
        hidden = self.norms[tower](hidden)
        found = {}
        for (kind, _, some), part in zip(group, hidden.split(lengths, 1), strict=True):
            mean = (part * some[..., None]).sum(1) / some.sum(1, keepdim=True).clamp_min(1)
            found[kind] = F.normalize((self.image_head if kind == IMAGE else self.text_head)(mean), dim=-1)
        return found


ContrastiveConfig.model_class = ContrastiveModel
AutoConfig.register(ContrastiveConfig.model_type, ContrastiveConfig, exist_ok=True)
AutoModel.register(ContrastiveConfig, ContrastiveModel, exist_ok=True)
