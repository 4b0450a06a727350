"""Tokens choose: each token takes the k experts with the highest score."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from ..context import NO_CONTEXT, Context
from ..ranks import sum_over_ranks
from ..routing import Routing
from . import rules
from .base import largest
from .linear import LinearRouter

__all__ = ["TopK"]

Renormalize = Literal["no", "before_drop", "after_drop"]


class TopK(LinearRouter):
    """Top-k routing with every convention that differs between code bases as an option.

    Args:
        top_k: k, how many experts a token takes.
        score_function: what turns logits into weights: "softmax" (over experts), or, each by itself, "sigmoid" or
            "sqrt_softplus".
        score_after: False scores all experts and then selects; True selects by logits and scores the selected alone
            (a softmax then runs over k).
        renormalize: whether the k weights of a token are divided by their sum: "no" (raw scores: the review's equation
            2, Switch, V-MoE), "before_drop" (GShard, Mixtral: a token that loses a choice keeps less than 1) or
            "after_drop" (DeepSpeed, fairseq: what remains sums to 1). None takes "before_drop" for k > 1, "no" for 1.
        selection_bias: whether a bias (E,), a float32 buffer that no gradient reaches, is added to the scores for the
            selection, not for the weight (Wang et al. 2024, auxiliary-loss-free load balancing).
        bias_update_rate: how much `update` raises the bias of an expert that had less than the mean load since the last
            update, and lowers that of one that had more (Wang et al. 2024, algorithm 1).
        norm_order: p of the p-norm that renormalisation divides by; 1 is the sum.
        norm_eps: what renormalisation adds to that norm.
        norm_min: what renormalisation raises that norm to where it is less.
        scaling_factor: what the weights are multiplied by at last.
        per_expert_scale: whether the weights are multiplied by a learned scale (E,) too, one at first.
        expert_groups: into how many runs of experts the choice is divided; a token chooses within its best
            `top_groups` runs (DeepSeek-V2, section 2.1.2: device-limited routing). 1 does not divide.
        top_groups: how many runs a token may use; None takes all.
        group_score: what ranks the runs: "max", their best expert, or "top2_sum", the sum of their best two.
        outside_score: what the experts outside those runs are ranked by; None forbids them. With 0.0, as in A.X K2, one
            of them is chosen before an expert inside whose score plus selection bias is negative.
        group_size: how many consecutive tokens make a group, which has its own capacity and its own balance,
            importance and load losses (GShard, section 3.2; V-MoE); the last group may be shorter. None takes all
            tokens of the batch as one.
        **options: of `LinearRouter` and `Router`.

    Raises:
        ValueError: where top_k is not in 1..E; where the groups do not fit; where one choice would be renormalised: its
            weight would be the constant 1, and the router would get no gradient.
    """

    chooses: ClassVar[str] = "tokens"
    replays: ClassVar[bool] = True
    source: ClassVar[str] = "Shazeer et al. 2017"

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        top_k: int = 2,
        score_function: rules.ScoreFunction = "softmax",
        score_after: bool = False,
        renormalize: Renormalize | None = None,
        selection_bias: bool = False,
        bias_update_rate: float = 0.001,
        norm_order: float = 1.0,
        norm_eps: float = 0.0,
        norm_min: float = 0.0,
        scaling_factor: float = 1.0,
        per_expert_scale: bool = False,
        expert_groups: int = 1,
        top_groups: int | None = None,
        group_score: rules.GroupScore = "max",
        outside_score: float | None = None,
        group_size: int | None = None,
        load_balancing_loss: float = 0.01,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_experts, load_balancing_loss=load_balancing_loss, **options)
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k {top_k} must be between 1 and num_experts, {num_experts}")
        if score_function not in rules.SCORE_FUNCTIONS:
            raise ValueError(
                f"score_function {score_function!r} is unknown; choose {' or '.join(rules.SCORE_FUNCTIONS)}"
            )
        if renormalize is None:
            renormalize = "no" if top_k == 1 else "before_drop"
        if renormalize not in get_args(Renormalize):
            raise ValueError(f"renormalize {renormalize!r} is unknown; choose from {', '.join(get_args(Renormalize))}")
        if top_k == 1 and (renormalize != "no" or (score_after and score_function == "softmax")):
            raise ValueError(
                "with top_k=1 a weight that is normalised over the selected experts is always 1, and the router gets "
                'no gradient; use renormalize="no" and score_after=False'
            )
        if group_size is not None and group_size < 1:
            raise ValueError(f"group_size {group_size} must be at least 1, or None for one group")
        if top_groups is None:
            top_groups = expert_groups
        rules.check_groups(num_experts, top_k, expert_groups, top_groups, group_score)
        if norm_order <= 0:
            raise ValueError(f"norm_order {norm_order} must be positive")
        self.top_k = top_k
        self.norm_order, self.norm_eps, self.norm_min = norm_order, norm_eps, norm_min
        self.scaling_factor = scaling_factor
        self.expert_scale: nn.Parameter | None = None
        if per_expert_scale:
            self.expert_scale = nn.Parameter(torch.ones_like(self.weight[:, 0]))
        self.expert_groups, self.top_groups, self.group_score = expert_groups, top_groups, group_score
        self.outside_score = outside_score
        self.group_size = group_size
        self.score_function = score_function
        self.score_after = score_after
        self.renormalize = renormalize
        self.selection_bias: Tensor | None
        bias = torch.zeros(num_experts, device=self.weight.device) if selection_bias else None
        self.register_buffer("selection_bias", bias)
        self.bias_update_rate = bias_update_rate
        self.observed: Tensor | None
        if bias is None:
            self.observed = None  # a plain one: accelerate refuses a buffer without a value that no file holds
        else:
            self.register_buffer("observed", torch.zeros_like(bias), persistent=False)

    def probs(self, logits: Tensor) -> Tensor:
        """The scores, divided by their sum where they are not a softmax."""
        scores = rules.SCORE_FUNCTIONS[self.score_function](logits)
        if self.score_function == "softmax":
            return scores
        return scores / scores.sum(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)

    def choose(self, logits: Tensor, context: Context) -> Routing:
        """The experts that the context forces, or the top k of each row, with the weights of the rules."""
        keep: Tensor | None
        if context.experts is not None:
            index, keep = context.forced(self.num_experts)
            if bool(keep.all()):
                keep = None
        else:
            index, keep = self.select(logits), None
        return Routing.from_topk(index, self.weigh(logits, index, keep), self.num_experts, keep=keep, check=False)

    def select(self, logits: Tensor) -> Tensor:
        """The experts (T, k) of each row, best first, of what `rank` makes of the logits."""
        return largest(self.rank(logits), self.top_k)

    def rank(self, logits: Tensor) -> Tensor:
        """What the choice goes by (T, E): the scores plus the selection bias, outside_score outside the best groups."""
        ranked = logits.detach()
        if not self.score_after:
            ranked = rules.SCORE_FUNCTIONS[self.score_function](ranked)
        if self.selection_bias is not None:
            ranked = ranked + self.selection_bias
        if self.top_groups < self.expert_groups:
            ranked = rules.limit_to_groups(
                ranked, self.expert_groups, self.top_groups, self.group_score, self.outside_score
            )
        return ranked

    def weigh(self, logits: Tensor, index: Tensor, keep: Tensor | None = None) -> Tensor:
        """The weights (T, k) of the experts index (T, k), of which keep (T, k) says which there are."""
        score = rules.SCORE_FUNCTIONS[self.score_function]
        weight = (logits if self.score_after else score(logits)).gather(-1, index)
        if keep is not None:
            weight = weight.masked_fill(~keep, torch.finfo(weight.dtype).min if self.score_after else 0.0)
        if self.score_after:
            weight = score(weight)
        if self.renormalize == "after_drop":
            return weight
        if self.renormalize == "before_drop":
            norm = torch.linalg.vector_norm(weight, self.norm_order, dim=-1, keepdim=True)
            weight = weight / self._divisor(norm)
        return self._scale(weight, index)

    def _divisor(self, norm: Tensor) -> Tensor:
        return (norm + self.norm_eps).clamp_min(max(self.norm_min, torch.finfo(norm.dtype).tiny))

    def _scale(self, weight: Tensor, expert: Tensor) -> Tensor:
        if self.scaling_factor != 1:
            weight = weight * self.scaling_factor
        return weight if self.expert_scale is None else weight * self.expert_scale.to(weight.dtype)[expert]

    def observe(self, logits: Tensor, routing: Routing, context: Context = NO_CONTEXT) -> None:
        """Add up the load of each expert for the next `update`."""
        if self.observed is not None:
            self.observed += routing.demand

    def update(self) -> None:
        """Move the selection bias towards balance by the load since the last update, summed over ranks."""
        if self.selection_bias is None or self.observed is None:
            return
        sum_over_ranks(self.observed, group=self.process_group)
        self.selection_bias += self.bias_update_rate * (self.observed.mean() - self.observed).sign()
        self.observed.zero_()

    @property
    def advances(self) -> bool:
        """Whether there is a selection bias that moves."""
        return self.selection_bias is not None and self.bias_update_rate > 0

    def limit(self, routing: Routing, logits: Tensor, context: Context) -> Routing:
        """Capacity, then the renormalisation of what remains where asked for."""
        routing = super().limit(routing, logits, context)
        if self.renormalize != "after_drop":
            return routing
        power = routing.weight.abs() ** self.norm_order
        norm = power.new_zeros(routing.num_tokens).index_add(0, routing.token, power) ** (1 / self.norm_order)
        weight = routing.weight / self._divisor(norm)[routing.token]
        return routing.with_weight(self._scale(weight, routing.expert))
