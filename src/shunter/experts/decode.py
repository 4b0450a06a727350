"""A few tokens without a backward, as in generation: the time is that of reading the weights of the experts they chose.

So only those are read, each once, by the product that was measured to read fastest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..routing import Routing
from .activations import activate
from .autograd import Gradients, Needs, Plan, differentiable
from .backends import Backend, Weights, register
from .combine import sum_by_token

__all__ = ["decode"]

# In float32, up to so many rows an expert's matrix times them as columns is faster than they times it.
FEW_ROWS = 6


class _Decode:
    def plan(self, x: Tensor, weights: Weights, routing: Routing) -> Plan:
        return Plan(routing.counts.tolist(), ())

    def forward(
        self, x: Tensor, weights: Weights, routing: Routing, plan: Plan, keep: bool
    ) -> tuple[Tensor, Tensor | None]:
        h = _products(x, routing.token, weights.up, plan.layout)
        if weights.up_bias is not None:
            h += weights.up_bias[routing.expert]
        a = activate(h, weights.activation)
        y = _products(a, torch.arange(a.shape[0], device=a.device), weights.down, plan.layout)
        if weights.down_bias is not None:
            y += weights.down_bias[routing.expert]
        return sum_by_token(y, routing, routing.weight), h if keep else None

    def backward(
        self, grad: Tensor, x: Tensor, weights: Weights, routing: Routing, plan: Plan, h: Tensor | None, needs: Needs
    ) -> Gradients:
        raise NotImplementedError("the decode backend has no backward; call it under torch.no_grad()")


def _products(x: Tensor, index: Tensor, matrices: Tensor, counts: list[int]) -> Tensor:
    """The rows of x (., p) at an index (N,), sorted by expert, times their experts' matrices (E, q, p): (N, q)."""
    columns = x.element_size() > 2
    # Columns a power of two apart would meet in the cache, so they are a little further; a spare one comes last.
    rows = x.new_zeros(index.numel() + 1, x.shape[1] + 16 * columns)[:, : x.shape[1]]
    rows[:-1] = x[index]
    out = x.new_empty(index.numel(), matrices.shape[1])
    start = 0
    for matrix, count in zip(matrices, counts, strict=True):
        end = start + count
        if count and count <= FEW_ROWS and columns:
            # A single column takes twice as long as two: the next one joins it.
            out[start:end] = (matrix @ rows[start : max(end, start + 2)].T).T[:count]
        elif count:
            torch.mm(rows[start:end], matrix.T, out=out[start:end])
        start = end
    return out


def _refuses(x: Tensor, weights: Weights) -> str | None:
    parts = (x, weights.up, weights.down, weights.up_bias, weights.down_bias)
    if torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in parts):
        return "it has no backward; call it under torch.no_grad()"
    return None


decode = differentiable("decode", _Decode())
register(Backend("decode", decode, _refuses, "a product for each expert that a token chose, and no other weights read"))
