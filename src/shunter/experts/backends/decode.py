"""A few tokens without a backward, as in generation: the time is that of reading the weights of the experts they chose.

So only those are read, each once: by a loop that Numba compiles, or without it by the product of torch's that was
measured to read fastest.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...routing import Routing
from ..activations import activate
from ..autograd import Gradients, Needs, Plan, differentiable
from ..choice import Backend, is_transformed, register
from ..combine import sum_by_token
from ..cpu import SINGLE, scratch
from ..quantised import QuantisedWeights
from ..weights import ExpertWeights, Weights
from .numba import bridge

__all__ = ["decode", "decode_choices"]

# A matrix is read in panels of so many bytes or fewer, which the cores share.
PANEL_BYTES = 2**20

# So many columns are what a float32 matrix is multiplied by fastest: one or two fewer take as long, three longer.
FEW_COLUMNS = 4

# Up to so many tokens a layer without a backward is bound by reading weights.
FEW_TOKENS = 32


class _Decode:
    def plan(self, x: Tensor, weights: Weights, routing: Routing) -> Plan:
        return Plan(None, ())

    def forward(
        self, x: Tensor, weights: Weights, routing: Routing, plan: Plan, keep: bool
    ) -> tuple[Tensor, Tensor | None]:
        if x.dtype in bridge.DTYPES and bridge.usable(weights.up, weights.down):
            out, h = _in_loops(x, weights, routing)
            return out, h.to(x.dtype, copy=True) if keep else None
        counts = routing.counts.tolist()
        h = _products(x, routing.token, weights.up, counts)
        if weights.up_bias is not None:
            h += weights.up_bias[routing.expert]
        a = activate(h, weights.activation)
        y = _products(a, torch.arange(a.shape[0], device=a.device), weights.down, counts)
        if weights.down_bias is not None:
            y += weights.down_bias[routing.expert]
        return sum_by_token(y, routing, routing.weight), h if keep else None

    def backward(
        self, grad: Tensor, x: Tensor, weights: Weights, routing: Routing, plan: Plan, h: Tensor | None, needs: Needs
    ) -> Gradients:
        raise NotImplementedError("the decode backend has no backward; call it under torch.no_grad()")


def _one_by_one(x: Tensor, weights: ExpertWeights, routing: Routing) -> Tensor:
    """The output (T, d) by the matrices of one expert after another, of those that have tokens."""
    y = x.new_empty(routing.token.numel(), weights.dim)
    bounds = routing.offsets.tolist()
    for e, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        if start < end:
            up, down, up_bias, down_bias = weights.expert(e)
            h = F.linear(x[routing.token[start:end]], up, up_bias)
            y[start:end] = F.linear(activate(h, weights.activation), down, down_bias)
    return sum_by_token(y, routing, routing.weight)


def _in_loops(x: Tensor, weights: Weights, routing: Routing) -> tuple[Tensor, Tensor]:
    """The output (T, d), and in scratch memory the pre-activations (N, 2f) in float32."""
    with bridge.ready() as loops:
        return _stacked_in(loops, x, weights, bridge.triples(loops, routing), bridge.array(routing.weight.float()))


def _stacked_in(loops: Any, x: Tensor, weights: Weights, triples: Any, combine_weight: Any) -> tuple[Tensor, Tensor]:
    biases = [None if bias is None else bias.contiguous() for bias in (weights.up_bias, weights.down_bias)]
    n, (d, f) = triples.token.size, weights.down.shape[1:]
    h = scratch("decode h", SINGLE, n, weights.up.shape[1])
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    loops.decode(
        loops.ACTIVATIONS[weights.activation],
        bridge.array(x.contiguous()),
        triples,
        combine_weight,
        bridge.matrices(loops, x.dtype, weights.up, weights.down, *biases),
        bridge.array(scratch("decode", SINGLE, n * (2 * d + f))),
        bridge.array(h),
        bridge.array(out),
    )
    return out, h


def _coded_in_loops(x: Tensor, weights: QuantisedWeights, routing: Routing) -> Tensor:
    """The output (T, d), each matrix decoded as it is multiplied."""
    with bridge.ready() as loops:
        return _coded_in(loops, x, weights, bridge.triples(loops, routing), bridge.array(routing.weight.float()))


def _coded_in(loops: Any, x: Tensor, weights: QuantisedWeights, triples: Any, combine_weight: Any) -> Tensor:
    n, d, f = triples.token.size, weights.dim, weights.hidden
    width = max(weights.up.width, weights.down.width)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    loops.decode_coded(
        loops.ACTIVATIONS[weights.activation],
        bridge.array(x.contiguous()),
        triples,
        combine_weight,
        bridge.coded(loops, weights.up),
        bridge.coded(loops, weights.down),
        *bridge.biases(x.dtype, weights.up_bias, weights.down_bias),
        width,
        bridge.array(scratch("decode coded", SINGLE, n * (2 * d + weights.up.rows + f + width))),
        bridge.array(out),
    )
    return out


def decode_choices(
    x: Tensor, weights: Weights | QuantisedWeights, index: Tensor, combine_weight: Tensor
) -> Tensor | None:
    """`decode` of choices that the loops sort themselves: making a `Routing` would take longer than the experts.

    Args:
        x: (T, d).
        weights: of E experts.
        index: (T, k) int64, the experts of each token.
        combine_weight: (T, k).

    Returns:
        (T, d), the bits that `decode` returns for `Routing.from_topk`; None where it is not for the loops: many tokens,
        something learns or is traced, another dtype or device, an index of no expert.
    """
    plain = (x, index, combine_weight)
    if (
        not 0 < x.shape[0] <= FEW_TOKENS
        or torch.compiler.is_compiling()
        or index.dtype != torch.int64
        or not all(part.is_cpu for part in plain)
        or (torch.is_grad_enabled() and any(part.requires_grad for part in (*plain, *weights.learned())))
        or is_transformed((*plain, *weights.learned()))
    ):
        return None
    if isinstance(weights, Weights):
        if x.dtype != weights.up.dtype or not bridge.usable(weights.up, weights.down):
            return None
    elif not bridge.runs(x, weights):
        return None
    with bridge.ready() as loops:
        choices = bridge.array(index.contiguous()), bridge.array(combine_weight.float().contiguous())
        right, *routing = loops.sorted_choices(*choices, weights.num_experts)
        if not right:
            return None
        if isinstance(weights, Weights):
            return _stacked_in(loops, x, weights, *routing)[0]
        return _coded_in(loops, x, weights, *routing)


def _products(x: Tensor, index: Tensor, matrices: Tensor, counts: list[int]) -> Tensor:
    """The rows of x (., p) at an index (N,), sorted by expert, times their experts' matrices (E, q, p): (N, q)."""
    n, p = index.numel(), x.shape[1]
    # Rows a power of two apart would meet in the cache, so they are a little further; zeros fill the last columns.
    rows = x.new_zeros(n + FEW_COLUMNS - 1, p + 16)[:, :p]
    torch.index_select(x, 0, index, out=rows[:n])
    out = x.new_empty(n, matrices.shape[1])
    start = 0
    for matrix, count in zip(matrices, counts, strict=True):
        if count:
            _product(rows[start:], matrix, out[start : start + count])
        start += count
    return out


