"""What a sparse model's loss would have cost a dense one: the compute at which dense runs reach it, by interpolation.

Artetxe et al. 2021, Efficient Large Scale Language Modeling with Mixtures of Experts, section 4; Fedus et al. 2022,
section 3.1.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["dense_equivalent"]


def dense_equivalent(compute: ArrayLike, loss: ArrayLike, target: float) -> tuple[float, float]:
    """The least compute at which a dense model has a loss, linear between the logarithms of two neighbouring runs.

    A dense run that is no better than a cheaper one counts for nothing: the cheaper one has its loss for less.

    Args:
        compute: of the dense runs, (D,), positive and different.
        loss: theirs, or errors or other positive numbers of which less is better, (D,).
        target: the loss to reach.

    Returns:
        Between which two numbers the compute is: twice the same where dense runs have the target between them; 0 and
        the cheapest run's where that is better already; the dearest run's and infinity where none is as good. Nothing
        is extrapolated.

    Raises:
        ValueError: for runs of which there is no such curve, and a target that is no number from 0.
    """
    cost, reached = np.asarray(compute, dtype=np.float64), np.asarray(loss, dtype=np.float64)
    if cost.ndim != 1 or cost.shape != reached.shape or len(cost) < 2:
        raise ValueError(f"dense_equivalent: needs the compute and loss of two dense runs or more, not {cost.shape}")
    if not (np.isfinite(cost).all() and np.isfinite(reached).all() and (cost > 0).all() and (reached > 0).all()):
        raise ValueError("dense_equivalent: compute and losses must be positive numbers")
    if not 0 <= target < math.inf:
        raise ValueError(f"dense_equivalent: the target must be a number from 0, not {target}")
    order = np.argsort(cost)
    cost, reached = cost[order], reached[order]
    if (np.diff(cost) <= 0).any():
        raise ValueError("dense_equivalent: the compute of dense runs must differ")
    if target > reached[0]:
        return 0.0, float(cost[0])
    better = np.append(True, reached[1:] < np.minimum.accumulate(reached)[:-1])
    if target < reached[better][-1]:
        return float(cost[-1]), math.inf
    falling = np.log(reached[better])[::-1], np.log(cost[better])[::-1]
    found = float(np.exp(np.interp(np.log(target), *falling)))
    return found, found
