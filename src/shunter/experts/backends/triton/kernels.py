"""The Triton kernels, dispatch and combine included, each beside the function that launches it.

T tokens of width d; N triples (token, expert, weight), sorted by expert; E experts of width f; h (N, 2f), gate first,
or (N, f) pre-activations; a (N, f) hidden states; dy, da, dh their gradients. A tile is `rows` triples of one expert.

A program of a product over triples owns a tile of `blocks.expert_tiles`: rows of one expert. A tile's missing rows
repeat its last one, so that no value of another expert enters, and are never stored. Columns and steps beyond a width
are zeros. Sums run in float32, for float64 in float64. Offsets are int64, so that tensors of more than 2^31 elements
are safe; only those within a tile of contiguous rows are int32, because they take registers by the element.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....routing import Routing
from ...quantised import Packed
from .blocks import product_blocks

__all__ = [
    "INTERPRETED",
    "coded_products",
    "down_backward",
    "hidden",
    "outer",
    "products",
    "sum_by_expert",
    "sum_by_token",
]

# Whether the kernels below run in Triton's interpreter: that is settled where they are decorated.
INTERPRETED: bool = triton.knobs.runtime.interpret

# Neighbouring programs go through so many tiles of rows before the next columns: both operands stay in the L2 cache.
GROUP = tl.constexpr(8)

# Columns of a program that only adds rows up.
SUM_COLUMNS = 1024


@triton.jit
def _activated(h, NAME: tl.constexpr):
    """The pointwise function of an activation, and its derivative; NaN stays NaN."""
    if NAME == "silu":
        s = 1.0 / (1.0 + tl.exp(-h))
        return h * s, s * (1.0 + h * (1.0 - s))
    elif NAME == "gelu":
        s = 0.5 * (1.0 + tl.erf(h * 0.7071067811865476))
        return h * s, s + h * tl.exp(-0.5 * h * h) * 0.3989422804014327
    elif NAME == "gelu_tanh":  # (1 + tanh(u)) / 2 is the sigmoid of 2 u
        s = 1.0 / (1.0 + tl.exp(-1.5957691216057308 * h * (1.0 + 0.044715 * h * h)))
        return h * s, s + h * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * h * h)
    elif NAME == "quick_gelu":
        s = 1.0 / (1.0 + tl.exp(-1.702 * h))
        return h * s, s + 1.702 * h * s * (1.0 - s)
    elif NAME == "relu2":
        r = tl.where(h <= 0.0, 0.0, h)
        return r * r, 2.0 * r
    else:
        tl.static_assert(NAME == "relu")
        return tl.where(h <= 0.0, 0.0, h), tl.where(h <= 0.0, 0.0, 1.0).to(h.dtype)


@triton.jit
def _swizzled(program, rows, columns):
    """The row and the column of a program in a grid of tiles, in an order that reuses the L2 cache."""
    group = program // (GROUP * columns)
    place = program % (GROUP * columns)
    height = tl.minimum(rows - group * GROUP, GROUP)
    return group * GROUP + place % height, place // height


@triton.jit
def _expert_tile(tiles, num_tiles, num_columns):
    """A program's expert, first and last triple (exclusive) and tile of columns."""
    tile, column = _swizzled(tl.program_id(0), num_tiles, num_columns)
    tiles += tile
    return tl.load(tiles), tl.load(tiles + num_tiles), tl.load(tiles + 2 * num_tiles), column


