"""Probes while a graph is traced: a function that finds out by running something, to one whose result is a constant."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch._C import _len_torch_dispatch_stack
from torch._ops import _len_torch_dispatch_stack_pre_dispatch
from torch.utils._python_dispatch import _disable_current_modes

__all__ = ["outside_tracing"]

P = ParamSpec("P")
Result = TypeVar("Result")


def outside_tracing(probe: Callable[P, Result]) -> Callable[P, Result]:
    """The probe, run on real tensors also by `torch.compile` and `torch.export`, into whose graph its result goes.

    Args:
        probe: takes no tensors of the graph.
    """

    @torch.compiler.assume_constant_result
    @wraps(probe)
    def run(*args: P.args, **kwargs: P.kwargs) -> Result:
        if not _len_torch_dispatch_stack() and not _len_torch_dispatch_stack_pre_dispatch():
            return probe(*args, **kwargs)
        with _disable_current_modes():
            return probe(*args, **kwargs)

    return run
