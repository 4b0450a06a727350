"""Which products this processor is good at."""

from __future__ import annotations

import platform

import torch
from torch import Tensor

__all__ = ["FAST", "product_dtype"]


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
