"""The experts' activations: the pass between their two products, forward and backward, on rows of pre-activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["ACTIVATIONS", "activate", "activate_backward"]

# name: (pointwise function, whether it gates: act(gate) * up)
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "swiglu": (F.silu, True),
    "geglu": (F.gelu, True),
    "geglu_tanh": (lambda h: F.gelu(h, approximate="tanh"), True),
    "reglu": (F.relu, True),
    "silu": (F.silu, False),
    "gelu": (F.gelu, False),
    "gelu_tanh": (lambda h: F.gelu(h, approximate="tanh"), False),
    "relu": (F.relu, False),
    "quick_gelu": (lambda h: h * torch.sigmoid(1.702 * h), False),
    "relu2": (lambda h: F.relu(h).square(), False),
}


class _Pointwise(NamedTuple):
    """A function into given memory: of h, and its derivative at h times a gradient."""

    forward: Callable[[Tensor, Tensor], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor], Tensor]


_aten = torch.ops.aten

_SILU = _Pointwise(
    lambda h, out: _aten.silu.out(h, out=out),
    lambda grad, h, out: _aten.silu_backward.grad_input(grad, h, grad_input=out),
)

_GELU = _Pointwise(
    lambda h, out: _aten.gelu.out(h, out=out),
    lambda grad, h, out: _aten.gelu_backward.grad_input(grad, h, grad_input=out),
)

_GELU_TANH = _Pointwise(
    lambda h, out: _aten.gelu.out(h, approximate="tanh", out=out),
    lambda grad, h, out: _aten.gelu_backward.grad_input(grad, h, approximate="tanh", grad_input=out),
)

_RELU = _Pointwise(
    lambda h, out: _aten.relu.out(h, out=out),
    lambda grad, h, out: _aten.threshold_backward.grad_input(grad, h, 0, grad_input=out),
)


def _quick_gelu_backward(grad: Tensor, h: Tensor, out: Tensor) -> Tensor:
    s = torch.sigmoid(1.702 * h)
    return torch.mul(grad, s + 1.702 * h * s * (1 - s), out=out)


_QUICK_GELU = _Pointwise(lambda h, out: torch.mul(h, torch.sigmoid(1.702 * h), out=out), _quick_gelu_backward)

_RELU2 = _Pointwise(
    lambda h, out: _aten.relu.out(h, out=out).square_(),
    lambda grad, h, out: torch.mul(grad, 2 * F.relu(h), out=out),
)

_POINTWISE = {
    "swiglu": _SILU, "geglu": _GELU, "geglu_tanh": _GELU_TANH, "reglu": _RELU,
    "silu": _SILU, "gelu": _GELU, "gelu_tanh": _GELU_TANH, "relu": _RELU,
    "quick_gelu": _QUICK_GELU, "relu2": _RELU2,
}  # fmt: skip


def activate(h: Tensor, activation: str, out: Tensor | None = None) -> Tensor:
    """The expert's hidden state (n, f) of its pre-activations (n, 2f), or (n, f) where the activation does not gate.

    Args:
        h: pre-activations.
        activation: a key of `ACTIVATIONS`.
        out: (n, f), where to write it; None makes a new tensor, differentiably.
    """
    function, gated = ACTIVATIONS[activation]
    if out is not None:
        if not gated:
            return _POINTWISE[activation].forward(h, out)
        gate, up = h.chunk(2, dim=-1)
        return _POINTWISE[activation].forward(gate, out).mul_(up)
    if not gated:
        return function(h)
    gate, up = h.chunk(2, dim=-1)
    return function(gate) * up


def activate_backward(
    h: Tensor, da: Tensor, weight: Tensor, activation: str, out: tuple[Tensor, Tensor, Tensor]
) -> Tensor:
    """Everything that the backward needs of one pass over pre-activations; without autograd.

    Args:
        h: pre-activations (n, 2f) or (n, f).
        da: (n, f), the gradient of the hidden state but for the combine weight; it is overwritten.
        weight: (n, 1), the combine weights in h's dtype.
        activation: a key of `ACTIVATIONS`.
        out: scratch (n, f), then where the hidden state goes again (n, f), and the gradient of the pre-activations.

    Returns:
        The gradient of the combine weights (n,), <da, hidden state>, in at least float32.
    """
    pointwise, gated = _POINTWISE[activation], ACTIVATIONS[activation][1]
    acted, a, dh = out
    single = torch.promote_types(h.dtype, torch.float32)
    if not gated:
        pointwise.forward(h, a)
        grad_weight = torch.mul(da, a, out=acted).sum(-1, dtype=single)
        pointwise.backward(da.mul_(weight), h, dh)
        return grad_weight
    gate, up = h.chunk(2, dim=-1)
    pointwise.forward(gate, acted)
    grad_gate, grad_up = dh.chunk(2, dim=-1)
    torch.mul(acted, up, out=a)
    grad_weight = torch.mul(da, a, out=grad_up).sum(-1, dtype=single)
    torch.mul(da.mul_(weight), acted, out=grad_up)
    pointwise.backward(da.mul_(up), gate, grad_gate)
    return grad_weight
