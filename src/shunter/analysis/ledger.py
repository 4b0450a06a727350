"""What a model costs: parameters, those that one token uses, and floating-point operations for each token."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..moe import moe_layers

__all__ = ["TRAINING_FLOPS", "Ledger", "ledger"]

TRAINING_FLOPS = 3
"""How many times a forward pass a training pass costs: one forward, and a backward of twice its cost."""


@dataclass(frozen=True)
class Ledger:
    """The account of a model.

    Args:
        params_total: all parameters, shared ones once, embeddings included.
        params_active: those that a token uses: without the experts that it is not sent to.
        flops: forward FLOPs of one token by part; a multiply-add counts as 2. Softmax, norms and look-ups are left out.
    """

    params_total: int
    params_active: float
    flops: dict[str, float]

    @property
    def flops_per_token(self) -> float:
        """Forward FLOPs of one token; training takes about three times as many."""
        return sum(self.flops.values())


def ledger(
    model: PreTrainedModel, sequence_length: int, once: Collection[str] = (), target_length: int | None = None
) -> Ledger:
    """The ledger of a Hugging Face model, dense or sparsified, at a length of its sequences.

    Linear maps are counted once a token, as convolutions over tokens are and those that cut an image into patches, but
    for those named in `once`, which a sequence passes once (the head of a classifier).

    Of an encoder-decoder model a token is one of the encoder's `sequence_length` or of the decoder's `target_length`;
    its numbers are means over both. All that either stack has is active, but for the experts not taken.

    Attention scores are counted over the whole sequence, as the kernels compute them (not halved for causality). A
    router that chooses a varying number of experts counts with its mean, or with the layer's `experts_taken`; dropped
    tokens count as computed.

    Raises:
        ValueError: for an encoder-decoder model without a target length.
    """
    config: Any = model.config
    pairs = bool(getattr(config, "is_encoder_decoder", False))
    if pairs and target_length is None:
        raise ValueError("ledger: an encoder-decoder model has two sequence lengths; give target_length too")
    source, target = sequence_length, target_length or 0
    encoder = {id(part) for part in model.get_encoder().modules()} if pairs else set()
    total_length = source + target if pairs else source

    def share(name: str, module: nn.Module) -> float:
        """For how many tokens of each a module computes: keys and values of another stack are of its tokens."""
        if not pairs:
            return 1 / sequence_length if name in once else 1.0
        of_encoder = id(module) in encoder or _reads_encoder(name)
        return (source if of_encoder else target) / total_length

    flops = {"projections": 0.0, "attention": 0.0, "routers": 0.0, "experts": 0.0}
    inactive = 0.0
    layers = moe_layers(model)
    for name, layer in layers.items():
        length = source if not pairs or id(layer) in encoder else target
        for part, count in layer.flops_per_token(length).items():
            flops[part] += count * (share(name, layer) if pairs else 1)
        inactive += layer.inactive_parameters(length)
    inside = {id(part) for layer in layers.values() for part in layer.modules()}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D | nn.Conv1d | nn.Conv2d) and id(module) not in inside:
            flops["projections"] += 2 * module.weight.numel() * share(name, module)
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or getattr(config, "d_kv", None) or config.hidden_size // heads
    scores = config.num_hidden_layers * source * source
    if pairs:
        below = next(
            (n for name in ("num_decoder_layers", "decoder_layers") if (n := getattr(config, name, None))),
            config.num_hidden_layers,
        )
        scores += below * target * (target + source)
    flops["attention"] += 2 * 2 * scores * heads * head_dim / total_length
    total = sum(p.numel() for p in model.parameters())
    return Ledger(total, total - inactive, flops)


def _reads_encoder(name: str) -> bool:
    """Whether a map of a decoder makes keys or values of the encoder's tokens, by its path."""
    *_, attention, last = ["", *name.split(".")]
    return attention in _CROSS and last in _KEYS_AND_VALUES


_CROSS = ("EncDecAttention", "encoder_attn", "crossattention")
_KEYS_AND_VALUES = ("k", "v", "k_proj", "v_proj", "key", "value")
