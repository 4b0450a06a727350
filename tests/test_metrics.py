"""Load, co-activation, margins and saturation against counts by hand."""

import math

import pytest
import torch

from shunter.analysis.inspect.saturation import chance_saturation, saturation
from shunter.metrics import BF16, affinity, coactivation, label_shares, margins, routing_entropy, summarise, usage


def _ragged(tokens, experts, k):
    index = torch.rand(tokens, experts).argsort(1)[:, :k]
    return torch.where(torch.rand(tokens, k) < 0.3, -1, index)


def test_usage_against_counts():
    index = _ragged(200, 6, 3)
    found = usage(index, 6)
    flat = [e for row in index.tolist() for e in row if e >= 0]
    assert found.load.tolist() == pytest.approx([flat.count(e) / len(flat) for e in range(6)])
    assert found.unserved == pytest.approx(sum(all(e < 0 for e in row) for row in index.tolist()) / 200)
    assert found.experts_per_token == pytest.approx(len(flat) / 200)
    assert found.balance == pytest.approx(6 * max(found.load.tolist()))
    assert found.entropy == pytest.approx(-sum(p * math.log(p) for p in found.load.tolist() if p) / math.log(6))


def test_even_collapsed_and_empty_usage():
    even = usage(torch.arange(40)[:, None] % 8, 8)
    assert even.balance == pytest.approx(1) and even.entropy == pytest.approx(1) and even.dead == []
    one = usage(torch.full((40, 1), 3), 8)
    assert one.balance == pytest.approx(8) and one.entropy == 0 and one.dead == [0, 1, 2, 4, 5, 6, 7]
    none = usage(torch.full((4, 2), -1), 3)
    assert none.unserved == 1 and none.balance == 0 and none.entropy == 0 and none.dead == [0, 1, 2]


def test_label_shares_against_counts():
    index, label = _ragged(300, 5, 2), torch.randint(-1, 3, (300,))
    found = label_shares(index, label, 5, 4)
    for which in range(4):
        mine = [e for row, m in zip(index.tolist(), label.tolist(), strict=True) if m == which for e in row if e >= 0]
        expected = [mine.count(e) / len(mine) if mine else 0.0 for e in range(5)]
        assert found[which].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("chunk", [7, 1 << 16])
def test_coactivation_against_brute_force(monkeypatch, chunk):
    monkeypatch.setattr("shunter.metrics.CHUNK", chunk)
    index = _ragged(100, 6, 3)
    found = coactivation(index, 6)
    for i in range(6):
        for j in range(6):
            assert int(found[i, j]) == sum(i in row and j in row for row in index.tolist())


def test_affinity_is_one_without_preference_and_names_planted_pairs():
    free = affinity(coactivation(torch.rand(40_000, 6).argsort(1)[:, :2], 6))
    off = ~torch.eye(6, dtype=torch.bool)
    assert (free[off] - 1).abs().max() < 0.15
    assert free.diagonal().isnan().all()
    first = torch.randint(3, (500,))
    pairs = affinity(coactivation(torch.stack([2 * first, 2 * first + 1], 1), 6))
    for i in range(6):
        assert int(pairs[i].nan_to_num(-1).argmax()) == i ^ 1
        assert float(pairs[i].nan_to_num(0).sum()) == float(pairs[i, i ^ 1])
    assert affinity(coactivation(torch.arange(6)[:, None], 6)).isnan().all()


def test_margins_against_a_loop():
    logits, index = torch.randn(60, 5), _ragged(60, 5, 3)
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
    assert found.near_ties == pytest.approx(float((gap <= BF16 * size).float().mean()))
    tied = logits.to(torch.bfloat16).float().sort(descending=True).values
    # Two neighbours that bfloat16 makes equal were at most one rounding apart.
    assert bool((gap <= BF16 * size)[tied[:, 1] == tied[:, 2]].all())
    bottom = summarise(*margins(logits, logits.topk(2, largest=False).indices))
    assert bottom is not None and bottom.against == 1
    assert summarise(torch.full((3,), math.nan), torch.ones(3)) is None


def test_routing_entropy_is_one_undecided_and_zero_certain():
    assert torch.allclose(routing_entropy(torch.zeros(3, 7)), torch.ones(3))
    certain = torch.full((3, 7), -1e4)
    certain[:, 2] = 0
    assert torch.allclose(routing_entropy(certain), torch.zeros(3))
    assert torch.allclose(routing_entropy(torch.tensor([[0.0, 0.0, -math.inf, -math.inf]])), torch.tensor(0.5))


def test_saturation_against_sets():
    before, after = _ragged(80, 6, 3), _ragged(80, 6, 2)
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
