"""Tokens choose at most k experts, by a gate that is differentiable everywhere."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import losses
from ..context import NO_CONTEXT, Context
from ..routing import Routing
from .base import Router

__all__ = ["DSelectK", "smooth_step"]

_LEAST = 0.01
"""Below this weight of a selector on experts that exist the reachability loss is linear in it."""


class DSelectK(Router):
    """DSelect-k: k selectors, each a product of smooth binary decisions that spells the number of one expert.

    The weights are a mixture of the selectors. k bounds the experts of a token from above once the decisions are all 0
    or 1: two selectors may agree, and early in training, when no decision is made, every expert is used (and paid for).
    The logits are (T, k (m + 1)): m = ceil(log2 E) decisions for each selector, then the selectors' mixture logits.

    Args:
        top_k: k, the number of selectors.
        per_example: True computes the logits from the hidden state; False learns one set for all tokens (a task's).
        gamma: the width of the smooth step; outside it a decision is made for good: its gradient is exactly zero.
        entropy_loss: coefficient of the selectors' entropies, summed over selectors: it makes them decide.
        reachability_loss: where E is not a power of two, coefficient of 1 / (weight of each selector on experts that
            exist), summed over selectors; its least value is k. Below a weight of 0.01 the tangent at 0.01 takes the
            place of the reciprocal, which a selector that has decided for an expert that is not there makes infinite.
        **options: of `Router`.

    Raises:
        ValueError: where top_k is not in 1..E or gamma is not positive.

    Source: Hazimeh et al. 2021 (DSelect-k), sections 2 and 3, equations 3 to 6. Losses are means over tokens.
    """

    chooses: ClassVar[str] = "tokens"
    source: ClassVar[str] = "Hazimeh et al. 2021"

    codes: Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        top_k: int = 2,
        per_example: bool = True,
        gamma: float = 1.0,
        entropy_loss: float = 0.01,
        reachability_loss: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_experts, **options)
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k {top_k} must be between 1 and num_experts, {num_experts}")
        if gamma <= 0:
            raise ValueError(f"gamma {gamma} must be positive")
        self.top_k = top_k
        self.per_example = per_example
        self.gamma = gamma
        self.num_decisions = math.ceil(math.log2(num_experts))
        self.coefficients["entropy_loss"] = entropy_loss
        power_of_two = num_experts == 2**self.num_decisions
        self.coefficients["reachability_loss"] = 0.0 if power_of_two else reachability_loss
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.bias = nn.Parameter(torch.empty(self.score_width, **place))
        self.weight = nn.Parameter(torch.empty(self.score_width, dim, **place)) if per_example else None
        # The binary digits of each expert's number, the most significant first.
        digits = torch.arange(self.num_decisions - 1, -1, -1, device=device)
        codes = (torch.arange(num_experts, device=device)[:, None] >> digits) & 1
        self.register_buffer("codes", codes.bool(), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the decisions' parameters uniformly within gamma / 100 of zero, the mixture's within 0.05."""
        selectors = self.top_k * self.num_decisions
        for parameter in self.parameters():
            nn.init.uniform_(parameter[:selectors], -self.gamma / 100, self.gamma / 100)
            nn.init.uniform_(parameter[selectors:], -0.05, 0.05)

    @property
    def score_width(self) -> int:
        """k (m + 1): the decisions of each selector and its mixture logit."""
        return self.top_k * (self.num_decisions + 1)

    def score(self, x: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        """The decisions' and mixture logits (T, k (m + 1)) of x (T, d), in at least float32."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        bias = self.bias.to(dtype)
        if self.weight is None:
            return bias.expand(x.shape[0], -1)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(dtype), self.weight.to(dtype), bias)

    def selectors(self, logits: Tensor) -> Tensor:
        """r(z) (T, k, E): the weight that each selector gives each expert; at most 1 in all, 1 for E a power of two."""
        decisions = logits[:, : self.top_k * self.num_decisions].unflatten(-1, (self.top_k, self.num_decisions))
        step = smooth_step(decisions, self.gamma)[:, :, None]
        return torch.where(self.codes, step, 1 - step).prod(-1)

    def probs(self, logits: Tensor) -> Tensor:
        """The mixture of the selectors (T, E)."""
        mixture = logits[:, -self.top_k :].softmax(-1)
        return (mixture[..., None] * self.selectors(logits)).sum(1)

    def choose(self, logits: Tensor, context: Context) -> Routing:
        """Every expert whose weight is not exactly zero."""
        weight = self.probs(logits)
        return Routing.from_dense(weight, mask=weight > 0, check=False)

    def loss_terms(self, logits: Tensor, routing: Routing, context: Context) -> dict[str, Callable[[], Tensor]]:
        """The selectors' entropies, their weight on experts that exist, and the losses of `Router`."""
        selectors = self.selectors(logits)

        def reachability() -> Tensor:
            there = selectors.sum(-1)
            reciprocal = 1 / there.clamp_min(_LEAST) + (_LEAST - there).clamp_min(0) / _LEAST**2
            return losses.mean_over_tokens(reciprocal.sum(-1), context.mask)

        return {
            **super().loss_terms(logits, routing, context),
            "entropy_loss": lambda: losses.mean_over_tokens(losses.entropy(selectors).sum(-1), context.mask),
            "reachability_loss": reachability,
        }

    def extra_repr(self) -> str:
        """d, E, k and whether the gate reads the token, for `print(model)`."""
        return f"dim={self.dim}, num_experts={self.num_experts}, top_k={self.top_k}, per_example={self.per_example}"


def smooth_step(t: Tensor, gamma: float = 1.0) -> Tensor:
    """0 up to -gamma / 2, 1 from gamma / 2 on, and the cubic that joins them smoothly between.

    Source: Hazimeh et al. 2021, equation 4.
    """
    t = t.clamp(-gamma / 2, gamma / 2)
    return -2 / gamma**3 * t**3 + 3 / (2 * gamma) * t + 0.5
