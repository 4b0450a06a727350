"""The registry of backends: plain functions of (x, weights, routing), and the rule that chooses among them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..routing import Routing
from .weights import ExpertWeights, Weights

__all__ = ["Backend", "backend_names", "choose", "get", "is_transformed", "register"]


class Run(Protocol):
    """What a backend is: x (T, d), weights, routing -> (T, d), each token's sum of weight times expert output.

    With `recompute` no pre-activations are kept for the backward: it computes them again, to the same gradients.
    """

    def __call__(self, x: Tensor, weights: Any, routing: Routing, recompute: bool = False) -> Tensor: ...


def _always(x: Tensor, weights: Any) -> None:
    return None


@dataclass(frozen=True)
class Backend:
    """A way to compute experts.

    Args:
        name: its name.
        run: the function.
        refuses: why it cannot run on (x, weights), in words, or None where it can.
        summary: how it works, for `explain`.
        unsuited: why "auto" passes over it on (x, weights) although it could run, or None.
        reason: why "auto" takes it, in words.
        no_backward: whether it is for inputs alone of which nothing learns.
        takes: the kinds of `ExpertWeights` that its functions are given; `ExpertWeights` itself is for what asks for
            one expert's matrices at a time.
    """

    name: str
    run: Run
    refuses: Callable[[Tensor, Any], str | None]
    summary: str
    unsuited: Callable[[Tensor, Any], str | None] = _always
    reason: Callable[[Tensor, Any], str] = lambda x, weights: "nothing before it can run"
    no_backward: bool = False
    takes: tuple[type[ExpertWeights], ...] = (Weights,)

    def lacks(self, x: Tensor, weights: ExpertWeights, routing: Routing | None = None) -> str | None:
        """Why it cannot run on (x, weights, routing), in words; None where it can."""
        if self.no_backward and torch.is_grad_enabled():
            if any(part.requires_grad for part in (x, *weights.learned(), *_weight_of(routing))):
                return "it has no backward; call it under torch.no_grad()"
        if not isinstance(weights, self.takes):
            return f"it reads all experts from one tensor; {type(weights).__name__} gives one expert at a time"
        return self.refuses(x, weights)


# The order in which "auto" tries them.
_ON_CPU = ("decode", "numba", "padded", "reference")
_ON_CUDA = ("triton", "grouped_mm", "reference")
_ELSEWHERE = ("grouped_mm", "reference")

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


def choose(name: str, x: Tensor, weights: ExpertWeights, routing: Routing | None = None) -> tuple[Backend, str]:
    """The backend that runs x (T, d) under a name or "auto", and why, in words.

    Without a routing it is one whose weights do not learn.

    Raises:
        ValueError: where the named backend cannot run this input.
    """
    transformed = not torch.compiler.is_compiling() and is_transformed((x, *weights.learned(), *_weight_of(routing)))
    if name != "auto":
        backend = get(name)
        refusal: str | None = 'an input is in a transform of torch.func or forward mode; take "auto" or "reference"'
        if not transformed or name == "reference":
            refusal = backend.lacks(x, weights, routing)
        if refusal:
            raise ValueError(f"backend {name!r} cannot run this: {refusal}")
        return backend, "you asked for it"
    if transformed:
        return get("reference"), "an input is in a transform of torch.func or forward mode, which it alone supports"
    passed = ""
    for candidate in _ON_CPU if x.is_cpu else _ON_CUDA if x.is_cuda else _ELSEWHERE:
        backend = get(candidate)
        unfit = backend.lacks(x, weights, routing) or backend.unsuited(x, weights)
        if unfit is None:
            return backend, backend.reason(x, weights) + passed
        if candidate != "decode":  # which is for a few tokens without gradients alone
            passed = f" ({candidate}: {unfit})"
    raise AssertionError("reference refuses nothing")


def _weight_of(routing: Routing | None) -> tuple[Tensor, ...]:
    return () if routing is None else (routing.weight,)


def is_transformed(parts: Iterable[Tensor]) -> bool:
    """Whether one is in a transform of torch.func, or has a tangent (forward-mode differentiation)."""
    dual = forward_ad._current_level >= 0
    return any(
        torch._C._functorch.is_functorch_wrapped_tensor(part) or (dual and forward_ad.unpack_dual(part)[1] is not None)
        for part in parts
    )
