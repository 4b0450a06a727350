"""Padded batched products over chunks of experts: the fast CPU backend for many small experts.

A loop of small products pays a call and a thread hand-over for each expert. Here neighbouring experts form a chunk
whose rows, padded to the chunk's fullest expert, fit the cache together: one batched product computes them all, and the
gathers, activations and products of a chunk reuse the same few buffers. What is kept for the backward is x and the
unpadded pre-activations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..routing import Routing
from .backends import Backend, Weights, activate, activate_backward, register
from .combine import sum_by_token
from .memory import empty

__all__ = ["padded"]

# What a chunk's padded rows may take: with the products' operands it stays inside a few MiB of cache.
CHUNK_BYTES = 4 * 2**20
# A chunk closes before padding would make it this much larger than its rows.
MAX_WASTE = 1.3


def padded(x: Tensor, weights: Weights, routing: Routing) -> Tensor:
    """The experts' weighted outputs (T, d) of x (T, d); equal to `reference`, once differentiable."""
    return _Padded.apply(
        x, routing.weight, weights.up, weights.down, weights.up_bias, weights.down_bias, routing, weights.activation
    )


@dataclass(frozen=True)
class _Chunk:
    """Experts [first, last), each with `slots` padded slots; slot s of the chunk holds the triple `rows[s]`.

    An unfilled slot repeats a real row, so that no value from outside the chunk's tokens enters; its weight is zero.
    `real` are the slots that hold a triple of their own, in the order of the triples `span`.
    """

    first: int
    last: int
    slots: int
    rows: Tensor
    real: Tensor
    span: slice
    full: bool


def _chunks(routing: Routing, row_bytes: int) -> list[_Chunk]:
    counts = routing.counts.tolist()
    bounds = routing.offsets.tolist()
    groups: list[tuple[int, int, int]] = []
    first, most, total = 0, 0, 0
    for e, count in enumerate(counts):
        most_then, total_then, size = max(most, count), total + count, e + 1 - first
        too_big = size * most_then * row_bytes > CHUNK_BYTES
        wasteful = size * most_then > MAX_WASTE * total_then + 16 * size
        if e > first and (too_big or wasteful):
            groups.append((first, e, most))
            first, most_then, total_then = e, count, count
        most, total = most_then, total_then
    if counts:
        groups.append((first, len(counts), most))
    chunks = []
    for first, last, most in groups:
        start, end = bounds[first], bounds[last]
        if start == end:
            continue
        if most * (last - first) == end - start:
            rows = torch.arange(start, end)
            chunks.append(_Chunk(first, last, most, rows, rows - start, slice(start, end), True))
            continue
        begins = routing.offsets[first:last, None]
        slot = torch.arange(most)
        rows = begins + slot
        filled = slot < routing.counts[first:last, None]
        rows = torch.where(filled, rows, begins.clamp(max=end - 1)).reshape(-1)
        real = filled.reshape(-1).nonzero().squeeze(1)
        chunks.append(_Chunk(first, last, most, rows, real, slice(start, end), False))
    return chunks


