"""MLP-Mixer and Sparse-MLP: images of patches in, logits of their classes out, without attention.

A block mixes the patches of each channel, and then the channels of each patch, by a feed-forward network each. In a
sparse block both are mixtures of experts: over tokens, to whose experts each channel is sent as the vector of its
patches, and over channels, to whose experts each patch is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from ..analysis.ledger import Ledger
from ..moe import MoE, aux_loss, give_reward, moe_layers

__all__ = ["Mixer", "MixerShape", "mixer_ledger", "mixes_channels"]


class MixerShape(PretrainedConfig):
    """The shape of a `Mixer`.

    Args:
        image_size, patch_size, num_channels: of the images.
        hidden_size: d.
        num_hidden_layers: blocks.
        tokens_hidden, intermediate_size: the widths of the dense networks over tokens and over channels.
        sparse: the numbers of the blocks that are sparse.
        tokens_experts, channels_experts: what `MoE` is given there, but for its dim.
        **rest: of any configuration; its id2label names the classes.
    """

    model_type = "shunter-mixer"

    def __init__(
        self,
        image_size: int = 8,
        patch_size: int = 4,
        num_channels: int = 1,
        hidden_size: int = 8,
        num_hidden_layers: int = 1,
        tokens_hidden: int = 8,
        intermediate_size: int = 8,
        sparse: list[int] | None = None,
        tokens_experts: dict[str, Any] | None = None,
        channels_experts: dict[str, Any] | None = None,
        **rest: Any,
    ) -> None:
        super().__init__(**rest)
        self.image_size, self.patch_size, self.num_channels = image_size, patch_size, num_channels
        self.hidden_size, self.num_hidden_layers = hidden_size, num_hidden_layers
        self.tokens_hidden, self.intermediate_size = tokens_hidden, intermediate_size
        self.sparse, self.tokens_experts, self.channels_experts = sparse or [], tokens_experts, channels_experts

    @property
    def patches(self) -> int:
        """S, of an image."""
        return (self.image_size // self.patch_size) ** 2


class _Network(nn.Sequential):
    """Two linear maps and GELU between them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))


class _Block(nn.Module):
    def __init__(self, config: Any, sparse: bool) -> None:
        super().__init__()
        d, patches = config.hidden_size, config.patches
        self.before_tokens, self.before_channels = nn.LayerNorm(d), nn.LayerNorm(d)
        self.tokens: nn.Module = _Network(patches, config.tokens_hidden)
        self.channels: nn.Module = _Network(d, config.intermediate_size)
        if sparse:
            self.tokens = MoE(patches, activation="gelu", bias=True, **config.tokens_experts)
            self.channels = MoE(d, activation="gelu", bias=True, **config.channels_experts)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.before_tokens(x).mT.contiguous()).mT
        out: Tensor = x + self.channels(self.before_channels(x))
        return out


class Mixer(PreTrainedModel):
    """Pixels (B, channels, height, width) to logits (B, classes).

    Source: Tolstikhin et al. 2021 (MLP-Mixer); with sparse blocks Lou et al. 2021 (Sparse-MLP), without the maps that
    bring the input of the experts over tokens to another size.
    """

    config_class = MixerShape
    main_input_name = "pixel_values"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        d, patch = config.hidden_size, config.patch_size
        self.stem = nn.Conv2d(config.num_channels, d, patch, stride=patch)
        self.blocks = nn.ModuleList(_Block(config, n in config.sparse) for n in range(config.num_hidden_layers))
        self.norm, self.classifier = nn.LayerNorm(d), nn.Linear(d, config.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Each part has drawn its own."""

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        """The logits, and with labels (B,) the mean cross-entropy, in training with the losses of the routers."""
        x = self.stem(pixel_values).flatten(2).mT
        for block in self.blocks:
            x = block(x)
        logits = self.classifier(self.norm(x).mean(1))
        if labels is None:
            return ImageClassifierOutput(logits=logits)
        losses = F.cross_entropy(logits, labels, reduction="none")
        if self.training and any(layer.decider.learns_by_reward for layer in moe_layers(self).values()):
            give_reward(self, -losses.detach())
        return ImageClassifierOutput(loss=losses.mean() + aux_loss(self), logits=logits)


def mixes_channels(layer: str) -> bool:
    """Whether the layer of this name is sent patches, and not channels."""
    return layer.endswith(".channels")


@torch.no_grad()
def mixer_ledger(model: Mixer) -> Ledger:
    """The ledger of a Mixer, a token being a patch; what a block does for each channel is shared out among them."""
    config: Any = model.config
    d, patches = config.hidden_size, config.patches
    flops = {"projections": 2.0 * model.stem.weight.numel(), "routers": 0.0, "experts": 0.0}
    flops["projections"] += 2 * model.classifier.weight.numel() / patches
    inactive = 0.0
    for block in model.blocks:
        networks: list[tuple[Any, int, float]] = [(block.tokens, d, d / patches), (block.channels, patches, 1.0)]
        for network, rows, each in networks:
            if isinstance(network, MoE):
                for part, count in network.flops_per_token(rows).items():
                    flops[part] += each * count
                inactive += network.inactive_parameters(rows)
            else:
                flops["projections"] += each * 2 * sum(p.numel() for p in network.parameters() if p.dim() == 2)
    total = sum(p.numel() for p in model.parameters())
    return Ledger(total, total - inactive, flops)
