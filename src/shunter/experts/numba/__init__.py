"""Loops compiled for this CPU, where the package `numba` is installed: what torch's products and passes leave undone.

Numba compiles a loop in seconds when it first runs on a machine and keeps it on disk. `kernels` needs it, this file
torch alone.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

__all__ = ["INSTALLED", "fuses", "how", "products", "swiglu", "swiglu_backward", "usable"]

INSTALLED = find_spec("numba") is not None
# As what integers the loops get the bits of a dtype, of which numpy has not all.
_BITS = {torch.float32: "float32", torch.bfloat16: "uint16", torch.float16: "int16"}
# Fewer numbers than this are not worth handing to other threads, which may be busy.
SMALL = 2**16
# Not every threading layer of Numba's takes two callers at once.
_LOCK = threading.Lock()


def usable(*tensors: Tensor) -> bool:
    """Whether the loops run on these: many numbers, contiguous, on a CPU, in 32 or 16 bits; and numba is installed."""
    fit = all(t.is_cpu and t.dtype in _BITS and t.is_contiguous() for t in tensors)
    return fit and sum(t.numel() for t in tensors) >= SMALL and INSTALLED and _running()


def how(run: bool) -> str:
    """For `explain`: whether the loops run, and if not, why."""
    if run:
        return "its loops are compiled by numba"
    if INSTALLED:
        return "numba has no loops for these, or they are few"
    return "with numba (pip install shunter[numba]) it is faster"


def fuses(activation: str, like: Tensor, numbers: int) -> bool:
    """Whether `swiglu` and `swiglu_backward` are this activation's passes, for so many numbers as a tensor holds."""
    fit = activation == "swiglu" and like.is_cpu and like.dtype == torch.float32
    return fit and numbers >= SMALL and INSTALLED and _running()


def products(x: Tensor, index: Tensor, matrices: Tensor, counts: list[int]) -> Tensor:
    """The rows of x (., p) at an index (N,), sorted by expert, times their experts' matrices (E, q, p): (N, q).

    In float32. Each matrix of an expert that has rows is read once from memory, and none other.
    """
    out = x.new_empty(index.numel(), matrices.shape[1], dtype=torch.float32)
    size = torch.tensor(counts, device=x.device)
    experts = size.nonzero().view(-1)
    starts = (size.cumsum(0) - size)[experts]
    with _ready() as kernels:
        parts = (x.float()[index], matrices, experts, starts, size[experts], out)
        kernels.products(*map(_array, parts))
    return out


def swiglu(h: Tensor, out: Tensor) -> Tensor:
    """The hidden state of pre-activations h (n, 2f), gate first, into out (n, f) in float32, in one pass."""
    with _ready() as kernels:
        kernels.swiglu(_array(h), _array(out))
    return out


def swiglu_backward(h: Tensor, index: Tensor, da: Tensor, weight: Tensor, a: Tensor, dh: Tensor) -> Tensor:
    """What `activations.activate_backward` computes, for pre-activations h (., 2f) at an index (n,).

    In one pass, and with the hidden state in `a` times the combine weight.
    """
    grad_weight = da.new_empty(da.shape[0])
    with _ready() as kernels:
        kernels.swiglu_backward(*map(_array, (h, index, da, weight.view(-1), a, dh, grad_weight)))
    return grad_weight


def _array(tensor: Tensor) -> Any:
    """A numpy array over the tensor's memory."""
    tensor = tensor.detach()
    if tensor.element_size() == 2:
        return tensor.view(torch.int16).numpy().view(_BITS[tensor.dtype])
    return tensor.numpy()


@contextmanager
def _ready() -> Iterator[Any]:
    """The kernels, for one caller at a time, on as many threads as torch uses."""
    import numba

    with _LOCK:
        numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
        yield _kernels()[0]


def _running() -> bool:
    """Whether the loops run in this process; Numba's threads do not outlive a fork."""
    kernels, process = _kernels()
    return kernels is not None and process == os.getpid()


@cache
def _kernels() -> tuple[ModuleType | None, int]:
    """The compiled loops, and the process that has their threads; with a warning None where numba does not work."""
    try:
        from . import kernels
    except Exception as error:  # whatever its own import raises: another numpy, no folder to keep what it compiles
        warnings.warn(f"numba is installed but cannot be used, so experts on the CPU are slower: {error}", stacklevel=2)
        return None, os.getpid()
    return kernels, os.getpid()
