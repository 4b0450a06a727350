"""The compute of a dense model with a sparse one's loss, against planted power laws."""

import math

import numpy as np
import pytest

from shunter.analysis.dense_equivalent import dense_equivalent


def test_a_planted_power_law_gives_its_own_inverse(seed):
    random = np.random.default_rng(seed)
    for _ in range(50):
        scale, power = random.uniform(1, 100), -random.uniform(0.05, 0.6)
        compute = 10 ** np.sort(random.uniform(3, 9, size=6))
        loss = scale * compute**power
        wanted = 10 ** random.uniform(*np.log10(compute[[0, -1]]))
        shuffled = random.permutation(6)
        found = dense_equivalent(compute[shuffled], loss[shuffled], scale * wanted**power)
        assert found == pytest.approx((wanted, wanted), rel=1e-6)
        for place in range(6):
            assert dense_equivalent(compute, loss, loss[place])[0] == pytest.approx(compute[place], rel=1e-6)
        assert dense_equivalent(compute, loss, 1.01 * loss.max()) == (0, compute[0]), "the cheapest is better"
        assert dense_equivalent(compute, loss, 0.99 * loss.min()) == (compute[-1], math.inf), "none is as good"


def test_a_dense_run_that_is_no_better_than_a_cheaper_one_counts_for_nothing(seed):
    """Against a search of all segments between neighbours of the best so far."""
    random = np.random.default_rng(seed)
    for _ in range(50):
        compute, loss = 10 ** np.sort(random.uniform(3, 9, size=7)), random.uniform(1, 4, size=7)
        best = [0]
        for place in range(1, 7):
            if loss[place] < loss[best[-1]]:
                best.append(place)
        target = random.uniform(1, 4)
        low, high = dense_equivalent(compute, loss, target)
        if target > loss[0]:
            assert (low, high) == (0, compute[0])
        elif target < loss.min():
            assert (low, high) == (compute[-1], math.inf)
        else:
            after = next(i for i in best if loss[i] <= target)
            before = best[max(0, best.index(after) - 1)]
            assert low == high and compute[before] * (1 - 1e-9) <= low <= compute[after] * (1 + 1e-9)


@pytest.mark.parametrize(
    "compute, loss, said",
    [
        ([1, 1], [3, 2], "must differ"),
        ([1], [1], "two dense runs"),
        ([1, 2], [1], "two dense runs"),
        ([1, 2], [1, 0], "positive"),
        ([-1, 2], [2, 1], "positive"),
        ([1, 2], [float("nan"), 1], "positive"),
    ],
)
def test_runs_without_such_a_curve_are_refused(compute, loss, said):
    with pytest.raises(ValueError, match=said):
        dense_equivalent(compute, loss, 1.5)


@pytest.mark.parametrize("target", [-1.0, math.nan, math.inf])
def test_a_target_that_is_no_loss_is_refused(target):
    with pytest.raises(ValueError, match="target"):
        dense_equivalent([1, 2], [3, 2], target)
