"""Load balance, dead experts, load entropy and near-ties: from experts' loads or router logits to numbers, each once.

The load of an expert is the number of assignments, (token, expert) pairs, that it has. What takes a load takes counts
or shares alike, floating point of shape (..., E), and reduces the last dimension; the others are layers, steps or
tokens. T tokens, E experts, k experts of a token. Entropies are in nats unless they say otherwise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from . import losses

__all__ = [
    "DEAD_BELOW",
    "Margins",
    "balance",
    "dead",
    "effective_experts",
    "expert_load",
    "load_entropy",
    "margins",
    "near_tie",
    "normalised_entropy",
    "routing_entropy",
    "summarise",
]

DEAD_BELOW = 0.01  # of an even share: an expert with less has stopped learning
BF16 = 2.0**-7  # the most that two numbers of one bfloat16 can differ by, relative to them
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)  # of margins


def expert_load(index: Tensor, num_experts: int) -> Tensor:
    """(E,) float64: the number of assignments of each of E experts; index is (T, k) integer, -1 for none."""
    return torch.bincount(index[index >= 0].to(torch.int64), minlength=num_experts).to(torch.float64)


def balance(load: Tensor) -> Tensor:
    """(...) the load of the busiest expert over the mean load: 1 is even, E is collapse, 0 without assignments.

    Less 1 it is the maximal violation, MaxVio, of Wang et al. 2024 (Auxiliary-Loss-Free Load Balancing).
    """
    return load.amax(-1) / load.mean(-1).clamp_min(torch.finfo(load.dtype).tiny)


def dead(load: Tensor, below: float = DEAD_BELOW) -> Tensor:
    """(..., E) bool: experts with less than `below` of the mean load; those without any in any case."""
    return (load == 0) | (load < below * load.mean(-1, keepdim=True))


def load_entropy(load: Tensor) -> Tensor:
    """(...) the entropy in nats of the experts' shares: ln E is even, 0 is collapse, or no assignment at all."""
    total = load.sum(-1, keepdim=True)
    return losses.entropy(load / total.clamp_min(torch.finfo(load.dtype).tiny))


def normalised_entropy(load: Tensor) -> Tensor:
    """(...) `load_entropy` over ln E: 1 is even, 0 is collapse, no assignment, or a single expert."""
    return load_entropy(load) / math.log(max(2, load.shape[-1]))


def effective_experts(load: Tensor) -> Tensor:
    """(...) exp(`load_entropy`), how many evenly used experts have the same entropy: 1 is collapse, E is even."""
    return load_entropy(load).exp()


def routing_entropy(logits: Tensor) -> Tensor:
    """(T,) `normalised_entropy` of the softmax of each token's logits (T, E): 1 is undecided, 0 is certain."""
    return normalised_entropy(logits.detach().to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1))


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


def near_tie(margin: Tensor, size: Tensor) -> Tensor:
    """(T,) bool: where bfloat16 may make the two logits of a margin equal; margin and size (T,) are of `margins`."""
    return margin.abs() <= BF16 * size


@dataclass(frozen=True)
class Margins:
    """The distribution of margins over tokens.

    Args:
        quantiles: of the margin in logits, at `QUANTILES`.
        near_ties: the share of tokens that are a `near_tie`.
        against: the share of tokens that lack an expert whose logit is above one of theirs: a bias, a capacity, a
            table or the experts themselves chose.
    """

    quantiles: list[float]
    near_ties: float
    against: float


def summarise(margin: Tensor, size: Tensor) -> Margins | None:
    """The distribution of the margins (T,) and sizes (T,) that `margins` gives; None where no token has one."""
    finite = margin.isfinite() & size.isfinite()
    margin, size = margin[finite].to(torch.float64), size[finite].to(torch.float64)
    if not len(margin):
        return None
    ordered = margin.sort().values
    at = [min(len(ordered) - 1, int(q * len(ordered))) for q in QUANTILES]
    share = [float(case.double().mean()) for case in (near_tie(margin, size), margin < 0)]
    return Margins(ordered[at].tolist(), near_ties=share[0], against=share[1])
