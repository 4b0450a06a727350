"""What a sparse model's score would have cost a dense one: the compute at which dense runs reach it, by interpolation.

Artetxe et al. 2021, Efficient Large Scale Language Modeling with Mixtures of Experts, section 4; Fedus et al. 2022,
section 3.1.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["dense_equivalent"]


def dense_equivalent(compute: ArrayLike, score: ArrayLike, target: float) -> float | None:
    """The compute at which a dense model would have a score, linear between the logarithms of two neighbouring runs.

    Args:
        compute: of the dense runs, (D,), positive and different.
        score: their losses, errors or other positive numbers, (D,), which rise or fall all the way.
        target: the score to reach.

    Returns:
        The compute; None where no two dense runs have the target between them: nothing is extrapolated.

    Raises:
        ValueError: for runs of which there is no such curve.
    """
    cost, reached = np.asarray(compute, dtype=np.float64), np.asarray(score, dtype=np.float64)
    if cost.ndim != 1 or cost.shape != reached.shape or len(cost) < 2:
        raise ValueError(f"dense_equivalent: needs the compute and score of two dense runs or more, not {cost.shape}")
    if not (np.isfinite(cost).all() and np.isfinite(reached).all() and (cost > 0).all() and (reached > 0).all()):
        raise ValueError("dense_equivalent: compute and scores must be positive numbers")
    order = np.argsort(cost)
    cost, reached = cost[order], reached[order]
    steps = np.diff(reached)
    if (np.diff(cost) <= 0).any() or not ((steps > 0).all() or (steps < 0).all()):
        raise ValueError("dense_equivalent: the dense scores neither rise nor fall all the way with compute")
    if not reached.min() <= target <= reached.max():
        return None
    rising = np.argsort(reached)
    return float(np.exp(np.interp(np.log(target), np.log(reached[rising]), np.log(cost[rising]))))
