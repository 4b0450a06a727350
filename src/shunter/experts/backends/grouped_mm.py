"""PyTorch's grouped product, `torch.nn.functional.grouped_mm`, as a backend: one call for all experts of a projection.

It is called within what it is known to compute rightly: float32, bfloat16 or float16; an operand's rows or columns
contiguous, the other stride a multiple of 16 bytes (others are copied into such strides); no bias (added here); int32
ends of groups that cover every row, because rows behind the last end come back uninitialised.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ...routing import Routing
from ..activations import activate, activate_backward
from ..autograd import Gradients, Needs, Plan, differentiable
from ..choice import Backend, register
from ..combine import sum_by_token
from ..weights import Weights

__all__ = ["grouped_mm"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# The CUDA kernel's own limit on the number of groups is 1024, exclusive.
MAX_CUDA_EXPERTS = 1023


class _Grouped:
    def plan(self, x: Tensor, weights: Weights, routing: Routing) -> Plan:
        return Plan(None, (routing.offsets[1:].to(torch.int32),))

    def forward(
        self, x: Tensor, weights: Weights, routing: Routing, plan: Plan, keep: bool
    ) -> tuple[Tensor, Tensor | None]:
        (ends,) = plan.indices
        h = _up(x[routing.token], weights, routing, ends)
        y = _product(activate(h, weights.activation), weights.down.mT, ends)
        if weights.down_bias is not None:
            y += weights.down_bias[routing.expert]
        return sum_by_token(y.contiguous(), routing, routing.weight), h if keep else None

    def backward(
        self, grad: Tensor, x: Tensor, weights: Weights, routing: Routing, plan: Plan, h: Tensor | None, needs: Needs
    ) -> Gradients:
        (ends,) = plan.indices
        grad_x = grad_weight = grad_up = grad_down = grad_up_bias = grad_down_bias = None
        if h is None:
            h = _up(x[routing.token], weights, routing, ends)
        dy = grad[routing.token]
        w = routing.weight[:, None].to(x.dtype)
        da = _product(dy, weights.down, ends)  # before the combine weight
        a, dh = torch.empty_like(da), torch.empty_like(h)
        inner = activate_backward(h, da, w, weights.activation, (torch.empty_like(da), a, dh))
        if needs.weight:
            grad_weight = inner.to(routing.weight.dtype)
            if weights.down_bias is not None:
                grad_weight += (dy * weights.down_bias[routing.expert]).sum(-1, dtype=grad_weight.dtype)
        if needs.down or needs.down_bias:
            dy = dy.mul_(w)
            if needs.down:
                grad_down = _gradient(dy, a, ends)
            if needs.down_bias:
                grad_down_bias = _sums(dy, ends)
        if needs.up:
            grad_up = _gradient(dh, x[routing.token], ends)
        if needs.up_bias:
            grad_up_bias = _sums(dh, ends)
        if needs.x:
            grad_x = sum_by_token(_product(dh, weights.up, ends).contiguous(), routing, None)
        return Gradients(grad_x, grad_weight, grad_up, grad_down, grad_up_bias, grad_down_bias)


def _up(rows: Tensor, weights: Weights, routing: Routing, ends: Tensor) -> Tensor:
    """The pre-activations (N, 2f) or (N, f) of gathered rows (N, d)."""
    h = _product(rows, weights.up.mT, ends)
    if weights.up_bias is not None:
        h += weights.up_bias[routing.expert]
    return h


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
    if rows.is_cpu:  # where a product with ones adds one after the other, and rounds as often
        return torch.stack([part.sum(0) for part in rows.tensor_split(ends[:-1].to(torch.int64))])
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


grouped_mm = differentiable("grouped_mm", _Grouped())

register(
    Backend(
        "grouped_mm",
        grouped_mm,
        _refuses,
        "torch's grouped product: a call for all experts of a projection",
        reason=lambda x, weights: f"it is the fastest that runs on {x.device.type}",
    )
)
