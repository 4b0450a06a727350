"""What this processor does well: the precision of its products, and scratch memory without page faults."""

from __future__ import annotations

import ctypes
import math
import platform
import sys
import threading
from functools import cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["FAST", "SINGLE", "product_dtype", "scratch", "with_huge_pages"]

# What scratch in float32 on the CPU is like.
SINGLE = torch.empty(0, dtype=torch.float32, device="cpu")

_HUGE_PAGE = 2**21

_MADV_HUGEPAGE = 14


class _Held(threading.local):
    """By name and device a buffer of bytes, and what was last given of it."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.device], tuple[Tensor, Tensor]] = {}


_HELD = _Held()


def scratch(name: str, like: Tensor, *shape: int) -> Tensor:
    """Uninitialised memory of a shape, with the dtype and device of a tensor; the thread gets it again under this name.

    What it holds is lost with the next call under the same name.
    """
    key = name, like.device
    buffer, given = _HELD.buffers.get(key, (None, None))
    if given is not None and given.shape == shape and given.dtype == like.dtype:
        return given
    size = math.prod(shape) * like.element_size()
    with torch.inference_mode(False):  # what inference mode makes could not be written to outside of it
        if buffer is None or buffer.numel() < size:
            _HELD.buffers.pop(key, None)  # first, so that both are never there together
            del buffer, given
            buffer = with_huge_pages(torch.empty(size, dtype=torch.uint8, device=like.device))
        given = buffer[:size].view(like.dtype).view(shape)
    _HELD.buffers[key] = buffer, given
    return given


def with_huge_pages(fresh: Tensor) -> Tensor:
    """The same memory, for which the kernel, where it can, takes pages of 2 MiB: fewer faults, fewer table walks."""
    advise = _madvise()
    if advise is not None and fresh.is_cpu:
        address = fresh.data_ptr()
        start = -(-address // _HUGE_PAGE) * _HUGE_PAGE
        end = (address + fresh.nbytes) // _HUGE_PAGE * _HUGE_PAGE
        if start < end:
            advise(start, end - start, _MADV_HUGEPAGE)
    return fresh


@cache
def _madvise() -> Any:
    """The C library's madvise, or None where there is none."""
    if sys.platform != "linux":
        return None
    function = getattr(ctypes.CDLL(None), "madvise", None)
    if function is not None:
        function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function


def _fast() -> dict[torch.dtype, bool]:
    """Whether torch has fast products in each half precision on this processor; on other than x86 it is taken to."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return {torch.bfloat16: True, torch.float16: True}
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return {
        torch.bfloat16: torch.backends.cpu.get_cpu_capability().startswith("AVX512"),
        torch.float16: bool(known.get("avx512_fp16") or known.get("amx_fp16")),
    }


FAST = _fast()


def product_dtype(x: Tensor) -> torch.dtype:
    """What products of x run in on a CPU: its own dtype, or float32 where that is many times faster."""
    return x.dtype if FAST.get(x.dtype, True) else torch.float32
