"""After the review: tokens choose, each as many experts as it needs."""

from __future__ import annotations

from collections.abc import Callable
from statistics import NormalDist
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import losses
from ..context import NO_CONTEXT, Context
from ..ranks import sum_over_ranks
from ..routing import Routing
from .linear import LinearRouter

__all__ = ["ReLU", "TopP"]


class _Variable(LinearRouter):
    """A router whose tokens take different numbers of experts; it counts them for the cost."""

    chooses: ClassVar[str] = "tokens"
    in_review: ClassVar[bool] = False

    uses: Tensor
    mean_experts: Tensor

    def __init__(self, dim: int, num_experts: int, *, device: torch.device | str | None = None, **options: Any) -> None:
        super().__init__(dim, num_experts, device=device, **options)
        # Tokens, and experts that they used, since the last update.
        self.register_buffer("uses", torch.zeros(2, dtype=torch.float32, device=device))
        self.register_buffer("mean_experts", torch.tensor(float(num_experts), dtype=torch.float32, device=device))

    def observe(self, logits: Tensor, routing: Routing, context: Context = NO_CONTEXT) -> None:
        """Add up tokens and the experts they used."""
        self.uses[0] += context.num_real(routing.num_tokens)
        self.uses[1] += routing.demand.sum()

    def update(self) -> None:
        """Take the mean number of experts over all ranks since the last update."""
        sum_over_ranks(self.uses, group=self.process_group)
        if self.uses[0] > 0:
            self.mean_experts.copy_(self.uses[1] / self.uses[0])
            self.advance()
        self.uses.zero_()

    def advance(self) -> None:
        """Move what depends on `mean_experts`, after a step in which any rank saw a token."""

    @property
    def experts_per_token(self) -> float:
        """The mean over the tokens of the last step; before the first what the router aims at, or begins with."""
        return float(self.mean_experts)


class TopP(_Variable):
    """Top-p routing: the fewest experts whose probabilities add up to p; unsure tokens take more.

    Weights are the probabilities, not renormalised. The entropy loss keeps the router from spreading.

    Args:
        threshold: p.
        max_experts: the most experts of a token; None sets no limit.
        entropy_loss: coefficient of the mean entropy of the rows; the paper's 1e-4.
        load_balancing_loss: of `Router`; the paper's 0.01.
        **options: of `LinearRouter` and `Router`.

    Raises:
        ValueError: for a threshold outside of (0, 1], and for max_experts outside of 1 to E.

    Source: Huang et al. 2024 (Harder Tasks Need More Experts), section 3.1, equations 4 to 7.
    """

    source: ClassVar[str] = "Huang et al. 2024"

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        threshold: float = 0.4,
        max_experts: int | None = None,
        entropy_loss: float = 1e-4,
        load_balancing_loss: float = 0.01,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_experts, load_balancing_loss=load_balancing_loss, **options)
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold {threshold} must be in (0, 1]")
        if max_experts is not None and not 1 <= max_experts <= num_experts:
            raise ValueError(f"max_experts {max_experts} must be between 1 and num_experts, {num_experts}")
        self.threshold = threshold
        self.max_experts = max_experts
        self.coefficients["entropy_loss"] = entropy_loss
        self.mean_experts.fill_(self._expected())

    def _expected(self) -> float:
        """How many experts a token takes by the initial weights, if its numbers have a mean square of 1.

        Its logits are then normal with standard deviation s = 0.88 sqrt(init_scale), 0.88 being what the cut of the
        initial weights leaves, and the share p of such probabilities is in their largest 1 - Phi(Phi^-1(1 - p) + s).
        """
        most = float(self.max_experts or self.num_experts)
        if self.threshold == 1:
            return most
        normal, spread = NormalDist(), 0.88 * self.init_scale**0.5 * self.logit_scale
        share = 1 - normal.cdf(normal.inv_cdf(1 - self.threshold) + spread)
        return min(max(share * self.num_experts + 0.5, 1.0), most)  # 0.5: a token takes a whole number, rounded up

    def choose(self, logits: Tensor, context: Context) -> Routing:
        """The best experts of each row until their probabilities reach the threshold; at least one."""
        probs = logits.softmax(-1)
        ranked, index = probs.detach().sort(dim=-1, descending=True, stable=True)
        before = ranked.cumsum(-1) - ranked
        keep = before < self.threshold
        keep[:, 0] = True
        if self.max_experts is not None:
            keep[:, self.max_experts :] = False
        return Routing.from_topk(index, probs.gather(1, index), self.num_experts, keep=keep, check=False)

    def loss_terms(self, logits: Tensor, routing: Routing, context: Context) -> dict[str, Callable[[], Tensor]]:
        """The entropy of the rows, and the losses of `Router`."""
        return {
            **super().loss_terms(logits, routing, context),
            "entropy_loss": lambda: losses.local_entropy_loss(logits.softmax(-1), context.mask),
        }


