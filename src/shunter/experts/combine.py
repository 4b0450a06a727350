"""The gather and the combine: tokens to the rows of their experts, and their outputs back to one weighted sum each."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..routing import Routing
from .autograd import gradients_in_graph

__all__ = ["plain_sum", "rows_of", "sum_by_token", "weighted_sum"]


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


def rows_of(x: Tensor, routing: Routing) -> Tensor:
    """The rows (N, d) of x (T, d) that the triples of a routing take, in their order; differentiable."""
    rows: Tensor = _Gather.apply(x, routing)
    return rows


def weighted_sum(y: Tensor, routing: Routing) -> Tensor:
    """The weighted sum (T, d) of each token's rows y (N, d), one for each triple; differentiable."""
    out: Tensor = _Combine.apply(y, routing.weight, routing)
    return out


def plain_sum(token: Tensor, shape: torch.Size, y: Tensor, weight: Tensor) -> Tensor:
    """As `weighted_sum`, in plain autograd: the rows y (N, d) of these tokens (N,) to an output of a shape (T, d)."""
    rows = y * weight[:, None]
    return rows.new_zeros(shape).index_add(0, token, rows).to(y.dtype)


class _Gather(torch.autograd.Function):
    """x (T, d) -> the rows (N, d) of a routing's triples; the gradient is summed in one pass, in a fixed order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, routing: Routing) -> Tensor:
        ctx.routing = routing
        return x.index_select(0, routing.token)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        if torch.is_grad_enabled():
            out = grads[0].new_zeros(ctx.routing.num_tokens, grads[0].shape[1])
            return out.index_add(0, ctx.routing.token, grads[0]), None
        return sum_by_token(grads[0].contiguous(), ctx.routing, None), None


class _Combine(torch.autograd.Function):
    """The weighted sum of each token's rows: y (N, d), weight (N,) -> (T, d)."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, weight: Tensor, routing: Routing) -> Tensor:
        ctx.save_for_backward(y, weight, routing.token)
        return sum_by_token(y, routing, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        y, weight, token = ctx.saved_tensors
        if torch.is_grad_enabled():
            plain = partial(plain_sum, token, grads[0].shape)
            return (*gradients_in_graph(plain, (y, weight), ctx.needs_input_grad[:2], grads[0]), None)
        grad = grads[0].index_select(0, token)
        grad_weight = (grad * y).sum(-1, dtype=weight.dtype) if ctx.needs_input_grad[1] else None
        grad_y = grad.mul_(weight[:, None]) if ctx.needs_input_grad[0] else None
        return grad_y, grad_weight, None
