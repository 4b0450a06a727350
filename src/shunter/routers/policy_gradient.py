"""Learned by reward: what every router has that is a stochastic policy, trained by REINFORCE (Williams 1992).

A forward leaves a `Decision` on its layer; when the reward is known, `shunter.give_reward` turns it into losses.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from .. import losses
from ..context import NO_CONTEXT, Context
from ..routing import Routing
from .linear import LinearRouter

__all__ = ["Baseline", "Decision", "PolicyRouter", "taken"]

Baseline = Literal["head", "parameter", "none"]


@dataclass(frozen=True)
class Decision:
    """What a policy decided in one training forward, inside the autograd graph, until its reward is known.

    Args:
        x: (T, d) hidden states that the router saw.
        logits: (T, E) scores of the policy.
        routing: the actions; what capacity dropped was an action too.
        context: what was known of the tokens.
    """

    x: Tensor
    logits: Tensor
    routing: Routing
    context: Context

    @property
    def shape(self) -> torch.Size:
        """The leading sizes of the layer's input, whose product is T."""
        return self.x.shape[:1] if self.context.shape is None else self.context.shape


@dataclass(frozen=True, eq=False)
class Actions(Routing):
    """The routing of a policy, with the baseline b (T,) of the tokens' rewards; None where there is none.

    A router's weights may be elsewhere once its forward is over (offloaded, sharded), so the forward computes it.
    """

    baseline: Tensor | None = None

    def detach(self) -> Routing:
        """As of any routing; the baseline is for the reward of this forward alone."""
        outside = super().detach()
        assert isinstance(outside, Actions)
        return replace(outside, baseline=None)


class PolicyRouter(LinearRouter):
    """A router whose choice is an action of a policy pi(. | x), and which learns from the reward of that action.

    The outputs of the experts are not scaled: every weight is exactly 1, and no gradient of the model's loss reaches
    the policy. What trains it is sum_t -log pi(a_t | x_t) (r_t - b_t) / T, whose gradient is in the mean that of the
    expected loss, where r_t is minus the loss of token t and b_t a baseline that depends on no action.

    Args:
        baseline: b: "head" (linear in the hidden state, through which no gradient goes), "parameter" (one number) or
            "none".
        policy_loss: coefficient of the REINFORCE loss.
        baseline_loss: coefficient of the mean squared error (r - b)^2, which trains the baseline.
        entropy_bonus: coefficient of the policy's mean entropy in nats, which is subtracted from the loss.
        **options: of `LinearRouter` and `Router`.

    Raises:
        ValueError: for an unknown baseline.
    """

    chooses: ClassVar[str] = "tokens"
    learns_by_reward: ClassVar[bool] = True

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        baseline: Baseline = "head",
        policy_loss: float = 1.0,
        baseline_loss: float = 1.0,
        entropy_bonus: float = 0.01,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_experts, device=device, dtype=dtype, **options)
        if baseline not in get_args(Baseline):
            raise ValueError(f"baseline {baseline!r} is unknown; choose from {', '.join(get_args(Baseline))}")
        self.baseline = baseline
        self.coefficients["entropy_bonus"] = entropy_bonus
        self.reward_coefficients = {"policy_loss": policy_loss, "baseline_loss": baseline_loss}
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.value_bias = None if baseline == "none" else nn.Parameter(torch.zeros(1, **place))
        self.value_weight = nn.Parameter(torch.zeros(dim, **place)) if baseline == "head" else None

    def forward(self, x: Tensor, context: Context = NO_CONTEXT) -> tuple[Tensor, Routing]:
        """The logits and the actions, in training with the baseline of their rewards."""
        logits, routing = super().forward(x, context)
        if not self.training or self.baseline == "none":
            return logits, routing
        decided = {field.name: getattr(routing, field.name) for field in fields(Routing)}
        return logits, Actions(**decided | {"check": False}, baseline=self.value(context.real(x)))

    def log_prob(self, logits: Tensor, routing: Routing) -> Tensor:
        """log pi (T,) of the actions of a routing, under logits (T, E)."""
        raise NotImplementedError

    def entropy(self, logits: Tensor) -> Tensor:
        """The entropy (T,) of the policy in nats."""
        raise NotImplementedError

    def value(self, x: Tensor) -> Tensor:
        """The baseline b (T,) of hidden states x (T, d), in at least float32; zeros without one."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        value = x.new_zeros(x.shape[0], dtype=dtype)
        with torch.autocast(x.device.type, enabled=False):
            if self.value_weight is not None:
                value = value + x.detach().to(dtype) @ self.value_weight.to(dtype)
            return value if self.value_bias is None else value + self.value_bias.to(dtype)

    def action_reward(self, decision: Decision, decisions: int) -> Tensor | None:
        """What the actions themselves earn (T,), besides the reward of the outcome; None for nothing.

        Args:
            decision: this layer's.
            decisions: how many layers decided about these tokens.
        """
        return None

    def reward_losses(self, decision: Decision, reward: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """The weighted losses by name that a reward (T,) makes of a decision.

        Args:
            decision: of the last training forward.
            reward: (T,), without gradient.
            mask: (T,) bool, True at tokens that were rewarded.

        Source: Williams 1992 (Simple statistical gradient-following algorithms), theorem 1.
        """
        reward = reward.detach().to(decision.logits.dtype)
        value = getattr(decision.routing, "baseline", None)
        value = self.value(decision.x) if value is None else value
        log_prob = self.log_prob(decision.logits, decision.routing)
        terms = {"policy_loss": -log_prob * (reward - value.detach())}
        if self.baseline != "none":
            terms["baseline_loss"] = (reward - value).square()
        return {
            name: self.reward_coefficients[name] * losses.mean_over_tokens(term, mask)
            for name, term in terms.items()
            if self.reward_coefficients[name]
        }

    def loss_terms(self, logits: Tensor, routing: Routing, context: Context) -> dict[str, Any]:
        """The entropy, which a positive coefficient raises, and the losses of `Router`."""
        return {
            **super().loss_terms(logits, routing, context),
            "entropy_bonus": lambda: -losses.mean_over_tokens(self.entropy(logits), context.mask),
        }


def taken(routing: Routing) -> Tensor:
    """(T, E) bool: which experts each token asked for, those that capacity dropped included."""
    matrix = torch.zeros(routing.num_tokens, routing.num_experts, dtype=torch.bool, device=routing.token.device)
    for part in (routing, routing.dropped):
        if part is not None:
            matrix[part.token, part.expert] = True
    return matrix
