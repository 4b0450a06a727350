"""The combine: expert outputs back to tokens, one weighted sum for each, shared by the backends."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ..routing import Routing

__all__ = ["sum_by_token"]


def sum_by_token(rows: Tensor, routing: Routing, weight: Tensor | None) -> Tensor:
    """The (weighted) sum over each token's rows (N, d) -> (T, d): one pass, in a fixed order, without atomics."""
    order, offsets = routing.by_token
    if rows.numel() == 0:
        return rows.new_zeros(routing.num_tokens, rows.shape[1])
    per_row = None if weight is None else weight.detach()[order].to(rows.dtype)
    return F.embedding_bag(order, rows, offsets, mode="sum", per_sample_weights=per_row, include_last_offset=True)
