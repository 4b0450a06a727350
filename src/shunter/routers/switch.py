"""Tokens choose one expert: Switch routing with the policies of its reference implementation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import capacity, losses
from ..context import NO_CONTEXT, Context
from ..routing import Routing
from .base import largest
from .gshard import gumbel_like
from .topk import TopK

__all__ = ["Switch"]

Policy = Literal["argmax", "sample", "input_dropout", "jitter"]


class Switch(TopK):
    """Switch routing: each token takes one expert, weighted by its raw probability, within a capacity.

    The input is cast to float32 inside the router and the weights stay float32 (selective precision).

    The initial scale 0.1 is the router's. The paper's is of the experts' matrices too: `sparsify(init="paper")` and
    `MoE.init_as_in_paper` draw them so, everything else as for any router.

    Args:
        policy: how a training token explores: "jitter" (input times uniform noise), "input_dropout", "sample" (the
            expert is drawn from the softmax) or "argmax" (not at all). Evaluation takes the argmax.
        jitter: of `LinearRouter`, for policy "jitter"; the paper's 0.01.
        input_dropout: the probability of dropping an entry of the router's input, for policy "input_dropout".
        no_token_left_behind: how often a token that found no slot is offered to its next best expert, where slots are
            left (section 7 and appendix B of the paper; its code goes up to the fourth choice: 3).
        capacity_factor: of `Router`; the paper's 1.25.
        eval_capacity_factor: of `Router`; the paper's 2.0.
        capacity_order: of `Router`; "probability" is switch_max: each expert keeps its most probable tokens.
        balance_choices: of `Router`; the first choices, where no_token_left_behind adds others.
        **options: of `TopK`, `LinearRouter` and `Router`; balance loss 0.01 and initial scale 0.1 are the paper's too.

    Raises:
        ValueError: for an unknown policy or impossible values.

    Source: Fedus et al. 2021 (Switch Transformers), sections 2.1 to 2.4, appendix B.
    """

    source: ClassVar[str] = "Fedus et al. 2021"

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        policy: Policy = "jitter",
        jitter: float = 0.01,
        input_dropout: float = 0.1,
        no_token_left_behind: int = 0,
        capacity_factor: float | None = 1.25,
        eval_capacity_factor: float | Literal["dropless"] | None = 2.0,
        balance_choices: losses.Choices = "first",
        **options: Any,
    ) -> None:
        if policy not in get_args(Policy):
            raise ValueError(f"policy {policy!r} is unknown; choose from {', '.join(get_args(Policy))}")
        if not 0 <= input_dropout < 1:
            raise ValueError(f"input_dropout {input_dropout} must be in [0, 1)")
        if not 0 <= no_token_left_behind < num_experts:
            raise ValueError(f"no_token_left_behind {no_token_left_behind} must be between 0 and {num_experts - 1}")
        if options.pop("top_k", 1) != 1:
            raise ValueError('switch sends a token to one expert; for more use router="topk"')
        if options.pop("score_function", "softmax") != "softmax":
            raise ValueError('switch weighs by a softmax; for other scores use router="topk"')
        options.update(capacity_factor=capacity_factor, eval_capacity_factor=eval_capacity_factor)
        jitter = jitter if policy == "jitter" else 0.0
        super().__init__(dim, num_experts, top_k=1, jitter=jitter, balance_choices=balance_choices, **options)
        self.policy = policy
        self.input_dropout = input_dropout
        self.no_token_left_behind = no_token_left_behind

    def score(self, x: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        """The logits (T, E) of x (T, d), in training with the noise on the input that the policy asks for."""
        if self.training and self.policy == "input_dropout":
            x = F.dropout(x.to(torch.promote_types(x.dtype, torch.float32)), self.input_dropout)
        return super().score(x, context)

    def draw_experts(self, up: Tensor, down: Tensor) -> None:
        """Truncated normal, sd sqrt(s / n) for n inputs and the initial scale s (section 2.4)."""
        for weight in (up, down):
            std = (self.init_scale / weight.shape[-1]) ** 0.5
            nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)

    def choose(self, logits: Tensor, context: Context) -> Routing:
        """The argmax of each row, or a draw from its softmax."""
        if not (self.training and self.policy == "sample") or context.experts is not None:
            return super().choose(logits, context)
        index = largest(logits.detach() + gumbel_like(logits), 1)
        return Routing.from_topk(index, logits.softmax(-1).gather(1, index), self.num_experts, check=False)

    def limit(self, routing: Routing, logits: Tensor, context: Context) -> Routing:
        """Capacity; then what was dropped is offered to the next best experts, where slots are left."""
        asked = routing
        routing = super().limit(asked, logits, context)
        if not self.no_token_left_behind or routing.dropped is None:
            return routing
        group = self.groups(logits)
        slots = self.slots(logits, group, context)
        assert slots is not None
        probs = self.probs(logits)
        untried = probs.detach().index_put((asked.token, asked.expert), probs.new_tensor(-1.0))
        following = largest(untried, self.no_token_left_behind)
        waiting = torch.zeros(routing.num_tokens, dtype=torch.bool, device=logits.device)
        waiting[routing.dropped.token] = True
        for rank in range(self.no_token_left_behind):
            index = following[:, rank : rank + 1]
            offer = Routing.from_topk(index, probs.gather(1, index), self.num_experts, keep=waiting, check=False)
            free = slots - _used(routing, group)
            taken = capacity.limit(offer, free, self.capacity_order, self.priority(logits), group)
            waiting[taken.token] = False
            taken = replace(taken, choice=torch.full_like(taken.token, rank + 1), dropped=None)
            routing = routing.merged(taken)
        return routing

    @property
    def leak(self) -> str | None:
        """As `Router`; besides, the slots that a dropped token is offered depend on later tokens."""
        if self.no_token_left_behind and self.present_capacity_factor is not None:
            return "no_token_left_behind gives an earlier token what later ones leave free"
        return super().leak


def _used(routing: Routing, group: Tensor | None) -> Tensor:
    """How many slots are taken, (G, E)."""
    if group is None:
        return routing.counts[None]
    used = torch.zeros(int(group[-1]) + 1, routing.num_experts, dtype=torch.int64, device=group.device)
    one = torch.ones((), dtype=torch.int64, device=group.device)
    return used.index_put((group[routing.token], routing.expert), one, accumulate=True)
