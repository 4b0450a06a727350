"""Which experts of a layer work together: from each token's experts to counts of pairs, and these against chance."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["affinity", "coactivation"]

CHUNK = 1 << 16  # tokens; counts up to it are exact in float32


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
