"""From torch's tensors to the compiled loops: whether they can run here, arrays of tensors, and their threads.

Numba compiles a loop in seconds when it first runs on a machine and keeps it on disk. `loops` needs the package numba,
this file torch alone.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ....routing import Routing
from ...cpu import SINGLE, product_dtype
from ...quantised import STEP, Coding, Packed, QuantisedWeights
from ...tracing import outside_tracing
from ...weights import Weights
from . import mkl, onednn

__all__ = [
    "DTYPES",
    "INSTALLED",
    "SMALL",
    "array",
    "biases",
    "coded",
    "how",
    "lacks",
    "matrices",
    "no_halves",
    "operands",
    "ready",
    "runs",
    "threads",
    "triples",
    "usable",
]

INSTALLED = find_spec("numba") is not None

# As what integers the loops get the bits of a dtype, of which numpy has not all.
DTYPES = {torch.float32: "float32", torch.bfloat16: "uint16", torch.float16: "int16"}

# Fewer numbers than this are not worth handing to other threads, which may be busy.
SMALL = 2**16

# Not every threading layer of Numba's takes two callers at once.
_LOCK = threading.Lock()


def usable(*tensors: Tensor) -> bool:
    """Whether the loops run on these: many numbers, contiguous, on a CPU, in 32 or 16 bits; and numba is installed."""
    fit = all(t.is_cpu and t.dtype in DTYPES and t.is_contiguous() for t in tensors)
    return fit and sum(t.numel() for t in tensors) >= SMALL and INSTALLED and _running()


def runs(x: Tensor, weights: QuantisedWeights) -> bool:
    """Whether the loops decode these weights for x: on a CPU, in 32 or 16 bits; and numba is installed."""
    return x.is_cpu and weights.device.type == "cpu" and x.dtype in DTYPES and INSTALLED and _running()


def how(run: bool) -> str:
    """For `explain`: whether the loops run, and if not, why."""
    if run:
        return "its loops are compiled by numba"
    if INSTALLED:
        return "numba has no loops for these, or they are few"
    return "with numba (pip install shunter[numba]) it is faster"


@outside_tracing
def lacks() -> str | None:
    """Why the loops cannot run in this process, or None where they can."""
    if not INSTALLED:
        return "numba is not installed (pip install shunter[numba])"
    if mkl.addresses() is None:
        return "its loops call MKL, which this torch does not have"
    if not _running():
        return "numba does not work in this process, or was not used before an export"
    return None if _right() else "MKL's products came out wrong, called from its loops"


@outside_tracing
def no_halves(dtype: torch.dtype, dim: int, hidden: int) -> str | None:
    """Why the loops do not multiply in a half precision in which torch is fast; None where they do."""
    itself = f"this processor multiplies {dtype} itself"
    if dtype != torch.bfloat16 or onednn.addresses() is None or not onednn.enabled():
        return f"{itself}, by other instructions than its loops call"
    if dim % 16 or hidden % 16:
        return f"{itself}, and its loops take widths that are multiples of 16, not d={dim} and f={hidden}"
    if not INSTALLED or not _running() or _right_in_halves():
        return None
    return "oneDNN's products came out wrong, called from its loops"


def operands(x: Tensor, weights: Weights) -> Tensor:
    """No numbers, of the dtype in which the loops multiply: that of x where torch is fast in it and they can."""
    widens = product_dtype(x) == torch.float32 or no_halves(x.dtype, weights.dim, weights.hidden)
    return SINGLE if widens else x.new_empty(0)


@outside_tracing
def threads() -> int:
    """How many threads the loops run on."""
    import numba

    return min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]


def array(tensor: Tensor) -> Any:
    """A numpy array over the tensor's memory, as the loops take it."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.element_size() == 2 and tensor.is_floating_point():
        return tensor.view(torch.int16).numpy().view(DTYPES[tensor.dtype])
    return tensor.numpy()


def triples(loops: Any, routing: Routing) -> Any:
    """Where a routing's triples are, as the loops take it."""
    return loops.Triples(*map(array, (routing.token, routing.offsets, *routing.by_token)))


