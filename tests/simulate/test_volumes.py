"""What exchanges move, against closed forms and against counting drawn choices."""

import random

import pytest
import torch

from shunter.ranks import rows_to_ranks
from shunter.simulate.volumes import elements, exchanges, rows_between_nodes, rows_leaving

from ..helpers import deviation


def test_elements_of_a_forward():
    """B = 1024 tokens of d = 512, one expert each: 2 CF B d."""
    assert [elements(1024, 512, 1, factor) for factor in (None, 1, 1.25, 2)] == [2**20, 2**20, 1_310_720, 2**21]


def test_numbers_of_exchanges():
    assert exchanges() == (2, 2)
    assert exchanges(shuffle=True) == (4, 4)


@pytest.mark.parametrize(
    "top_k, experts, places, expected",
    [
        (8, 10**6, 8, 5.25),  # of so many experts that repetition would be rare: 8 (1 - (7/8)^8)
        (2, 8, 8, 2.0),  # an expert a rank
        (2, 8, 4, 2 * (1 - 1 / 7) + 1 / 7),  # Mixtral: the second choice is the rank's other expert in 1 of 7
        (1, 64, 64, 1.0),
        (8, 8, 4, 4.0),
    ],
)
def test_ranks_of_a_token(top_k, experts, places, expected):
    assert rows_to_ranks(top_k, experts, places) == pytest.approx(expected, abs=0.005)


def test_drawn_choices_are_counted_alike():
    nodes, size, limit = random.choice([2, 4, 8]), 4, random.choice([0, 2])
    held = random.randint(1, 3)  # experts of a rank
    experts, eligible = held * size * nodes, (limit or nodes) * size
    k = random.randint(1, min(8, held * eligible))
    draws = 20_000
    allowed = torch.rand(draws, nodes).argsort(1)[:, : limit or nodes]
    scores = torch.zeros(draws, nodes).scatter_(1, allowed, 1).repeat_interleave(held * size, 1)
    ranks = (scores + torch.rand(draws, experts)).topk(k).indices // held  # k different experts of those nodes
    distinct = torch.zeros(draws, nodes * size).scatter_(1, ranks, 1).sum(1)
    found = rows_to_ranks(k, experts, nodes * size, eligible)
    assert abs(distinct.mean() - found) < deviation(draws, width=k)
    others = torch.zeros(draws, nodes).scatter_(1, ranks // size, 1)[:, 1:].sum(1)  # of a token of the first node
    assert abs(others.mean() - rows_between_nodes(k, experts, nodes, limit)) < deviation(draws, width=nodes)
    leaving = (ranks != 0).sum(1).float()  # rank 0 is the own
    assert abs(leaving.mean() - rows_leaving(1, k, nodes * size)) < deviation(draws, width=k)
