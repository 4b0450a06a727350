"""The loops that Numba compiles, dispatch and combine included: hidden states and a routing's triples to outputs.

Sizes and suffixes, here and in `bridge.py`:

    T tokens, d their width           N triples (token, expert, weight), sorted by expert, then by token
    E experts, f their width          2f where the activation gates, gate first; f where it does not
    a thread has a share: a run of triples, begin to end; it goes through it in blocks of n rows of one expert

    up (E, 2f, d), down (E, d, f)     the experts' matrices, gate and up in one; biases (E, 1, 2f) and (E, 1, d)
    weight (N,)                       the combine weights

    x (T, d) hidden states            rows (N, d) what the experts give each triple, before they are combined
    h (N, 2f) pre-activations         a (N, f) hidden states of an expert, after the activation
    dy (N, d), da (N, f), dh (N, 2f)  gradients of the output, of a and of h
    …_n the n rows of a block; …_b scratch for a block; …_e the matrix of expert e in float32

Scratch is float32, of one flat array a thread, which `_carve` cuts up. Numbers in half precision come as their bits.
What products take are `operands`, float32 or bfloat16: the type of an argument, as the activation is. As float32 they
are widened when they are read; either way sums and activations are float32, and results are rounded once. All loops are
in one file, as Numba compiles again what has changed in the file of a loop, and not what that uses of another.
"""

from __future__ import annotations

from typing import NamedTuple

import llvmlite.binding
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload, register_jitable

from . import mkl, onednn

# Arithmetic is as it is written: what the compiler may choose, it chooses otherwise in a loop that it compiles than in
# what it keeps of the loop on disk, and a run that goes on in another process would end in other bits.
_compiled = numba.njit(parallel=True, error_model="numpy", cache=True)

_inner = numba.njit(error_model="numpy", cache=True)  # what a thread of those calls

# But for sums of lanes: infinities and NaN stay what they are.
_summing = numba.njit(parallel=True, fastmath={"reassoc", "contract", "nsz"}, error_model="numpy", cache=True)


if found := mkl.addresses():
    llvmlite.binding.add_symbol("shunter_sgemm", found.sgemm)
    llvmlite.binding.add_symbol("shunter_threads", found.threads)

if half := onednn.addresses():
    llvmlite.binding.add_symbol("shunter_brgemm", half.brgemm)
    llvmlite.binding.add_symbol("shunter_release", half.release)


_sgemm = types.ExternalFunction("shunter_sgemm", types.void(*[types.intp] * 13))

_threads = types.ExternalFunction("shunter_threads", types.int32(types.int32))

_brgemm = types.ExternalFunction("shunter_brgemm", types.void(*[types.intp] * 11))

_release = types.ExternalFunction("shunter_release", types.void(types.intp))

# A thread takes so many rows of a matrix at once when decoding.
_ROWS = 64

# A product with a large matrix is faster in panels of so many columns of the result.
_COLUMNS = 512

# A product in bfloat16 sums over so many of its columns and rows at once.
_DEPTH = 1024

# Reading an expert's matrices, and writing their gradients, takes as long as computing so many rows.
_ROWS_OF_MATRICES = 16

# A thread's share ends with an expert if that changes it by so little.
_TOLERANCE = 1 / 32

# A matrix of at most so many bytes is fetched into the cache before its turn; its gradient is computed in the cache and
# written past it.
_CACHED = 2**18


# ---- numbers in half precision


def _read(value):
    """A value in float32: of float32 itself, of the bits of a bfloat16 (uint16) or of a float16 (int16)."""


@overload(_read, inline="always")
def _(value):
    if value == types.float32:
        return lambda value: value
    if value == types.uint16:
        return lambda value: np.uint32(np.uint32(value) << np.uint32(16)).view(np.float32)

    def half(value):
        bits = np.uint32(np.uint16(value))
        magnitude = np.uint32((bits & np.uint32(0x7FFF)) << np.uint32(13))
        # Of infinity and NaN all exponent bits are set.
        special = np.uint32(np.uint32(magnitude >= np.uint32(0x0F800000)) * np.uint32(0x7F800000))
        scaled = np.float32(magnitude.view(np.float32) * np.float32(2.0**112)).view(np.uint32)
        return np.uint32(scaled | special | ((bits & np.uint32(0x8000)) << np.uint32(16))).view(np.float32)

    return half


def _write(out, i, value):
    """A number in float32 into out[i]: float32 itself, the bits of a bfloat16 (uint16) or of a float16 (int16)."""


@overload(_write)
def _(out, i, value):
    if out.dtype == types.float32:

        def put(out, i, value):
            out[i] = value

    elif out.dtype == types.uint16:

        def put(out, i, value):
            bits = np.float32(value).view(np.uint32)
            odd = np.uint32((bits >> np.uint32(16)) & np.uint32(1))
            # Without a branch, which would keep the value out of lanes. NaN is not rounded but made quiet.
            nan = np.uint32(np.uint32(bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000))
            rounded = np.uint32(bits + np.uint32((np.uint32(0x7FFF) + odd) * np.uint32(np.uint32(1) - nan)))
            out[i] = np.uint16((rounded >> np.uint32(16)) | np.uint32(nan << np.uint32(6)))

    else:

        def put(out, i, value):
            bits = np.float32(value).view(np.uint32)
            size = np.uint32(bits & np.uint32(0x7FFFFFFF))
            odd = np.uint32((size >> np.uint32(13)) & np.uint32(1))
            # Normal numbers get another bias; smaller ones are what 0.5 has in its last places when they are added.
            half = np.uint32(((size + np.uint32(0xFFF) + odd) >> np.uint32(13)) - np.uint32(112 << 10))
            tiny = np.float32(size.view(np.float32) + np.float32(0.5)).view(np.uint32)
            half = np.uint32(tiny - np.uint32(0x3F000000)) if size < np.uint32(0x38800000) else half
            half = np.uint32(0x7C00) if size >= np.uint32(0x477FF000) else half
            half = np.uint32(0x7E00) if size > np.uint32(0x7F800000) else half
            out[i] = np.int16(half | np.uint32((bits >> np.uint32(16)) & np.uint32(0x8000)))

    return put


# ---- activations


@intrinsic
def _fma(context, a, b, c):
    """a b + c of float32, rounded once."""

    def generate(context, builder, signature, arguments):
        return builder.fma(*arguments)

    return types.float32(*[types.float32] * 3), generate


@_inner
def _exp(t):
    """exp(t) to two units in the last place for t from -87 to 88, in operations that run in lanes."""
    t = min(max(t, np.float32(-87)), np.float32(88))
    n = np.floor(_fma(t, np.float32(1.44269504), np.float32(0.5)))
    # t = n ln 2 + r, with ln 2 in two parts of which the first is short: n times it is exact.
    r = _fma(n, np.float32(-0.693359375), t)
    r = _fma(n, np.float32(2.12194440e-4), r)
    series = _fma(r, np.float32(1 / 5040), np.float32(1 / 720))
    series = _fma(series, r, np.float32(1 / 120))
    series = _fma(series, r, np.float32(1 / 24))
    series = _fma(series, r, np.float32(1 / 6))
    series = _fma(_fma(series, r, np.float32(0.5)) * r, r, r) + np.float32(1)
    return series * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)


@_inner
def _sigmoid(x):
    """1 / (1 + exp(-x))."""
    return np.float32(1) / (np.float32(1) + _exp(-x))


class _Silu(NamedTuple):
    gated: bool


class _Gelu(NamedTuple):
    gated: bool


class _GeluTanh(NamedTuple):
    gated: bool


class _Relu(NamedTuple):
    gated: bool


class _QuickGelu(NamedTuple):
    gated: bool


class _Relu2(NamedTuple):
    gated: bool


# The activation that a loop computes is the type of an argument: each gets loops of its own.
ACTIVATIONS = {
    "swiglu": _Silu(True), "geglu": _Gelu(True), "geglu_tanh": _GeluTanh(True), "reglu": _Relu(True),
    "silu": _Silu(False), "gelu": _Gelu(False), "gelu_tanh": _GeluTanh(False), "relu": _Relu(False),
    "quick_gelu": _QuickGelu(False), "relu2": _Relu2(False),
}  # fmt: skip


def _act(activation, x):
    """The activation at x, and its derivative there."""


@overload(_act)
def _(activation, x):
    return {
        _Silu: _silu, _Gelu: _gelu, _GeluTanh: _gelu_tanh, _Relu: _relu, _QuickGelu: _quick_gelu, _Relu2: _relu2,
    }[activation.instance_class]  # fmt: skip


