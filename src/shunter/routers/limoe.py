"""Tokens choose, across modalities: one tower whose router is kept from leaving a modality to one expert."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import losses
from ..context import Context
from ..routing import Routing
from .vmoe import VMoE

__all__ = ["LIMoE"]


class LIMoE(VMoE):
    """LIMoE routing: V-MoE's router with two entropy losses for each modality.

    The local loss makes each token sure of its expert; the global loss keeps the tokens of a modality together on at
    least about S experts, and is zero once they are. Slots go by batch priority, for without it the rarer modality
    loses its tokens; so the router leaks in causal models.

    Args:
        num_modalities: how many modalities there are; `modality` ids are 0 to num_modalities - 1.
        local_entropy_loss: coefficient of the local entropy loss, summed over modalities.
        global_entropy_loss: coefficient of the global entropy loss, summed over modalities.
        soft_minimum: S >= 1, one number or one for each modality; None takes E / num_modalities.
        top_k, capacity_order, z_loss: of `VMoE` and `Router`; one expert, batch priority and a z-loss are the paper's.
        **options: of `VMoE`, `TopK`, `LinearRouter` and `Router`.

    Raises:
        ValueError: where soft_minimum does not fit the modalities or the experts.

    Source: Mustafa et al. 2022 (LIMoE), sections 2.2 and 2.3. The coefficients are ours.
    """

    source: ClassVar[str] = "Mustafa et al. 2022"
    needs: ClassVar[tuple[str, ...]] = ("modality",)

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        num_modalities: int = 2,
        local_entropy_loss: float = 0.01,
        global_entropy_loss: float = 0.01,
        soft_minimum: float | Sequence[float] | None = None,
        top_k: int = 1,
        capacity_order: str = "batch",
        z_loss: float = 0.001,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_experts, top_k=top_k, capacity_order=capacity_order, z_loss=z_loss, **options)
        if num_modalities < 1:
            raise ValueError(f"num_modalities {num_modalities} must be at least 1")
        if soft_minimum is None:
            soft_minimum = max(1.0, num_experts / num_modalities)
        if not isinstance(soft_minimum, Sequence):
            soft_minimum = [soft_minimum] * num_modalities
        if len(soft_minimum) != num_modalities or not all(1 <= s <= num_experts for s in soft_minimum):
            raise ValueError(
                f"soft_minimum {list(soft_minimum)} must be one number from 1 to {num_experts} for each of the "
                f"{num_modalities} modalities"
            )
        self.num_modalities = num_modalities
        self.soft_minimum = tuple(float(s) for s in soft_minimum)
        self.coefficients["local_entropy_loss"] = local_entropy_loss
        self.coefficients["global_entropy_loss"] = global_entropy_loss

    def choose(self, logits: Tensor, context: Context) -> Routing:
        """As `VMoE`: the modality enters the losses alone."""
        self.require(context, "modality", self.num_modalities)
        return super().choose(logits, context)

    def loss_terms(self, logits: Tensor, routing: Routing, context: Context) -> dict[str, Callable[[], Tensor]]:
        """The local and global entropies of the clean probabilities of each modality, and the losses of `VMoE`."""
        probs = logits.chunk(2, dim=-1)[0].softmax(-1)
        modality = self.require(context, "modality", self.num_modalities)
        masks = [modality == m for m in range(self.num_modalities)]
        if context.mask is not None:
            masks = [mask & context.mask for mask in masks]
        return {
            **super().loss_terms(logits, routing, context),
            "local_entropy_loss": lambda: torch.stack([losses.local_entropy_loss(probs, mask) for mask in masks]).sum(),
            "global_entropy_loss": lambda: torch.stack(
                [
                    losses.global_entropy_loss(probs, mask, minimum)
                    for mask, minimum in zip(masks, self.soft_minimum, strict=True)
                ]
            ).sum(),
        }
