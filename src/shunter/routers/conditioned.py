"""Tokens choose by more than their own hidden state: by task, by sentence, by what another network heard."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import losses as losses_room
from ..routing import Routing
from .base import NO_CONTEXT, Context
from .topk import TopK

__all__ = ["Sentence", "Speech", "Task"]


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


class Speech(TopK):
    """SpeechMoE routing: the router reads the hidden state and what an embedding network knows of the frame.

    The embedding network is shared by all layers and trained outside (by CTC in the paper); pass its output as
    `embedding=`. With num_domains the domain (or accent) of the utterance enters too (SpeechMoE2).

    Args:
        embedding_dim: the width of `embedding`.
        num_domains: how many domains or accents; 0 leaves them out. `domain` ids are 0 to num_domains - 1.
        sparsity_loss: coefficient of the sparsity L1 loss; 0.15 as in the reference configuration.
        mean_importance_loss: coefficient of the mean importance loss; 0.15 likewise.
        **options: of `TopK`, `LinearRouter` and `Router`; top-1, weighted by the raw probability.

    Raises:
        ValueError: where embedding_dim is missing, or the embedding has another width.

    Source: You et al. 2021 (SpeechMoE), section 3; You et al. 2022 (SpeechMoE2), section 3.
    """

    source: ClassVar[str] = "You et al. 2021"
    example_options: ClassVar[dict[str, Any]] = {"embedding_dim": 8}
    needs: ClassVar[tuple[str, ...]] = ("embedding",)

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        embedding_dim: int | None = None,
        num_domains: int = 0,
        top_k: int = 1,
        sparsity_loss: float = 0.15,
        mean_importance_loss: float = 0.15,
        load_balancing_loss: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        if embedding_dim is None or embedding_dim < 1:
            raise ValueError(f"speech routing needs embedding_dim=, the width of the embedding; got {embedding_dim}")
        options.update(load_balancing_loss=load_balancing_loss, device=device, dtype=dtype)
        super().__init__(dim, num_experts, top_k=top_k, **options)
        self.embedding_dim = embedding_dim
        self.num_domains = num_domains
        self.coefficients["sparsity_loss"] = sparsity_loss
        self.coefficients["mean_importance_loss"] = mean_importance_loss
        # A linear map of a concatenation is a sum of linear maps; that of a domain's embedding is a row of a table.
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.embedding_weight = nn.Parameter(torch.empty(num_experts, embedding_dim, **place))
        self.domain_logits = nn.Parameter(torch.zeros(num_domains, num_experts, **place)) if num_domains else None
        std = (self.init_scale / (dim + embedding_dim)) ** 0.5
        for weight in (self.weight, self.embedding_weight):
            nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)

    @property
    def required(self) -> tuple[str, ...]:
        """The embedding, and the domain where the router reads it."""
        return ("embedding", "domain") if self.num_domains else self.needs

    def project(self, x: Tensor, context: Context) -> Tensor:
        """The linear map (T, E) of x (T, d), the embedding (T, w) and the domain."""
        embedding = self.require(context, "embedding")
        if embedding.shape != (x.shape[0], self.embedding_dim):
            raise ValueError(
                f"Speech: embedding has shape {tuple(embedding.shape)}; it must be {(x.shape[0], self.embedding_dim)}"
            )
        logits = super().project(x, context)
        logits = logits + F.linear(embedding.to(logits.dtype), self.embedding_weight.to(logits.dtype))
        if self.domain_logits is not None:
            domain = self.require(context, "domain", self.num_domains)
            logits = logits + self.domain_logits.to(logits.dtype)[domain]
        return logits

    def loss_terms(self, logits: Tensor, routing: Routing, context: Context) -> dict[str, Callable[[], Tensor]]:
        """Sparsity, mean importance, and the losses of `Router`."""
        probs = self.probs(logits)
        return {
            **super().loss_terms(logits, routing, context),
            "sparsity_loss": lambda: losses_room.sparsity_loss(probs, context.mask),
            "mean_importance_loss": lambda: losses_room.mean_importance_loss(probs, context.mask),
        }
