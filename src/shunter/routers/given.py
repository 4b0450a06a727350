"""Fixed: the experts that the caller names for each token, or the next ones round robin."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ..context import Context
from ..routing import Routing
from .fixed import Unlearned

__all__ = ["Forced", "Uniform"]


class Forced(Unlearned):
    """Each token takes the experts that the caller names, with equal weights that sum to 1.

    The `experts` of the context (T, k) are int64, -1 for none. To keep a router's own weights pass `experts=` to a
    layer with a top-k router instead.

    Source: none; a tool for tests, for measurements, and for labels known in advance.
    """

    in_review: ClassVar[bool] = False
    needs: ClassVar[tuple[str, ...]] = ("experts",)
    replays: ClassVar[bool] = True
    source: ClassVar[str] = "the caller"

    def choose(self, logits: Tensor, context: Context) -> Routing:
        """The named experts."""
        index, keep = context.forced(self.num_experts)
        share = keep / keep.sum(-1, keepdim=True).clamp_min(1)
        return Routing.from_topk(index, share.to(logits.dtype), self.num_experts, keep=keep, check=False)


class Uniform(Unlearned):
    """Token t takes experts t k to t k + k - 1, modulo E: perfectly balanced whatever the tokens are.

    Args:
        top_k: k.
        **options: of `Router`.

    Raises:
        ValueError: for top_k outside of 1 to E.

    Source: none; the reference point for the cost of imbalance.
    """

    in_review: ClassVar[bool] = False
    source: ClassVar[str] = "round robin"

    def __init__(self, dim: int, num_experts: int, *, top_k: int = 1, **options: Any) -> None:
        super().__init__(dim, num_experts, **options)
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k {top_k} must be between 1 and num_experts, {num_experts}")
        self.top_k = top_k

    def choose(self, logits: Tensor, context: Context) -> Routing:
        """The next k experts for each real token."""
        number = torch.arange(logits.shape[0], device=logits.device)
        if context.mask is not None:
            number = context.mask.cumsum(0) - 1
        index = (number[:, None] * self.top_k + torch.arange(self.top_k, device=logits.device)) % self.num_experts
        weight = logits.new_full(index.shape, 1 / self.top_k)
        return Routing.from_topk(index, weight, self.num_experts, check=False)
