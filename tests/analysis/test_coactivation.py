"""Pairs of experts against counts by hand, and against pairs that were planted."""

import pytest
import torch

from shunter.analysis.coactivation import affinity, coactivation
from tests.helpers import random_index


@pytest.mark.parametrize("chunk", [7, 1 << 16])
def test_coactivation_against_brute_force(monkeypatch, chunk):
    monkeypatch.setattr("shunter.analysis.coactivation.CHUNK", chunk)
    index = random_index(100, 6, 3)
    found = coactivation(index, 6)
    for i in range(6):
        for j in range(6):
            assert int(found[i, j]) == sum(i in row and j in row for row in index.tolist())


def test_affinity_is_one_without_preference_and_names_planted_pairs():
    free = affinity(coactivation(torch.rand(100_000, 6).argsort(1)[:, :2], 6))
    off = ~torch.eye(6, dtype=torch.bool)
    assert (free[off] - 1).abs().max() < 0.15
    assert free.diagonal().isnan().all()
    first = torch.randint(3, (500,))
    pairs = affinity(coactivation(torch.stack([2 * first, 2 * first + 1], 1), 6))
    for i in range(6):
        assert int(pairs[i].nan_to_num(-1).argmax()) == i ^ 1
        assert float(pairs[i].nan_to_num(0).sum()) == float(pairs[i, i ^ 1])
    assert affinity(coactivation(torch.arange(6)[:, None], 6)).isnan().all()
