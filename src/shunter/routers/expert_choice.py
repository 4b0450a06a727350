"""Experts choose: each expert takes the tokens that score it highest."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..context import Context
from ..routing import Routing
from .base import largest
from .linear import LinearRouter

__all__ = ["ExpertChoice", "capped_plan"]


class ExpertChoice(LinearRouter):
    """Expert choice routing: every expert takes its C best tokens; a token may get several experts or none.

    The weight is the softmax over experts, not renormalised. Perfectly balanced, so there is no balance loss. Tokens
    compete with later tokens: not for causal models.

    With max_experts no token gets more than that many experts, and those it cannot take go to other tokens. The plan is
    a linear program with an entropy term (`capped_plan`), nearly integral; an expert takes its C largest entries, a
    token keeps its max_experts largest. It costs some 20 passes over the scores: 0.2 s for 4096 tokens and 64 experts
    on one CPU core, against 0.01 s without the cap.

    Args:
        capacity_factor, eval_capacity_factor: the mean number of experts a token gets, in training and in evaluation;
            C = ceil(capacity_factor * T / E).
        max_experts: b, the most experts of a token, at least capacity_factor; None sets no limit.
        entropy: the strength of the entropy term of the capped plan, in units of probability.
        **options: of `LinearRouter` and `Router`.

    Raises:
        ValueError: where capacity_factor is None (every expert would take every token), or max_experts below it.

    Source: Zhou et al. 2022 (Mixture-of-Experts with Expert Choice Routing), section 3.2; the cap is section 3.3.
    """

    chooses: ClassVar[str] = "experts"
    source: ClassVar[str] = "Zhou et al. 2022"

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        capacity_factor: float | None = 2.0,
        eval_capacity_factor: float | Literal["dropless"] | None = None,
        max_experts: int | None = None,
        entropy: float = 0.001,
        **options: Any,
    ) -> None:
        evaluated = capacity_factor if eval_capacity_factor is None else eval_capacity_factor
        factors = [0 if factor in (None, "dropless") else float(factor) for factor in (capacity_factor, evaluated)]
        if min(factors) <= 0:
            raise ValueError(
                "expert_choice needs a capacity_factor above 0, in evaluation too: how many tokens each expert takes"
            )
        options.update(capacity_factor=capacity_factor, eval_capacity_factor=eval_capacity_factor)
        super().__init__(dim, num_experts, **options)
        if max_experts is not None and max_experts < max(factors):
            raise ValueError(
                f"expert_choice: max_experts {max_experts} is less than the capacity_factor, the mean number of "
                "experts of a token; raise the one or lower the other"
            )
        if entropy <= 0:
            raise ValueError(f"expert_choice: entropy {entropy} must be positive")
        self.max_experts = max_experts
        self.entropy = entropy

    def choose(self, logits: Tensor, context: Context) -> Routing:
        """The C best real tokens of each column of the softmax over experts, or of the capped plan."""
        scores = logits.softmax(-1)
        real = context.num_real(logits.shape[0])
        slots = self.capacity(real)
        assert slots is not None
        slots = min(slots, real)
        ranked = scores.detach()
        capped = self.max_experts is not None and self.max_experts < self.num_experts
        if capped:
            ranked = self._plan(ranked, slots, context.mask)
        if context.mask is not None:
            ranked = ranked.masked_fill(~context.mask[:, None], -1.0)
        token = largest(ranked.T.contiguous(), slots)
        chosen = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device).scatter(0, token.T, True)
        if capped:
            assert self.max_experts is not None
            chosen &= torch.zeros_like(chosen).scatter(1, largest(ranked, self.max_experts), True)
        return Routing.from_dense(scores, mask=chosen, check=False)

    def _plan(self, scores: Tensor, slots: int, mask: Tensor | None) -> Tensor:
        assert self.max_experts is not None
        # Few tokens cannot fill every slot without breaking the cap.
        real = scores if mask is None else scores[mask]
        slots = min(slots, self.max_experts * real.shape[0] // self.num_experts)
        plan = torch.zeros_like(scores)
        if slots:
            part = capped_plan(real.nan_to_num(0.0), slots, self.max_experts, self.entropy)
            plan[slice(None) if mask is None else mask] = part
        return plan

    def limit(self, routing: Routing, logits: Tensor, context: Context) -> Routing:
        """The routing itself: the choice is already within capacity."""
        return routing

    @property
    def experts_per_token(self) -> float:
        """The capacity factor: E experts take C = capacity_factor * T / E tokens each."""
        factor = self.present_capacity_factor
        assert factor is not None
        return min(factor, float(self.num_experts))

    @property
    def leak(self) -> str:
        """Always: tokens compete for an expert with later tokens."""
        return "expert choice lets later tokens compete with earlier ones for an expert"


@torch.no_grad()
def capped_plan(
    scores: Tensor, slots: int, max_experts: int, entropy: float, iterations: int = 100, tolerance: float = 0.01
) -> Tensor:
    """The A (T, E) in [0, 1] of the largest <A, scores> + entropy * H(A): columns sum to slots, rows to <= max_experts.

    Dykstra's algorithm: Kullback-Leibler projections, in turn, on what the experts ask and on what the tokens allow.
    Each projection is exact with the box [0, 1] included, so that a few rounds do, and A is known by one price for
    each expert and one for each token: A = min(1, exp(scores / entropy - prices)).

    Args:
        scores: (T, E) floating point, finite.
        slots: C in 1..T, with C * E <= max_experts * T.
        max_experts: b in 1..E.
        entropy: positive; the smaller, the closer to the linear program, and the more rounds.
        iterations: the most rounds.
        tolerance: rounds end once every column's sum is within this of slots. Rows are within max_experts always.

    Source: Zhou et al. 2022, section 3.3; Benamou et al. 2015 (Iterative Bregman Projections), section 5.
    """
    profit = scores / entropy
    token_price = torch.zeros_like(profit[:, :1])
    plan = profit
    for _ in range(iterations):
        expert_price = _price((profit - token_price).T.contiguous(), slots).T
        token_price = _price(profit - expert_price, max_experts).clamp_min(0)
        plan = (profit - expert_price - token_price).clamp_max(0).exp()
        if bool(((plan.sum(0) - slots).abs() <= tolerance).all()):
            break
    return plan


def _price(profit: Tensor, total: int) -> Tensor:
    """The price (R, 1) at which each row of profit (R, n) has sum min(1, exp(profit - price)) = total, 1 <= total <= n.

    If the j best entries of a row are cut at 1, the others must add up to total - j, which gives the price; the right j
    is the first whose price indeed leaves the next entry uncut. Sums are relative to the entry of rank `total`, the
    last that can be cut; entries e^60 above it are cut for certain.
    """
    top = profit.topk(total, dim=-1).values
    last = top[:, -1:]
    below = (profit - last).clamp_max(0).exp().sum(-1, keepdim=True) - total
    rest = (top - last).clamp_max(60).exp().flip(-1).cumsum(-1).flip(-1) + below
    price = last + (rest / torch.arange(total, 0, -1, device=profit.device)).log()
    uncut = (top <= price).to(torch.int8).argmax(-1, keepdim=True)
    return price.gather(-1, uncut)
