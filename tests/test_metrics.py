"""Balance, dead experts, load entropy and margins against counts by hand."""

import math

import pytest
import torch

from shunter.metrics import (
    DEAD_BELOW,
    balance,
    dead,
    effective_experts,
    expert_load,
    load_entropy,
    margins,
    near_tie,
    normalised_entropy,
    routing_entropy,
    summarise,
)
from tests.helpers import random_index


def test_load_counts_assignments():
    index = random_index(200, 6, 3)
    flat = [e for row in index.tolist() for e in row if e >= 0]
    assert expert_load(index.to(torch.int16), 6).tolist() == [flat.count(e) for e in range(6)]


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_measures_of_loads_against_their_definitions(scale):
    """Of counts and of shares alike, row by row."""
    counts = torch.randint(100, (5, 7)) * (torch.rand(5, 7) < 0.7)
    counts[:, 3] += 1  # no row is empty
    counts[0], counts[1] = 40, torch.tensor([0, 0, 0, 12, 0, 0, 0])
    load = counts.double() * scale
    found = [f(load).tolist() for f in (balance, load_entropy, normalised_entropy, effective_experts)]
    for row, values in zip(counts.tolist(), zip(*found, strict=True), strict=True):
        total = sum(row)
        nats = -sum(n / total * math.log(n / total) for n in row if n)
        expected = [max(row) / (total / 7), nats, nats / math.log(7), math.exp(nats)]
        assert values == pytest.approx(expected, abs=1e-9)
    assert found[0][:2] == pytest.approx([1, 7]) and found[2][:2] == pytest.approx([1, 0])


@pytest.mark.parametrize("below", [0.0, DEAD_BELOW, 0.3])
def test_dead_experts_have_less_than_a_part_of_the_mean(below):
    mean = 50.0
    load = torch.tensor([0.0, 0.9 * below * mean, 1.1 * below * mean, 60.0, 70.0], dtype=torch.float64)
    load = torch.cat([load, 6 * mean - load.sum(0, keepdim=True)])
    assert dead(load, below).tolist() == [True, True, below == 0, False, False, False]
    rows = dead(torch.stack([load, load.flip(0)]), below)
    assert rows.tolist() == [dead(load, below).tolist(), dead(load, below).tolist()[::-1]]


def test_edges_of_loads():
    nothing, one = torch.zeros(3), torch.tensor([5.0])
    assert [float(f(nothing)) for f in (balance, load_entropy, normalised_entropy)] == [0, 0, 0]
    assert dead(nothing).all() and dead(nothing, below=0).all()
    assert [float(f(one)) for f in (balance, load_entropy, normalised_entropy, effective_experts)] == [1, 0, 0, 1]
    assert not dead(one).any()
    assert math.copysign(1, float(load_entropy(one))) == 1  # no "-0.0" in a report
    assert float(balance(expert_load(torch.full((4, 2), -1), 3))) == 0


def test_margins_against_a_loop():
    logits, index = torch.randn(60, 5), random_index(60, 5, 3)
    index[0], index[1] = torch.tensor([-1, -1, -1]), torch.tensor([0, 1, 2])
    gap, size = margins(logits, index)
    for t in range(60):
        taken = [float(logits[t, e]) for e in index[t].tolist() if e >= 0]
        rest = [float(logits[t, e]) for e in range(5) if e not in index[t].tolist()]
        if not taken or not rest:
            assert gap[t].isnan()
            continue
        assert float(gap[t]) == pytest.approx(min(taken) - max(rest))
        assert float(size[t]) == pytest.approx(max(abs(min(taken)), abs(max(rest))))
    assert margins(logits, torch.arange(5).expand(60, 5))[0].isnan().all()


def test_margins_of_the_top_experts_are_never_negative_and_near_ties_are_those_that_bf16_makes():
    logits = torch.randn(2000, 8)
    top = logits.topk(2).indices
    gap, size = margins(logits, top)
    found = summarise(gap, size)
    assert found is not None and found.against == 0
    assert found.quantiles == sorted(found.quantiles)
    assert found.quantiles[2] == pytest.approx(float(gap.median()), rel=0.02)
    assert found.near_ties == pytest.approx(float(near_tie(gap, size).float().mean()))
    tied = logits.to(torch.bfloat16).float().sort(descending=True).values
    # Two neighbours that bfloat16 makes equal were at most one rounding apart.
    assert bool(near_tie(gap, size)[tied[:, 1] == tied[:, 2]].all())
    bottom = summarise(*margins(logits, logits.topk(2, largest=False).indices))
    assert bottom is not None and bottom.against == 1
    assert summarise(torch.full((3,), math.nan), torch.ones(3)) is None


def test_routing_entropy_is_one_undecided_and_zero_certain():
    assert torch.allclose(routing_entropy(torch.zeros(3, 7)), torch.ones(3))
    certain = torch.full((3, 7), -1e4)
    certain[:, 2] = 0
    assert torch.allclose(routing_entropy(certain), torch.zeros(3))
    assert torch.allclose(routing_entropy(torch.tensor([[0.0, 0.0, -math.inf, -math.inf]])), torch.tensor(0.5))
