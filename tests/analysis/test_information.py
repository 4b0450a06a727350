"""Mutual information against closed forms, and its null."""

import math

import numpy as np
import pytest
import torch

from shunter.analysis.information import Information, entropy, information, mutual_information


def test_entropy_and_mutual_information_against_closed_forms():
    assert entropy(torch.ones(3, 5)) == pytest.approx(math.log2(15))
    assert entropy(torch.tensor([0.0, 4.0])) == 0
    for _ in range(10):
        p = torch.rand(()).item()
        flip = -(p * math.log2(p) + (1 - p) * math.log2(1 - p))
        channel = torch.tensor([[1 - p, p], [p, 1 - p]], dtype=torch.float64)  # the binary symmetric channel
        assert mutual_information(channel) == pytest.approx(1 - flip, abs=1e-9)
        rows, columns = torch.rand(4, 1, dtype=torch.float64), torch.rand(1, 7, dtype=torch.float64)
        assert mutual_information(rows * columns) == pytest.approx(0, abs=1e-9)


def _brute_force(index, label):
    joint = {}
    for experts, mark in zip(index.tolist(), label.tolist(), strict=True):
        for expert in experts:
            if expert >= 0 and mark >= 0:
                joint[mark, expert] = joint.get((mark, expert), 0) + 1
    n = sum(joint.values())
    total = 0.0
    for (mark, expert), count in joint.items():
        of_mark = sum(c for (m, _), c in joint.items() if m == mark)
        of_expert = sum(c for (_, e), c in joint.items() if e == expert)
        total += count / n * math.log2(count * n / of_mark / of_expert)
    return total


def test_sample_information_against_brute_force():
    experts = int(torch.randint(2, 7, ()))
    index = torch.rand(300, experts).argsort(1)[:, :2]
    index[torch.rand(300, 2) < 0.2] = -1
    label = torch.randint(-1, 6, (300,))
    found = information(index, label, experts, shuffles=2)
    assert found.bits == pytest.approx(_brute_force(index, label), abs=1e-9)
    assert found.tokens == int((label >= 0).sum())


def test_sorting_and_counting_agree(monkeypatch):
    index, label = torch.randint(5, (400, 2)), torch.randint(9, (400,))
    counted = information(index, label, 5)
    monkeypatch.setattr("shunter.analysis.information.DENSE_TABLE", 0)
    sorted_ = information(index, label, 5)
    for field in ("bits", "null", "null_max", "entropy"):
        assert getattr(counted, field) == pytest.approx(getattr(sorted_, field), abs=1e-12)


def test_routing_that_is_a_function_of_the_label_has_all_of_the_experts_entropy():
    table = torch.randint(8, (40,))
    label = torch.randint(40, (4000,))
    expert = table[label]
    found = information(expert[:, None], label, 8)
    assert found.bits == pytest.approx(entropy(torch.bincount(expert)), abs=1e-9)
    assert found.entropy == pytest.approx(found.bits, abs=1e-9)
    assert found.adjusted == pytest.approx(1, abs=1e-9)
    assert found.beyond_chance


def test_random_routing_has_none_after_the_null():
    """Many labels and few tokens: the plain estimate is far from zero, the adjusted one is not."""
    found = information(torch.rand(6000, 8).argsort(1)[:, :2], torch.randint(600, (6000,)), 8, shuffles=20)
    assert found.bits > 0.2
    assert found.adjusted == pytest.approx(0, abs=0.02)


def test_what_is_known_already_is_taken_out():
    token = torch.randint(12, (5000,))
    domain = (token >= 6).long()
    by_token, by_both = (token % 4)[:, None], ((token + torch.arange(5000) % 2) % 4)[:, None]
    assert information(by_token, domain, 4, given=token).adjusted is None  # nothing is left to tell
    parity = torch.arange(5000) % 2
    rest = information(by_both, parity, 4, given=token)
    assert rest.entropy == pytest.approx(1, abs=0.05)
    assert rest.adjusted == pytest.approx(1, abs=1e-9)
    assert information(by_both, domain, 4, given=token, shuffles=20).adjusted == pytest.approx(0, abs=0.02)


def test_shuffles_stay_within_the_group():
    """Labels that differ between groups alone tell nothing in them: every shuffle is the sample itself."""
    group = torch.randint(5, (500,))
    found = information(torch.randint(3, (500, 1)), group * 2, 3, given=group)
    assert found.bits == pytest.approx(0, abs=1e-9) and found.null_max == pytest.approx(0, abs=1e-9)


def test_nothing_to_measure():
    assert information(torch.full((5, 2), -1), torch.arange(5), 4).adjusted is None
    assert information(torch.zeros(5, 1, dtype=torch.int64), torch.arange(5), 4).adjusted is None
    assert information(torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), 4).bits == 0
    once = information(torch.arange(40)[:, None] % 4, torch.arange(40), 4)
    assert once.adjusted is None  # each label seen once: the null is all of the entropy
    assert Information(0.5, 0.1, 0.2, 0.9, 10).adjusted == pytest.approx(0.5)


def test_same_input_same_null():
    index, label = torch.randint(4, (200, 1)), torch.randint(9, (200,))
    assert information(index, label, 4) == information(index, label, 4)
    assert np.isfinite(information(index, label, 4).null)