@register_jitable
def _silu(activation, x):
    s = _sigmoid(x)
    return x * s, s * _fma(x, np.float32(1) - s, np.float32(1))


@register_jitable
def _gelu(activation, x):
    """x P(x) with the normal distribution P: P(-|x|) = exp(-z^2) erfcx(z) / 2 at z = |x| / sqrt(2).

    The polynomial is the least relative error of erfcx over 1 / (1 + 0.4 z), z to 9.4, in squares.
    """
    t = np.float32(1) / _fma(abs(x), np.float32(0.4 * 0.5**0.5), np.float32(1))
    tail = _fma(t, np.float32(0.026825237), np.float32(-0.064718848))
    tail = _fma(tail, t, np.float32(-0.086963255))
    tail = _fma(tail, t, np.float32(0.30641318))
    tail = _fma(tail, t, np.float32(-0.093691357))
    tail = _fma(tail, t, np.float32(0.28194092))
    tail = _fma(tail, t, np.float32(0.17287811))
    tail = _fma(tail, t, np.float32(0.23231549))
    tail = _fma(tail, t, np.float32(0.22496832))
    tail = _fma(tail, t, np.float32(3.2225327e-05))
    bell = _exp(x * x * np.float32(-0.5))
    tail = tail * bell * np.float32(0.5)
    p = tail if x < 0 else np.float32(1) - tail
    return x * p, _fma(x * bell, np.float32((2 * np.pi) ** -0.5), p)


@register_jitable
def _gelu_tanh(activation, x):
    """x (1 + tanh(u / 2)) / 2 = x sigmoid(u)."""
    square = x * x
    s = _sigmoid(x * _fma(square, np.float32(0.07135482), np.float32(1.5957691)))
    slope = _fma(square, np.float32(3 * 0.07135482), np.float32(1.5957691))
    return x * s, _fma(x * s * (np.float32(1) - s), slope, s)


@register_jitable
def _relu(activation, x):
    return (np.float32(0) if x <= 0 else x), (np.float32(1) if x > 0 else np.float32(0))


@register_jitable
def _quick_gelu(activation, x):
    """x sigmoid(1.702 x)."""
    s = _sigmoid(x * np.float32(1.702))
    return x * s, _fma(np.float32(1.702) * x * s, np.float32(1) - s, s)


@register_jitable
def _relu2(activation, x):
    r = np.float32(0) if x <= 0 else x
    return r * r, np.float32(2) * r


# ---- sums of a row


_FLOAT, _LANES = ir.FloatType(), ir.VectorType(ir.FloatType(), 16)


def _sum_of_lanes(builder, total):
    for width in (8, 4, 2, 1):
        low, high = ([*range(first, first + width)] for first in (0, width))
        kind = ir.VectorType(ir.IntType(32), width)
        parts = [builder.shuffle_vector(total, total, ir.Constant(kind, part)) for part in (low, high)]
        total = builder.fadd(*parts)
    return builder.extract_element(total, ir.IntType(32)(0))


@intrinsic
def _sum_of_sixteens(context, address, steps):
    """The sum of 16 `steps` float32 from an address on, in 16 lanes that are added up at the end."""

    def generate(context, builder, signature, arguments):
        address, steps = arguments
        total = cgutils.alloca_once(builder, _LANES)
        builder.store(ir.Constant(_LANES, [0.0] * 16), total)
        with cgutils.for_range(builder, steps) as loop:
            found = _load(builder, _LANES, builder.add(address, builder.shl(loop.index, loop.index.type(6))), 4)
            builder.store(builder.fadd(builder.load(total), found), total)
        return _sum_of_lanes(builder, builder.load(total))

    return types.float32(types.intp, types.intp), generate


@_inner
def _sum(row):
    """The sum of a row of float32, in an order of its own: no compiler's, no processor's."""
    whole = row.shape[0] // 16
    total = _sum_of_sixteens(row.ctypes.data, whole)
    for i in range(16 * whole, row.shape[0]):
        total += row[i]
    return total


# ---- decoding: products of few rows


@_summing
def products(rows, matrices, experts, offsets, out):
    """Rows (N, p), from offsets[e] to offsets[e + 1] those of e in `experts`, times its matrix (q, p), into out (N, q).

    Two rows of the matrix, half a block apart, meet up to four of the others at once: memory is faster in two places
    than in one, if they are no neighbours, and so many sums neither wait for each other nor overflow the registers. The
    last row fills up what is missing to two or to four.
    """
    q, p = matrices.shape[1:]
    blocks = (q + _ROWS - 1) // _ROWS
    for item in numba.prange(experts.shape[0] * blocks):
        group, block = item // blocks, item % blocks
        e = experts[group]
        first, end = offsets[e], offsets[e + 1]
        top, bottom = block * _ROWS, min(q, (block + 1) * _ROWS)
        half = (bottom - top + 1) // 2
        for r in range(top, top + half):
            s = min(r + half, bottom - 1)
            one, two = matrices[e, r], matrices[e, s]
            n = first
            while end - n >= 3:
                last = min(n + 3, end - 1)
                xa, xb, xc, xd = rows[n], rows[n + 1], rows[n + 2], rows[last]
                a1 = b1 = c1 = d1 = a2 = b2 = c2 = d2 = np.float32(0)
                for i in range(p):
                    v1, v2 = _read(one[i]), _read(two[i])
                    a1 += v1 * xa[i]
                    b1 += v1 * xb[i]
                    c1 += v1 * xc[i]
                    d1 += v1 * xd[i]
                    a2 += v2 * xa[i]
                    b2 += v2 * xb[i]
                    c2 += v2 * xc[i]
                    d2 += v2 * xd[i]
                out[n, r], out[n + 1, r], out[n + 2, r], out[last, r] = a1, b1, c1, d1
                out[n, s], out[n + 1, s], out[n + 2, s], out[last, s] = a2, b2, c2, d2
                n += 4
            if end - n == 2:
                xa, xb = rows[n], rows[n + 1]
                a1 = b1 = a2 = b2 = np.float32(0)
                for i in range(p):
                    v1, v2 = _read(one[i]), _read(two[i])
                    a1 += v1 * xa[i]
                    b1 += v1 * xb[i]
                    a2 += v2 * xa[i]
                    b2 += v2 * xb[i]
                out[n, r], out[n + 1, r] = a1, b1
                out[n, s], out[n + 1, s] = a2, b2
            elif end - n == 1:
                xa = rows[n]
                a1 = a2 = np.float32(0)
                for i in range(p):
                    a1 += _read(one[i]) * xa[i]
                    a2 += _read(two[i]) * xa[i]
                out[n, r], out[n, s] = a1, a2


# ---- what the loops are given


class Matrices(NamedTuple):
    """Of each expert: up (E, 2f, d), down (E, d, f) and their biases (E, 1, 2f) and (E, 1, d); those absent have E 0.

    The experts' parameters, or their gradients.
    """

    up: np.ndarray
    down: np.ndarray
    up_bias: np.ndarray
    down_bias: np.ndarray


class Triples(NamedTuple):
    """Of a routing.

    Args:
        token: (N,), the token of each triple, sorted by expert.
        offsets: (E + 1,), where each expert's triples begin.
        rows: (N,), the triples in the order of their tokens.
        starts: (T + 1,), where each token's begin there.
    """

    token: np.ndarray
    offsets: np.ndarray
    rows: np.ndarray
    starts: np.ndarray


@_inner
def sorted_choices(index, weight, num_experts):
    """Whether choices (T, k) are all of experts that there are; their triples, sorted by expert; their weights."""
    tokens, k = index.shape
    offsets, starts = np.zeros(num_experts + 1, np.int64), np.arange(tokens + 1) * k
    token, rows = np.empty(tokens * k, np.int64), np.empty(tokens * k, np.int64)
    sorted_weight = np.empty(tokens * k, np.float32)
    right = True
    for t in range(tokens):
        for j in range(k):
            right = right and 0 <= index[t, j] < num_experts
            if right:
                offsets[index[t, j] + 1] += 1
    for e in range(num_experts):
        offsets[e + 1] += offsets[e]
    if right:
        free = offsets.copy()
        for t in range(tokens):
            for j in range(k):
                e = index[t, j]
                token[free[e]], rows[t * k + j], sorted_weight[free[e]] = t, free[e], weight[t, j]
                free[e] += 1
    return right, Triples(token, offsets, rows, starts), sorted_weight


# ---- shares of threads


