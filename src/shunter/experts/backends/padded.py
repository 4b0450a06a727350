"""Padded batched products over chunks of experts: the CPU backend.

A loop of small products pays a call and a thread hand-over for each expert. Here neighbouring experts form a chunk
whose rows, padded to the chunk's fullest expert, fit the cache together: one batched product computes them all, and the
gathers, activations and products of a chunk reuse the same few buffers. A large expert is a chunk by itself.

Where the processor has no instructions for products in half precision, torch's take many times those in float32: a
chunk's operands are then widened to float32, and its results rounded once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...routing import Routing
from ..activations import activate, activate_backward
from ..autograd import Gradients, Needs, Plan, differentiable
from ..choice import Backend, register
from ..combine import sum_by_token
from ..cpu import product_dtype, scratch
from ..weights import Weights

__all__ = ["padded"]

# What a chunk's padded rows may take: with the products' operands it stays inside a few MiB of cache.
CHUNK_BYTES = 8 * 2**20

# A chunk closes before padding would make it this much larger than its rows and so many slots for each expert.
MAX_WASTE = 1.3

SLACK = 16

# A product of one expert with a result at least twice as wide as its rows is a batch of panels of so many columns.
PANEL_COLUMNS = 512


class _Chunk(NamedTuple):
    """Experts [first, last) with `slots` padded slots each, from slot `base` on; their triples are [start, end)."""

    first: int
    last: int
    slots: int
    base: int
    start: int
    end: int

    @property
    def experts(self) -> slice:
        return slice(self.first, self.last)

    @property
    def shape(self) -> tuple[int, int]:
        return self.last - self.first, self.slots

    @property
    def size(self) -> int:
        return (self.last - self.first) * self.slots

    @property
    def padded(self) -> slice:
        return slice(self.base, self.base + self.size)

    @property
    def triples(self) -> slice:
        return slice(self.start, self.end)

    @property
    def in_order(self) -> bool:
        """Whether the first slots hold the triples in order, and the others, if any, come last."""
        return self.last - self.first == 1 or self.size == self.end - self.start


class _Layout(NamedTuple):
    """The chunks that compute something, and the experts that compute nothing."""

    chunks: list[_Chunk]
    idle: list[int]


def _plan(routing: Routing, row_bytes: int, step: int) -> Plan:
    """The layout, and where its P slots are.

    An unfilled slot repeats the first triple of its expert, so that no value from outside the expert enters; its weight
    is zero. The indices: the triple (P,) and the token (P,) of each slot; the slot of each triple (N,), counted from
    the beginning and from that of its chunk.
    """
    bounds = routing.offsets.tolist()
    counts = [end - start for start, end in zip(bounds, bounds[1:], strict=False)]
    chunks: list[_Chunk] = []
    places: list[tuple[int, int, int]] = []  # by expert: its slots, how far they are from its triples, its chunk's base
    base = 0
    for first, last, slots in _groups(counts, row_bytes, step):
        chunk = _Chunk(first, last, slots, base, bounds[first], bounds[last])
        places += [(slots, base + i * slots - bounds[first + i], base) for i in range(last - first)]
        if slots:
            chunks.append(chunk)
        base += chunk.size
    layout = _Layout(chunks, [e for e, count in enumerate(counts) if not count])
    slots_of, shift, base_of = torch.tensor(places, device=routing.token.device).unbind(1)
    triple = torch.arange(bounds[-1], device=routing.token.device)
    slot = triple + shift[routing.expert]
    row = routing.offsets[:-1].clamp(max=max(bounds[-1] - 1, 0)).repeat_interleave(slots_of, output_size=base)
    row[slot] = triple
    return Plan(layout, (row, routing.token[row], slot, slot - base_of[routing.expert]))


def _groups(counts: list[int], row_bytes: int, step: int) -> list[tuple[int, int, int]]:
    """Runs of experts (first, last, slots of each); of many, a multiple of the threads that share them."""
    threads = torch.get_num_threads()
    bounds = [0]
    for e in range(1, len(counts)):
        while (size := e - bounds[-1]) and not _fits(counts[bounds[-1] : e + 1], row_bytes):
            bounds.append(bounds[-1] + (size // threads * threads or size))
    return [
        (first, last, -(-max(counts[first:last]) // step) * step)
        for first, last in zip(bounds, [*bounds[1:], len(counts)], strict=True)
    ]


def _fits(counts: list[int], row_bytes: int) -> bool:
    """Whether experts with so many rows make one chunk."""
    padded = len(counts) * max(counts)
    return padded * row_bytes <= CHUNK_BYTES and padded <= MAX_WASTE * sum(counts) + SLACK * len(counts)


def _step(x: Tensor, routing: Routing) -> int:
    """What the slots of an expert are a multiple of.

    Products of half precision are compiled for their sizes, anew for each number of rows: few different ones do.
    """
    if product_dtype(x).itemsize > 2:
        return 1
    mean = routing.token.numel() // routing.num_experts
    return max(8, 2 ** (mean // 32).bit_length() // 2)


class _Buffers:
    """The memory that every chunk reuses, by name."""

    def __init__(self, like: Tensor, layout: _Layout, **widths: int) -> None:
        rows = max((chunk.size for chunk in layout.chunks), default=0)
        self.whole = {name: scratch(name, like, rows, width) for name, width in widths.items()}

    def take(self, name: str, rows: int) -> Tensor:
        return self.whole[name][:rows]


class _Padded:
    def plan(self, x: Tensor, weights: Weights, routing: Routing) -> Plan:
        width, (d, f) = weights.up.shape[1], weights.down.shape[1:]
        return _plan(routing, (2 * d + width + f) * product_dtype(x).itemsize, _step(x, routing))

    def forward(
        self, x: Tensor, weights: Weights, routing: Routing, plan: Plan, keep: bool
    ) -> tuple[Tensor, Tensor | None]:
        width, (d, f) = weights.up.shape[1], weights.down.shape[1:]
        row, token, slot, local = plan.indices
        h = x.new_empty(slot.numel(), width) if keep else None
        wide = x.to(product_dtype(x))
        y = scratch("rows", wide, row.numel(), d)
        buffers = _Buffers(wide, plan.layout, x=d, h=width, a=f)
        for c in plan.layout.chunks:
            x_c = torch.index_select(wide, 0, token[c.padded], out=buffers.take("x", c.size))
            # Unfilled slots behind the others may run over the next chunk's triples, which it then writes.
            direct = h is not None and h.dtype == wide.dtype and c.in_order and c.start + c.size <= h.shape[0]
            h_c = h[c.start : c.start + c.size] if h is not None and direct else buffers.take("h", c.size)
            _batched(x_c, _matrices("up", weights.up, c, wide).mT, weights.up_bias, c, h_c)
            if h is not None and not direct:
                if c.in_order:
                    h[c.triples] = h_c[: c.end - c.start]
                else:
                    _take(h_c, local[c.triples], h[c.triples])
            a_c = buffers.take("a", c.size)
            activate(h_c, weights.activation, a_c)
            _batched(a_c, _matrices("down", weights.down, c, wide).mT, weights.down_bias, c, y[c.padded])
        return sum_by_token(y, routing, routing.weight, slot).to(x.dtype), h

    def backward(
        self, grad: Tensor, x: Tensor, weights: Weights, routing: Routing, plan: Plan, h: Tensor | None, needs: Needs
    ) -> Gradients:
        up, down, up_bias, down_bias = weights.up, weights.down, weights.up_bias, weights.down_bias
        width, (d, f) = up.shape[1], down.shape[1:]
        row, token, slot, local = plan.indices
        wide, wide_grad = x.to(product_dtype(x)), grad.to(product_dtype(x))
        weight = wide.new_zeros(row.numel(), 1)
        weight[slot, 0] = routing.weight.to(wide.dtype)
        grad_weight = torch.empty_like(routing.weight) if needs.weight else None
        grad_up, grad_down, grad_up_bias, grad_down_bias = parameters = [
            torch.empty_like(value) if value is not None and need else None
            for value, need in zip((up, down, up_bias, down_bias), needs[2:], strict=True)
        ]
        dx = scratch("rows", wide, row.numel(), d) if needs.x else None
        buffers = _Buffers(wide, plan.layout, x=d, dy=d, h=width, da=f, acted=f, a=f, dh=width)
        for c in plan.layout.chunks:
            dy = torch.index_select(wide_grad, 0, token[c.padded], out=buffers.take("dy", c.size))
            x_c, h_c = buffers.take("x", c.size), buffers.take("h", c.size)
            if h is None or grad_up is not None:
                torch.index_select(wide, 0, token[c.padded], out=x_c)
            if h is None:
                _batched(x_c, _matrices("up", up, c, wide).mT, up_bias, c, h_c)
                if x.dtype != wide.dtype:
                    h_c.copy_(h_c.to(x.dtype))  # as it would have been kept
            da, a, dh = buffers.take("da", c.size), buffers.take("a", c.size), buffers.take("dh", c.size)
            _batched(dy, _matrices("down", down, c, wide), None, c, da)
            w = weight[c.padded]
            if h is not None and c.size == c.end - c.start:
                h_c = h[c.triples].to(wide.dtype)
            elif h is not None:
                _take(h, row[c.padded], h_c)
            inner = activate_backward(h_c, da, w, weights.activation, (buffers.take("acted", c.size), a, dh))
            if grad_weight is not None:
                if down_bias is not None:
                    bias = down_bias[c.experts, :, None].to(wide.dtype)
                    inner += torch.bmm(dy.view(*c.shape, d), bias).view(-1)
                grad_weight[c.triples] = inner[local[c.triples]]
            if grad_down is not None or grad_down_bias is not None:
                dy.mul_(w)
            if grad_down is not None:
                _product(dy.view(*c.shape, d).mT, a.view(*c.shape, f), grad_down[c.experts])
            if grad_down_bias is not None:
                grad_down_bias[c.experts] = dy.view(*c.shape, d).sum(1)
            if grad_up is not None:
                _product(dh.view(*c.shape, width).mT, x_c.view(*c.shape, d), grad_up[c.experts])
            if grad_up_bias is not None:
                grad_up_bias[c.experts] = dh.view(*c.shape, width).sum(1)
            if dx is not None:
                _batched(dh, _matrices("up", up, c, wide), None, c, dx[c.padded])
        if plan.layout.idle:
            for gradient in parameters:
                if gradient is not None:
                    gradient[plan.layout.idle] = 0
        grad_x = None if dx is None else sum_by_token(dx, routing, None, slot).to(x.dtype)
        return Gradients(grad_x, grad_weight, grad_up, grad_down, grad_up_bias, grad_down_bias)


def _batched(rows: Tensor, matrices: Tensor, bias: Tensor | None, chunk: _Chunk, out: Tensor) -> None:
    """Each expert's slots times its matrix (E, p, q), plus its bias (E, q): rows (slots, p) into out (slots, q)."""
    rows, out = rows.view(*chunk.shape, -1), out.view(*chunk.shape, -1)
    p, q = matrices.shape[1:]
    panels = q // PANEL_COLUMNS
    if bias is None and chunk.shape[0] == 1 and q >= 2 * p and q == panels * PANEL_COLUMNS:
        by_panel = [part[0].unflatten(1, (panels, -1)).transpose(0, 1) for part in (matrices, out)]
        torch.bmm(rows.expand(panels, -1, -1), by_panel[0], out=by_panel[1])
    elif bias is None:
        torch.bmm(rows, matrices, out=out)
    else:
        torch.baddbmm(bias[chunk.experts, None].to(rows.dtype), rows, matrices, out=out)


