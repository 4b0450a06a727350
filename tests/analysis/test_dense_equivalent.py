"""The compute of a dense model with a sparse one's score, against planted power laws."""

import numpy as np
import pytest

from shunter.analysis.dense_equivalent import dense_equivalent


def test_a_planted_power_law_gives_its_own_inverse(seed):
    random = np.random.default_rng(seed)
    for _ in range(50):
        scale, power = random.uniform(1, 100), random.choice([-1, 1]) * random.uniform(0.05, 0.6)
        compute = 10 ** np.sort(random.uniform(3, 9, size=6))
        score = scale * compute**power
        wanted = 10 ** random.uniform(*np.log10(compute[[0, -1]]))
        shuffled = random.permutation(6)
        found = dense_equivalent(compute[shuffled], score[shuffled], scale * wanted**power)
        assert found == pytest.approx(wanted, rel=1e-6)
        for place in range(6):
            assert dense_equivalent(compute, score, score[place]) == pytest.approx(compute[place], rel=1e-6)
        for outside in (0.99 * score.min(), 1.01 * score.max()):
            assert dense_equivalent(compute, score, outside) is None


@pytest.mark.parametrize(
    "compute, score, said",
    [
        ([1, 2, 3], [3, 1, 2], "neither rise nor fall"),
        ([1, 2], [2, 2], "neither rise nor fall"),
        ([1, 1], [3, 2], "neither rise nor fall"),
        ([1], [1], "two dense runs"),
        ([1, 2], [1], "two dense runs"),
        ([1, 2], [1, 0], "positive"),
        ([-1, 2], [2, 1], "positive"),
        ([1, 2], [float("nan"), 1], "positive"),
    ],
)
def test_runs_without_such_a_curve_are_refused(compute, score, said):
    with pytest.raises(ValueError, match=said):
        dense_equivalent(compute, score, 1.5)
