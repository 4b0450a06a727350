"""Tokens choose: each token takes the k experts with the highest score."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from ..routing import Routing
from .base import NO_CONTEXT, Context, LinearRouter, largest

__all__ = ["TopK"]

Renormalize = Literal["no", "before_drop", "after_drop"]


class TopK(LinearRouter):
    """Top-k routing with every convention that differs between code bases as an option.

    Args:
        top_k: k, how many experts a token takes.
        score_function: what turns logits into weights: "softmax" (over experts) or "sigmoid" (each by itself).
        score_after: False scores all experts and then selects; True selects by logits and scores the selected alone
            (a softmax then runs over k).
        renormalize: whether the k weights of a token are divided by their sum: "no" (raw scores: the review's equation
            2, Switch, V-MoE), "before_drop" (GShard, Mixtral: a token that loses a choice keeps less than 1) or
            "after_drop" (DeepSpeed, fairseq: what remains sums to 1). None takes "before_drop" for k > 1, "no" for 1.
        selection_bias: whether a bias (E,), a float32 buffer that no gradient reaches, is added to the scores for the
            selection, not for the weight (Wang et al. 2024, auxiliary-loss-free load balancing).
        bias_update_rate: how much `update` raises the bias of an expert that had less than the mean load since the last
            update, and lowers that of one that had more (Wang et al. 2024, algorithm 1).
        group_size: how many consecutive tokens make a group, which has its own capacity and balance loss (GShard,
            section 3.2); the last group may be shorter. None takes all tokens of the batch as one.
        **options: of `LinearRouter` and `Router`.

    Raises:
        ValueError: where top_k is not in 1..E; where one choice would be renormalised: its weight would be the constant
            1, and the router would get no gradient.
    """

    chooses: ClassVar[str] = "tokens"
    source: ClassVar[str] = "Shazeer et al. 2017"

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        top_k: int = 2,
        score_function: Literal["softmax", "sigmoid"] = "softmax",
        score_after: bool = False,
        renormalize: Renormalize | None = None,
        selection_bias: bool = False,
        bias_update_rate: float = 0.001,
        group_size: int | None = None,
        load_balancing_loss: float = 0.01,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_experts, load_balancing_loss=load_balancing_loss, **options)
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k {top_k} must be between 1 and num_experts, {num_experts}")
        if score_function not in ("softmax", "sigmoid"):
            raise ValueError(f"score_function {score_function!r} is unknown; choose softmax or sigmoid")
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
        self.top_k = top_k
        self.group_size = group_size
        self.score_function = score_function
        self.score_after = score_after
        self.renormalize = renormalize
        self.selection_bias: Tensor | None
        bias = torch.zeros(num_experts, device=self.weight.device) if selection_bias else None
        self.register_buffer("selection_bias", bias)
        self.bias_update_rate = bias_update_rate
        self.observed: Tensor | None
        self.register_buffer("observed", None if bias is None else torch.zeros_like(bias), persistent=False)

    def probs(self, logits: Tensor) -> Tensor:
        """Softmax of the logits, or sigmoids divided by their sum."""
        if self.score_function == "softmax":
            return logits.softmax(-1)
        scores = logits.sigmoid()
        return scores / scores.sum(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)

    def choose(self, logits: Tensor, context: Context) -> Routing:
        """The top k experts of each row, by score plus selection bias."""
        score = torch.sigmoid if self.score_function == "sigmoid" else (lambda h: h.softmax(-1))
        ranked = scores = logits if self.score_after else score(logits)
        if self.selection_bias is not None:
            ranked = scores + self.selection_bias
        index = largest(ranked.detach(), self.top_k)
        weight = scores.gather(-1, index)
        if self.score_after:
            weight = score(weight)
        if self.renormalize == "before_drop":
            weight = weight / weight.sum(-1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)
        return Routing.from_topk(index, weight, self.num_experts, check=False)

    def observe(self, logits: Tensor, routing: Routing, context: Context = NO_CONTEXT) -> None:
        """Add up the load of each expert for the next `update`."""
        if self.observed is not None:
            self.observed += routing.demand

    def update(self) -> None:
        """Move the selection bias towards balance by the load since the last update, summed over ranks."""
        if self.selection_bias is None or self.observed is None:
            return
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.observed)
        self.selection_bias += self.bias_update_rate * (self.observed.mean() - self.observed).sign()
        self.observed.zero_()

    def limit(self, routing: Routing, logits: Tensor, context: Context) -> Routing:
        """Capacity, then the renormalisation of what remains where asked for."""
        routing = super().limit(routing, logits, context)
        if self.renormalize != "after_drop":
            return routing
        total = routing.weight.new_zeros(routing.num_tokens).index_add(0, routing.token, routing.weight)
        tiny = torch.finfo(total.dtype).tiny
        return routing.with_weight(routing.weight / total[routing.token].clamp_min(tiny))
