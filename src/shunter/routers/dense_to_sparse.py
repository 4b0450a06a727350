"""Tokens choose, from many experts to one: a gate that training anneals from dense to sparse."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..context import NO_CONTEXT, Context
from ..ranks import sum_over_ranks
from ..routing import Routing
from .gshard import gumbel_like
from .linear import LinearRouter

__all__ = ["DenseToSparse"]


class DenseToSparse(LinearRouter):
    """Dense-to-sparse gate: every expert whose Gumbel-softmax weight exceeds a threshold; the temperature falls.

    At the first temperature a token uses many experts, at the last about one. Evaluation takes the most probable
    expert, weighted by its probability, at every stage of training. `update` moves the temperature by one step, and
    never raises it.

    Args:
        max_temperature, min_temperature: tau at the first step and from step `anneal_steps` on.
        anneal_steps: how many calls of `update` the fall takes; None takes as many as the training has, of which
            `shunter train`, `shunter compare` and `BalanceCallback` in a Trainer tell, and 10,000 where nobody does.
        schedule: "linear" in the step, or "exponential" (a constant ratio between steps).
        threshold: the weight above which an expert is used.
        hard_after: the number of updates after which training too uses the largest weight alone; None never.
        **options: of `LinearRouter` and `Router`; the balance loss is off, as the gate is said to need none.

    Raises:
        ValueError: for impossible temperatures, steps or thresholds.

    Source: Nie et al. 2021 (Dense-to-Sparse Gate for Mixture-of-Experts; EvoMoE), section 4, equations 5 to 8.
    """

    chooses: ClassVar[str] = "tokens"
    source: ClassVar[str] = "Nie et al. 2021"

    temperature: Tensor
    steps: Tensor
    uses: Tensor
    observed: Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        max_temperature: float = 2.0,
        min_temperature: float = 0.3,
        anneal_steps: int | None = None,
        schedule: Literal["linear", "exponential"] = "linear",
        threshold: float = 0.001,
        hard_after: int | None = None,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_experts, device=device, **options)
        if not 0 < min_temperature <= max_temperature:
            raise ValueError(f"min_temperature {min_temperature} must be positive and at most {max_temperature}")
        if anneal_steps is not None and anneal_steps < 1:
            raise ValueError(f"anneal_steps {anneal_steps} must be at least 1, or None for the length of the training")
        if schedule not in ("linear", "exponential"):
            raise ValueError(f"schedule {schedule!r} is unknown; choose from linear, exponential")
        if not 0 <= threshold < 1:
            raise ValueError(f"threshold {threshold} must be in [0, 1)")
        self.max_temperature = max_temperature
        self.min_temperature = min_temperature
        self.anneal_steps = anneal_steps
        self.expected_steps = 10_000
        self.schedule = schedule
        self.threshold = threshold
        self.hard_after = hard_after
        self.register_buffer("temperature", torch.tensor(max_temperature, dtype=torch.float32, device=device))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=device))
        # Tokens and experts used by them in training so far, the cost of the dense phase; and since the last update.
        self.register_buffer("uses", torch.zeros(2, dtype=torch.int64, device=device))
        self.register_buffer("observed", torch.zeros(2, dtype=torch.int64, device=device), persistent=False)

    def choose(self, logits: Tensor, context: Context) -> Routing:
        """The experts above the threshold, at least one; in evaluation the most probable one."""
        noisy = logits
        if self.training:
            noisy = (logits + gumbel_like(logits)) / self.temperature.to(logits.dtype)
        weight = noisy.softmax(-1)
        best = weight.detach().argmax(-1, keepdim=True)
        sparse = not self.training or (self.hard_after is not None and int(self.steps) >= self.hard_after)
        used = torch.zeros_like(weight, dtype=torch.bool) if sparse else weight > self.threshold
        return Routing.from_dense(weight, mask=used.scatter(1, best, True), check=False)

    def observe(self, logits: Tensor, routing: Routing, context: Context = NO_CONTEXT) -> None:
        """Add up tokens and the experts they used."""
        self.observed[0] += context.num_real(routing.num_tokens)
        self.observed[1] += routing.demand.sum()

    def update(self) -> None:
        """One step of the schedule; the tokens of all ranks since the last one enter the cost."""
        sum_over_ranks(self.observed, group=self.process_group)
        self.uses += self.observed
        self.observed.zero_()
        self.steps += 1
        done = min(int(self.steps) / (self.anneal_steps or self.expected_steps), 1.0)
        if self.schedule == "linear":
            scheduled = self.max_temperature + done * (self.min_temperature - self.max_temperature)
        else:
            scheduled = self.max_temperature * (self.min_temperature / self.max_temperature) ** done
        # A model that is trained again, for longer, does not become dense again.
        self.temperature.clamp_(max=scheduled)

    def expect_steps(self, steps: int) -> None:
        """Anneal over the steps of this training, where `anneal_steps` does not say otherwise."""
        self.expected_steps = steps

    @property
    def experts_per_token(self) -> float:
        """In training the mean over all training so far, E before the first token; in evaluation 1."""
        if not self.training:
            return 1.0
        tokens, used = (self.uses + self.observed).tolist()
        return used / tokens if tokens else float(self.num_experts)
