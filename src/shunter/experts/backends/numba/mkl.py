"""Where the products of the MKL inside torch are, for compiled loops to call without a call into torch.

Torch's builds for x86 contain or load Intel's MKL and show its names. No other library is taken: one that could not be
kept to the calling thread would start threads of its own in each of ours.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import NamedTuple

import torch

__all__ = ["Addresses", "addresses", "in_torch"]


class Addresses(NamedTuple):
    """Of `sgemm`, with arguments as in Fortran, and of what sets the number of threads for the thread that calls."""

    sgemm: int
    threads: int


@cache
def addresses() -> Addresses | None:
    """The functions' addresses in this process, or None where torch has no MKL."""
    if not torch.backends.mkl.is_available():
        return None
    found = in_torch("sgemm_", "MKL_Set_Num_Threads_Local")
    return Addresses(*found) if found else None


def in_torch(*names: str) -> list[int] | None:
    """Where functions that torch loads are in this process, or None where one of them is missing."""
    library = ctypes.CDLL(torch._C.__file__)  # its symbols include those of all that it loads
    found = [getattr(library, name, None) for name in names]
    where = [ctypes.cast(function, ctypes.c_void_p).value for function in found if function is not None]
    present = [address for address in where if address]
    return present if len(present) == len(names) else None