@triton.jit
def _hidden_kernel(
    x, token, up, bias, h, a, tiles, num_tiles, num_columns, d, f, x_t, x_d, up_e, up_n, up_d, bias_e, bias_n,
    ACT: tl.constexpr, GATED: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Dispatch and first product of `hidden`: a program has BLOCK_M triples of one expert, BLOCK_N of the f columns.

    It goes through d in steps of BLOCK_K. `x_t` and the like are strides: of x along the tokens.
    """
    expert, start, end, column = _expert_tile(tiles, num_tiles, num_columns)
    if start >= end:
        return
    i, j = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    row, n = start + i, (column * BLOCK_N + j).to(tl.int64)
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    left = x + tl.load(token + tl.minimum(row, end - 1))[:, None] * x_t + k[None, :] * x_d
    first = up + expert * up_e + k[:, None] * up_d + n[None, :] * up_n
    second = first + f.to(tl.int64) * up_n
    gate = tl.full((BLOCK_M, BLOCK_N), 0, ACC)
    value = tl.full((BLOCK_M, BLOCK_N), 0, ACC)
    for at in range(0, d, BLOCK_K):
        inside = k < d - at
        columns = inside[:, None] & (n < f)[None, :]
        rows = tl.load(left, inside[None, :], 0.0)
        gate = tl.dot(rows, tl.load(first, columns, 0.0), gate, input_precision=PRECISION, out_dtype=ACC)
        if GATED:
            value = tl.dot(rows, tl.load(second, columns, 0.0), value, input_precision=PRECISION, out_dtype=ACC)
        left += BLOCK_K * x_d
        first += BLOCK_K * up_d
        second += BLOCK_K * up_d
    if bias is not None:
        bias += expert * bias_e + n * bias_n
        gate += tl.load(bias, n < f, 0.0).to(ACC)[None, :]
        if GATED:
            value += tl.load(bias + f.to(tl.int64) * bias_n, n < f, 0.0).to(ACC)[None, :]
    there = (row < end)[:, None] & (n < f)[None, :]
    if h is not None:
        width = 2 * f if GATED else f
        h += start * width + column * BLOCK_N
        tl.store(h + (i[:, None] * width + j[None, :]), gate, there)
        if GATED:
            tl.store(h + f + (i[:, None] * width + j[None, :]), value, there)
    if a is not None:
        acted, _ = _activated(gate, ACT)
        a += start * f + column * BLOCK_N
        tl.store(a + (i[:, None] * f + j[None, :]), acted * value if GATED else acted, there)


def hidden(
    x: Tensor,
    up: Tensor,
    bias: Tensor | None,
    routing: Routing,
    tiles: Tensor,
    block_m: int,
    pointwise: str,
    gated: bool,
    h: Tensor | None,
    a: Tensor | None,
) -> None:
    """Dispatch and first product: of x (T, d) and up (E, 2f, d) or (E, f, d) the pre-activations and hidden states.

    Into h the pre-activations (N, 2f) or (N, f), into a the hidden states (N, f); either may be None. `bias` is (E, 2f)
    or (E, f), or None; `tiles` and `block_m`, their rows, are of `blocks.expert_tiles`; `pointwise` is "silu", "gelu",
    "gelu_tanh" or "relu", and the second half of h multiplies it if `gated`.
    """
    d, f = x.shape[1], up.shape[1] // (1 + gated)
    blocks = product_blocks(block_m, f, x, accumulators=1 + gated)
    columns = triton.cdiv(f, blocks.n)
    _hidden_kernel[(tiles.shape[1] * columns,)](
        x, routing.token, up, bias, h, a, tiles, tiles.shape[1], columns, d, f,
        *x.stride(), *up.stride(), *_strides(bias), ACT=pointwise, GATED=gated, **_arithmetic(x), **blocks.options,
    )  # fmt: skip


@triton.jit
def _product_kernel(
    rows, matrices, bias, out, tiles, num_tiles, num_columns, p, q, matrices_e, matrices_p, matrices_q, bias_e, bias_q,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The product of `products`: a program has BLOCK_M triples of an expert, BLOCK_N of the q columns, p in steps."""
    expert, start, end, column = _expert_tile(tiles, num_tiles, num_columns)
    if start >= end:
        return
    i, j = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    row, n = start + i, (column * BLOCK_N + j).to(tl.int64)
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    left = rows + tl.minimum(row, end - 1)[:, None] * p + k[None, :]
    right = matrices + expert * matrices_e + k[:, None] * matrices_p + n[None, :] * matrices_q
    sums = tl.full((BLOCK_M, BLOCK_N), 0, ACC)
    for at in range(0, p, BLOCK_K):
        inside = k < p - at
        columns = inside[:, None] & (n < q)[None, :]
        values = tl.load(left, inside[None, :], 0.0)
        sums = tl.dot(values, tl.load(right, columns, 0.0), sums, input_precision=PRECISION, out_dtype=ACC)
        left += BLOCK_K
        right += BLOCK_K * matrices_p
    if bias is not None:
        sums += tl.load(bias + expert * bias_e + n * bias_q, n < q, 0.0).to(ACC)[None, :]
    out += start * q + column * BLOCK_N
    tl.store(out + (i[:, None] * q + j[None, :]), sums, (row < end)[:, None] & (n < q)[None, :])


def products(rows: Tensor, matrices: Tensor, bias: Tensor | None, tiles: Tensor, block_m: int) -> Tensor:
    """Each row (N, p), contiguous, times the matrix (E, p, q) of its expert, plus its bias (E, q): (N, q)."""
    p, q = matrices.shape[1:]
    out = rows.new_empty(rows.shape[0], q)
    blocks = product_blocks(block_m, q, rows)
    columns = triton.cdiv(q, blocks.n)
    _product_kernel[(tiles.shape[1] * columns,)](
        rows, matrices, bias, out, tiles, tiles.shape[1], columns, p, q, *matrices.stride(), *_strides(bias),
        **_arithmetic(rows), **blocks.options,
    )  # fmt: skip
    return out


@triton.jit
def _activation_backward(da, w, h, a, dh, start, end, at, f, ACT: tl.constexpr, GATED: tl.constexpr):
    """A tile of `down_backward` from column `at` on, behind its product: stores a and dh, returns the rows' <da, a>."""
    i, j = tl.arange(0, da.shape[0])[:, None], tl.arange(0, da.shape[1])[None, :]
    there = (start + i < end) & (at + j < f)
    width = 2 * f if GATED else f
    of_gate = start * width + at
    place = i * width + j
    gate = tl.load(h + of_gate + place, there, 0.0).to(da.dtype)
    acted, slope = _activated(gate, ACT)
    w = w[:, None]
    if GATED:
        up = tl.load(h + of_gate + f + place, there, 0.0).to(da.dtype)
        if dh is not None:
            tl.store(dh + of_gate + f + place, w * da * acted, there)
        da *= up
    sums = tl.sum(da * acted, 1)
    if dh is not None:
        tl.store(dh + of_gate + place, w * da * slope, there)
    if a is not None:
        tl.store(a + (start * f + at) + (i * f + j), w * acted * up if GATED else w * acted, there)
    return sums


@triton.jit
def _down_backward_kernel(
    grad, token, weight, down, h, a, dh, inner, tiles, num_tiles, num_columns, num_rows, d, f,
    down_e, down_d, down_f,
    ACT: tl.constexpr, GATED: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The product and the epilogue of `down_backward`: a program has BLOCK_M triples and BLOCK_N of the f columns.

    `inner` (columns, N) takes each tile of columns' part of <da, a>.
    """
    expert, start, end, column = _expert_tile(tiles, num_tiles, num_columns)
    if start >= end:
        return
    i, j = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    row, n = start + i, (column * BLOCK_N + j).to(tl.int64)
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    left = grad + tl.load(token + tl.minimum(row, end - 1))[:, None] * d + k[None, :]
    right = down + expert * down_e + k[:, None] * down_d + n[None, :] * down_f
    da = tl.full((BLOCK_M, BLOCK_N), 0, ACC)
    for at in range(0, d, BLOCK_K):
        inside = k < d - at
        columns = inside[:, None] & (n < f)[None, :]
        dy = tl.load(left, inside[None, :], 0.0)
        da = tl.dot(dy, tl.load(right, columns, 0.0), da, input_precision=PRECISION, out_dtype=ACC)
        left += BLOCK_K
        right += BLOCK_K * down_d
    w = tl.load(weight + row, row < end, 0.0).to(ACC)
    # By halves, because a whole tile of all that the activation's backward needs would not fit the registers.
    low, high = tl.split(tl.permute(tl.reshape(da, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
    at = column * BLOCK_N
    sums = _activation_backward(low, w, h, a, dh, start, end, at, f, ACT, GATED)
    sums += _activation_backward(high, w, h, a, dh, start, end, at + BLOCK_N // 2, f, ACT, GATED)
    if inner is not None:
        tl.store(inner + column * num_rows.to(tl.int64) + row, sums, row < end)


def down_backward(
    grad: Tensor,
    down: Tensor,
    h: Tensor,
    routing: Routing,
    tiles: Tensor,
    block_m: int,
    pointwise: str,
    gated: bool,
    a: Tensor | None,
    dh: Tensor | None,
    want_weight: bool,
) -> Tensor | None:
    """From the output's gradient (T, d), contiguous, through the second product and the activation, w the weights (N,).

    Into a the hidden states times w (N, f), into dh the gradient of the pre-activations (N, 2f) or (N, f); either may
    be None. Returns the gradient of w (N,) but for the bias of the second product, <dy W_down, hidden state>: every
    tile of columns has its own part of it, and the parts are added in a fixed order.
    """
    d, f = down.shape[1:]
    # The epilogue's registers hold about as much as a second accumulator.
    blocks = product_blocks(block_m, f, grad, accumulators=2)
    columns = triton.cdiv(f, blocks.n)
    sums = torch.promote_types(grad.dtype, torch.float32)
    inner = grad.new_empty(columns, h.shape[0], dtype=sums) if want_weight else None
    _down_backward_kernel[(tiles.shape[1] * columns,)](
        grad, routing.token, routing.weight, down, h, a, dh, inner, tiles, tiles.shape[1], columns, h.shape[0], d, f,
        *down.stride(), ACT=pointwise, GATED=gated, **_arithmetic(grad), **blocks.options,
    )  # fmt: skip
    return None if inner is None else inner.sum(0)


@triton.jit
def _coded_product_kernel(
    rows, index, codes, scales, zeros, bias, starts, scale_starts, bits, out, tiles, num_tiles, num_columns, p, q,
    rows_n, rows_p, bias_e, bias_q, GROUP_COLUMNS: tl.constexpr, ZERO_POINT: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The product of `coded_products`: a program has BLOCK_M triples of an expert, BLOCK_N of the q columns.

    Each step decodes its tile of the matrix: that of 8 bits has one scale for a column, that of 4 bits one for a group.
    """
    expert, start, end, column = _expert_tile(tiles, num_tiles, num_columns)
    if start >= end:
        return
    i, j = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    row, n = start + i, (column * BLOCK_N + j).to(tl.int64)
    from_row = tl.minimum(row, end - 1)
    from_row = from_row if index is None else tl.load(index + from_row)
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    left = rows + from_row[:, None] * rows_n + k[None, :] * rows_p
    code, scale = codes + tl.load(starts + expert), scales + tl.load(scale_starts + expert)
    sums = tl.full((BLOCK_M, BLOCK_N), 0, ACC)
    if tl.load(bits + expert) == 8:
        width = (p + 31) // 32 * 32
        of_column = (tl.load(scale + n, n < q, 0).to(tl.int32) << 16).to(tl.float32, bitcast=True)
        for at in range(0, p, BLOCK_K):
            inside = k < p - at
            tile = tl.load(code + n[None, :] * width + (at + k)[:, None], inside[:, None] & (n < q)[None, :], 0)
            tile = tile.to(tl.int8, bitcast=True).to(tl.float32) * of_column[None, :]
            values = tl.load(left, inside[None, :], 0.0)
            sums = tl.dot(values, tile.to(values.dtype), sums, input_precision=PRECISION, out_dtype=ACC)
            left += BLOCK_K * rows_p
    else:
        groups = (p + GROUP_COLUMNS - 1) // GROUP_COLUMNS
        width = groups * (GROUP_COLUMNS // 2)
        for at in range(0, p, BLOCK_K):
            inside = k < p - at
            there = inside[:, None] & (n < q)[None, :]
            place = at + k
            tile = tl.load(code + n[None, :] * width + (place // 32 * 16 + place % 16)[:, None], there, 0)
            tile = (tile.to(tl.int32) >> (place // 16 % 2 * 4).to(tl.int32)[:, None]) & 15
            group = n[None, :] * groups + (place // GROUP_COLUMNS)[:, None]
            of_group = (tl.load(scale + group, there, 0).to(tl.int32) << 16).to(tl.float32, bitcast=True)
            if ZERO_POINT:
                tile -= tl.load(zeros + tl.load(scale_starts + expert) + group, there, 0).to(tl.int32)
            else:
                tile -= 8
            tile = tile.to(tl.float32) * of_group
            values = tl.load(left, inside[None, :], 0.0)
            sums = tl.dot(values, tile.to(values.dtype), sums, input_precision=PRECISION, out_dtype=ACC)
            left += BLOCK_K * rows_p
    if bias is not None:
        sums += tl.load(bias + expert * bias_e + n * bias_q, n < q, 0.0).to(ACC)[None, :]
    out += start * q + column * BLOCK_N
    tl.store(out + (i[:, None] * q + j[None, :]), sums, (row < end)[:, None] & (n < q)[None, :])


def coded_products(
    rows: Tensor,
    index: Tensor | None,
    packed: Packed,
    places: tuple[Tensor, Tensor, Tensor],
    bias: Tensor | None,
    tiles: Tensor,
    block_m: int,
) -> Tensor:
    """Each triple's row (., p), in order or at an index (N,), times its expert's matrix (q, p) in codes: (N, q).

    `places` (E + 1,), (E + 1,), (E,): where the codes and the scales of each expert begin, and its bits. `bias` is
    (E, q) or None; `tiles` and `block_m` are as of `hidden`.
    """
    p, q = packed.columns, packed.rows
    count = rows.shape[0] if index is None else index.numel()
    out = rows.new_empty(count, q)
    blocks = product_blocks(block_m, q, rows)
    columns = triton.cdiv(q, blocks.n)
    starts, scale_starts, bits = places
    _coded_product_kernel[(tiles.shape[1] * columns,)](
        rows, index, packed.codes, packed.scale, packed.zero, bias, starts, scale_starts, bits, out, tiles,
        tiles.shape[1], columns, p, q, *rows.stride(), *_strides(bias), GROUP_COLUMNS=packed.coding.group,
        ZERO_POINT=packed.coding.zero_point, **_arithmetic(rows), **blocks.options,
    )  # fmt: skip
    return out


@triton.jit
def _outer_kernel(
    left, left_index, right, right_index, out, offsets, num_rows, num_columns, p, q,
    left_n, left_p, right_n, right_q, out_e, out_p, out_q,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The sums of `outer`: a program has one expert and a tile BLOCK_M x BLOCK_N of its (p, q), triples in steps."""
    expert = (tl.program_id(0) // (num_rows * num_columns)).to(tl.int64)
    i, j = _swizzled(tl.program_id(0) % (num_rows * num_columns), num_rows, num_columns)
    start, end = tl.load(offsets + expert), tl.load(offsets + expert + 1)
    m = i * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
    n = j * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    sums = tl.full((BLOCK_M, BLOCK_N), 0, ACC)
    for at in range(start, end, BLOCK_K):
        row = at + tl.arange(0, BLOCK_K).to(tl.int64)
        there = row < end
        of_left = row if left_index is None else tl.load(left_index + row, there, 0)
        of_right = row if right_index is None else tl.load(right_index + row, there, 0)
        a = tl.load(left + of_left[None, :] * left_n + m[:, None] * left_p, there[None, :] & (m < p)[:, None], 0.0)
        b = tl.load(right + of_right[:, None] * right_n + n[None, :] * right_q, there[:, None] & (n < q)[None, :], 0.0)
        sums = tl.dot(a, b, sums, input_precision=PRECISION, out_dtype=ACC)
    out += expert * out_e + m[:, None] * out_p + n[None, :] * out_q
    tl.store(out, sums, (m < p)[:, None] & (n < q)[None, :])


def outer(
    left: Tensor, left_index: Tensor | None, right: Tensor, right_index: Tensor | None, routing: Routing, out: Tensor
) -> None:
    """Into out (E, p, q) the sums of left_i right_i^T over each expert's triples, zeros where it has none.

    The rows (., p) and (., q) of the triples are in order, or where an index (N,) says.
    """
    p, q = out.shape[1:]
    blocks = product_blocks(p, q, left)
    rows, columns = triton.cdiv(p, blocks.m), triton.cdiv(q, blocks.n)
    _outer_kernel[(out.shape[0] * rows * columns,)](
        left, left_index, right, right_index, out, routing.offsets, rows, columns, p, q,
        *left.stride(), *right.stride(), *out.stride(), **_arithmetic(left), **blocks.options,
    )  # fmt: skip


@triton.jit
def _sum_by_expert_kernel(
    rows, index, weight, offsets, out, width, out_e, out_w,
    ACC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The sums of `sum_by_expert`: a program has one expert and BLOCK_N columns, triples in steps of BLOCK_K."""
    expert = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    start, end = tl.load(offsets + expert), tl.load(offsets + expert + 1)
    sums = tl.full((BLOCK_N,), 0, ACC)
    for at in range(start, end, BLOCK_K):
        row = at + tl.arange(0, BLOCK_K).to(tl.int64)
        there = row < end
        of = row if index is None else tl.load(index + row, there, 0)
        values = tl.load(rows + of[:, None] * width + column[None, :], there[:, None] & (column < width)[None, :], 0.0)
        values = values.to(ACC)
        if weight is not None:
            values *= tl.load(weight + row, there, 0.0).to(ACC)[:, None]
        sums += tl.sum(values, 0)
    tl.store(out + expert * out_e + column * out_w, sums, column < width)


def sum_by_expert(rows: Tensor, index: Tensor | None, weight: Tensor | None, routing: Routing, out: Tensor) -> None:
    """Into out (E, p) the sums over each expert's triples of the rows (., p), contiguous, in order or at an index (N,).

    Each is multiplied by its triple's weight (N,), if there is one.
    """
    _sum_by_expert_kernel[(out.shape[0], triton.cdiv(out.shape[1], 64))](
        rows, index, weight, routing.offsets, out, out.shape[1], *out.stride(),
        ACC=_accumulator(rows), BLOCK_N=64, BLOCK_K=64,
    )  # fmt: skip


@triton.jit
def _sum_by_token_kernel(
    rows, order, weight, offsets, out, width, out_t, out_d, ACC: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """The sums of `sum_by_token`: a program has one token and BLOCK_N columns, its triples one after the other."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    sums = tl.full((BLOCK_N,), 0, ACC)
    for at in range(tl.load(offsets + token), tl.load(offsets + token + 1)):
        row = tl.load(order + at)
        values = tl.load(rows + row * width + column, column < width, 0.0).to(ACC)
        sums += values if weight is None else values * tl.load(weight + row).to(ACC)
    tl.store(out + token * out_t + column * out_d, sums, column < width)


def sum_by_token(rows: Tensor, weight: Tensor | None, routing: Routing, out: Tensor) -> None:
    """Combine: into out (T, d) the sum over each token's rows (N, d), contiguous, in a fixed order, without atomics.

    Each is multiplied by its triple's weight (N,), if there is one.
    """
    order, offsets = routing.by_token
    block = min(SUM_COLUMNS, triton.next_power_of_2(rows.shape[1]))
    _sum_by_token_kernel[(out.shape[0], triton.cdiv(rows.shape[1], block))](
        rows, order, weight, offsets, out, rows.shape[1], *out.stride(), ACC=_accumulator(rows), BLOCK_N=block
    )


def _accumulator(like: Tensor) -> tl.dtype:
    """The dtype that sums of such numbers run in."""
    return tl.float64 if like.dtype == torch.float64 else tl.float32


def _arithmetic(like: Tensor) -> dict[str, object]:
    """What sums run in, and whether products of float32 may round their operands to TF32: as torch's own products."""
    tf32 = like.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return {"ACC": _accumulator(like), "PRECISION": "tf32" if tf32 else "ieee"}


def _strides(bias: Tensor | None) -> tuple[int, ...]:
    """Of a bias (E, q); zeros where there is none."""
    return (0, 0) if bias is None else bias.stride()
