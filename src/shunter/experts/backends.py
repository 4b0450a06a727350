"""The registry of backends: plain functions of (x, weights, routing), and the rule that chooses among them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..routing import Routing
from . import numba
from .activations import ACTIVATIONS
from .products import product_dtype

__all__ = ["Backend", "Weights", "backend_names", "choose", "get", "register"]


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

    @property
    def gated(self) -> bool:
        """Whether the activation multiplies two halves of the pre-activations."""
        return ACTIVATIONS[self.activation][1]


class Run(Protocol):
    """What a backend is: x (T, d), weights, routing -> (T, d), each token's sum of weight times expert output.

    With `recompute` no pre-activations are kept for the backward: it computes them again, to the same gradients.
    """

    def __call__(self, x: Tensor, weights: Weights, routing: Routing, recompute: bool = False) -> Tensor: ...


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


# Up to so many tokens a layer without a backward is bound by reading weights.
FEW_TOKENS = 32

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
    if x.is_cpu and x.shape[0] <= FEW_TOKENS and not get("decode").refuses(x, weights):
        why = f"for {FEW_TOKENS} tokens or fewer without gradients reading weights is what takes time"
        return get("decode"), f"{why}; {numba.how(numba.usable(weights.up, weights.down))}"
    if x.is_cpu:
        unfit = get("fused").refuses(x, weights) or _not_worth_threads(x, weights)
        if unfit is None:
            return get("fused"), "on a CPU its threads neither wait for each other nor pay calls for each expert"
        why = "on a CPU a product for each expert would cost more in calls, and fresh memory in faults"
        if (wide := product_dtype(x)) != x.dtype:
            why += f"; its products run in {wide}, which this processor multiplies faster than {x.dtype}"
        return get("padded"), f"{why} (fused: {unfit})"
    grouped, fused = get("grouped_mm"), get("triton")
    unfit = fused.refuses(x, weights) or _unfit(x, weights) if x.is_cuda else None
    if x.is_cuda and unfit is None:
        return fused, "its fused kernels move the least memory on a GPU"
    if refusal := grouped.refuses(x, weights):
        return get("reference"), refusal
    return grouped, f"it is the fastest that runs on {x.device.type}" + (f" (triton: {unfit})" if unfit else "")


def _not_worth_threads(x: Tensor, weights: Weights) -> str | None:
    """Why the fused backend, which could run this, is not the choice on a CPU; None where it is."""
    if x.numel() < numba.SMALL:
        return f"{x.numel()} numbers are few for threads that may be busy"
    if (experts := weights.up.shape[0]) < numba.threads():
        return f"{experts} experts are fewer than its {numba.threads()} threads"
    return None


def _unfit(x: Tensor, weights: Weights) -> str | None:
    """Why the Triton backend, which could run this, is not the choice on a GPU; None where it is."""
    if x.element_size() != 2:
        return f"without tensor cores, in {x.dtype}, its products are slower than cuBLAS's"
    if any(width % 8 for width in weights.down.shape[1:]):
        return f"widths {tuple(weights.down.shape[1:])} that are not multiples of 8 make it load single elements"
    return None


def _wants_higher_order(x: Tensor) -> bool:
    return not torch.compiler.is_compiling() and bool(torch._C._functorch.is_functorch_wrapped_tensor(x))