def matrices(loops: Any, dtype: torch.dtype, *parts: Tensor | None) -> Any:
    """Matrices (E, q, p), and biases (E, q) as (E, 1, q), of one dtype; none for None."""
    none = _none(dtype)
    arrays = [none if part is None else array(part if part.ndim == 3 else part[:, None]) for part in parts]
    return loops.Matrices(*arrays)


def biases(dtype: torch.dtype, *parts: Tensor | None) -> list[Any]:
    """Biases (E, q) as (E, 1, q) of one dtype; none for None."""
    return [_none(dtype) if part is None else array(part.to(dtype).contiguous()[:, None]) for part in parts]


def coded(loops: Any, packed: Packed) -> Any:
    """Matrices in codes, as the loops take them."""
    coding = packed.coding
    zeros = packed.zero if coding.zero_point else _middle()
    return loops.Coded(
        array(packed.codes),
        array(packed.scale).view("uint16"),
        array(zeros),
        int(coding.zero_point),
        *_places(coding, packed.rows, packed.columns),
        (coding.group // STEP).bit_length() - 1,
        packed.rows,
        packed.columns,
    )


@cache
def _middle() -> Tensor:
    return torch.full((1,), 8, dtype=torch.uint8, device="cpu")


@lru_cache(maxsize=1024)
def _places(coding: Coding, rows: int, columns: int) -> tuple[Any, Any, Any]:
    """Where the codes and the scales of each expert begin, and its bits."""
    lists = (*coding.starts(rows, columns), coding.bits)
    first, second, third = (array(torch.tensor(numbers, dtype=torch.int64, device="cpu")) for numbers in lists)
    return first, second, third


@cache
def _none(dtype: torch.dtype) -> Any:
    return array(torch.empty(0, 0, 0, dtype=dtype, device="cpu"))


@contextmanager
def ready() -> Iterator[Any]:
    """The compiled loops, for one caller at a time, on as many threads as torch uses."""
    import numba

    own = torch.get_num_threads()
    with _LOCK:
        numba.set_num_threads(threads())
        if torch.get_num_threads() != own:  # Numba's first launch sets OpenMP's number, which is torch's too
            torch.set_num_threads(own)
        yield _loops()[0]


@cache
def _right() -> bool:
    """Whether a product called from a loop is right: another MKL may take its arguments otherwise."""
    a, b = torch.arange(6.0).view(2, 3), torch.arange(12.0).view(3, 4)
    with ready() as loops:
        return bool((loops.product(array(a), array(b)) == array(a @ b)).all())


@cache
def _right_in_halves() -> bool:
    """Whether a product in bfloat16 called from a loop is right, for each way in which operands may lie."""
    a, b = torch.arange(768.0).view(48, 16) % 7, torch.arange(512.0).view(16, 32) % 5
    halves = [array(t.bfloat16()) for t in (a, b, a.T.contiguous(), b.T.contiguous())]
    with ready() as loops:
        ways = [(i, j) for i in (halves[0], halves[2].T) for j in (halves[1], halves[3].T)]
        return all(bool((loops.product_of_halves(i, j) == array(a @ b)).all()) for i, j in ways)


def _running() -> bool:
    """Whether the loops run in this process; Numba's threads do not outlive a fork."""
    if torch.compiler.is_exporting() and not _loops.cache_info().currsize:
        return False  # torch.export replaces functions of math, which numba looks for when it is imported
    loops, process = _loops()
    return loops is not None and process == os.getpid()


@cache
def _loops() -> tuple[ModuleType | None, int]:
    """The compiled loops, and the process that has their threads; with a warning None where numba does not work."""
    try:
        from . import loops
    except Exception as error:  # whatever its own import raises: another numpy, no folder to keep what it compiles
        warnings.warn(f"numba is installed but cannot be used, so experts on the CPU are slower: {error}", stacklevel=2)
        return None, os.getpid()
    return loops, os.getpid()
