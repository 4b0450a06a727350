"""Whole experts by thread, in loops that Numba compiles: the CPU backend where it is installed.

Each thread takes a share of the triples and goes through it expert by expert: it gathers a block of rows, multiplies,
activates and multiplies again, while the rows are in its cache. The products are those of the MKL inside torch, called
from the loop and kept to the thread. So nothing is padded, nothing waits for other threads between two products, and no
call into torch is paid for each expert. An expert may be shared by neighbouring threads; each then has a part of the
gradients of its matrices, and the parts are added in order.

Numbers in half precision are widened as they are read and rounded once, at the end.
"""

from __future__ import annotations

from bisect import bisect_right
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..routing import Routing
from . import numba
from .autograd import Gradients, Needs, Plan, differentiable
from .backends import Backend, Weights, register
from .combine import sum_by_token
from .memory import scratch, with_huge_pages
from .products import product_dtype

__all__ = ["fused"]

# A thread has so many rows at work: enough for products at full speed, few enough for the cache.
BLOCK_ROWS = 512
# Reading an expert's matrices, and writing their gradients, takes as long as computing so many rows.
ROWS_OF_MATRICES = 16
# A thread's share ends with an expert if that changes it by so little.
TOLERANCE = 1 / 32

_LIKE = torch.empty(0, dtype=torch.float32, device="cpu")


class _Layout(NamedTuple):
    """What the threads take.

    Args:
        bounds: where the triples of each of n threads begin, n + 1.
        slots: by thread the part for the expert that an earlier thread began, and for any other.
        parts: how many parts of gradients there are.
        shared: by expert the parts that are its gradients together, in the order of the threads.
        block: how many rows a thread has at work at most.
        idle: the experts that compute nothing.
    """

    bounds: list[int]
    slots: list[tuple[int, int]]
    parts: int
    shared: dict[int, list[int]]
    block: int
    idle: list[int]


def _layout(offsets: list[int], threads: int, own: bool) -> _Layout:
    """The threads' shares of a routing; with `own` a part for each thread, also where it shares no expert."""
    bounds = _bounds(offsets, threads)
    slots: list[tuple[int, int]] = []
    shared: dict[int, list[int]] = {}
    parts = 0
    for start, end in zip(bounds, bounds[1:], strict=False):
        first, last = bisect_right(offsets, start) - 1, bisect_right(offsets, end - 1) - 1
        begun = start < end and offsets[first] < start
        goes_on = start < end < offsets[last + 1] and not (begun and first == last)
        slots.append((parts, parts + begun))
        if begun:
            shared[first].append(parts)
        if goes_on:
            shared[last] = [parts + begun]
        parts += begun + (goes_on or own)
    counts = [end - start for start, end in zip(offsets, offsets[1:], strict=False)]
    idle = [e for e, count in enumerate(counts) if not count]
    return _Layout(bounds, slots, parts, shared, min(max(*counts, 1), BLOCK_ROWS), idle)


def _bounds(offsets: list[int], threads: int) -> list[int]:
    """Where the threads' shares of about equal work begin and end."""
    work = [0]
    for start, end in zip(offsets, offsets[1:], strict=False):
        work.append(work[-1] + (end - start + ROWS_OF_MATRICES if end > start else 0))
    near = TOLERANCE * work[-1] / threads
    bounds = [0]
    for t in range(1, threads):
        target = work[-1] * t / threads
        e = min(bisect_right(work, target), len(offsets) - 1) - 1
        if target - work[e] <= near:
            bounds.append(offsets[e])
        elif work[e + 1] - target <= near:
            bounds.append(offsets[e + 1])
        else:
            part = (target - work[e]) / (work[e + 1] - work[e])
            bounds.append(offsets[e] + round(part * (offsets[e + 1] - offsets[e])))
    return [*bounds, offsets[-1]]