class _Buffers:
    """Scratch memory that every chunk reuses: fresh large buffers cost more in page faults than in work."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.flat: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        size = 1
        for n in shape:
            size *= n
        held = self.flat.get(name)
        if held is None or held.numel() < size:
            held = self.flat[name] = self.like.new_empty(size)
        return held[:size].view(shape)


class _Padded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        up: Tensor,
        down: Tensor,
        up_bias: Tensor | None,
        down_bias: Tensor | None,
        routing: Routing,
        activation: str,
    ) -> Tensor:
        n, (d, f) = routing.token.numel(), down.shape[1:]
        width = up.shape[1]
        h = empty(x, n, width)
        y = empty(x, n, d)
        buffers = _Buffers(x)
        chunks = _chunks(routing, (2 * d + width + f) * x.element_size())
        for c in chunks:
            experts, shape = slice(c.first, c.last), (c.last - c.first, c.slots)
            token = routing.token[c.rows]
            x_c = torch.index_select(x, 0, token, out=buffers.take("x", token.numel(), d))
            h_c = h[c.span] if c.full else buffers.take("h", token.numel(), width)
            _batched(x_c.view(*shape, d), up[experts].mT, up_bias, experts, h_c.view(*shape, width))
            a_c = activate(h_c, activation)
            y_c = y[c.span] if c.full else buffers.take("y", token.numel(), d)
            _batched(a_c.view(*shape, f), down[experts].mT, down_bias, experts, y_c.view(*shape, d))
            if not c.full:
                torch.index_select(h_c, 0, c.real, out=h[c.span])
                torch.index_select(y_c, 0, c.real, out=y[c.span])
        ctx.save_for_backward(x, weight, up, down, up_bias, down_bias, h)
        ctx.routing, ctx.activation, ctx.chunks = routing, activation, chunks
        return sum_by_token(y, routing, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, up, down, up_bias, down_bias, h = ctx.saved_tensors
        routing: Routing = ctx.routing
        grad_out = grads[0].contiguous()
        need_x, need_weight, need_up, need_down, need_up_bias, need_down_bias = ctx.needs_input_grad[:6]
        need_h = need_x or need_up or need_up_bias
        d, f, width = down.shape[1], down.shape[2], up.shape[1]
        n = routing.token.numel()
        grad_rows = empty(x, n, d) if need_x else None
        grad_weight = torch.empty_like(weight) if need_weight else None
        grad_up, grad_down, grad_up_bias, grad_down_bias = (
            empty(value, *value.shape) if need else None
            for value, need in (
                (up, need_up),
                (down, need_down),
                (up_bias, need_up_bias),
                (down_bias, need_down_bias),
            )
        )
        buffers = _Buffers(x)
        for c in ctx.chunks:
            experts, shape = slice(c.first, c.last), (c.last - c.first, c.slots)
            token = routing.token[c.rows]
            slots = token.numel()
            dy = torch.index_select(grad_out, 0, token, out=buffers.take("dy", slots, d))
            h_c = h[c.span] if c.full else torch.index_select(h, 0, c.rows, out=buffers.take("h", slots, width))
            w = weight[c.rows].to(x.dtype)
            if not c.full:
                w = torch.zeros_like(w).index_copy_(0, c.real, w[c.real])
            w = w[:, None]
            da = buffers.take("da", slots, f)
            torch.bmm(dy.view(*shape, d), down[experts], out=da.view(*shape, f))  # before the combine weight
            a, dh = activate_backward(h_c, da, w if need_h else None, ctx.activation)
            if grad_weight is not None:
                inner = torch.linalg.vecdot(da, a).to(weight.dtype)
                if down_bias is not None:
                    bias = down_bias[experts].repeat_interleave(c.slots, 0)
                    inner = inner + torch.linalg.vecdot(dy, bias).to(weight.dtype)
                grad_weight[c.span] = inner[c.real]
            if grad_down is not None or grad_down_bias is not None:
                dy.mul_(w)
                if grad_down is not None:
                    torch.bmm(dy.view(*shape, d).mT, a.view(*shape, f), out=grad_down[experts])
                if grad_down_bias is not None:
                    grad_down_bias[experts] = dy.view(*shape, d).sum(1)
            if dh is None:
                continue
            dh_c = dh.view(*shape, width)
            if grad_up is not None:
                x_c = torch.index_select(x, 0, token, out=buffers.take("x", slots, d))
                torch.bmm(dh_c.mT, x_c.view(*shape, d), out=grad_up[experts])
            if grad_up_bias is not None:
                grad_up_bias[experts] = dh_c.sum(1)
            if grad_rows is not None:
                dx = grad_rows[c.span] if c.full else buffers.take("dx", slots, d)
                torch.bmm(dh_c, up[experts], out=dx.view(*shape, d))
                if not c.full:
                    torch.index_select(dx, 0, c.real, out=grad_rows[c.span])
        idle = (routing.counts == 0).nonzero().squeeze(1)
        if idle.numel():
            for grad in (grad_up, grad_down, grad_up_bias, grad_down_bias):
                if grad is not None:
                    grad.index_fill_(0, idle, 0)
        grad_x = None if grad_rows is None else sum_by_token(grad_rows, routing, None)
        return grad_x, grad_weight, grad_up, grad_down, grad_up_bias, grad_down_bias, None, None


def _batched(x: Tensor, weight: Tensor, bias: Tensor | None, experts: slice, out: Tensor) -> None:
    if bias is None:
        torch.bmm(x, weight, out=out)
    else:
        torch.baddbmm(bias[experts, None], x, weight, out=out)


register(Backend("padded", padded, lambda x, weights: None, "padded batched products over chunks of experts"))
