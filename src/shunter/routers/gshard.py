"""Tokens choose: GShard's top-2 gating, whose second expert may be left out or drawn at random."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from .. import losses
from ..context import Context
from ..routing import Routing
from .base import largest
from .topk import TopK

__all__ = ["GShard", "gumbel_like"]

SecondPolicy = Literal["all", "random", "sampling"]


class GShard(TopK):
    """GShard routing: the best expert always, a second one by policy, within a capacity for each group of tokens.

    Args:
        second_policy: which second experts a training token uses: "all" (the second best, always), "random" (the
            second best, with probability min(1, g2 / second_threshold), g2 being its share of the two probabilities)
            or "sampling" (one drawn from the softmax over all but the first).
        eval_second_policy: the same in evaluation. "all" keeps evaluation deterministic; the paper makes no difference.
        second_threshold: the share above which "random" always keeps the second expert: the paper's 0.5 ("2 g2 > rnd");
            Mesh TensorFlow uses 0.2.
        capacity_factor, capacity_formula, balance_choices: of `Router`; 2.0, lingvo's rounding, and the first choices
            alone are the paper's.
        **options: of `TopK` (`renormalize`: "before_drop" is the paper's, "after_drop" fairseq's and DeepSpeed's;
            `group_size`), `LinearRouter` and `Router`.

    Raises:
        ValueError: for an unknown policy, a threshold that is not positive, or fewer than two experts.

    Source: Lepikhin et al. 2020 (GShard), section 2.2 and algorithm 1.
    """

    source: ClassVar[str] = "Lepikhin et al. 2020"

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        second_policy: SecondPolicy = "random",
        eval_second_policy: SecondPolicy = "all",
        second_threshold: float = 0.5,
        capacity_factor: float | None = 2.0,
        capacity_formula: str = "gshard",
        balance_choices: losses.Choices = "first",
        **options: Any,
    ) -> None:
        for policy in (second_policy, eval_second_policy):
            if policy not in get_args(SecondPolicy):
                raise ValueError(
                    f"second_policy {policy!r} is unknown; choose from {', '.join(get_args(SecondPolicy))}"
                )
        if second_threshold <= 0:
            raise ValueError(f"second_threshold {second_threshold} must be positive")
        if options.pop("top_k", 2) != 2 or options.pop("score_function", "softmax") != "softmax":
            raise ValueError('gshard takes two experts a token by softmax; for other rules use router="topk"')
        options.update(capacity_factor=capacity_factor, capacity_formula=capacity_formula)
        super().__init__(dim, num_experts, top_k=2, balance_choices=balance_choices, **options)
        self.second_policy = second_policy
        self.eval_second_policy = eval_second_policy
        self.second_threshold = second_threshold

    def choose(self, logits: Tensor, context: Context) -> Routing:
        """The first expert, and the second that the policy of the present mode gives."""
        policy = self.second_policy if self.training else self.eval_second_policy
        if context.experts is not None:
            return self._follow(logits, context)
        if policy == "all":
            return super().choose(logits, context)
        index, keep = self.select(logits), None
        if policy == "sampling":
            drawn = (logits.detach() + gumbel_like(logits)).scatter(1, index[:, :1], -torch.inf)
            index = torch.cat([index[:, :1], largest(drawn, 1)], dim=1)
        else:
            both = logits.detach().gather(1, index).softmax(-1)
            keep = torch.ones_like(index, dtype=torch.bool)
            keep[:, 1] = torch.rand_like(both[:, 1]) * self.second_threshold < both[:, 1]
        return Routing.from_topk(index, self.weigh(logits, index), self.num_experts, keep=keep, check=False)

    def _follow(self, logits: Tensor, context: Context) -> Routing:
        """The forced experts; the first shares the weight with a second that was left out, as by the policies."""
        index, keep = context.forced(self.num_experts)
        if index.shape[1] == 2:
            others = logits.detach().scatter(1, index[:, :1], -torch.inf)
            index = torch.where(keep, index, torch.cat([index[:, :1], largest(others, 1)], dim=1))
        return Routing.from_topk(index, self.weigh(logits, index), self.num_experts, keep=keep, check=False)


def gumbel_like(logits: Tensor) -> Tensor:
    """Standard Gumbel noise in the shape of the logits: the argmax of their sum is a draw from their softmax."""
    return -torch.empty_like(logits).exponential_().log()