def _product(rows: Tensor, matrix: Tensor, out: Tensor) -> None:
    """The first n rows (., p) times a matrix (q, p), transposed, into out (n, q), at nearly the speed of reading it.

    One large product would copy the matrix into another order first. A batch of its panels does not, nor does the
    matrix times a few columns, of which those too many are left out of the result.
    """
    n, q = out.shape
    single = rows.element_size() > 2
    if single and 1 < n <= FEW_COLUMNS:
        out.copy_((matrix @ rows[:FEW_COLUMNS].T)[:, :n].T)
        return
    rows = rows[:n]
    panels = 2 if n == 1 else 1
    while matrix.nbytes > panels * PANEL_BYTES:
        panels *= 2
    if single and panels > 1 and q % panels == 0:
        parts = matrix.unflatten(0, (panels, -1)).mT
        out.unflatten(1, (panels, -1)).copy_(torch.bmm(rows.expand(panels, -1, -1), parts).transpose(0, 1))
    elif n == 1:
        torch.mm(matrix, rows.T, out=out.T)
    else:
        torch.mm(rows, matrix.T, out=out)


_stacked = differentiable("decode", _Decode())


def decode(x: Tensor, weights: ExpertWeights, routing: Routing, recompute: bool = False) -> Tensor:
    """The output (T, d) for few tokens: the weights of their experts are read, and no others."""
    if isinstance(weights, Weights):
        return _stacked(x, weights, routing, recompute)
    if isinstance(weights, QuantisedWeights) and bridge.runs(x, weights):
        return _coded_in_loops(x, weights, routing)
    return _one_by_one(x, weights, routing)


register(
    Backend(
        "decode",
        decode,
        lambda x, weights: None,
        "a product for each expert that a token chose, and no other weights read",
        lambda x, weights: None if x.shape[0] <= FEW_TOKENS else f"it is for {FEW_TOKENS} tokens or fewer",
        lambda x, weights: (
            f"for {FEW_TOKENS} tokens or fewer without gradients reading weights is what takes time; "
            + (
                bridge.how(bridge.usable(weights.up, weights.down))
                if isinstance(weights, Weights)
                else bridge.how(bridge.runs(x, weights))
                if isinstance(weights, QuantisedWeights)
                else "the matrices come one expert at a time"
            )
        ),
        no_backward=True,
        takes=(ExpertWeights,),
    )
)