class _Fused:
    def plan(self, x: Tensor, weights: Weights, routing: Routing) -> Plan:
        layout = _layout(routing.offsets.tolist(), numba.threads(), x.dtype != torch.float32)
        return Plan(layout, (torch.tensor(layout.bounds), torch.tensor(layout.slots)))

    def forward(
        self, x: Tensor, weights: Weights, routing: Routing, plan: Plan, keep: bool
    ) -> tuple[Tensor, Tensor | None]:
        h = with_huge_pages(x.new_empty(routing.token.numel() if keep else 0, weights.up.shape[1]))
        y = _single("rows", routing.token.numel(), x.shape[1])
        with numba.ready() as kernels:
            kernels.forward(
                kernels.ACTIVATIONS[weights.activation],
                numba.array(x.contiguous()),
                _share(kernels, routing, plan),
                _matrices(kernels, x.dtype, weights.up, weights.down, weights.up_bias, weights.down_bias),
                _room(kernels, x, weights, plan.layout),
                numba.array(h),
                numba.array(y),
            )
        return sum_by_token(y, routing, routing.weight).to(x.dtype), h if keep else None

    def backward(
        self, grad: Tensor, x: Tensor, weights: Weights, routing: Routing, plan: Plan, h: Tensor | None, needs: Needs
    ) -> Gradients:
        n, d, width = routing.token.numel(), x.shape[1], weights.up.shape[1]
        own = (weights.up, weights.down, weights.up_bias, weights.down_bias)
        parameters = [
            with_huge_pages(torch.empty_like(value)) if value is not None and need else None
            for value, need in zip(own, needs[2:], strict=True)
        ]
        parts = [
            _single(f"parts {i}", plan.layout.parts, *gradient.shape[1:])
            if gradient is not None and plan.layout.parts
            else None
            for i, gradient in enumerate(parameters)
        ]
        dx = _single("rows", n if needs.x else 0, d)
        grad_weight = torch.empty(n, dtype=torch.float32)
        with numba.ready() as kernels:
            kernels.backward(
                kernels.ACTIVATIONS[weights.activation],
                numba.array(grad),
                numba.array(x.contiguous()),
                numba.array(routing.weight.float()),
                _share(kernels, routing, plan),
                _matrices(kernels, x.dtype, *own),
                _room(kernels, x, weights, plan.layout, backward=True),
                numba.array(x.new_empty(0, width) if h is None else h),
                _matrices(kernels, torch.float32, *parts),
                numba.array(dx),
                numba.array(grad_weight),
                _matrices(kernels, x.dtype, *parameters),
            )
        for gradient, part in zip(parameters, parts, strict=True):
            if gradient is None:
                continue
            for expert, slots in plan.layout.shared.items():
                gradient[expert] = part[slots].sum(0)  # type: ignore[index]
            if plan.layout.idle:
                gradient[plan.layout.idle] = 0
        weight = grad_weight.to(routing.weight.dtype) if needs.weight else None
        grad_x = sum_by_token(dx, routing, None).to(x.dtype) if needs.x else None
        return Gradients(grad_x, weight, *parameters)


def _single(name: str, *shape: int) -> Tensor:
    """Scratch in float32."""
    return scratch(f"fused {name}", _LIKE, *shape)


def _matrices(kernels: Any, dtype: torch.dtype, *parts: Tensor | None) -> Any:
    """Matrices (E, q, p), and biases (E, q) as (E, 1, q), of one dtype; none for None."""
    none = _none(dtype)
    arrays = [none if part is None else numba.array(part if part.ndim == 3 else part[:, None]) for part in parts]
    return kernels.Matrices(*arrays)


@cache
def _none(dtype: torch.dtype) -> Any:
    return numba.array(torch.empty(0, 0, 0, dtype=dtype, device="cpu"))


def _share(kernels: Any, routing: Routing, plan: Plan) -> Any:
    return kernels.Share(*map(numba.array, (routing.token, routing.offsets, *plan.indices)))


def _room(kernels: Any, x: Tensor, weights: Weights, layout: _Layout, backward: bool = False) -> Any:
    """Scratch for each thread's block; what is not needed is empty."""
    threads, (d, f), width = len(layout.slots), weights.down.shape[1:], weights.up.shape[1]
    rows, later = layout.block, layout.block if backward else 0
    half = x.dtype != torch.float32
    shapes = {
        "x": (rows, d), "h": (rows, width), "a": (rows, f), "dy": (later, d), "dh": (later, width), "da": (later, f),
        "up": (width if half else 0, d), "down": (d if half else 0, f),
    }  # fmt: skip
    whole = numba.array(_single("room", threads * sum(n * m for n, m in shapes.values())))
    parts, start = {}, 0
    for name, (n, m) in shapes.items():
        end = start + threads * n * m
        parts[name], start = whole[start:end].reshape(threads, n, m), end
    return kernels.Room(**parts, again=numba.array(scratch("fused again", x, threads, later, width)))


def _refuses(x: Tensor, weights: Weights) -> str | None:
    if not x.is_cpu:
        return "it runs on CPUs"
    if x.dtype not in numba.DTYPES:
        return f"it computes in float32, not in {x.dtype}"
    if product_dtype(x) != torch.float32:
        return f"this processor multiplies {x.dtype} itself"
    parts = (weights.up, weights.down, weights.up_bias, weights.down_bias)
    if not all(part is None or part.is_contiguous() for part in parts):
        return "the experts' matrices or biases are not contiguous"
    return numba.lacks()


fused = differentiable("fused", _Fused())
register(Backend("fused", fused, _refuses, "whole experts by thread, in compiled loops around MKL's products"))
