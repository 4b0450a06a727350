"""All experts: every token takes every expert, weighted by a softmax, at the cost of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import mul
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..context import NO_CONTEXT, Context
from ..ranks import sum_over_ranks
from ..routing import Routing
from .linear import LinearRouter

__all__ = ["HME", "MMoE", "Soft"]


class Soft(LinearRouter):
    """The mixture of experts before sparsity: all experts compute every token, y = sum_i softmax(h)_i f_i(x).

    Args:
        margin: in training, an expert whose gates add up to more than the mean of all experts' plus this, in tokens,
            gets the gate 0 until the others have caught up; the other gates are renormalised (Eigen et al., section
            3.1). The sums advance in `update`. None sets no limit: for Eigen's second phase of training, set
            `router.margin = None`.
        **options: of `LinearRouter` and `Router`, without a capacity.

    Raises:
        ValueError: for a capacity, or a margin below 0.

    Source: Jacobs et al. 1991 (Adaptive Mixtures of Local Experts), equation 1; stacked: Eigen et al. 2013 (Learning
    Factored Representations in a Deep Mixture of Experts), section 3.
    """

    chooses: ClassVar[str] = "all"
    source: ClassVar[str] = "Jacobs et al. 1991"

    total: Tensor
    observed: Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        margin: float | None = None,
        capacity_factor: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        if capacity_factor:
            raise ValueError(
                f"{type(self).__name__}: capacity_factor {capacity_factor} would drop tokens that every expert takes; "
                "leave it out, or choose topk"
            )
        if margin is not None and margin < 0:
            raise ValueError(f"margin {margin} must be at least 0 tokens, or None for no limit")
        super().__init__(dim, num_experts, device=device, dtype=dtype, **options)
        self.top_k = num_experts
        self.margin = margin
        state = torch.zeros(num_experts, dtype=torch.float32, device=device)
        self.register_buffer("total", state)
        self.register_buffer("observed", state.clone(), persistent=False)

    def probs(self, logits: Tensor) -> Tensor:
        """The gates: the softmax, in training over the experts within the margin."""
        if self.margin is not None and self.training:
            logits = logits.masked_fill(self.total - self.total.mean() > self.margin, -torch.inf)
        return logits.softmax(-1)

    def choose(self, logits: Tensor, context: Context) -> Routing:
        """Every expert of every token, by its gate."""
        gates = self.probs(logits)
        return Routing.from_dense(gates, mask=torch.ones_like(gates, dtype=torch.bool), check=False)

    def observe(self, logits: Tensor, routing: Routing, context: Context = NO_CONTEXT) -> None:
        """Add up the gates of each expert for the next `update`."""
        self.observed.index_add_(0, routing.expert, routing.weight.detach().to(self.observed.dtype))

    def update(self) -> None:
        """Take the gates since the last update, of all ranks, into the sums that the margin compares."""
        sum_over_ranks(self.observed, group=self.process_group)
        self.total += self.observed
        self.observed.zero_()


class HME(Soft):
    """Hierarchical mixture of experts: a tree of softmaxes whose leaves are the experts.

    The gate of an expert is the product of the branches on its path; its logarithm is the expert's logit.
    `shunter.mixtures` fits such a tree over linear experts by expectation maximisation.

    Args:
        branching: how many branches the nodes have, from the root down: their product is E. One number gives every
            node as many: E is then a power of it.
        **options: of `Soft`, `LinearRouter` and `Router`.

    Raises:
        ValueError: where branching does not give E leaves.

    Source: Jordan and Jacobs 1994 (Hierarchical Mixtures of Experts and the EM Algorithm), section 2.
    """

    source: ClassVar[str] = "Jordan & Jacobs 1994"

    def __init__(self, dim: int, num_experts: int, *, branching: int | Sequence[int] = 2, **options: Any) -> None:
        self.widths = _widths(num_experts, branching)
        super().__init__(dim, num_experts, **options)

    @property
    def num_rows(self) -> int:
        """The branches of all nodes."""
        return sum(self.widths)

    def score(self, x: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        """The logarithm (T, E) of the product of the branches' softmaxes, in at least float32."""
        branches = super().score(x, context)
        gate = branches.new_zeros(x.shape[0], 1)
        for level in branches.split(self.widths, dim=-1):
            within = level.unflatten(-1, (gate.shape[-1], -1)).log_softmax(-1)
            gate = (gate[..., None] + within).flatten(1)
        return gate


def _widths(num_experts: int, branching: int | Sequence[int]) -> list[int]:
    """How many branches each level of the tree has in all, from the root down."""
    given = [branching] if isinstance(branching, int) else list(branching)
    widths = list(accumulate(given, mul))
    while isinstance(branching, int) and branching > 1 and widths[-1] < num_experts:
        widths.append(widths[-1] * branching)
    if not given or min(given) < 1 or widths[-1] != num_experts:
        raise ValueError(
            f"hme: branching {branching} gives no tree with {num_experts} leaves; give as many numbers as the tree has "
            "levels, whose product is num_experts"
        )
    return widths


class MMoE(Soft):
    """Multi-gate mixture of experts: experts shared by all tasks, a softmax gate for each task.

    The gate is that of the token's task. For the outputs of several tasks call the layer once for each, with `task=`.

    Args:
        num_tasks: how many tasks, and gates, there are; `task` ids are 0 to num_tasks - 1.
        **options: of `Soft`, `LinearRouter` and `Router`.

    Raises:
        ValueError: where num_tasks is missing, or a task id is out of range.

    Source: Ma et al. 2018 (Modeling Task Relationships in Multi-task Learning with Multi-gate Mixture-of-Experts),
    equations 6 and 7.
    """

    source: ClassVar[str] = "Ma et al. 2018"
    example_options: ClassVar[dict[str, Any]] = {"num_tasks": 4}
    needs: ClassVar[tuple[str, ...]] = ("task",)

    def __init__(self, dim: int, num_experts: int, *, num_tasks: int | None = None, **options: Any) -> None:
        if num_tasks is None or num_tasks < 1:
            raise ValueError(f"mmoe needs num_tasks=, the number of tasks; got {num_tasks}")
        self.num_tasks = num_tasks
        super().__init__(dim, num_experts, **options)

    @property
    def num_rows(self) -> int:
        """E for each task."""
        return self.num_tasks * self.num_experts

    def score(self, x: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        """The logits (T, E) of each token's own gate, in at least float32."""
        task = self.require(context, "task", self.num_tasks)
        gates = super().score(x, context).unflatten(-1, (self.num_tasks, self.num_experts))
        return gates[torch.arange(x.shape[0], device=x.device), task]
