"""How evenly a layer's experts are used, and which of them are used together."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .information import entropy
from .run_folder import DEAD_BELOW

__all__ = ["Usage", "affinity", "coactivation", "label_shares", "usage"]

CHUNK = 1 << 16  # tokens; counts up to it are exact in float32


@dataclass(frozen=True)
class Usage:
    """How one layer's experts share the tokens.

    Args:
        load: (E,) float64, of all assignments the share of each expert; zeros where there is no assignment.
        unserved: the share of the tokens that no expert computes.
        experts_per_token: the mean number of experts that compute a token.
    """

    load: Tensor
    unserved: float
    experts_per_token: float

    @property
    def balance(self) -> float:
        """The busiest expert's load over the mean load: 1 is even, E is collapse; 0 without assignments."""
        return float(self.load.max()) * len(self.load)

    @property
    def entropy(self) -> float:
        """The entropy of the load over log E: 1 is even, 0 is collapse."""
        return entropy(self.load) / math.log2(len(self.load)) if len(self.load) > 1 and bool(self.load.any()) else 0.0

    @property
    def dead(self) -> list[int]:
        """Experts with less than `DEAD_BELOW` of an even share."""
        return (self.load * len(self.load) < DEAD_BELOW).nonzero().flatten().tolist()


def usage(index: Tensor, num_experts: int) -> Usage:
    """The usage of E experts by the experts (T, k) of each token, -1 for none."""
    chosen = index >= 0
    counts = torch.bincount(index[chosen].to(torch.int64), minlength=num_experts).to(torch.float64)
    tokens = max(1, len(index))
    return Usage(
        counts / counts.sum().clamp_min(1), float((~chosen.any(1)).sum()) / tokens, float(chosen.sum()) / tokens
    )


def label_shares(index: Tensor, label: Tensor, num_experts: int, num_labels: int) -> Tensor:
    """(L, E) float64: of the assignments of each label's tokens the share of each expert; a row without any is zero.

    Args:
        index: (T, k) experts of each token, -1 for none.
        label: (T,) integer label of each token in [0, L), -1 where it is not known.
        num_experts: E.
        num_labels: L.
    """
    known = (label >= 0)[:, None] & (index >= 0)
    cell = label[:, None] * num_experts + index
    counts = torch.bincount(cell[known].to(torch.int64), minlength=num_labels * num_experts)
    counts = counts.reshape(num_labels, num_experts).to(torch.float64)
    return counts / counts.sum(1, keepdim=True).clamp_min(1)


def coactivation(index: Tensor, num_experts: int) -> Tensor:
    """(E, E) int64: how many tokens have both experts; on the diagonal, how many have the expert.

    Args:
        index: (T, k) experts of each token, different within a row, -1 for none.
        num_experts: E.
    """
    together = torch.zeros(num_experts, num_experts, dtype=torch.int64)
    for part in index.to(torch.int64).split(CHUNK):
        served = torch.zeros(len(part), num_experts + 1)
        served.scatter_(1, part.where(part >= 0, num_experts), 1.0)
        served = served[:, :num_experts]
        together += (served.T @ served).to(torch.int64)
    return together


def affinity(together: Tensor) -> Tensor:
    """(E, E) float64: how many times as often two experts meet as if each drew its partners by their load.

    1 is no preference, 0 never together; NaN on the diagonal and where an expert has no partner at all. The two
    directions of a pair differ by little, and are averaged geometrically.

    Args:
        together: (E, E), of `coactivation`.
    """
    counts = together.to(torch.float64)
    load = counts.diagonal().clone()
    meetings = counts - load.diag()
    partners = meetings.sum(1, keepdim=True)
    expected = partners * load / (load.sum() - load)[:, None]
    ratio = meetings / expected
    ratio = (ratio * ratio.T).sqrt()
    return ratio.fill_diagonal_(float("nan"))