@_inner
def bounds(offsets, shares):
    """Where the triples of each of n shares begin, (n + 1,): shares of about equal work."""
    experts, total = offsets.shape[0] - 1, 0
    for e in range(experts):
        total += _work(offsets, e)
    near = _TOLERANCE * total / shares
    found = np.empty(shares + 1, np.int64)
    found[0], found[shares] = 0, offsets[experts]
    e, before = 0, 0
    for t in range(1, shares):
        target = total * t / shares
        while e < experts - 1 and before + _work(offsets, e) <= target:
            before += _work(offsets, e)
            e += 1
        if target - before <= near:
            found[t] = offsets[e]
        elif before + _work(offsets, e) - target <= near:
            found[t] = offsets[e + 1]
        else:
            part = (target - before) / _work(offsets, e)
            found[t] = offsets[e] + round(part * (offsets[e + 1] - offsets[e]))
    return found


@_inner
def _work(offsets, e):
    """What an expert takes, in rows."""
    count = offsets[e + 1] - offsets[e]
    return count + _ROWS_OF_MATRICES if count > 0 else 0


# ---- scratch, the cache, and where results go


@_inner
def _carve(scratch, start, rows, columns):
    """A matrix (rows, columns) of flat scratch from `start` on, and where the next may begin."""
    end = start + rows * columns
    return scratch[start:end].reshape(rows, columns), end


def _carve_operands(scratch, start, rows, columns, operands):
    """As `_carve`, in the dtype of `operands`."""


@overload(_carve_operands, inline="always")
def _(scratch, start, rows, columns, operands):
    if operands.dtype == types.float32:
        return lambda scratch, start, rows, columns, operands: _carve(scratch, start, rows, columns)

    def halves(scratch, start, rows, columns, operands):
        end = start + (rows * columns + 1) // 2
        return scratch[start:end].view(np.uint16)[: rows * columns].reshape(rows, columns), end

    return halves


def _widened(matrix, scratch):
    """The matrix as products take it: itself, or widened into scratch."""


@overload(_widened)
def _(matrix, scratch):
    if matrix.dtype == scratch.dtype:
        return lambda matrix, scratch: matrix

    def widened(matrix, scratch):
        for r in range(matrix.shape[0]):
            row, result = matrix[r], scratch[r]
            for i in range(row.shape[0]):
                result[i] = _read(row[i])
        return scratch

    return widened


@intrinsic
def _prefetch(context, address):
    """The cache line at an address, soon."""

    def generate(context, builder, signature, arguments):
        byte, flag = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, flag, flag, flag])
        function = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
        # To read, into the second level, data.
        builder.call(function, [builder.inttoptr(arguments[0], byte), flag(0), flag(2), flag(1)])
        return context.get_dummy_value()

    return types.void(types.intp), generate


@intrinsic
def _store_32_bytes_past_cache(context, source, target):
    """32 bytes, not into the cache; the target is aligned to them."""

    def generate(context, builder, signature, arguments):
        eight = ir.VectorType(ir.FloatType(), 8).as_pointer()
        value = builder.load(builder.inttoptr(arguments[0], eight), align=4)
        store = builder.store(value, builder.inttoptr(arguments[1], eight), align=32)
        store.set_metadata("nontemporal", builder.module.add_metadata([ir.IntType(32)(1)]))
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), generate


@intrinsic
def _fence(context):
    """What was written before is there for all threads, also what went past the cache."""

    def generate(context, builder, signature, arguments):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


