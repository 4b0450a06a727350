"""Tokens choose one expert in each of k prototypes: k times top-1 instead of top-k."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from .. import capacity, losses
from ..context import Context
from ..routing import Routing
from .linear import LinearRouter

__all__ = ["Prototypes"]


class Prototypes(LinearRouter):
    """Expert prototyping: the experts are split into k prototypes, and each token takes the best expert of each.

    The softmax is within a prototype, and the weights are its raw probabilities, so that the layer is the sum of k
    Switch layers of E / k experts each.

    Args:
        num_prototypes: k, which divides E; runs of E / k experts make a prototype.
        slots: what the capacity factor multiplies: "1x" gives all prototypes together the slots of one Switch layer,
            C = F T / E; "kx" gives each its own, C = F T k / E.
        capacity_factor: of `Router`; 1.25 as Switch.
        load_balancing_loss: coefficient of the sum over prototypes of Switch's loss, whose balanced value is k.
        **options: of `LinearRouter` and `Router`.

    Raises:
        ValueError: where num_prototypes does not divide E, or slots is unknown.

    Source: Yang et al. 2021 (M6-T: Exploring Sparse Expert Models and Beyond), section 3.3.
    """

    chooses: ClassVar[str] = "tokens"
    source: ClassVar[str] = "Yang et al. 2021"

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        num_prototypes: int = 2,
        slots: Literal["1x", "kx"] = "kx",
        capacity_factor: float | None = 1.25,
        load_balancing_loss: float = 0.01,
        **options: Any,
    ) -> None:
        if num_prototypes < 1 or num_experts % num_prototypes:
            raise ValueError(f"num_prototypes {num_prototypes} must divide num_experts, {num_experts}")
        if slots not in ("1x", "kx"):
            raise ValueError(f"slots {slots!r} is unknown; choose from 1x, kx")
        options.setdefault("balance_choices", "all")
        options.update(capacity_factor=capacity_factor, load_balancing_loss=load_balancing_loss)
        super().__init__(dim, num_experts, **options)
        self.top_k = num_prototypes
        self.slots_rule = slots

    def _by_prototype(self, logits: Tensor) -> Tensor:
        return logits.unflatten(-1, (self.top_k, -1))

    def probs(self, logits: Tensor) -> Tensor:
        """The softmax within each prototype, divided by k (T, E)."""
        return self._by_prototype(logits).softmax(-1).flatten(-2) / self.top_k

    def choose(self, logits: Tensor, context: Context) -> Routing:
        """The argmax within each prototype, weighted by its probability there."""
        parts = self._by_prototype(logits)
        best = parts.detach().argmax(-1)
        weight = parts.softmax(-1).gather(-1, best[..., None]).squeeze(-1)
        first = torch.arange(0, self.num_experts, parts.shape[-1], device=logits.device)
        routing = Routing.from_topk(best + first, weight, self.num_experts, check=False)
        return replace(routing, choice=None)  # each is the first choice of its own prototype

    def capacity(self, num_tokens: int) -> int | None:
        """The slots C of one expert for T real tokens, by the rule of `slots`."""
        factor = self.present_capacity_factor
        if factor is None:
            return None
        experts = self.num_experts if self.slots_rule == "1x" else self.num_experts // self.top_k
        return capacity.capacity(num_tokens, experts, 1, factor, self.capacity_formula)

    def loss_terms(self, logits: Tensor, routing: Routing, context: Context) -> dict[str, Callable[[], Tensor]]:
        """The losses of `Router`, the z-loss summed over prototypes."""
        parts = self._by_prototype(logits).unbind(-2)
        return {
            **super().loss_terms(logits, routing, context),
            "z_loss": lambda: torch.stack([losses.z_loss(part, context.mask) for part in parts]).sum(),
        }

    @property
    def leak(self) -> str | None:
        """As with one choice: no prototype's choice competes with another's."""
        if self.present_capacity_factor is None or self.capacity_order == "position":
            return None
        return super().leak
