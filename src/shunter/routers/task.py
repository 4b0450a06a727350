"""Experts by task or by sentence: one decision for all tokens of a task id, or of a sequence."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..context import NO_CONTEXT, Context
from .topk import TopK

__all__ = ["Sentence", "Task"]


class Task(TopK):
    """Task-level routing: the router reads a learned embedding of the task, so a task has the same experts always.

    A deployed model needs the experts of its own task alone (`experts_of`).

    Args:
        num_tasks: how many tasks there are; `task` ids are 0 to num_tasks - 1 (in translation the target language).
        **options: of `TopK`, `LinearRouter` and `Router`; top-2 without a capacity, which would drop whole tasks.

    Raises:
        ValueError: where num_tasks is missing, or a task id is out of range.

    Source: Kudugunta et al. 2021 (Beyond Distillation: Task-level Mixture-of-Experts), section 3.
    """

    source: ClassVar[str] = "Kudugunta et al. 2021"
    example_options: ClassVar[dict[str, Any]] = {"num_tasks": 4}
    needs: ClassVar[tuple[str, ...]] = ("task",)

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        num_tasks: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_experts, device=device, dtype=dtype, **options)
        if num_tasks is None or num_tasks < 1:
            raise ValueError(f"task routing needs num_tasks=, the number of tasks; got {num_tasks}")
        self.num_tasks = num_tasks
        self.embedding = nn.Parameter(torch.randn(num_tasks, dim, device=device, dtype=dtype))

    def score(self, x: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        """The logits (T, E) of each token's task, in at least float32."""
        task = self.require(context, "task", self.num_tasks)
        dtype = torch.promote_types(x.dtype, torch.float32)
        return super().score(self.embedding.to(dtype), context)[task]

    @torch.no_grad()
    def experts_of(self, task: int) -> list[int]:
        """The experts of a task, in order."""
        context = Context(task=torch.tensor([task], device=self.embedding.device))
        index = self.choose(self.score(self.embedding[:1], context), context).expert
        return sorted(index.tolist())


class Sentence(TopK):
    """Sentence-level routing: the router reads the mean hidden state of the token's sequence, real tokens alone.

    Args:
        **options: of `TopK`, `LinearRouter` and `Router`; top-2 without a capacity, which would cut sentences.

    Source: Kudugunta et al. 2021 (Beyond Distillation: Task-level Mixture-of-Experts), section 3.
    """

    source: ClassVar[str] = "Kudugunta et al. 2021"
    needs: ClassVar[tuple[str, ...]] = ("sequence",)

    def score(self, x: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        """The logits (T, E) of the mean of each token's sequence, in at least float32."""
        numbers, sequence = self.require(context, "sequence").unique(return_inverse=True)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        real = x.new_ones(x.shape[0]) if context.mask is None else context.mask.to(x.dtype)
        if context.mask is not None:
            x = torch.where(context.mask[:, None], x, 0)
        total = x.new_zeros(numbers.numel(), x.shape[1]).index_add(0, sequence, x)
        size = real.new_zeros(numbers.numel()).index_add(0, sequence, real)
        return super().score(total / size.clamp_min(1)[:, None], context)[sequence]

    @property
    def leak(self) -> str:
        """Always: the mean is over the whole sequence."""
        return "sentence routing reads the mean of the whole sequence, later tokens included"
