"""Whole experts by thread, in loops that Numba compiles: the CPU backend where it is installed.

Each thread takes a share of the triples and goes through it expert by expert: it gathers a block of rows, multiplies,
activates and multiplies again, while the rows are in its cache. The products are those of the MKL inside torch, called
from the loop and kept to the thread. So nothing is padded, nothing waits for other threads between two products, and no
call into torch is paid for each expert. An expert may be shared by neighbouring threads; each then has a part of the
gradients of its matrices, and the parts are added in order.

Where the processor multiplies bfloat16 the products are oneDNN's, with sums in float32. Elsewhere numbers in half
precision are widened as they are read, and rounded once, at the end.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ....routing import Routing
from ...autograd import Gradients, Needs, Plan, differentiable
from ...choice import Backend, register
from ...cpu import SINGLE, product_dtype, scratch, with_huge_pages
from ...quantised import NO_BACKWARD, QuantisedWeights
from ...weights import Weights
from . import bridge
from .gradients import gradient_of

__all__ = ["numba"]

# A thread has so many rows at work: enough for products at full speed, few enough for the cache.
BLOCK_ROWS = 512


class _Numba:
    def plan(self, x: Tensor, weights: Weights, routing: Routing) -> Plan:
        """The number of shares."""
        return Plan(bridge.threads(), ())

    def forward(
        self, x: Tensor, weights: Weights, routing: Routing, plan: Plan, keep: bool
    ) -> tuple[Tensor, Tensor | None]:
        n, width = routing.token.numel(), weights.up.shape[1]
        own = (weights.up, weights.down, weights.up_bias, weights.down_bias)
        h = with_huge_pages(torch.empty(n if keep else 0, width, dtype=x.dtype, device=x.device))
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        operands = bridge.operands(x, weights)
        block = _block(n, operands)
        with bridge.ready() as loops:
            loops.forward(
                loops.ACTIVATIONS[weights.activation],
                bridge.array(operands),
                bridge.array(x.contiguous()),
                bridge.triples(loops, routing),
                bridge.array(routing.weight.float()),
                bridge.matrices(loops, x.dtype, *own),
                block,
                _scratch_of_shares(loops, operands, weights, plan.layout, block),
                bridge.array(scratch("numba rows", operands, n, x.shape[1])),
                bridge.array(h),
                bridge.array(out),
            )
        return out, h if keep else None

    def forward_coded(self, x: Tensor, weights: QuantisedWeights, routing: Routing) -> Tensor:
        """The output (T, d), each expert's matrices decoded panel by panel."""
        n, d, f = routing.token.numel(), weights.dim, weights.hidden
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        block = _block(n, SINGLE)
        with bridge.ready() as loops:
            panel = loops.PANEL_ROWS * max(weights.up.width, weights.down.width)
            loops.forward_coded(
                loops.ACTIVATIONS[weights.activation],
                bridge.array(x.contiguous()),
                bridge.triples(loops, routing),
                bridge.array(routing.weight.float()),
                bridge.coded(loops, weights.up),
                bridge.coded(loops, weights.down),
                *bridge.biases(x.dtype, weights.up_bias, weights.down_bias),
                block,
                bridge.array(_single("coded", bridge.threads(), block * (d + weights.up.rows + f) + panel)),
                bridge.array(_single("rows", n, d)),
                bridge.array(out),
            )
        return out

    def backward(
        self, grad: Tensor, x: Tensor, weights: Weights, routing: Routing, plan: Plan, h: Tensor | None, needs: Needs
    ) -> Gradients:
        n, d = routing.token.numel(), x.shape[1]
        own = (weights.up, weights.down, weights.up_bias, weights.down_bias)
        parameters = [
            gradient_of(value) if value is not None and need else None
            for value, need in zip(own, needs[2:], strict=True)
        ]
        part = sum(gradient[0].numel() for gradient in parameters if gradient is not None)
        grad_weight = torch.empty(n, dtype=torch.float32, device=x.device)
        grad_x = torch.empty_like(x if needs.x else x[:0], memory_format=torch.contiguous_format)
        operands = bridge.operands(x, weights)
        block = _block(n, operands)
        with bridge.ready() as loops:
            loops.backward(
                loops.ACTIVATIONS[weights.activation],
                bridge.array(operands),
                bridge.array(grad),
                bridge.array(x.contiguous()),
                bridge.triples(loops, routing),
                bridge.array(routing.weight.float()),
                bridge.matrices(loops, x.dtype, *own),
                block,
                _scratch_of_shares(loops, operands, weights, plan.layout, block),
                bridge.array(x[:0, :0] if h is None else h),
                bridge.array(_single("parts", 2 * plan.layout, part)),
                bridge.array(scratch("numba rows", operands, n if needs.x else 0, d)),
                bridge.array(grad_x),
                bridge.array(grad_weight),
                bridge.matrices(loops, x.dtype, *parameters),
            )
        weight = grad_weight.to(routing.weight.dtype) if needs.weight else None
        return Gradients(grad_x if needs.x else None, weight, *parameters)


