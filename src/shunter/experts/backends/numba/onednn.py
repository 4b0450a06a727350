"""Where the bfloat16 products of the oneDNN inside torch are, for compiled loops to call without a call into torch.

MKL multiplies bfloat16 slowly on processors of other makers. oneDNN's products of small blocks (`brgemm`), which torch
has for the kernels that its compiler writes, run at the peak of the processor, from 64 rows on.
"""

from __future__ import annotations

import os
import sys
from functools import cache
from typing import NamedTuple

import torch

from .mkl import in_torch

__all__ = ["Addresses", "addresses", "enabled"]

_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")  # which may say that the instructions are not to be used


class Addresses(NamedTuple):
    """Of `brgemm(m, n, k, lda, ldb, ldc, add, a, b, c, packed)`, and of what ends a thread's use of it."""

    brgemm: int
    release: int


def enabled() -> bool:
    """Whether torch may use oneDNN now: its functions end the process where they may not."""
    return bool(torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled)


@cache
def addresses() -> Addresses | None:
    """The functions' addresses in this process; None where torch has none, or the processor does not multiply so."""
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if sys.platform != "linux" or not known.get("avx512_bf16") or any(os.environ.get(name) for name in _LIMITS):
        return None
    # As C++ names them: what their arguments are is a part of the name.
    names = "6brgemmEllllllbPKN3c108BFloat16ES5_Pfb", "14brgemm_releaseEb"
    found = in_torch(*(f"_ZN2at6native7cpublas{name}" for name in names))
    return Addresses(*found) if found else None
