"""Experts choose: each expert takes the tokens that score it highest."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ..routing import Routing
from .base import Context, LinearRouter, largest

__all__ = ["ExpertChoice"]


class ExpertChoice(LinearRouter):
    """Expert choice routing: every expert takes its C best tokens; a token may get several experts or none.

    The weight is the softmax over experts, not renormalised. Perfectly balanced, so there is no balance loss. Tokens
    compete with later tokens: not for causal models.

    Args:
        capacity_factor: the mean number of experts a token gets; C = ceil(capacity_factor * T / E).
        **options: of `LinearRouter` and `Router`.

    Raises:
        ValueError: where capacity_factor is None: without a capacity every expert would take every token.

    Source: Zhou et al. 2022 (Mixture-of-Experts with Expert Choice Routing), section 3.2.
    """

    chooses: ClassVar[str] = "experts"
    source: ClassVar[str] = "Zhou et al. 2022"

    def __init__(self, dim: int, num_experts: int, *, capacity_factor: float | None = 2.0, **options: Any) -> None:
        if capacity_factor is None:
            raise ValueError("expert_choice needs a capacity_factor: the number of tokens that each expert takes")
        super().__init__(dim, num_experts, capacity_factor=capacity_factor, **options)

    def choose(self, logits: Tensor, context: Context) -> Routing:
        """The C best real tokens of each column of the softmax over experts."""
        scores = logits.softmax(-1)
        real = context.num_real(logits.shape[0])
        slots = self.capacity(real)
        assert slots is not None
        ranked = scores.detach()
        if context.mask is not None:
            ranked = ranked.masked_fill(~context.mask[:, None], -1.0)
        token = largest(ranked.T.contiguous(), min(slots, real))
        chosen = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device).scatter(0, token.T, True)
        return Routing.from_dense(scores, mask=chosen, check=False)

    def limit(self, routing: Routing, logits: Tensor, context: Context) -> Routing:
        """The routing itself: the choice is already within capacity."""
        return routing

    @property
    def experts_per_token(self) -> float:
        """The capacity factor: E experts take C = capacity_factor * T / E tokens each."""
        assert self.capacity_factor is not None
        return min(self.capacity_factor, float(self.num_experts))

    @property
    def leak(self) -> str:
        """Always: tokens compete for an expert with later tokens."""
        return "expert choice lets later tokens compete with earlier ones for an expert"
