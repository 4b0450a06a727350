"""The loops that Numba compiles. Matrices in half precision come as their bits, which each loop widens as it reads."""

from __future__ import annotations

import numba
import numpy as np
from numba import types
from numba.extending import overload

# Sums may be split into lanes; infinities and NaN stay what they are.
_compiled = numba.njit(parallel=True, fastmath={"reassoc", "contract", "nsz"}, error_model="numpy", cache=True)

# A thread takes so many rows of a matrix at once.
_ROWS = 64


def _single(value):
    """A value in float32: of float32 itself, of the bits of a bfloat16 (uint16) or of a float16 (int16)."""


@overload(_single, inline="always")
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


@_compiled
def products(rows, matrices, experts, starts, counts, out):
    """Rows (N, p) of experts[g], counts[g] from starts[g] on, times its matrix (q, p), transposed, into out (N, q).

    A row of the matrix meets up to four of the others at once: as many sums as neither wait for each other nor overflow
    the registers. The last row fills up four.
    """
    q, p = matrices.shape[1:]
    blocks = (q + _ROWS - 1) // _ROWS
    for item in numba.prange(experts.shape[0] * blocks):
        group, block = item // blocks, item % blocks
        first, end = starts[group], starts[group] + counts[group]
        for r in range(block * _ROWS, min(q, (block + 1) * _ROWS)):
            row = matrices[experts[group], r]
            n = first
            while end - n >= 3:
                last = min(n + 3, end - 1)
                xa, xb, xc, xd = rows[n], rows[n + 1], rows[n + 2], rows[last]
                a = b = c = d = np.float32(0)
                for i in range(p):
                    value = _single(row[i])
                    a += value * xa[i]
                    b += value * xb[i]
                    c += value * xc[i]
                    d += value * xd[i]
                out[n, r], out[n + 1, r], out[n + 2, r], out[last, r] = a, b, c, d
                n += 4
            if end - n == 2:
                xa, xb = rows[n], rows[n + 1]
                a = b = np.float32(0)
                for i in range(p):
                    value = _single(row[i])
                    a += value * xa[i]
                    b += value * xb[i]
                out[n, r], out[n + 1, r] = a, b
            elif end - n == 1:
                xa = rows[n]
                a = np.float32(0)
                for i in range(p):
                    a += _single(row[i]) * xa[i]
                out[n, r] = a


@numba.njit(fastmath={"contract"}, error_model="numpy", cache=True)
def _sigmoid(x):
    """1 / (1 + exp(-x)) to two units in the last place, in operations that run in lanes; NaN aside."""
    t = min(max(-x, np.float32(-87)), np.float32(88))
    n = np.floor(t * np.float32(1.44269504) + np.float32(0.5))
    # t = n ln 2 + r, with ln 2 in two parts of which the first is short: n times it is exact.
    r = t - n * np.float32(0.693359375)
    r = r - n * np.float32(-2.12194440e-4)
    series = r * np.float32(1 / 5040) + np.float32(1 / 720)
    series = series * r + np.float32(1 / 120)
    series = series * r + np.float32(1 / 24)
    series = series * r + np.float32(1 / 6)
    series = (series * r + np.float32(0.5)) * r * r + r + np.float32(1)
    power = np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
    return np.float32(1) / (np.float32(1) + series * power)


@_compiled
def swiglu(h, out):
    """silu(gate) up of each row of h (n, 2f), gate first, into out (n, f)."""
    f = out.shape[1]
    for r in numba.prange(out.shape[0]):
        row, result = h[r], out[r]
        for i in range(f):
            gate = _single(row[i])
            result[i] = gate * _sigmoid(gate) * _single(row[f + i])


@_compiled
def swiglu_backward(h, index, da, weight, a, dh, grad_weight):
    """For each row of da (n, f), the gradient of its hidden state but for the weight (n,), at h (., 2f)[index (n,)].

    The hidden state times the weight into a (n, f), the gradient of the pre-activations into dh (n, 2f), and that of
    the weight, <da, hidden state>, into grad_weight (n,).
    """
    f = da.shape[1]
    for r in numba.prange(da.shape[0]):
        row, grad, hidden, result = h[index[r]], da[r], a[r], dh[r]
        w = weight[r]
        total = np.float32(0)
        for i in range(f):
            gate, up = _single(row[i]), _single(row[f + i])
            s = _sigmoid(gate)
            acted = gate * s
            value = acted * up
            total += grad[i] * value
            hidden[i] = w * value
            d = w * grad[i]
            result[f + i] = d * acted
            result[i] = d * up * s * (np.float32(1) + gate * (np.float32(1) - s))
        grad_weight[r] = total
