"""One autograd function over a loop of experts: computes routed rows only, keeps x and the pre-activations alone.

Each expert's rows are contiguous, because a routing is sorted by expert. The gathered input, the activations and the
expert outputs are recomputed or never needed: the gradient of a combine weight is <dy W_down, a>, not <dy, y>.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..routing import Routing
from .backends import Backend, Weights, activate, register
from .combine import sum_by_token
from .memory import empty

__all__ = ["loop"]


def loop(x: Tensor, weights: Weights, routing: Routing) -> Tensor:
    """The experts' weighted outputs (T, d) of x (T, d); equal to `reference`, once differentiable."""
    return _Loop.apply(
        x, routing.weight, weights.up, weights.down, weights.up_bias, weights.down_bias, routing, weights.activation
    )


class _Loop(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        up: Tensor,
        down: Tensor,
        up_bias: Tensor | None,
        down_bias: Tensor | None,
        routing: Routing,
        activation: str,
    ) -> Tensor:
        n = routing.token.numel()
        h = empty(x, n, up.shape[1])
        y = empty(x, n, x.shape[1])
        for e, rows in _spans(routing):
            x_e = x.index_select(0, routing.token[rows])
            _linear(x_e, up[e], up_bias, e, out=h[rows])
            _linear(activate(h[rows], activation), down[e], down_bias, e, out=y[rows])
        ctx.save_for_backward(x, weight, up, down, up_bias, down_bias, h)
        ctx.routing, ctx.activation = routing, activation
        return sum_by_token(y, routing, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, up, down, up_bias, down_bias, h = ctx.saved_tensors
        routing: Routing = ctx.routing
        grad_out = grads[0].contiguous()
        need_x, need_weight, need_up, need_down, need_up_bias, need_down_bias = ctx.needs_input_grad[:6]
        need_h = need_x or need_up or need_up_bias
        grad_rows = empty(x, routing.token.numel(), x.shape[1]) if need_x else None
        grad_weight = torch.empty_like(weight) if need_weight else None
        grad_up, grad_down, grad_up_bias, grad_down_bias = (
            empty(value,*value.shape).zero_() if need else None
            for value, need in (
                (up, need_up), (down, need_down), (up_bias, need_up_bias), (down_bias, need_down_bias)
            )
        )  # fmt: skip
        for e, rows in _spans(routing):
            token = routing.token[rows]
            dy = grad_out.index_select(0, token)
            w = weight[rows, None].to(x.dtype)
            with torch.enable_grad():
                h_e = h[rows].detach().requires_grad_(need_h)
                a = activate(h_e, ctx.activation)
            da = dy @ down[e]  # before the combine weight
            hidden = a.detach()
            if grad_weight is not None:
                inner = (da * hidden).sum(-1, dtype=weight.dtype)
                if down_bias is not None:
                    inner = inner + (dy @ down_bias[e]).to(weight.dtype)
                grad_weight[rows] = inner
            if grad_down is not None or grad_down_bias is not None:
                weighted = dy * w
                if grad_down is not None:
                    torch.mm(weighted.T, hidden, out=grad_down[e])
                if grad_down_bias is not None:
                    grad_down_bias[e] = weighted.sum(0)
            if not need_h:
                continue
            (dh,) = torch.autograd.grad(a, h_e, da * w)
            if grad_up is not None:
                torch.mm(dh.T, x.index_select(0, token), out=grad_up[e])
            if grad_up_bias is not None:
                grad_up_bias[e] = dh.sum(0)
            if grad_rows is not None:
                torch.mm(dh, up[e], out=grad_rows[rows])
        grad_x = None if grad_rows is None else sum_by_token(grad_rows, routing, None)
        return grad_x, grad_weight, grad_up, grad_down, grad_up_bias, grad_down_bias, None, None


def _spans(routing: Routing) -> Iterator[tuple[int, slice]]:
    """The experts that compute something, each with its rows."""
    bounds = routing.offsets.tolist()
    for e, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        if end > start:
            yield e, slice(start, end)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, e: int, out: Tensor) -> None:
    if bias is None:
        torch.mm(x, weight.T, out=out)
    else:
        torch.addmm(bias[e], x, weight.T, out=out)


register(Backend("loop", loop, lambda x, weights: None, "one autograd function over a loop of experts, sorted rows"))
