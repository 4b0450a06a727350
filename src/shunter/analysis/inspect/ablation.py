"""Ablation: the rise of a language model's or classifier's loss when one expert is removed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..expert_weights import removed
from .material import Batch
from .recording import batch_losses

__all__ = ["Ablation", "ablate"]


@dataclass(frozen=True)
class Ablation:
    """The effect of removing one expert.

    Args:
        rise: of the mean loss over all targets, in nats.
        spread: the standard error of the rise over the targets.
    """

    rise: float
    spread: float


@torch.no_grad()
def ablate(
    model: PreTrainedModel, parameters: dict[str, Tensor], batches: list[Batch], whole: list[Tensor]
) -> Ablation:
    """Remove an expert: it adds nothing, and its tokens keep their other experts with the weights they had.

    Args:
        model: in evaluation mode; the same after as before, Ctrl-C included.
        parameters: of the expert, of `expert_parameters`.
        batches: what the loss is taken on.
        whole: the losses of the batches' targets with all experts, of `batch_losses`.
    """
    with removed(parameters):
        without = [batch_losses(model, batch) for batch in batches]
    change = torch.cat([a - b for a, b in zip([x for x in without if x is not None], whole, strict=True)]).double()
    change = change[~change.isnan()]
    return Ablation(float(change.mean()), float(change.std(correction=0)) / max(1, len(change)) ** 0.5)
