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
    backend = get("loop")
    if torch.is_grad_enabled() and _wants_higher_order(x):
        return get("reference"), "the input is in a functorch transform, which only the reference supports"
    return backend, f"the fastest for {x.dtype} on {x.device.type}"


def _wants_higher_order(x: Tensor) -> bool:
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(x))
