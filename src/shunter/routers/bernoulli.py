"""Learned by reward: every expert of every token is on or off by a coin of its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import losses
from ..context import Context
from ..routing import Routing
from .policy_gradient import Baseline, PolicyRouter, taken

__all__ = ["Bernoulli"]

Evaluation = Literal["sample", "threshold"]


class Bernoulli(PolicyRouter):
    """Conditional computation: each expert of each token is on with probability sigmoid(h), independently.

    A token has any number of experts, none included. Rewards are given as for `reinforce`. Two penalties keep experts
    (L_b) and tokens (L_e) near the activation rate, at which the policy starts; two bonuses for variance (L_v) keep it
    from turning the same experts on for every token, and from being undecided.

    Args:
        activation_rate: tau in (0, 1), the share of experts that should be on. The bias starts at its logit.
        batch_rate_loss: coefficient of L_b, the sum over experts of (mean over tokens of sigmoid(h) - tau)^2.
        token_rate_loss: coefficient of L_e, the mean over tokens of (mean over experts of sigmoid(h) - tau)^2.
        variance_bonus: coefficient of L_v, the sum over experts of the variance over tokens of sigmoid(h), which is
            subtracted from the loss.
        token_variance_bonus: coefficient of the mean over tokens of the variance over experts of sigmoid(h), which is
            subtracted from the loss.
        evaluation: "sample" (draws as in training, which keeps the rate) or "threshold" (on where sigmoid(h) > 1/2:
            deterministic, but nothing is on for a token that is sure of no expert).
        router_bias: of `LinearRouter`; without a bias no linear policy leaves the rate 1/2 for tokens around zero.
        **options: of `PolicyRouter`, `LinearRouter` and `Router`; without a baseline or an entropy bonus.

    Raises:
        ValueError: for a rate outside (0, 1), or an unknown way to evaluate.

    Source: Bengio et al. 2016 (Conditional Computation in Neural Networks for Faster Models), section 3. As in the
    authors' code the penalties are squared, and the variance is taken over experts too, at a tenth; its proportions
    are those of the coefficients, but what it sums over tokens is a mean here, as in the paper.
    """

    source: ClassVar[str] = "Bengio et al. 2016"

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        activation_rate: float = 0.25,
        batch_rate_loss: float = 0.8,
        token_rate_loss: float = 0.0008,
        variance_bonus: float = 0.1,
        token_variance_bonus: float = 0.01,
        evaluation: Evaluation = "sample",
        baseline: Baseline = "none",
        entropy_bonus: float = 0.0,
        router_bias: bool = True,
        **options: Any,
    ) -> None:
        if not 0 < activation_rate < 1:
            raise ValueError(f"activation_rate {activation_rate} must be between 0 and 1")
        if evaluation not in get_args(Evaluation):
            raise ValueError(f"evaluation {evaluation!r} is unknown; choose from {', '.join(get_args(Evaluation))}")
        self.activation_rate = activation_rate
        options.update(baseline=baseline, entropy_bonus=entropy_bonus, router_bias=router_bias)
        super().__init__(dim, num_experts, **options)
        self.evaluation = evaluation
        self.top_k = max(1, round(activation_rate * num_experts))
        self.coefficients["batch_rate_loss"] = batch_rate_loss
        self.coefficients["token_rate_loss"] = token_rate_loss
        self.coefficients["variance_bonus"] = variance_bonus
        self.coefficients["token_variance_bonus"] = token_variance_bonus

    def reset_parameters(self) -> None:
        """Draw the weights (see `init_scale`); the bias is the logit of the activation rate."""
        super().reset_parameters()
        if self.bias is not None:
            nn.init.constant_(self.bias, math.log(self.activation_rate / (1 - self.activation_rate)))

    def probs(self, logits: Tensor) -> Tensor:
        """The shares (T, E) of each token's expected number of experts."""
        on = logits.sigmoid()
        return on / on.sum(-1, keepdim=True).clamp_min(torch.finfo(on.dtype).tiny)

    def choose(self, logits: Tensor, context: Context) -> Routing:
        """A toss for each token and expert; weight 1."""
        on = logits.detach().sigmoid()
        drawn = self.training or self.evaluation == "sample"
        mask = torch.rand_like(on) < on if drawn else on > 0.5
        return Routing.from_dense(torch.ones_like(on), mask=mask, check=False)

    def log_prob(self, logits: Tensor, routing: Routing) -> Tensor:
        """log pi (T,) of each token's set of experts: the sum over all of them, on or off."""
        return F.logsigmoid(torch.where(taken(routing), logits, -logits)).sum(-1)

    def entropy(self, logits: Tensor) -> Tensor:
        """The entropy (T,) of all tosses of a token."""
        return losses.entropy(torch.stack([logits, -logits], -1).sigmoid()).sum(-1)

    def loss_terms(self, logits: Tensor, routing: Routing, context: Context) -> dict[str, Callable[[], Tensor]]:
        """L_b, L_e and both of L_v, and the losses of `PolicyRouter`."""
        on, rate, mask = logits.sigmoid(), self.activation_rate, context.mask
        return {
            **super().loss_terms(logits, routing, context),
            "batch_rate_loss": lambda: (losses.mean_over_tokens(on, mask) - rate).square().sum(),
            "token_rate_loss": lambda: losses.mean_over_tokens((on.mean(-1) - rate).square(), mask),
            "variance_bonus": lambda: -losses.variance_over_tokens(on, mask).sum(),
            "token_variance_bonus": lambda: (
                -losses.mean_over_tokens((on - on.mean(-1, keepdim=True)).square().mean(-1), mask)
            ),
        }

    @property
    def experts_per_token(self) -> float:
        """The number of experts that the penalties hold the policy to: tau E."""
        return self.activation_rate * self.num_experts
