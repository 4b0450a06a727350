"""The combine: expert outputs back to tokens, one weighted sum for each, shared by the backends."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ..routing import Routing

__all__ = ["sum_by_token"]


def sum_by_token(rows: Tensor, routing: Routing, weight: Tensor | None, place: Tensor | None = None) -> Tensor:
    """The (weighted) sum over each token's rows -> (T, d): one pass, in a fixed order, without atomics.

    Args:
        rows: (N, d), a row for each triple; with `place` (P, d).
        routing: which triples are whose.
        weight: (N,), what to multiply each row by, or None.
        place: (N,) int64, where each triple's row is; None where they are in order.
    """
    order, offsets = routing.by_token
    if rows.numel() == 0:
        return rows.new_zeros(routing.num_tokens, rows.shape[1])
    per_row = None if weight is None else weight.detach()[order].to(rows.dtype)
    where = order if place is None else place[order]
    return F.embedding_bag(where, rows, offsets, mode="sum", per_sample_weights=per_row, include_last_offset=True)