def _single(name: str, *shape: int) -> Tensor:
    """Scratch in float32."""
    return scratch(f"numba {name}", SINGLE, *shape)


def _block(triples: int, operands: Tensor) -> int:
    """How many rows are at work at once: whole steps of what is packed together."""
    step = 1 if operands.dtype == torch.float32 else 16
    return -(-min(triples, BLOCK_ROWS) // step) * step


def _scratch_of_shares(loops: Any, operands: Tensor, weights: Weights, shares: int, block: int) -> Any:
    """Scratch in float32 for each share, the same for both halves: for a block of rows, and for changed matrices."""
    (d, f), width = weights.down.shape[1:], weights.up.shape[1]
    changed = (width + f) * d if weights.dtype != operands.dtype else 0
    if operands.dtype != torch.float32:
        changed = block * d + loops.packed_size(max(width, d), block)
    return bridge.array(_single("shares", shares, block * (2 * (d + width + f) + width) + changed))


def _refuses(x: Tensor, weights: Weights | QuantisedWeights) -> str | None:
    if not x.is_cpu:
        return "it runs on CPUs"
    if x.dtype not in bridge.DTYPES:
        return f"it computes in float32, not in {x.dtype}"
    if isinstance(weights, QuantisedWeights):
        return NO_BACKWARD if torch.is_grad_enabled() and x.requires_grad else bridge.lacks()
    dim, hidden = weights.down.shape[1:]
    if product_dtype(x) != torch.float32 and (reason := bridge.no_halves(x.dtype, dim, hidden)):
        return reason
    parts = (weights.up, weights.down, weights.up_bias, weights.down_bias)
    if not all(part is None or part.is_contiguous() for part in parts):
        return "the experts' matrices or biases are not contiguous"
    return bridge.lacks()


def _not_worth_threads(x: Tensor, weights: Weights | QuantisedWeights) -> str | None:
    """Why so little work is left to another backend; None where it is enough."""
    if isinstance(weights, QuantisedWeights):  # which no other multiplies without making all of a matrix first
        return None
    if x.numel() < bridge.SMALL:
        return f"{x.numel()} numbers are few for threads that may be busy"
    if (experts := weights.up.shape[0]) < bridge.threads():
        return f"{experts} experts are fewer than its {bridge.threads()} threads"
    return None


_stacked = differentiable("numba", _Numba())


def numba(x: Tensor, weights: Weights | QuantisedWeights, routing: Routing, recompute: bool = False) -> Tensor:
    """The output (T, d)."""
    if isinstance(weights, QuantisedWeights):
        return _Numba().forward_coded(x, weights, routing)
    return _stacked(x, weights, routing, recompute)


register(
    Backend(
        "numba",
        numba,
        _refuses,
        "whole experts by thread, in compiled loops around MKL's products",
        _not_worth_threads,
        lambda x, weights: "on a CPU its threads neither wait for each other nor pay calls for each expert",
        takes=(Weights, QuantisedWeights),
    )
)
