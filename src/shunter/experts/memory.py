"""Large scratch memory: fresh buffers of many megabytes cost more in page faults than in what is written to them."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any

from torch import Tensor

__all__ = ["empty"]

_HUGE_PAGE = 2**21
_MADV_HUGEPAGE = 14


def empty(like: Tensor, *shape: int) -> Tensor:
    """Uninitialised memory of a shape, with the dtype and device of a tensor.

    On Linux the kernel is asked to back large CPU buffers with 2 MiB pages: a fault for each instead of 512.
    """
    fresh = like.new_empty(shape)
    advise = _madvise()
    if advise is not None and fresh.is_cpu and fresh.nbytes >= 2 * _HUGE_PAGE:
        address = fresh.data_ptr()
        start = -(-address // _HUGE_PAGE) * _HUGE_PAGE
        end = (address + fresh.nbytes) // _HUGE_PAGE * _HUGE_PAGE
        advise(start, end - start, _MADV_HUGEPAGE)  # advice: where the kernel has no such pages, nothing changes
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
