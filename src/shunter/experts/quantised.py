"""Experts' matrices to codes of 8 or 4 bits with scales, and back: `QuantisedWeights`, which the backends decode.

A weight is (code - zero) scale. In 8 bits a row has one scale and codes from -127 to 127, zero 0. In 4 bits a group of
32 or 64 neighbours in a row has a scale and codes from 0 to 15; zero is 8, or a code of its own (`zero_point`). Scales
are bfloat16, of few enough bits that every weight is exact in float32; they are kept as their bits, so that no change
of a model's dtype rounds them. Rows are filled up with zeros to whole groups. 16 bytes of 4-bit codes hold 32
neighbours: the low halves the first 16, the high halves the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import UserError
from .weights import ExpertWeights, Matrices

__all__ = ["GROUPS", "NO_BACKWARD", "Coding", "Packed", "QuantisedWeights", "check_bits", "pack", "without_backward"]

GROUPS = (32, 64)

NO_BACKWARD = "quantised experts do not learn, and no gradient passes them; train the model that they were made of"

STEP = 32
"""How many neighbours of a row lie together."""

# Shares of the scale that reaches a group's largest weight: to clip a few may lose less than to round all coarsely.
_CLIPS = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.75, 0.7)


class Coding(NamedTuple):
    """How matrices are coded: the bits of each of E experts, 8 or 4; the group and kind of zero of those with 4."""

    bits: tuple[int, ...]
    group: int = 32
    zero_point: bool = False

    def width(self, e: int, columns: int) -> int:
        """The columns of a matrix of expert e with the zeros that fill its rows up."""
        unit = STEP if self.bits[e] == 8 else self.group
        return -(-columns // unit) * unit

    def starts(self, rows: int, columns: int) -> tuple[list[int], list[int]]:
        """Where the bytes of codes, and where the scales of each expert's matrix begin; last, how many there are."""
        widths = [self.width(e, columns) for e in range(len(self.bits))]
        codes = [rows * width * bits // 8 for width, bits in zip(widths, self.bits, strict=True)]
        scales = [
            rows * (1 if bits == 8 else width // self.group) for width, bits in zip(widths, self.bits, strict=True)
        ]
        return list(accumulate(codes, initial=0)), list(accumulate(scales, initial=0))


@dataclass(frozen=True)
class Packed:
    """A matrix (q, p) of each of E experts in codes.

    Args:
        codes: uint8, of one expert after the other, row by row.
        scale: int16, the bits of the bfloat16 scales, in the same order.
        zero: uint8, the zero of each scale; empty where all are the middle.
        rows, columns: q and p.
        coding: how they are coded.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    rows: int
    columns: int
    coding: Coding

    @property
    def nbytes(self) -> int:
        """Of codes, scales and zeros."""
        return self.codes.nbytes + self.scale.nbytes + self.zero.nbytes

    @property
    def width(self) -> int:
        """The columns of the widest matrix with the zeros that fill its rows up."""
        return max(self.coding.width(e, self.columns) for e in range(len(self.coding.bits)))

    def matrix(self, e: int) -> Tensor:
        """The matrix (q, p) of expert e, in float32, exactly."""
        starts, scales = self.coding.starts(self.rows, self.columns)
        bits, group = self.coding.bits[e], self.coding.group
        codes = self.codes[starts[e] : starts[e + 1]]
        scale = self.scale[scales[e] : scales[e + 1]].view(torch.bfloat16).float()
        if bits == 8:
            found = codes.view(torch.int8).view(self.rows, -1).float() * scale[:, None]
        else:
            pairs = codes.view(-1, STEP // 2)
            values = torch.stack([pairs & 15, pairs >> 4], 1).view(-1, group).float()
            zero = self.zero[scales[e] : scales[e + 1], None].float() if self.coding.zero_point else 8
            found = ((values - zero) * scale[:, None]).view(self.rows, -1)
        return found[:, : self.columns]


def check_bits(bits: int | Sequence[int], experts: int, group: int = 32) -> tuple[int, ...]:
    """The bits of each of E experts, of one number for all or one each.

    Raises:
        UserError: for other bits than 8 and 4, another number of them, or a group that is none of `GROUPS`.
    """
    each = (bits,) * experts if isinstance(bits, int) else tuple(bits)
    if len(each) != experts:
        raise UserError(f"quantize: {len(each)} bits are given for {experts} experts; give one number, or one each")
    for number in each:
        if isinstance(number, bool) or number not in (4, 8):
            raise UserError(f"quantize: {number!r} bits cannot be had; choose 8 or 4")
    if group not in GROUPS:
        raise UserError(f"quantize: a group of {group} cannot be had; choose {' or '.join(map(str, GROUPS))}")
    return each


@torch.no_grad()
def pack(matrices: Tensor, coding: Coding, importance: Tensor | None = None) -> Packed:
    """Matrices (E, q, p) to codes, expert by expert, with scales that lose least.

    Args:
        matrices: finite, in any dtype.
        coding: how.
        importance: (E, p), at least 0: what an error in each column counts, such as the mean square of what it is
            multiplied by; None or all zeros: every column the same.

    Returns:
        Codes whose scale, for each row or group, is the best of a few that clip the largest weights more or less.

    Raises:
        UserError: where a matrix holds NaN or infinity.
    """
    experts, rows, columns = matrices.shape
    starts, scales = coding.starts(rows, columns)
    codes = torch.empty(starts[-1], dtype=torch.uint8, device=matrices.device)
    scale = torch.empty(scales[-1], dtype=torch.int16, device=matrices.device)
    zero = torch.zeros(scales[-1] if coding.zero_point else 0, dtype=torch.uint8, device=matrices.device)
    for e in range(experts):
        matrix = matrices[e].float().contiguous()
        if not bool(matrix.isfinite().all()):
            raise UserError(f"quantize: the matrices of expert {e} hold NaN or infinity; take an earlier model")
        filled = torch.nn.functional.pad(matrix, (0, coding.width(e, columns) - columns))
        weighing = torch.ones_like(filled[0])
        if importance is not None and bool((importance[e] > 0).any()):
            weighing = torch.nn.functional.pad(importance[e].float(), (0, filled.shape[1] - columns))
            weighing = weighing / weighing.max()  # so that no square of it is beyond float32
        group = filled.shape[1] if coding.bits[e] == 8 else coding.group
        groups = filled.view(-1, group)
        weighing = weighing.view(1, -1, group).expand(rows, -1, -1).reshape(-1, group)
        found, steps, zeros = _code(groups, weighing, coding.bits[e], coding.zero_point and coding.bits[e] == 4)
        if coding.bits[e] == 8:
            codes[starts[e] : starts[e + 1]] = found.to(torch.int8).view(torch.uint8).view(-1)
        else:
            pairs = found.to(torch.uint8).view(-1, 2, STEP // 2)
            codes[starts[e] : starts[e + 1]] = (pairs[:, 0] | (pairs[:, 1] << 4)).view(-1)
        scale[scales[e] : scales[e + 1]] = steps.bfloat16().view(torch.int16).view(-1)
        if coding.zero_point:
            zero[scales[e] : scales[e + 1]] = zeros.to(torch.uint8).view(-1)
    return Packed(codes, scale, zero, rows, columns, coding)


def _code(groups: Tensor, weighing: Tensor, bits: int, zero_point: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (G, g), scales (G, 1) and zeros (G, 1) of groups (G, g), those of least weighted squared error tried."""
    low, high = (0, 15) if bits == 4 else (-127, 127)
    best: tuple[Tensor, ...] | None = None
    for scale, zero in _candidates(groups, bits, zero_point):
        scale = scale.bfloat16().float()
        scale = torch.where(
            scale.isfinite() & (1 / scale).isfinite(), scale, 1
        )  # where all weights are 0, or too small
        for refined in (False, True):
            codes = ((groups / scale).round() + zero).clamp(low, high)
            if refined:
                # For these codes the least squares have this scale.
                centred = weighing * (codes - zero)
                fitted = ((centred * groups).sum(1, True) / (centred * (codes - zero)).sum(1, True)).bfloat16().float()
                scale = torch.where(fitted.isfinite() & (1 / fitted).isfinite(), fitted, scale)
            error = (weighing * (groups - (codes - zero) * scale).square()).sum(1, True)
            if best is None:
                best = error, codes, scale, zero
            else:
                better = error < best[0]
                best = tuple(torch.where(better, a, b) for a, b in zip((error, codes, scale, zero), best, strict=True))
    assert best is not None
    return best[1], best[2], best[3]


def _candidates(groups: Tensor, bits: int, zero_point: bool) -> Any:
    """Scales and zeros to try, (G, 1) each."""
    largest = groups.gather(1, groups.abs().argmax(1, keepdim=True))
    if bits == 8:
        for clip in _CLIPS[:4]:
            yield clip * largest.abs() / 127, torch.zeros_like(largest)
    elif not zero_point:
        for clip in _CLIPS:
            yield (
                clip * largest / -8,
                torch.full_like(largest, 8),
            )  # of 16 codes, one more is on the side of the largest
        yield largest / 7, torch.full_like(largest, 8)
    else:
        bottom, top = groups.amin(1, keepdim=True).clamp(max=0), groups.amax(1, keepdim=True).clamp(min=0)
        for clip in _CLIPS:
            scale = clip * (top - bottom) / 15
            yield scale, torch.where(scale > 0, (-clip * bottom / scale).round(), 0).clamp(0, 15)


@dataclass(frozen=True)
class QuantisedWeights(ExpertWeights):
    """The parameters of E experts with their matrices in codes; nothing of them learns.

    Args:
        up: of matrices (2f, d), gate first, or (f, d).
        down: of matrices (d, f).
        up_bias: (E, 2f) or (E, f), or None.
        down_bias: (E, d), or None.
        activation: a key of `ACTIVATIONS`.
        dtype: of the matrices that `expert` returns.
    """

    up: Packed
    down: Packed
    up_bias: Tensor | None
    down_bias: Tensor | None
    activation: str
    dtype: torch.dtype

    @property
    def num_experts(self) -> int:  # type: ignore[override]
        """E."""
        return len(self.up.coding.bits)

    @property
    def dim(self) -> int:  # type: ignore[override]
        """d."""
        return self.down.rows

    @property
    def hidden(self) -> int:  # type: ignore[override]
        """f."""
        return self.down.columns

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Of the codes."""
        return self.up.codes.device

    def expert(self, e: int) -> Matrices:
        """The matrices of expert e, rounded to the dtype."""
        up_bias, down_bias = (None if b is None else b[e].to(self.dtype) for b in (self.up_bias, self.down_bias))
        return Matrices(self.up.matrix(e).to(self.dtype), self.down.matrix(e).to(self.dtype), up_bias, down_bias)

    def to(self, dtype: torch.dtype) -> QuantisedWeights:
        """The same, decoded into another precision."""
        return replace(self, dtype=dtype)


class _NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, *inputs: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise UserError(NO_BACKWARD)


def without_backward(out: Tensor, *inputs: Tensor) -> Tensor:
    """What was computed of inputs without a graph; a backward that comes here raises UserError."""
    if torch.is_grad_enabled() and any(value.requires_grad for value in inputs):
        refusing: Tensor = _NoBackward.apply(out, *inputs)
        return refusing
    return out
