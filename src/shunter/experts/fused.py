"""Whole experts by thread, in loops that Numba compiles: the CPU backend where it is installed.

Each thread takes a share of the triples and goes through it expert by expert: it gathers a block of rows, multiplies,
activates and multiplies again, while the rows are in its cache. The products are those of the MKL inside torch, called
from the loop and kept to the thread. So nothing is padded, nothing waits for other threads between two products, and no
call into torch is paid for each expert. An expert may be shared by neighbouring threads; each then has a part of the
gradients of its matrices, and the parts are added in order.

Numbers in half precision are widened as they are read and rounded once, at the end.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..routing import Routing
from . import numba
from .autograd import Gradients, Needs, Plan, differentiable
from .backends import Backend, Weights, register
from .memory import SINGLE, scratch, with_huge_pages
from .products import product_dtype

__all__ = ["fused"]

# A thread has so many rows at work: enough for products at full speed, few enough for the cache.
BLOCK_ROWS = 512


class _Fused:
    def plan(self, x: Tensor, weights: Weights, routing: Routing) -> Plan:
        """The number of shares."""
        return Plan(numba.threads(), ())

    def forward(
        self, x: Tensor, weights: Weights, routing: Routing, plan: Plan, keep: bool
    ) -> tuple[Tensor, Tensor | None]:
        n, width = routing.token.numel(), weights.up.shape[1]
        own = (weights.up, weights.down, weights.up_bias, weights.down_bias)
        h = with_huge_pages(torch.empty(n if keep else 0, width, dtype=x.dtype, device=x.device))
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        block = min(n, BLOCK_ROWS)
        with numba.ready() as kernels:
            kernels.forward(
                kernels.ACTIVATIONS[weights.activation],
                numba.array(x.contiguous()),
                numba.triples(kernels, routing),
                numba.array(routing.weight.float()),
                numba.matrices(kernels, x.dtype, *own),
                block,
                _room(x, weights, plan.layout, block),
                numba.array(_single("rows", n, x.shape[1])),
                numba.array(h),
                numba.array(out),
            )
        return out, h if keep else None

    def backward(
        self, grad: Tensor, x: Tensor, weights: Weights, routing: Routing, plan: Plan, h: Tensor | None, needs: Needs
    ) -> Gradients:
        n, d = routing.token.numel(), x.shape[1]
        own = (weights.up, weights.down, weights.up_bias, weights.down_bias)
        parameters = [
            with_huge_pages(torch.empty_like(value)) if value is not None and need else None
            for value, need in zip(own, needs[2:], strict=True)
        ]
        part = sum(gradient[0].numel() for gradient in parameters if gradient is not None)
        grad_weight = torch.empty(n, dtype=torch.float32, device=x.device)
        grad_x = torch.empty_like(x if needs.x else x[:0], memory_format=torch.contiguous_format)
        block = min(n, BLOCK_ROWS)
        with numba.ready() as kernels:
            kernels.backward(
                kernels.ACTIVATIONS[weights.activation],
                numba.array(grad),
                numba.array(x.contiguous()),
                numba.triples(kernels, routing),
                numba.array(routing.weight.float()),
                numba.matrices(kernels, x.dtype, *own),
                block,
                _room(x, weights, plan.layout, block),
                numba.array(x[:0, :0] if h is None else h),
                numba.array(_single("parts", 2 * plan.layout, part)),
                numba.array(_single("rows", n if needs.x else 0, d)),
                numba.array(grad_x),
                numba.array(grad_weight),
                numba.matrices(kernels, x.dtype, *parameters),
            )
        weight = grad_weight.to(routing.weight.dtype) if needs.weight else None
        return Gradients(grad_x if needs.x else None, weight, *parameters)


def _single(name: str, *shape: int) -> Tensor:
    """Scratch in float32."""
    return scratch(f"fused {name}", SINGLE, *shape)


def _room(x: Tensor, weights: Weights, shares: int, block: int) -> Any:
    """Scratch in float32 for each share, the same for both halves: for a block of rows, and for widened matrices."""
    (d, f), width = weights.down.shape[1:], weights.up.shape[1]
    wide = (width + f) * d if x.dtype != torch.float32 else 0
    return numba.array(_single("room", shares, block * (2 * (d + width + f) + width) + wide))


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
