"""Saturation against sets, and against the chance of independent choices."""

import pytest
import torch

from shunter.analysis.inspect.saturation import chance_saturation, saturation
from tests.helpers import random_index


def test_saturation_against_sets():
    before, after = random_index(80, 6, 3), random_index(80, 6, 2)
    same = total = 0
    for old, new in zip(before.tolist(), after.tolist(), strict=True):
        new = [e for e in new if e >= 0]
        same, total = same + len(set(new) & set(old)), total + len(new)
    assert saturation(before, after) == pytest.approx(same / total)
    assert saturation(after, after) == 1
    with pytest.raises(ValueError, match="80 tokens before and 79 after"):
        saturation(before, after[1:])


def test_chance_saturation_is_that_of_independent_choices():
    p = torch.rand(5) + 0.1
    before, after = (torch.multinomial(p, 60_000, replacement=True)[:, None] for _ in range(2))
    assert saturation(before, after) == pytest.approx(chance_saturation(before, after, 5), abs=0.02)
    assert chance_saturation(before, after, 5) == pytest.approx(float((p / p.sum()).square().sum()), abs=0.02)