@_inner
def _prefetch_part(matrix, r, n):
    """Part r of n of the matrix into the cache, if it is small."""
    size = matrix.size * matrix.itemsize
    if size <= _CACHED:
        for i in range(r * size // n // 64 * 64, (r + 1) * size // n, 64):
            _prefetch(matrix.ctypes.data + i)


@_inner
def _fits_cache(matrix):
    """Whether this gradient is computed in the cache and written past it."""
    size = matrix.size * matrix.itemsize
    return size <= _CACHED and (matrix.ctypes.data | size) % 32 == 0


@_inner
def _store_past_cache(rows, out):
    """Rows of float32 into out, of the same size and contiguous, past the cache."""
    for i in range(0, out.size * out.itemsize, 32):
        _store_32_bytes_past_cache(rows.ctypes.data + i, out.ctypes.data + i)


def _place_for(own, scratch, fits):
    """Where to compute in float32 what ends in `own`: there, if it `fits` and is float32, or in scratch."""


@overload(_place_for)
def _(own, scratch, fits):
    if own.dtype == types.float32:
        return lambda own, scratch, fits: own if fits else scratch
    return lambda own, scratch, fits: scratch


@_inner
def _store_rounded(rows, out):
    """Rows of float32 into out, in its dtype."""
    for r in range(rows.shape[0]):
        row, result = rows[r], out[r]
        for i in range(row.shape[0]):
            _write(result, i, row[i])


def _store(rows, out, streams):
    """What was computed in `_place_for` into out, unless it is there: in another dtype, or to be streamed."""


@overload(_store)
def _(rows, out, streams):
    if out.dtype == types.float32:
        return lambda rows, out, streams: _store_past_cache(rows, out) if streams else None
    return lambda rows, out, streams: _store_rounded(rows, out)


# ---- products by MKL


@_inner
def _end_of_block(start, until, block):
    """The end of the block that begins at `start`; those up to `until` are about equal."""
    blocks = (until - start + block - 1) // block
    return start + (until - start + blocks - 1) // blocks


def _product(a, b, out, add, work):
    """a (m, k) times b (k, n) into out (m, n), or added to it; by rows, or transposed.

    `work` is scratch: for arguments, and for what operands are packed into.
    """


@overload(_product)
def _(a, b, out, add, work):
    if a.dtype == types.float32:
        return lambda a, b, out, add, work: _product_of_singles(a, b, out, add, work[0])
    return lambda a, b, out, add, work: _product_of_halves(a, b, out, add, work[1])


@_inner
def _product_of_singles(a, b, out, add, work):
    """`_product` by MKL. To Fortran, which goes by columns, it is out.T = b.T a.T."""
    (m, k), n = a.shape, b.shape[1]
    turned_a, turned_b = a.strides[1] != 4, b.strides[1] != 4
    work[0], work[1], work[2] = m, n, k
    work[3] = max(b.strides[1] // 4, k) if turned_b else max(b.strides[0] // 4, n)
    work[4] = max(a.strides[1] // 4, m) if turned_a else max(a.strides[0] // 4, k)
    work[5] = max(out.strides[0] // 4, n)
    work[6] = 0x3F800000  # the bits of 1 in float32
    work[7] = 0x3F800000 if add else 0
    work[8], work[9] = ord("N"), ord("T")
    _call_sgemm(work.ctypes.data, a.ctypes.data, turned_a, b.ctypes.data, turned_b, out.ctypes.data)


@_inner
def _product_by_panels(a, b, out, add, work):
    """As `_product`, where b is an expert's matrix."""
    n, start = b.shape[1], 0
    columns = _COLUMNS if a.itemsize == 4 else n
    while start < n:
        stop = _end_of_block(start, n, columns)
        _product(a, b[:, start:stop], out[:, start:stop], add, work)
        start = stop


@_inner
def _call_sgemm(work, a, turned_a, b, turned_b, out):
    """The product of what is at these addresses, with arguments as `_product` puts them."""
    _sgemm(
        work + (36 if turned_b else 32), work + (36 if turned_a else 32), work + 4, work, work + 8, work + 24,
        b, work + 12, a, work + 16, work + 28, out, work + 20,
    )  # fmt: skip


@_inner
def product(a, b):
    """a b on this thread alone, for a check."""
    out = np.empty((a.shape[0], b.shape[1]), np.float32)
    _threads(1)
    _product_of_singles(a, b, out, False, np.empty(10, np.int32))
    _threads(0)
    return out


# ---- products by oneDNN


@intrinsic
def _turn_8(context, source, stride, target, target_stride):
    """8 rows of 8 numbers of 32 bits, so many bytes apart, transposed."""

    def generate(context, builder, signature, arguments):
        _store_turned(builder, arguments, [_load_eight(builder, arguments, r, 32) for r in range(8)])
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4), generate


@intrinsic
def _turn_8_pairs(context, source, stride, target, target_stride):
    """16 rows of 8 numbers of 16 bits, so many bytes apart, to 8 rows of 8 pairs of neighbours in a column."""

    def generate(context, builder, signature, arguments):
        wide = ir.VectorType(ir.IntType(32), 8)
        rows = [builder.zext(_load_eight(builder, arguments, r, 16), wide) for r in range(16)]
        sixteen = ir.Constant(wide, [16] * 8)
        pairs = [builder.or_(rows[r], builder.shl(rows[r + 1], sixteen)) for r in range(0, 16, 2)]
        _store_turned(builder, arguments, pairs)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4), generate


def _load_eight(builder, arguments, r, bits):
    """The code for 8 numbers of row r at the first address."""
    source, stride = arguments[:2]
    place = builder.add(source, builder.mul(stride, ir.Constant(stride.type, r)))
    return builder.load(builder.inttoptr(place, ir.VectorType(ir.IntType(bits), 8).as_pointer()), align=bits // 8)


def _store_turned(builder, arguments, rows):
    """The code that transposes 8 rows of 8, by exchanging squares of 1, 2 and 4, and stores them."""
    for size in (1, 2, 4):
        low = [j if not j & size else 8 + j - size for j in range(8)]
        high = [j + size if not j & size else 8 + j for j in range(8)]
        masks = [ir.Constant(ir.VectorType(ir.IntType(32), 8), mask) for mask in (low, high)]
        for r in [r for r in range(8) if not r & size]:
            pair = rows[r], rows[r + size]
            rows[r], rows[r + size] = (builder.shuffle_vector(*pair, mask) for mask in masks)
    target, stride = arguments[2:]
    for r, row in enumerate(rows):
        place = builder.add(target, builder.mul(stride, ir.Constant(stride.type, r)))
        builder.store(row, builder.inttoptr(place, row.type.as_pointer()), align=4)


@_inner
def _turn(source, stride, rows, columns, target):
    """The matrix of 32-bit numbers at `source`, rows `stride` bytes apart, transposed to `target`, by cache lines."""
    for top in range(0, rows, 16):
        for left in range(0, columns, 16):
            for r in range(top, min(top + 16, rows), 8):
                for c in range(left, min(left + 16, columns), 8):
                    _turn_8(source + r * stride + 4 * c, stride, target + 4 * (c * rows + r), 4 * rows)


@_inner
def _turn_pairs(source, stride, columns, rows, target):
    """As `_turn`, of 16-bit numbers, of which two neighbours in a column stay together."""
    for left in range(0, columns, 32):
        for top in range(0, rows, 32):
            for c in range(left, min(left + 32, columns), 8):
                for r in range(top, min(top + 32, rows), 16):
                    _turn_8_pairs(source + r * stride + 2 * c, stride, target + 2 * (c * rows + r), 2 * rows)


@_inner
def _panel(depth):
    """How many columns of so many rows are packed at once: what stays in the cache."""
    return min(512, 2**18 // depth // 32 * 32)


@_inner
def packed_size(m, block):
    """How many numbers of 32 bits the packed operands of all products of a block take, of results of m rows at most."""
    return m * ((block + 15) // 16 * 8) + 2**17


@_inner
def _pair_rows(b, top, bottom, left, right, out):
    """A part of b into flat out: pairs of neighbours in a column, by rows of pairs."""
    columns = right - left
    for r in range((bottom - top) // 2):
        one, two, result = b[top + 2 * r], b[top + 2 * r + 1], out[r * columns : (r + 1) * columns]
        for i in range(columns):
            result[i] = np.uint32(one[left + i]) | np.uint32(np.uint32(two[left + i]) << np.uint32(16))


@_inner
def _product_of_halves(a, b, out, add, packed):
    """`_product` by oneDNN, of bfloat16 as bits, in float32.

    It takes the first operand by rows, and of the second pairs of neighbours in a column. All sizes are multiples of
    16, but for m where a is not transposed, and for k where it is: then zeros follow, in memory, up to such a multiple.
    """
    (m, k), n = a.shape, b.shape[1]
    k = (k + 15) // 16 * 16
    where, step, at = a.ctypes.data, a.strides[0], 0
    if a.strides[1] != 2:
        at = m * k // 2
        _turn_pairs(where, a.strides[1], m, k, packed.ctypes.data)
        where, step = packed.ctypes.data, 2 * k
    depth = (k + _DEPTH - 1) // _DEPTH
    depth = (k // 16 + depth - 1) // depth * 16
    columns = _panel(depth)
    for left in range(0, n, columns):
        right = min(left + columns, n)
        for top in range(0, k, depth):
            bottom = min(top + depth, k)
            second = packed[at : at + (bottom - top) // 2 * (right - left)]
            if b.strides[1] != 2:
                corner = b.ctypes.data + left * b.strides[1] + 2 * top
                _turn(corner, b.strides[1], right - left, (bottom - top) // 2, second.ctypes.data)
            else:
                _pair_rows(b, top, bottom, left, right, second)
            _multiply(
                where + 2 * top, m, step, second.ctypes.data, right - left, bottom - top,
                out.ctypes.data + 4 * left, out.strides[0], add or top > 0,
            )  # fmt: skip


@_inner
def _multiply(a, m, a_step, b, n, k, out, out_step, add):
    """What is at address a, m rows so many bytes apart, times what is packed at b, into `out`, or added to it."""
    # Each size has a kernel of its own, which oneDNN makes and keeps: few sizes, then.
    most = m // 32 * 32
    if most > 0:
        _brgemm(most, n, k, a_step // 2, n, out_step // 4, add, a, b, out, 1)
    if most < m:
        a, out = a + most * a_step, out + most * out_step
        _brgemm(m - most, n, k, a_step // 2, n, out_step // 4, add, a, b, out, 1)


def _end_products(operands):
    """What a thread does after its products."""


@overload(_end_products)
def _(operands):
    return (lambda operands: _threads(0)) if operands.dtype == types.float32 else (lambda operands: _release(1))


@_inner
def product_of_halves(a, b):
    """a b of bfloat16 as bits, of sizes that are multiples of 16, on this thread alone, for a check."""
    out = np.empty((a.shape[0], b.shape[1]), np.float32)
    packed = np.empty(packed_size(a.shape[0], a.shape[1]), np.uint32)
    _product_of_halves(a, b, out, False, packed)
    _release(1)
    return out


# ---- dispatch, activation, combine


@_inner
def _gather(x, token, start, out):
    """Dispatch: the hidden states (n, d) of the tokens of triples from `start` on."""
    for r in range(out.shape[0]):
        row, result = x[token[start + r]], out[r]
        for i in range(row.shape[0]):
            _write(result, i, _read(row[i]))


@_inner
def _broadcast(bias, out):
    """The bias in every row."""
    for r in range(out.shape[0]):
        result = out[r]
        for i in range(bias.shape[0]):
            result[i] = _read(bias[i])


@_inner
def _linear(rows, matrix, biases, e, out, work):
    """Rows times the matrix, transposed, plus the bias of expert e if there are biases."""
    biased = biases.shape[0] > 0
    if biased:
        _broadcast(biases[e, 0], out)
    _product_by_panels(rows, matrix.T, out, biased, work)


@_inner
def _activate(activation, h, out):
    """The hidden state of each row of h (n, 2f), gate first, or (n, f), into out (n, f)."""
    f = out.shape[1]
    for r in range(out.shape[0]):
        row, result = h[r], out[r]
        if activation.gated:
            for i in range(f):
                _write(result, i, _act(activation, row[i])[0] * row[f + i])
        else:
            for i in range(f):
                _write(result, i, _act(activation, row[i])[0])


@_inner
def _activate_backward(activation, h, da, weight, a, dh, grad_weight):
    """For each row of da (n, f), the gradient of its hidden state but for the weight (n,), at h (n, 2f) or (n, f).

    The hidden state times the weight into a (n, f), the gradient of the pre-activations into dh, and that of the
    weight, <da, hidden state>, into grad_weight (n,); its terms take the place of da.
    """
    f = da.shape[1]
    for r in range(da.shape[0]):
        row, grad, hidden, result, w = h[r], da[r], a[r], dh[r], weight[r]
        if activation.gated:
            for i in range(f):
                up = _read(row[f + i])
                acted, slope = _act(activation, _read(row[i]))
                _write(hidden, i, w * (acted * up))
                _write(result, i, w * grad[i] * (up * slope))
                _write(result, f + i, w * grad[i] * acted)
                grad[i] *= acted * up
        else:
            for i in range(f):
                acted, slope = _act(activation, _read(row[i]))
                _write(hidden, i, w * acted)
                _write(result, i, w * grad[i] * slope)
                grad[i] *= acted
        grad_weight[r] = _sum(grad)


@_inner
def _add_bias_products(rows, bias, out):
    """The product of each row with the bias, added to out (n,)."""
    terms = np.empty(bias.shape[0], np.float32)
    for r in range(rows.shape[0]):
        row = rows[r]
        for i in range(bias.shape[0]):
            terms[i] = _read(row[i]) * _read(bias[i])
        out[r] += _sum(terms)


@_inner
def _add_weighted_rows(rows, weight, total):
    """The rows times their weights added to total (q,), which is in float64."""
    for r in range(rows.shape[0]):
        row, w = rows[r], weight[r]
        for i in range(total.shape[0]):
            total[i] += w * _read(row[i])


@_inner
def _write_sum(total, out):
    """A sum of rows into out (1, q)."""
    for i in range(total.shape[0]):
        out[0, i] = total[i]


@_inner
def _expert_of(offsets, triple, e):
    """The expert of a triple, which is e or a later one."""
    while offsets[e + 1] <= triple:
        e += 1
    return e


@_inner
def _one_choice_a_token(starts):
    """Whether no token has two triples."""
    most = 0
    for i in range(starts.shape[0] - 1):
        most = max(most, starts[i + 1] - starts[i])
    return most < 2


@_inner
def _scatter(rows, token, start, weight, weighted, out):
    """Combine, where a token has one triple: each row, times its weight or not, into that of its token."""
    for r in range(rows.shape[0]):
        row, result = rows[r], out[token[start + r]]
        w = weight[r] if weighted else np.float32(1)
        for c in range(row.shape[0]):
            _write(result, c, w * row[c])


@_inner
def _combine(t, n, triples, single, rows, weight, weighted, out):
    """Combine: for the tokens of thread t of n the sum of their rows, weighted or not, into out; `single` is done."""
    tokens, d = out.shape
    total = np.empty(d, np.float32)
    for i in range(t * tokens // n, (t + 1) * tokens // n):
        begin, end = triples.starts[i], triples.starts[i + 1]
        if single and begin < end:
            continue
        total[:] = 0
        for j in range(begin, end):
            row = rows[triples.rows[j]]
            w = weight[triples.rows[j]] if weighted else np.float32(1)
            for c in range(d):
                total[c] += w * _read(row[c])
        result = out[i]
        for c in range(d):
            _write(result, c, total[c])


@_inner
def _carve_block(scratch, block, weights, operands):
    """Of flat scratch what a block needs.

    Its gathered rows, pre-activations, hidden states and results; matrices, if they are widened; and what operands are
    packed into, if they are.
    """
    up, down = weights.up, weights.down
    (width, d), f = up.shape[1:], down.shape[2]
    widens, packs = up.itemsize < operands.itemsize, operands.itemsize < 4
    x_b, at = _carve_operands(scratch, 0, block, d, operands)
    h_b, at = _carve(scratch, at, block, width)
    a_b, at = _carve_operands(scratch, at, block, f, operands)
    y_b, at = _carve(scratch, at, block * packs, d)
    up_b, at = _carve_operands(scratch, at, width * widens, d, operands)
    down_b, at = _carve_operands(scratch, at, d * widens, f, operands)
    size = packed_size(max(width, d), block) if packs else 0
    packed, at = scratch[at : at + size].view(np.uint32), at + size
    return x_b, h_b, a_b, y_b, up_b, down_b, packed, at


def _place_of_results(rows, operands, spare, single):
    """Where a block's results are computed in float32.

    That is in `rows`, unless each is scattered at once; then over operands that are not needed any more. If these are
    in half precision, as `rows` then are, in neither.
    """


@overload(_place_of_results)
def _(rows, operands, spare, single):
    if rows.dtype == types.float32:
        return lambda rows, operands, spare, single: operands if single else rows
    return lambda rows, operands, spare, single: spare


def _fill_up(rows, n):
    """Zeros behind n rows of operands that are packed by 16 rows."""


@overload(_fill_up)
def _(rows, n):
    if rows.dtype == types.float32:
        return lambda rows, n: None

    def fill_up(rows, n):
        for r in range(n, (n + 15) // 16 * 16):
            rows[r] = 0

    return fill_up


# ---- the forward


@_inner
def _forward(t, activation, operands, x, triples, single, weight, begin, end, weights, block, scratch, h, rows, out):
    """The share of thread t: its triples are dispatched, computed and, where each token has one alone, combined.

    Args:
        t: the thread.
        activation: of `ACTIVATIONS`.
        operands: of their dtype products take theirs.
        x: (T, d).
        triples: the routing.
        single: whether no token has two triples: a row then goes to its token at once.
        weight: (N,) combine weights.
        begin, end: the share, in triples.
        weights: the experts' `Matrices`.
        block: how many rows are at work at once.
        scratch: flat, of this thread.
        h: (N, 2f), filled where it has rows: the pre-activations for the backward.
        rows: (N, d), filled unless `single`: each triple's output, for `_combine`.
        out: (T, d), filled if `single`.
    """
    token, offsets = triples.token, triples.offsets
    up, down, up_bias, down_bias = weights
    keep = h.shape[0] > 0
    x_b, h_b, a_b, y_b, up_b, down_b, packed, _ = _carve_block(scratch, block, weights, operands)
    _threads(1)
    work = np.empty(10, np.int32), packed
    start, e = begin, 0
    while start < end:
        e = _expert_of(offsets, start, e)
        until = min(offsets[e + 1], end)
        up_e, down_e = _widened(up[e], up_b), _widened(down[e], down_b)
        while start < until:
            stop = _end_of_block(start, until, block)
            n = stop - start
            x_n, a_n = x_b[:n], a_b[:n]
            h_n = _place_for(h[start:stop], h_b[:n], keep)
            _gather(x, token, start, x_n)
            _linear(x_n, up_e, up_bias, e, h_n, work)
            if keep:
                _store(h_n, h[start:stop], False)
            following = min(e + 1, up.shape[0] - 1)
            for r in range(n):  # which leaves memory time to fetch what comes next
                _activate(activation, h_n[r : r + 1], a_n[r : r + 1])
                _prefetch_part(up[following], r, n)
                _prefetch_part(down[following], r, n)
            y_n = _place_of_results(rows[start:stop], x_n, y_b[:n], single)
            _linear(a_n, down_e, down_bias, e, y_n, work)
            if single:
                _scatter(y_n, token, start, weight[start:stop], True, out)
            else:
                _store(y_n, rows[start:stop], False)
            start = stop
    _end_products(operands)


@_compiled
def forward(activation, operands, x, triples, weight, weights, block, scratch, rows, h, out):
    """Dispatch, experts and combine: the output (T, d), and the pre-activations of each triple, if h has rows.

    Args:
        activation: of `ACTIVATIONS`.
        operands: (0,), of the dtype that products take: float32, or that of x where it is bfloat16.
        x: (T, d).
        triples: `Triples`, N of them.
        weight: (N,), float32, combine weights.
        weights: `Matrices` of the experts, in the dtype of x.
        block: how many rows a thread has at work at once.
        scratch: (shares, .), float32.
        rows: (N, d), of the dtype of `operands`, scratch for what the experts give each triple.
        h: (N, 2f) or (N, f) in the dtype of x, filled; without rows nothing is kept for a backward.
        out: (T, d) in the dtype of x, filled.
    """
    shares = scratch.shape[0]
    of, single = bounds(triples.offsets, shares), _one_choice_a_token(triples.starts)
    for t in numba.prange(shares):
        _forward(
            np.int64(t),
            activation,
            operands,
            x,
            triples,
            single,
            weight,
            of[t],
            of[t + 1],
            weights,
            block,
            scratch[t],
            h,
            rows,
            out,
        )
    for t in numba.prange(shares):
        _combine(np.int64(t), shares, triples, single, rows, weight, True, out)


# ---- decoding


@_inner
def _add_biases(biases, experts, offsets, rows):
    """The bias of each expert, if there are any, to its rows."""
    if biases.shape[0] == 0:
        return
    for e in experts:
        bias = biases[e, 0]
        for r in range(offsets[e], offsets[e + 1]):
            row = rows[r]
            for i in range(row.shape[0]):
                row[i] += _read(bias[i])


@_inner
def decode(activation, x, triples, weight, weights, scratch, h, out):
    """The output and the pre-activations of few triples; each matrix in use is read once.

    Args:
        activation: of `ACTIVATIONS`.
        x: (T, d).
        triples: `Triples`, N of them.
        weight: (N,), float32, combine weights.
        weights: `Matrices` of the experts.
        scratch: (N (2d + f),), float32.
        h: (N, 2f) or (N, f), float32, filled.
        out: (T, d), filled.
    """
    offsets, n, d, f = triples.offsets, triples.token.shape[0], weights.down.shape[1], weights.down.shape[2]
    experts = np.nonzero(offsets[1:] > offsets[:-1])[0]
    x_n, at = _carve(scratch, 0, n, d)
    a, at = _carve(scratch, at, n, f)
    rows, at = _carve(scratch, at, n, d)
    _gather(x, triples.token, 0, x_n)
    products(x_n, weights.up, experts, offsets, h)
    _add_biases(weights.up_bias, experts, offsets, h)
    _activate(activation, h, a)
    products(a, weights.down, experts, offsets, rows)
    _add_biases(weights.down_bias, experts, offsets, rows)
    _combine(0, 1, triples, False, rows, weight, True, out)


# ---- matrices in codes of 8 or 4 bits


class Coded(NamedTuple):
    """A matrix (q, p) of each expert in codes, as `shunter.experts.quantised` lays them out.

    Args:
        codes: uint8, of one expert after the other.
        scales: the bits of bfloat16.
        zeros: uint8, of each scale, or one for all.
        zero_step: 1 or 0: how far the zeros of neighbouring scales are apart.
        starts, scale_starts: (E + 1,), where the codes and the scales of each expert begin.
        bits: (E,), 8 or 4.
        shift: log2 of how many steps of 32 columns share a scale, in 4 bits.
        rows, columns: q and p.
    """

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray
    zero_step: int
    starts: np.ndarray
    scale_starts: np.ndarray
    bits: np.ndarray
    shift: int
    rows: int
    columns: int


# Rows of a matrix that are decoded for one product: few enough to be in the cache when it reads them.
PANEL_ROWS = 128

# How many bytes ahead codes are fetched.
_AHEAD = 4096


def _in_all_lanes(builder, value):
    one = builder.insert_element(ir.Constant(_LANES, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(ir.IntType(32), 16), [0] * 16))


def _load(builder, kind, address, align):
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=align)


def _multiply_add(builder, a, b, c):
    name = "llvm.fmuladd.v16f32"
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_LANES, [_LANES] * 3), name)
    return builder.call(function, [a, b, c])


def _fetch_ahead(builder, address):
    """What a thread will read in some steps, into the cache: the processor itself stops at the end of a page."""
    byte, flag = ir.IntType(8).as_pointer(), ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [byte, flag, flag, flag])
    function = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
    ahead = builder.inttoptr(builder.add(address, address.type(_AHEAD)), byte)
    builder.call(function, [ahead, flag(0), flag(3), flag(1)])


def _step_of_eight(builder, i, codes, scales, offsets, shift):
    """The codes of 32 columns as two vectors of numbers; their scale is the row's."""
    _fetch_ahead(builder, builder.add(codes, builder.shl(i, i.type(5))))
    for half in (0, 16):
        address = builder.add(builder.add(codes, builder.shl(i, i.type(5))), i.type(half))
        found = _load(builder, ir.VectorType(ir.IntType(8), 16), address, 1)
        yield builder.sitofp(builder.sext(found, ir.VectorType(ir.IntType(32), 16)), _LANES)


def _step_of_four(builder, i, codes, scales, offsets, shift):
    """The weights of 32 columns as two vectors: code times scale minus zero times scale, exactly."""
    wide = ir.VectorType(ir.IntType(32), 16)
    address = builder.add(codes, builder.shl(i, i.type(4)))
    _fetch_ahead(builder, address)
    found = _load(builder, ir.VectorType(ir.IntType(8), 16), address, 1)
    found = builder.zext(found, wide)
    group = builder.shl(builder.lshr(i, shift), i.type(2))
    scale = _in_all_lanes(builder, _load(builder, _FLOAT, builder.add(scales, group), 4))
    offset = _in_all_lanes(builder, _load(builder, _FLOAT, builder.add(offsets, group), 4))
    low = builder.and_(found, ir.Constant(wide, [15] * 16))
    for half in (low, builder.lshr(found, ir.Constant(wide, [4] * 16))):
        yield _multiply_add(builder, builder.uitofp(half, _LANES), scale, offset)


def _dots_of(step, count):
    """A function that multiplies two rows of codes with `count` rows of float32, all filled up to steps of 32 columns.

    The second row of codes, scales and results is `apart` behind the first. Sums are in lanes that are added up once,
    at the end: a loop that ended with every group would add up as often.
    """

    @intrinsic
    def dots(context, codes, apart, scales, offsets, scales_apart, shift, steps, rows, stride, out):
        def generate(context, builder, signature, arguments):
            codes, apart, scales, offsets, scales_apart, shift, steps, rows, stride, out = arguments
            matrix = [(codes, scales, offsets)]
            matrix.append(
                (builder.add(codes, apart), builder.add(scales, scales_apart), builder.add(offsets, scales_apart))
            )
            # With few rows, sums of their own for both halves: they wait less for each other.
            chains = 2 if count < 4 else 1
            sums = [[cgutils.alloca_once(builder, _LANES) for _ in range(chains * count)] for _ in matrix]
            for cell in sums[0] + sums[1]:
                builder.store(ir.Constant(_LANES, [0.0] * 16), cell)
            with cgutils.for_range(builder, steps) as loop:
                weights = [list(step(builder, loop.index, *row, shift)) for row in matrix]
                for r in range(count):
                    row = builder.add(rows, builder.mul(stride, stride.type(r)))
                    row = builder.add(row, builder.shl(loop.index, loop.index.type(7)))
                    for half in (0, 1):
                        x = _load(builder, _LANES, builder.add(row, row.type(64 * half)), 4)
                        for of_row, cells in zip(weights, sums, strict=True):
                            cell = cells[chains * r + half % chains]
                            builder.store(_multiply_add(builder, of_row[half], x, builder.load(cell)), cell)
            cells = sums[0] + sums[1]
            for i in range(2 * count):
                total = builder.load(cells[chains * i])
                if chains == 2:
                    total = builder.fadd(total, builder.load(cells[2 * i + 1]))
                one = _sum_of_lanes(builder, total)
                builder.store(one, builder.inttoptr(builder.add(out, out.type(4 * i)), _FLOAT.as_pointer()))
            return context.get_dummy_value()

        return types.void(*[types.intp] * 10), generate

    return dots


def _decoded_by(step):
    """A function that writes a row of codes as float32, in steps of 32 columns; of 8 bits without their scale."""

    @intrinsic
    def decoded(context, codes, scales, offsets, shift, steps, out):
        def generate(context, builder, signature, arguments):
            codes, scales, offsets, shift, steps, out = arguments
            with cgutils.for_range(builder, steps) as loop:
                to = builder.add(out, builder.shl(loop.index, loop.index.type(7)))
                for half, weights in enumerate(step(builder, loop.index, codes, scales, offsets, shift)):
                    place = builder.inttoptr(builder.add(to, to.type(64 * half)), _LANES.as_pointer())
                    builder.store(weights, place, align=4)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 6), generate

    return decoded


_eight_and_one, _eight_and_two, _eight_and_four = (_dots_of(_step_of_eight, count) for count in (1, 2, 4))
_four_and_one, _four_and_two, _four_and_four = (_dots_of(_step_of_four, count) for count in (1, 2, 4))
_decoded_eight, _decoded_four = _decoded_by(_step_of_eight), _decoded_by(_step_of_four)


@_inner
def _steps(coded, e):
    """How many steps of 32 columns the rows of expert e have."""
    return (coded.starts[e + 1] - coded.starts[e]) // coded.rows // (4 * coded.bits[e])


@_inner
def _read_scales(coded, at, scales, offsets):
    """The scales from `at` on in float32, and what they are off: minus zero times scale."""
    bits = coded.scales[at : at + scales.shape[0]]
    for g in range(scales.shape[0]):
        scales[g] = _read(bits[g])
    if coded.zero_step == 0:
        for g in range(scales.shape[0]):
            offsets[g] = np.float32(-8) * scales[g]
    else:
        zeros = coded.zeros[at : at + scales.shape[0]]
        for g in range(scales.shape[0]):
            offsets[g] = np.float32(0) - np.float32(zeros[g]) * scales[g]


@_inner
def _coded_dots(rows, first, end, coded, e, top, bottom, out):
    """Rows (N, .) of expert e, from `first` to `end`, times the rows of its matrix from `top` to `bottom`, into out.

    Two rows of the matrix, half a block apart, at once, as in `products`.
    """
    steps, four = _steps(coded, e), coded.bits[e] == 4
    groups = steps >> coded.shift if four else 1
    row_bytes, shift, stride = steps * 4 * coded.bits[e], coded.shift, rows.strides[0]
    scales, offsets = np.empty((bottom - top) * groups, np.float32), np.empty((bottom - top) * groups, np.float32)
    _read_scales(coded, coded.scale_starts[e] + top * groups, scales, offsets)
    sums = np.empty(8, np.float32)
    to, base, x_first = sums.ctypes.data, coded.codes.ctypes.data + coded.starts[e], rows.ctypes.data
    s_first, o_first = scales.ctypes.data, offsets.ctypes.data
    half = (bottom - top + 1) // 2
    for r in range(top, top + half):
        other = min(r + half, bottom - 1)
        codes, gap = base + r * row_bytes, (other - r) * row_bytes
        part, apart = 4 * groups * (r - top), 4 * groups * (other - r)
        s, o = s_first + part, o_first + part
        n = first
        while n < end:
            x, count = x_first + n * stride, 4 if end - n >= 4 else 2 if end - n >= 2 else 1
            if four:
                if count == 4:
                    _four_and_four(codes, gap, s, o, apart, shift, steps, x, stride, to)
                elif count == 2:
                    _four_and_two(codes, gap, s, o, apart, shift, steps, x, stride, to)
                else:
                    _four_and_one(codes, gap, s, o, apart, shift, steps, x, stride, to)
                for i in range(count):
                    out[n + i, r], out[n + i, other] = sums[i], sums[count + i]
            else:
                if count == 4:
                    _eight_and_four(codes, gap, s, o, apart, shift, steps, x, stride, to)
                elif count == 2:
                    _eight_and_two(codes, gap, s, o, apart, shift, steps, x, stride, to)
                else:
                    _eight_and_one(codes, gap, s, o, apart, shift, steps, x, stride, to)
                for i in range(count):
                    out[n + i, r], out[n + i, other] = sums[i] * scales[r - top], sums[count + i] * scales[other - top]
            n += count


@_compiled
def coded_products(rows, coded, experts, offsets, out):
    """As `products`, with matrices in codes; rows are filled up with zeros to steps of 32 columns and whole groups."""
    q = coded.rows
    blocks = (q + _ROWS - 1) // _ROWS
    for item in numba.prange(experts.shape[0] * blocks):
        e, top = experts[item // blocks], item % blocks * _ROWS
        _coded_dots(rows, offsets[e], offsets[e + 1], coded, e, top, min(q, top + _ROWS), out)


@_inner
def _filled_up(rows, out):
    """The rows, with zeros behind them where out is wider."""
    width = rows.shape[1]
    for r in range(rows.shape[0]):
        out[r, :width] = rows[r]
        out[r, width:] = 0
    return out


@_inner
def decode_coded(activation, x, triples, weight, up, down, up_bias, down_bias, width, scratch, out):
    """The output of few triples; each code in use is read once.

    Args:
        activation: of `ACTIVATIONS`.
        x: (T, d).
        triples: `Triples`, N of them.
        weight: (N,), float32, combine weights.
        up, down: `Coded`.
        up_bias, down_bias: (E, 1, 2f) and (E, 1, d) in the dtype of x; those absent have E 0.
        width: to how many columns rows are filled up.
        scratch: (N (2d + 3f + width),), float32; 2d + 2f + width where the activation does not gate.
        out: (T, d), filled.
    """
    offsets, n, d, f = triples.offsets, triples.token.shape[0], down.rows, down.columns
    experts = np.nonzero(offsets[1:] > offsets[:-1])[0]
    x_n, at = _carve(scratch, 0, n, d)
    h, at = _carve(scratch, at, n, up.rows)
    a, at = _carve(scratch, at, n, f)
    rows, at = _carve(scratch, at, n, d)
    wide, at = _carve(scratch, at, n, width)
    _gather(x, triples.token, 0, x_n)
    coded_products(_filled_up(x_n, wide), up, experts, offsets, h)
    _add_biases(up_bias, experts, offsets, h)
    _activate(activation, h, a)
    coded_products(_filled_up(a, wide), down, experts, offsets, rows)
    _add_biases(down_bias, experts, offsets, rows)
    _combine(0, 1, triples, False, rows, weight, True, out)


@_inner
def _decode_rows(coded, e, top, out):
    """The rows of the matrix of expert e from `top` on, in float32, into out, filled up to steps of 32 columns."""
    steps, four = _steps(coded, e), coded.bits[e] == 4
    groups = steps >> coded.shift if four else 1
    scales, offsets = np.empty(out.shape[0] * groups, np.float32), np.empty(out.shape[0] * groups, np.float32)
    _read_scales(coded, coded.scale_starts[e] + top * groups, scales, offsets)
    for r in range(out.shape[0]):
        codes = coded.codes.ctypes.data + coded.starts[e] + (top + r) * steps * 4 * coded.bits[e]
        s, o = scales.ctypes.data + 4 * groups * r, offsets.ctypes.data + 4 * groups * r
        to = out.ctypes.data + r * out.strides[0]
        if four:
            _decoded_four(codes, s, o, coded.shift, steps, to)
        else:
            _decoded_eight(codes, s, o, coded.shift, steps, to)
            row, scale = out[r], scales[r]
            for i in range(row.shape[0]):
                row[i] *= scale


@_inner
def _coded_linear(rows, coded, biases, e, panel, out, work):
    """As `_linear`, a panel of the matrix after the other, decoded into scratch."""
    biased, q, start, width = biases.shape[0] > 0, coded.rows, 0, 32 * _steps(coded, e)
    if biased:
        _broadcast(biases[e, 0], out)
    while start < q:
        stop = _end_of_block(start, q, PANEL_ROWS)
        part, _ = _carve(panel, 0, stop - start, width)
        _decode_rows(coded, e, start, part)
        _product(rows, part[:, : coded.columns].T, out[:, start:stop], biased, work)
        start = stop


@_inner
def _forward_coded(
    activation, x, triples, single, weight, begin, end, up, down, up_bias, down_bias, block, scratch, rows, out
):
    """The share of one thread, as `_forward` has it: its triples from `begin` to `end`."""
    token, offsets, d, f = triples.token, triples.offsets, down.rows, down.columns
    x_b, at = _carve(scratch, 0, block, d)
    h_b, at = _carve(scratch, at, block, up.rows)
    a_b, at = _carve(scratch, at, block, f)
    panel = scratch[at:]
    _threads(1)
    work = np.empty(10, np.int32), np.empty(0, np.uint32)
    start, e = begin, 0
    while start < end:
        e = _expert_of(offsets, start, e)
        until = min(offsets[e + 1], end)
        while start < until:
            stop = _end_of_block(start, until, block)
            n = stop - start
            x_n, h_n, a_n = x_b[:n], h_b[:n], a_b[:n]
            _gather(x, token, start, x_n)
            _coded_linear(x_n, up, up_bias, e, panel, h_n, work)
            _activate(activation, h_n, a_n)
            y_n = x_n if single else rows[start:stop]
            _coded_linear(a_n, down, down_bias, e, panel, y_n, work)
            if single:
                _scatter(y_n, token, start, weight[start:stop], True, out)
            start = stop
    _threads(0)


@_compiled
def forward_coded(activation, x, triples, weight, up, down, up_bias, down_bias, block, scratch, rows, out):
    """Dispatch, experts and combine with matrices in codes: the output (T, d) of many tokens.

    Args:
        activation, x, triples, weight, up, down, up_bias, down_bias, out: as of `decode_coded`.
        block, rows: as of `forward`.
        scratch: (shares, .), float32: for each a block's rows, and `PANEL_ROWS` of the wider matrix, filled up.
    """
    shares = scratch.shape[0]
    of, single = bounds(triples.offsets, shares), _one_choice_a_token(triples.starts)
    for t in numba.prange(shares):
        _forward_coded(
            activation, x, triples, single, weight, of[t], of[t + 1], up, down, up_bias, down_bias, block, scratch[t],
            rows, out,
        )  # fmt: skip
    for t in numba.prange(shares):
        _combine(np.int64(t), shares, triples, single, rows, weight, True, out)


# ---- the backward


@_inner
def _carve_gradients(scratch, gradients):
    """Of flat scratch a part for each of one expert's matrices and biases that wants a gradient; else of no rows."""
    up, down, up_bias, down_bias = gradients
    of_up, at = _carve(scratch, 0, up.shape[1] * (up.shape[0] > 0), up.shape[2])
    of_down, at = _carve(scratch, at, down.shape[1] * (down.shape[0] > 0), down.shape[2])
    of_up_bias, at = _carve(scratch, at, up_bias.shape[1] * (up_bias.shape[0] > 0), up_bias.shape[2])
    of_down_bias, at = _carve(scratch, at, down_bias.shape[1] * (down_bias.shape[0] > 0), down_bias.shape[2])
    return of_up, of_down, of_up_bias, of_down_bias


@_inner
def _backward(
    t, activation, operands, grad, x, triples, single, weight, begin, end, weights, block, scratch, h, parts, rows,
    grad_x, grad_weight, gradients,
):  # fmt: skip
    """The share of thread t of the gradients.

    An expert that lies whole in the share has its gradients written at once. One that began in an earlier share, or
    goes on in a later one, has them in this thread's `parts`, which `_add_up_shared` adds up.

    Args:
        t, activation, operands, x, triples, single, weight, begin, end, weights, block, scratch: as of `_forward`.
        grad: (T, d), of the output.
        h: (N, 2f) pre-activations that were kept; without rows they are computed again.
        parts: (2n, .) of n threads, in float32: an expert that an earlier thread began, and one that this one began.
        rows: (N, d), filled unless `single`: each triple's gradient of x, for `_combine`.
        grad_x: (T, d), filled if `single`; without rows it is not wanted.
        grad_weight: (N,), filled: <da, a>, and with a bias <dy, bias> besides.
        gradients: `Matrices`, filled; those with E 0 are not wanted.
    """
    token, offsets = triples.token, triples.offsets
    up, down, up_bias, down_bias = weights
    (width, d), kept = up.shape[1:], h.shape[0] > 0
    x_b, h_b, a_b, y_b, up_b, down_b, packed, at = _carve_block(scratch, block, weights, operands)
    dy_b, at = _carve_operands(scratch, at, block, d, operands)
    dh_b, at = _carve_operands(scratch, at, block, width, operands)
    da_b, at = _carve(scratch, at, block, down.shape[2])
    again = scratch[at:].view(x.dtype)[: block * width * (not kept)].reshape(block * (not kept), width)
    needs_up, needs_down = gradients.up.shape[0] > 0, gradients.down.shape[0] > 0
    needs_up_bias, needs_down_bias = gradients.up_bias.shape[0] > 0, gradients.down_bias.shape[0] > 0
    _threads(1)
    work, ones = (np.empty(10, np.int32), packed), np.ones(block, np.float32)
    dh_sum, dy_sum = np.empty(width), np.empty(d)
    start, e = begin, 0
    while start < end:
        e = _expert_of(offsets, start, e)
        until = min(offsets[e + 1], end)
        up_e, down_e = _widened(up[e], up_b), _widened(down[e], down_b)
        begun = offsets[e] < begin
        whole = not begun and offsets[e + 1] <= end
        part = _carve_gradients(parts[2 * t if begun else 2 * t + 1], gradients)
        streams = _fits_cache(gradients.up[e]), _fits_cache(gradients.down[e]), False, False
        grad_up = _place_for(gradients.up[e], part[0], whole and not streams[0])
        grad_down = _place_for(gradients.down[e], part[1], whole and not streams[1])
        grad_up_bias = _place_for(gradients.up_bias[e], part[2], whole)
        grad_down_bias = _place_for(gradients.down_bias[e], part[3], whole)
        dh_sum[:] = 0
        dy_sum[:] = 0
        add = False
        while start < until:
            stop = _end_of_block(start, until, block)
            n = stop - start
            x_n, a_n, dy_n, dh_n, da_n = x_b[:n], a_b[:n], dy_b[:n], dh_b[:n], da_b[:n]
            if needs_up or not kept:
                _gather(x, token, start, x_n)
            h_n = h[start:stop]
            if not kept:
                h_n = again[:n]
                wide = _place_for(h_n, h_b[:n], True)
                _linear(x_n, up_e, up_bias, e, wide, work)
                _store(wide, h_n, False)
            _gather(grad, token, start, dy_n)
            _product_by_panels(dy_n, down_e, da_n, False, work)
            _activate_backward(activation, h_n, da_n, weight[start:stop], a_n, dh_n, grad_weight[start:stop])
            if down_bias.shape[0] > 0:
                _add_bias_products(dy_n, down_bias[e, 0], grad_weight[start:stop])
            if needs_down:
                _fill_up(dy_b, n)
                _fill_up(a_b, n)
                _product(dy_n.T, a_n, grad_down, add, work)
            if needs_down_bias:
                _add_weighted_rows(dy_n, weight[start:stop], dy_sum)
            if needs_up:
                _fill_up(dh_b, n)
                _fill_up(x_b, n)
                _product(dh_n.T, x_n, grad_up, add, work)
            if needs_up_bias:
                _add_weighted_rows(dh_n, ones, dh_sum)
            if grad_x.shape[0] > 0:
                dx_n = _place_of_results(rows[start:stop], dy_n, y_b[:n], single)
                _product_by_panels(dh_n, up_e, dx_n, False, work)
                if single:
                    _scatter(dx_n, token, start, weight[start:stop], False, grad_x)
                else:
                    _store(dx_n, rows[start:stop], False)
            add = True
            start = stop
        if needs_up_bias:
            _write_sum(dh_sum, grad_up_bias)
        if needs_down_bias:
            _write_sum(dy_sum, grad_down_bias)
        if whole:
            found = grad_up, grad_down, grad_up_bias, grad_down_bias
            for i in range(4):
                if gradients[i].shape[0] > 0:
                    _store(found[i], gradients[i][e], streams[i])
    _fence()
    _end_products(operands)


@_inner
def _add_up_shared(t, offsets, of, parts, gradients):
    """The gradients of experts that threads share, from their parts in order; zeros for experts without triples.

    Args:
        t: the thread, which adds up its share of the rows of each matrix.
        offsets: (E + 1,), where each expert's triples begin.
        of: (shares + 1,), where each share begins.
        parts, gradients: as of `_backward`.
    """
    shares = of.shape[0] - 1
    for e in range(offsets.shape[0] - 1):
        first, last = offsets[e], offsets[e + 1]
        share = 0
        while first < last and of[share + 1] <= first:
            share += 1
        if first < last <= of[share + 1]:
            continue
        for i in range(4):
            if gradients[i].shape[0] == 0:
                continue
            q, p = gradients[i].shape[1:]
            total = np.empty(p, np.float32)
            for r in range(t * q // shares, (t + 1) * q // shares):
                total[:] = 0
                s = share
                while first < last and of[s] < last:
                    if of[s] < of[s + 1]:
                        row = _carve_gradients(parts[2 * s if of[s] > first else 2 * s + 1], gradients)[i][r]
                        for c in range(p):
                            total[c] += row[c]
                    s += 1
                result = gradients[i][e, r]
                for c in range(p):
                    _write(result, c, total[c])


@_compiled
def backward(
    activation, operands, grad, x, triples, weight, weights, block, scratch, h, parts, rows, grad_x, grad_weight,
    gradients,
):  # fmt: skip
    """The gradients of x, of the combine weights and of the experts' matrices and biases, from that of the output.

    Args:
        activation, operands, x, triples, weight, weights, block: as of `forward`.
        grad: (T, d), of the output, in the dtype of x.
        scratch: (shares, .), float32.
        h: (N, 2f) or (N, f), the pre-activations that `forward` kept; without rows they are computed again.
        parts: (2 shares, .), float32, scratch for the gradients of experts that threads share: of the one that an
            earlier thread began, and of the one that this thread began.
        rows: (N, d), of the dtype of `operands`, scratch for each triple's gradient of x.
        grad_x: (T, d), filled; without rows it is not wanted.
        grad_weight: (N,), float32, filled.
        gradients: `Matrices`, filled; those with E 0 are not wanted.
    """
    shares = scratch.shape[0]
    of, single = bounds(triples.offsets, shares), _one_choice_a_token(triples.starts)
    for t in numba.prange(shares):
        _backward(
            np.int64(t), activation, operands, grad, x, triples, single, weight, of[t], of[t + 1], weights, block,
            scratch[t], h, parts, rows, grad_x, grad_weight, gradients,
        )  # fmt: skip
    for t in numba.prange(shares):
        _combine(np.int64(t), shares, triples, single, rows, weight, False, grad_x)
        _add_up_shared(np.int64(t), triples.offsets, of, parts, gradients)
