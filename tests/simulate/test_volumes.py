"""What exchanges move, against closed forms and against counting drawn choices."""

import random

import pytest
import torch

from shunter.simulate.volumes import elements, exchanges, rows_between_nodes, rows_leaving, rows_to_ranks

from ..helpers import deviation


def test_elements_of_a_forward():
    """B = 1024 tokens of d = 512, one expert each: 2 CF B d."""
    assert [elements(1024, 512, 1, factor) for factor in (None, 1, 1.25, 2)] == [2**20, 2**20, 1_310_720, 2**21]


def test_numbers_of_exchanges():
    assert exchanges() == (2, 2)
    assert exchanges(shuffle=True) == (4, 4)


@pytest.mark.parametrize("top_k, places, expected", [(8, 8, 5.25), (8, 4, 3.60), (2, 8, 1.875), (1, 64, 1.0)])
def test_ranks_of_a_token(top_k, places, expected):
    assert rows_to_ranks(top_k, places) == pytest.approx(expected, abs=0.005)


def test_drawn_choices_are_counted_alike():
    k, nodes, size, limit = random.randint(1, 8), random.choice([2, 4, 8]), 4, random.choice([0, 2])
    draws = 20_000
    allowed = torch.rand(draws, nodes).argsort(1)[:, : limit or nodes]
    ranks = allowed[:, :1] * 0 + allowed.gather(1, torch.randint(allowed.shape[1], (draws, k))) * size
    ranks += torch.randint(size, (draws, k))
    eligible = (limit or nodes) * size
    distinct = torch.zeros(draws, nodes * size).scatter_(1, ranks, 1).sum(1)
    assert abs(distinct.mean() - rows_to_ranks(k, nodes * size, min(eligible, nodes * size))) < deviation(
        draws, width=k
    )
    others = torch.zeros(draws, nodes).scatter_(1, ranks // size, 1)[:, 1:].sum(1)  # of a token of the first node
    assert abs(others.mean() - rows_between_nodes(k, nodes, limit)) < deviation(draws, width=nodes)
    leaving = (ranks != 0).sum(1).float()  # rank 0 is the own
    assert abs(leaving.mean() - rows_leaving(1, k, nodes * size)) < deviation(draws, width=k)
