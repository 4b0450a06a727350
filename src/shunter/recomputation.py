"""Activation checkpointing as a forward inside of it sees it: the regions around it, run first or run again.

A region is run in the forward, and again from inside a backward, when all that was known around it is gone. Both runs
have one object in common, by which the second finds what the first knew: the frame of torch's hooks for saved tensors,
or the `ctx` of an autograd function that runs the region in its forward and in its backward (`use_reentrant=True`).
"""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any

import torch
from torch.utils import checkpoint

__all__ = ["Regions", "notes", "recomputing", "regions"]

# What runs a backward, and what runs a function's own forward and backward.
_ENGINE: CodeType = torch.autograd.graph._engine_run_backward.__code__
_FORWARD: CodeType = torch.autograd.function.Function.apply.__code__
_BACKWARD: CodeType = torch.autograd.function.BackwardCFunction.apply.__code__
_CHECKPOINTS = checkpoint.__file__


@dataclass
class Regions:
    """The checkpointed regions around a forward in its thread.

    Args:
        first: those that are run for the first time, innermost first.
        again: the one that a backward runs again; None where this is no recomputation.
        frames: the ids of the calls under way.
    """

    first: list[Any] = field(default_factory=list)
    again: Any = None
    frames: set[int] = field(default_factory=set)


def regions() -> Regions:
    """The checkpointed regions around the caller; none in a graph that is being compiled."""
    found = Regions()
    if torch.compiler.is_compiling():
        return found
    inner: FrameType | None = None
    frame: FrameType | None = sys._getframe(1)
    in_backward = False
    while frame is not None:
        found.frames.add(id(frame))
        if not in_backward:
            found.again = _run_again(frame)
            in_backward = found.again is not None or frame.f_code is _ENGINE
            if not in_backward and (region := _run_first(frame, inner)) is not None:
                found.first.append(region)
        inner, frame = frame, frame.f_back
    innermost = _of_hooks()
    if innermost is not None and innermost not in found.first:
        found.first.insert(0, innermost)
    return found


def recomputing() -> bool:
    """Whether this forward is activation checkpointing's second one, run from inside a backward.

    A hook may run a forward of its own in a backward, as losses with cached gradients do: that one is a first.
    """
    if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
        return False
    return regions().again is not None


def notes(region: Any) -> dict[Any, Any]:
    """What was noted of a region; it ends with the region's graph."""
    found: dict[Any, Any] = vars(region).setdefault("_shunter_notes", {})
    return found


def _of_hooks() -> Any:
    """The region that is run first and was begun by a hook, not by a call (`torch.distributed._composable`)."""
    pack, _ = torch._C._autograd._top_saved_tensors_default_hooks(True) or (None, None)
    code = getattr(pack, "__code__", None)
    if code is None or code.co_filename != _CHECKPOINTS or "frame" not in code.co_freevars:
        return None
    return inspect.getclosurevars(pack).nonlocals["frame"]


def _run_again(frame: FrameType) -> Any:
    """The region that a call begins to run again; None for any other call."""
    code = frame.f_code
    if code is _BACKWARD:
        return frame.f_locals["self"]
    if code.co_filename == _CHECKPOINTS and code.co_name == "unpack_hook":
        return frame.f_locals["frame"]
    return None


def _run_first(frame: FrameType, inner: FrameType | None) -> Any:
    """The region that a call begins to run, which goes on in an inner one; None for any other call."""
    code = frame.f_code
    if code is _FORWARD and inner is not None:  # the inner one is the function's forward or a wrapper of it
        given = inner.f_locals.get(next(iter(inner.f_code.co_varnames), ""))
        given = given[0] if isinstance(given, tuple) and given else given
        return given if isinstance(given, torch._C._FunctionBase) else None
    if code.co_filename == _CHECKPOINTS and code.co_name == "checkpoint":
        run = frame.f_locals.get("gen")
        return None if run is None or run.gi_frame is None else run.gi_frame.f_locals.get("new_frame")
    return None