def _matrices(name: str, matrices: Tensor, chunk: _Chunk, like: Tensor) -> Tensor:
    """The chunk's matrices in the dtype of the products; widened ones are in scratch memory of a name."""
    own = matrices[chunk.experts]
    return own if own.dtype == like.dtype else scratch(name, like, *own.shape).copy_(own)


def _take(rows: Tensor, index: Tensor, out: Tensor) -> None:
    """The rows at an index, rounded or widened to the dtype of out."""
    if rows.dtype == out.dtype:
        torch.index_select(rows, 0, index, out=out)
    else:
        out.copy_(rows.index_select(0, index))


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """The batched product of a and b, rounded to the dtype of out."""
    if a.dtype == out.dtype:
        torch.bmm(a, b, out=out)
    else:
        out.copy_(torch.bmm(a, b, out=scratch("product", a, *out.shape)))


padded = differentiable("padded", _Padded())


def _reason(x: Tensor, weights: Weights) -> str:
    why = "on a CPU a product for each expert would cost more in calls, and fresh memory in faults"
    if (wide := product_dtype(x)) != x.dtype:
        why += f"; its products run in {wide}, which this processor multiplies faster than {x.dtype}"
    return why


register(
    Backend("padded", padded, lambda x, weights: None, "padded batched products over chunks of experts", reason=_reason)
)
