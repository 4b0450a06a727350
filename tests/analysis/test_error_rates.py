"""Error rates: the least number of edits, and what is divided by what."""

import random
from functools import cache

import pytest

from shunter.analysis.error_rates import edits, error_rates
from tests.conftest import SEED


def test_edits_are_those_of_the_definition():
    draw = random.Random(SEED)
    for _ in range(60):
        a, b = ("".join(draw.choices("abc", k=draw.randint(0, 7))) for _ in range(2))

        @cache
        def least(i, j, a=a, b=b):
            if i == 0 or j == 0:
                return i + j
            return min(least(i - 1, j) + 1, least(i, j - 1) + 1, least(i - 1, j - 1) + (a[i - 1] != b[j - 1]))

        assert edits(a, b) == least(len(a), len(b)), (a, b)
        assert edits(a.split("a"), b.split("a")) == edits(b.split("a"), a.split("a"))


def test_rates_are_of_all_that_was_said():
    found = error_rates([("one two three", "one too three four"), ("nine", "")])
    assert found["wer"] == pytest.approx(100 * (2 + 1) / 4)
    assert found["cer"] == pytest.approx(100 * (1 + 5 + 4) / (13 + 4))
    assert error_rates([("a", "a b c d")])["wer"] == 300
    assert error_rates([]) == {"wer": 0.0, "cer": 0.0}
