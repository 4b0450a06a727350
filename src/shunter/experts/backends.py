"""The registry of backends: plain functions of (x, weights, routing), and the rule that chooses among them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ..routing import Routing

__all__ = ["ACTIVATIONS", "Backend", "Weights", "activate", "backend_names", "choose", "get", "register"]

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
}


# name: the pointwise function's derivative times a gradient, d(function)(h) * grad
_DERIVATIVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "swiglu": lambda h, grad: torch.ops.aten.silu_backward(grad, h),
    "geglu": lambda h, grad: torch.ops.aten.gelu_backward(grad, h),
    "geglu_tanh": lambda h, grad: torch.ops.aten.gelu_backward(grad, h, approximate="tanh"),
    "reglu": lambda h, grad: torch.ops.aten.threshold_backward(grad, h, 0),
}
_DERIVATIVES |= {
    "silu": _DERIVATIVES["swiglu"],
    "gelu": _DERIVATIVES["geglu"],
    "gelu_tanh": _DERIVATIVES["geglu_tanh"],
    "relu": _DERIVATIVES["reglu"],
}


@dataclass(frozen=True)
class Weights:
    """The parameters of E experts, in Hugging Face's layout.

    Args:
        up: gated (E, 2f, d), the gate's rows before the up projection's; not gated (E, f, d).
        down: (E, d, f).
        up_bias: (E, 2f) or (E, f), or None.
        down_bias: (E, d), or None.
        activation: a key of `ACTIVATIONS`.
    """

    up: Tensor
    down: Tensor
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    activation: str = "swiglu"


def activate(h: Tensor, activation: str) -> Tensor:
    """The expert's hidden state (n, f) of its pre-activations (n, 2f), or (n, f) where the activation does not gate."""
    function, gated = ACTIVATIONS[activation]
    if not gated:
        return function(h)
    gate, up = h.chunk(2, dim=-1)
    return function(gate) * up


def activate_backward(h: Tensor, da: Tensor, scale: Tensor | None, activation: str) -> tuple[Tensor, Tensor | None]:
    """The hidden state again, and the gradient of the pre-activations h (n, 2f) or (n, f).

    Args:
        h: pre-activations.
        da: (n, f) the gradient of the hidden state but for a factor.
        scale: (n, 1) that factor for each row; None where the gradient of h is not wanted.
        activation: a key of `ACTIVATIONS`.

    Returns:
        The hidden state (n, f), and the gradient like h or None.
    """
    function, gated = ACTIVATIONS[activation]
    derivative = _DERIVATIVES[activation]
    if not gated:
        return function(h), None if scale is None else derivative(h, da * scale)
    gate, up = h.chunk(2, dim=-1)
    acted = function(gate)
    a = acted * up
    if scale is None:
        return a, None
    dh = torch.empty_like(h)
    grad_gate, grad_up = dh.chunk(2, dim=-1)
    scaled = da * scale
    torch.mul(scaled, acted, out=grad_up)
    grad_gate.copy_(derivative(gate, scaled.mul_(up)))
    return a, dh


class Run(Protocol):
    """What a backend is: x (T, d), weights, routing -> (T, d), each token's sum of weight times expert output."""

    def __call__(self, x: Tensor, weights: Weights, routing: Routing) -> Tensor: ...


@dataclass(frozen=True)
class Backend:
    """A way to compute experts.

    Args:
        name: its name.
        run: the function.
        refuses: why it cannot run on (x, weights), in words, or None where it can.
        summary: how it works, for `explain`.
    """

    name: str
    run: Run
    refuses: Callable[[Tensor, Weights], str | None]
    summary: str


# Above this many up-projection weights an expert's own product is as fast as a batched one, and needs no padding.
LARGE_EXPERT = 2**19

_BACKENDS: dict[str, Backend] = {}


def register(backend: Backend) -> None:
    """Add a backend; a later one of the same name replaces the earlier."""
    _BACKENDS[backend.name] = backend


def backend_names() -> list[str]:
    """The names that `get` knows, without "auto"."""
    return list(_BACKENDS)


def get(name: str) -> Backend:
    """The backend of a name.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in _BACKENDS:
        raise ValueError(f"backend {name!r} is unknown; choose auto, {', '.join(_BACKENDS)}")
    return _BACKENDS[name]


def choose(name: str, x: Tensor, weights: Weights) -> tuple[Backend, str]:
    """The backend that runs x (T, d) under a name or "auto", and why, in words.

    Raises:
        ValueError: where the named backend cannot run this input.
    """
    if name != "auto":
        backend = get(name)
        if refusal := backend.refuses(x, weights):
            raise ValueError(f"backend {name!r} cannot run this: {refusal}")
        return backend, "you asked for it"
    if torch.is_grad_enabled() and _wants_higher_order(x):
        return get("reference"), "the input is in a functorch transform, which only the reference supports"
    if weights.up[0].numel() <= LARGE_EXPERT:
        return get("padded"), "its experts are small: a product for each would cost more in calls than in work"
    return get("loop"), "its experts are large enough to fill a product each"


def _wants_higher_order(x: Tensor) -> bool:
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(x))
