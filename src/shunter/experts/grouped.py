"""PyTorch's grouped product, `torch.nn.functional.grouped_mm`, as a backend: one call for all experts of a projection.

It is called within what it is known to compute rightly: float32, bfloat16 or float16; an operand's rows or columns
contiguous, the other stride a multiple of 16 bytes (others are copied into such strides); no bias (added here); int32
ends of groups that cover every row, because rows behind the last end come back uninitialised.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..routing import Routing
from .backends import Backend, Weights, activate, activate_backward, register
from .combine import sum_by_token

__all__ = ["grouped"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The CUDA kernel's own limit on the number of groups is 1024, exclusive.
MAX_CUDA_EXPERTS = 1023


def grouped(x: Tensor, weights: Weights, routing: Routing) -> Tensor:
    """The experts' weighted outputs (T, d) of x (T, d); equal to `reference`, once differentiable."""
    return _Grouped.apply(
        x, routing.weight, weights.up, weights.down, weights.up_bias, weights.down_bias, routing, weights.activation
    )


class _Grouped(torch.autograd.Function):
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
        ends = _ends(routing)
        h = _product(x[routing.token], up.mT, ends)
        if up_bias is not None:
            h += up_bias[routing.expert]
        y = _product(activate(h, activation), down.mT, ends)
        if down_bias is not None:
            y += down_bias[routing.expert]
        ctx.save_for_backward(x, weight, up, down, up_bias, down_bias, h)
        ctx.routing, ctx.activation = routing, activation
        return sum_by_token(y.contiguous(), routing, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, up, down, up_bias, down_bias, h = ctx.saved_tensors
        routing: Routing = ctx.routing
        need_x, need_weight, need_up, need_down, need_up_bias, need_down_bias = ctx.needs_input_grad[:6]
        need_h = need_x or need_up or need_up_bias
        ends = _ends(routing)
        grad_x = grad_weight = grad_up = grad_down = grad_up_bias = grad_down_bias = None
        dy = grads[0][routing.token]
        w = weight[:, None].to(x.dtype)
        da = _product(dy, down, ends)  # before the combine weight
        a, dh = activate_backward(h, da, w if need_h else None, ctx.activation)
        if need_weight:
            grad_weight = (da * a).sum(-1, dtype=weight.dtype)
            if down_bias is not None:
                grad_weight += (dy * down_bias[routing.expert]).sum(-1, dtype=weight.dtype)
        if need_down or need_down_bias:
            dy = dy.mul_(w)
            if need_down:
                grad_down = _gradient(dy, a, ends)
            if need_down_bias:
                grad_down_bias = _sums(dy, ends)
        if dh is not None:
            if need_up:
                grad_up = _gradient(dh, x[routing.token], ends)
            if need_up_bias:
                grad_up_bias = _sums(dh, ends)
            if need_x:
                grad_x = sum_by_token(_product(dh, up, ends).contiguous(), routing, None)
        return grad_x, grad_weight, grad_up, grad_down, grad_up_bias, grad_down_bias, None, None


def _ends(routing: Routing) -> Tensor:
    return routing.offsets[1:].to(torch.int32)


def _product(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """Each row (n, p) times the matrix (E, p, q) of its expert: (n, q)."""
    if rows.shape[0] == 0:
        return rows.new_zeros(0, matrices.shape[2])
    return F.grouped_mm(_aligned(rows), _aligned(matrices), offs=ends)


def _gradient(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """The sum of left_i right_i^T over each expert's rows: (n, p) and (n, q) to (E, p, q)."""
    if left.shape[0] == 0:
        return left.new_zeros(ends.numel(), left.shape[1], right.shape[1])
    out = F.grouped_mm(_aligned(left).mT, _aligned(right), offs=ends)
    if out.is_cuda and torch.cuda.get_device_capability(out.device) >= (10, 0):
        # Blackwell's kernel leaves the matrices of experts without a row uninitialised (pytorch issue 172439).
        out = out.masked_fill(ends.diff(prepend=ends.new_zeros(1))[:, None, None] == 0, 0)
    return out


def _sums(rows: Tensor, ends: Tensor) -> Tensor:
    """The sum of each expert's rows: (n, p) to (E, p)."""
    return _gradient(rows.new_ones(rows.shape[0], 1), rows, ends)[:, 0]


def _aligned(operand: Tensor) -> Tensor:
    """The operand, or a copy of it whose strides and address grouped_mm takes."""
    step = 16 // operand.element_size()
    *batch, row, column = operand.stride()
    height, width = operand.shape[-2:]
    contiguous = (column == 1 and row >= width and row % step == 0) or (
        row == 1 and column >= height and column % step == 0
    )
    if contiguous and all(stride % step == 0 for stride in batch) and operand.data_ptr() % 16 == 0:
        return operand
    padded = operand.new_empty(*operand.shape[:-1], -(-width // step) * step)
    return padded[..., :width].copy_(operand)


def _refuses(x: Tensor, weights: Weights) -> str | None:
    if x.dtype not in DTYPES:
        return f"torch's grouped_mm computes in float32, bfloat16 and float16, not in {x.dtype}"
    if x.device.type not in ("cpu", "cuda"):
        return f"torch's grouped_mm is known here on cpu and cuda, not on {x.device.type}"
    if x.is_cuda and weights.up.shape[0] > MAX_CUDA_EXPERTS:
        return f"torch's grouped_mm takes at most {MAX_CUDA_EXPERTS} experts on cuda, not {weights.up.shape[0]}"
    return None


register(Backend("grouped_mm", grouped, _refuses, "torch's grouped product: a call for all experts of a projection"))
