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


def ledger(model: PreTrainedModel, sequence_length: int, once: Collection[str] = ()) -> Ledger:
    """The ledger of a Hugging Face model with one sequence, dense or sparsified, at a length of that.

    Linear maps are counted once a token, as convolutions that cut an image into patches are, but for those named in
    `once`, which a sequence passes once (the head of a classifier).

    Attention scores are counted over the whole sequence, as the kernels compute them (not halved for causality). A
    router that chooses a varying number of experts counts with its mean, or with the layer's `experts_taken`; dropped
    tokens count as computed.

    Raises:
        ValueError: for encoder-decoder models.
    """
    config: Any = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            "ledger: encoder-decoder models have two sequence lengths; only decoder-only models are counted"
        )
    flops = {"projections": 0.0, "attention": 0.0, "routers": 0.0, "experts": 0.0}
    inactive = 0.0
    layers = moe_layers(model).values()
    for layer in layers:
        for part, count in layer.flops_per_token(sequence_length).items():
            flops[part] += count
        inactive += layer.inactive_parameters(sequence_length)
    inside = {id(part) for layer in layers for part in layer.modules()}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D | nn.Conv2d) and id(module) not in inside:
            flops["projections"] += 2 * module.weight.numel() / (sequence_length if name in once else 1)
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    flops["attention"] += config.num_hidden_layers * 2 * 2 * sequence_length * heads * head_dim
    total = sum(p.numel() for p in model.parameters())
    return Ledger(total, total - inactive, flops)
