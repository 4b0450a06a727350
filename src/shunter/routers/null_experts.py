"""After the review: tokens choose, and some of what they may choose computes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import capacity
from ..context import NO_CONTEXT, Context
from ..ranks import sum_over_ranks
from ..routing import Routing
from .topk import TopK

__all__ = ["NullExperts"]


class NullExperts(TopK):
    """Top-k among E experts and some that compute nothing: a token decides how many experts it needs.

    The logits are (T, E + Z). A choice among the last Z columns costs nothing; its weight goes to the token's own
    hidden state (an identity expert) or nowhere (a zero expert). Losses and capacity see all E + Z columns; what a
    token costs counts the experts that compute.

    Args:
        top_k: k, how many of the E + Z a token takes.
        num_null: Z.
        identity: whether the weight of null choices multiplies the token's hidden state; else they add nothing.
        **options: of `TopK`, without renormalize="after_drop".

    Raises:
        ValueError: where num_null is less than 1, or renormalize is "after_drop": the null choices would be left out.

    Source: Jin et al. 2024 (MoE++), section 3.1; Meituan 2025 (LongCat-Flash), section 2.1, which scales the choice
    by a softmax over all and does not renormalise.
    """

    in_review: ClassVar[bool] = False
    replays: ClassVar[bool] = False

    uses: Tensor
    mean_experts: Tensor

    source: ClassVar[str] = "Jin et al. 2024"

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        top_k: int = 2,
        num_null: int = 1,
        identity: bool = True,
        **options: Any,
    ) -> None:
        if num_null < 1:
            raise ValueError(f"num_null {num_null} must be at least 1; without null experts use topk")
        if options.get("renormalize") == "after_drop":
            raise ValueError(
                'null_experts: renormalize="after_drop" would leave the null choices out; use "before_drop"'
            )
        shares = options.pop("capacity_shares", None)
        super().__init__(dim, num_experts + num_null, top_k=top_k, **options)
        self.num_experts = num_experts  # the parameters and buffers have a column for each null expert too
        if shares is not None:
            self.share_capacity(shares)
        self.num_null = num_null
        self.identity = identity
        # Tokens, and experts that computed them, since the last update; and their ratio then.
        self.register_buffer("uses", torch.zeros(2, device=self.weight.device), persistent=False)
        even = torch.tensor(top_k * num_experts / self.score_width, device=self.weight.device)
        self.register_buffer("mean_experts", even, persistent=False)

    @property
    def score_width(self) -> int:
        """E + Z."""
        return self.num_experts + self.num_null

    def _wide(self, logits: Tensor) -> Routing:
        """The choices among all E + Z columns."""
        index = self.select(logits)
        return Routing.from_topk(index, self.weigh(logits, index), self.score_width, check=False)

    def choose(self, logits: Tensor, context: Context) -> Routing:
        """The choices among the E experts."""
        index = self.select(logits)
        keep = index < self.num_experts
        return Routing.from_topk(index, self.weigh(logits, index), self.num_experts, keep=keep, check=False)

    def compute(
        self,
        x: Tensor,
        logits: Tensor,
        routing: Routing,
        context: Context,
        experts: Callable[[Tensor, Routing], Tensor],
    ) -> Tensor:
        """The output (T, d) of the experts; where null choices are the identity, x by their weight besides."""
        out = experts(x, routing)
        if not self.identity:
            return out
        index = self.select(logits)
        weight = self.weigh(logits, index).where(index >= self.num_experts, 0.0).sum(-1)
        if context.mask is not None:
            weight = weight.where(context.mask, 0.0)
        return out + weight.to(out.dtype)[:, None] * x

    def loss_terms(self, logits: Tensor, routing: Routing, context: Context) -> dict[str, Callable[[], Tensor]]:
        """The losses of `Router`, over all E + Z columns."""
        wide = self._wide(logits)
        if context.mask is not None:
            wide = wide.masked(context.mask[wide.token])
        return super().loss_terms(logits, wide, context)

    def observe(self, logits: Tensor, routing: Routing, context: Context = NO_CONTEXT) -> None:
        """Add up the load of all E + Z columns for the next `update`."""
        wide = self._wide(logits)
        super().observe(logits, wide if context.mask is None else wide.masked(context.mask[wide.token]), context)
        self.uses[0] += context.num_real(routing.num_tokens)
        self.uses[1] += routing.demand.sum()

    def update(self) -> None:
        """Move the selection bias, and take the mean number of experts over all ranks since the last update."""
        super().update()
        sum_over_ranks(self.uses, group=self.process_group)
        if self.uses[0] > 0:
            self.mean_experts.copy_(self.uses[1] / self.uses[0])
        self.uses.zero_()

    def capacity(self, num_tokens: int) -> int | None:
        """The slots C of one expert for T real tokens, of whose choices each of the E + Z has an even share."""
        factor = self.present_capacity_factor
        if factor is None:
            return None
        return capacity.capacity(num_tokens, self.score_width, self.top_k, factor, self.capacity_formula)

    @property
    def experts_per_token(self) -> float:
        """The mean number of choices that compute something, over the last step; before the first k E / (E + Z)."""
        return float(self.mean_experts)
