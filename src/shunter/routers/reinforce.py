"""Learned by reward: each token draws one expert from the router's softmax."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import losses
from ..context import Context
from ..routing import Routing
from .base import largest
from .gshard import gumbel_like
from .policy_gradient import PolicyRouter, taken

__all__ = ["Reinforce"]


class Reinforce(PolicyRouter):
    """RL-R: the expert is drawn from softmax(h) in training and is the most probable one in evaluation.

    Give the reward after each training forward, `shunter.give_reward(model, -loss_of_each_token)`; a model of
    `shunter.sparsify` does so itself where it is given labels.

    Args:
        load_balancing_loss: of `Router`; 0.01. The review does not say how RL-R was balanced.
        **options: of `PolicyRouter`, `LinearRouter` and `Router`; dropless unless a capacity is given.

    Source: Clark et al. 2022 (Unified Scaling Laws for Routed Language Models), section 3, RL-R; Fedus et al. 2022,
    section 4.1. The coefficients are this library's own.
    """

    source: ClassVar[str] = "Clark et al. 2022"

    def __init__(self, dim: int, num_experts: int, *, load_balancing_loss: float = 0.01, **options: Any) -> None:
        super().__init__(dim, num_experts, load_balancing_loss=load_balancing_loss, **options)

    def choose(self, logits: Tensor, context: Context) -> Routing:
        """A draw from the softmax of each row, in evaluation its argmax; weight 1."""
        scores = logits.detach()
        index = largest(scores + gumbel_like(scores) if self.training else scores, 1)
        return Routing.from_topk(index, torch.ones_like(scores[:, :1]), self.num_experts, check=False)

    def log_prob(self, logits: Tensor, routing: Routing) -> Tensor:
        """log softmax(h) (T,) at each token's expert; 0 at tokens without one."""
        return logits.log_softmax(-1).masked_fill(~taken(routing), 0).sum(-1)

    def entropy(self, logits: Tensor) -> Tensor:
        """The entropy (T,) of softmax(h)."""
        return losses.entropy(logits.softmax(-1))
