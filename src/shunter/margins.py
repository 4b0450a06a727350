"""How narrowly each token's experts were chosen: a near-tie may fall otherwise in another precision or batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Margins", "margins", "routing_entropy", "summarise"]

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