class ReLU(_Variable):
    """ReMoE routing: the weights are relu(h), differentiable everywhere; an L1 loss keeps most of them at zero.

    The coefficient of the loss moves after every step so that tokens take `target_experts` experts on average: it is
    multiplied by `growth` where they took more, divided where fewer. In the loss an expert's weights count in
    proportion to its load, which balances the experts.

    Args:
        target_experts: k, the mean number of experts of a token to reach.
        sparsity_loss: the coefficient at first; the paper's 1e-8.
        growth: what the coefficient is multiplied or divided by; the paper's 1.2.
        balance: whether the loss weighs experts by their load.
        **options: of `LinearRouter` and `Router`.

    Raises:
        ValueError: for target_experts outside of (0, E], sparsity_loss of at most 0, growth of at most 1.

    Source: Wang et al. 2024 (ReMoE: Fully Differentiable Mixture-of-Experts with ReLU Routing), section 3, equations
    6 to 10.
    """

    source: ClassVar[str] = "Wang et al. 2024"

    coefficient: Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        target_experts: float = 1.0,
        sparsity_loss: float = 1e-8,
        growth: float = 1.2,
        balance: bool = True,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_experts, device=device, **options)
        if not 0 < target_experts <= num_experts:
            raise ValueError(f"target_experts {target_experts} must be positive and at most num_experts, {num_experts}")
        if sparsity_loss <= 0 or growth <= 1:
            raise ValueError(f"sparsity_loss {sparsity_loss} must be positive and growth {growth} above 1")
        self.target_experts = target_experts
        self.growth = growth
        self.balance = balance
        self.coefficients["sparsity_loss"] = 1.0  # the loss carries its coefficient, which is state
        self.register_buffer("coefficient", torch.tensor(sparsity_loss, dtype=torch.float32, device=device))
        self.mean_experts.fill_(target_experts)

    def probs(self, logits: Tensor) -> Tensor:
        """relu(h) divided by its sum; uniform where all are zero."""
        weight = logits.relu()
        total = weight.sum(-1, keepdim=True)
        return torch.where(total > 0, weight / total.clamp_min(torch.finfo(weight.dtype).tiny), 1 / self.num_experts)

    def choose(self, logits: Tensor, context: Context) -> Routing:
        """The experts with positive logits; a token may have none."""
        return Routing.from_dense(logits.relu(), mask=logits > 0, check=False)

    def loss_terms(self, logits: Tensor, routing: Routing, context: Context) -> dict[str, Callable[[], Tensor]]:
        """The L1 loss of the weights, weighed by load, and the losses of `Router`."""

        def sparsity() -> Tensor:
            mean = losses.mean_over_tokens(logits.relu(), context.mask)
            if self.balance:
                tokens = max(context.num_real(logits.shape[0]), 1)
                mean = mean * routing.demand * (self.num_experts / (self.target_experts * tokens))
            return self.coefficient.to(mean.dtype) * mean.sum()

        return {**super().loss_terms(logits, routing, context), "sparsity_loss": sparsity}

    def advance(self) -> None:
        """One step of the coefficient towards the target."""
        self.coefficient *= self.growth ** torch.sign(self.mean_experts - self.target_experts)
