"""How experts are used and how firmly chosen: indices and logits to load, balance, entropy, dead experts, margins."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "Margins",
    "Usage",
    "affinity",
    "coactivation",
    "entropy",
    "label_shares",
    "margins",
    "mutual_information",
    "routing_entropy",
    "summarise",
    "usage",
]


def entropy(counts: Tensor) -> float:
    """The entropy in bits of the distribution that non-negative counts or shares of any shape are proportional to."""
    p = counts.to(torch.float64).flatten()
    p = p[p > 0] / p.sum()
    return max(0.0, float(-(p * p.log2()).sum()))


def mutual_information(joint: Tensor) -> float:
    """The mutual information in bits of rows and columns of a table (A, B) of counts or shares; 0 for an empty one."""
    return max(0.0, entropy(joint.sum(0)) + entropy(joint.sum(1)) - entropy(joint))


DEAD_BELOW = 0.01  # of an even share: an expert with less has stopped learning


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


BF16 = 2.0**-7  # the most that two numbers of one bfloat16 can differ by, relative to them


QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)


@dataclass(frozen=True)
class Margins:
    """The distribution over tokens of the margin between the last expert taken and the first not taken.

    Args:
        quantiles: of the margin in logits, at `QUANTILES`.
        near_ties: the share of tokens whose two logits are so close that bfloat16 may make them equal.
        against: the share of tokens that lack an expert whose logit is above one of theirs: a bias, a capacity, a
            table or the experts themselves chose.
    """

    quantiles: list[float]
    near_ties: float
    against: float


def margins(logits: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """The margin of each token's choice, and the size of the logits it lies between.

    Args:
        logits: (T, E) floating point.
        index: (T, k) integer experts of each token, -1 for none.

    Returns:
        (T,) the lowest logit among the token's experts less the highest among the others, negative where the logits
        alone would have chosen otherwise; (T,) the larger magnitude of the two. NaN where a token has no expert or all.
    """
    logits = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
    num_tokens, num_experts = logits.shape
    taken = torch.zeros(num_tokens, num_experts + 1, dtype=torch.bool, device=logits.device)
    taken.scatter_(1, index.to(torch.int64).where(index >= 0, num_experts), True)
    taken = taken[:, :num_experts]
    low = logits.masked_fill(~taken, float("inf")).amin(1)
    high = logits.masked_fill(taken, float("-inf")).amax(1)
    decided = taken.any(1) & ~taken.all(1)
    nan = torch.full_like(low, float("nan"))
    return torch.where(decided, low - high, nan), torch.where(decided, torch.maximum(low.abs(), high.abs()), nan)


def summarise(margin: Tensor, size: Tensor) -> Margins | None:
    """The distribution of the margins (T,) and sizes (T,) that `margins` gives; None where no token has one."""
    finite = margin.isfinite() & size.isfinite()
    margin, size = margin[finite].to(torch.float64), size[finite].to(torch.float64)
    if not len(margin):
        return None
    ordered = margin.sort().values
    at = [min(len(ordered) - 1, int(q * len(ordered))) for q in QUANTILES]
    return Margins(
        ordered[at].tolist(),
        float((margin.abs() <= BF16 * size).double().mean()),
        float((margin < 0).double().mean()),
    )


def routing_entropy(logits: Tensor) -> Tensor:
    """(T,) the entropy of the softmax of each token's logits (T, E) over log E: 1 is undecided, 0 is certain."""
    log_p = logits.detach().to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    nats = -(log_p.exp() * log_p).nan_to_num(0.0).sum(-1)
    return nats / torch.tensor(float(max(2, logits.shape[1]))).log()
