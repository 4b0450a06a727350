"""Slots and who gets them, against a greedy allocator written out."""

import pytest
import torch

from shunter import MoE
from shunter.capacity import FORMULAS, capacity, limit
from shunter.routing import Routing

from .helpers import deviation, random_routing

LOGITS = torch.tensor(
    [[2, 1, 0, -1], [1.5, 1.4, 0.2, 0], [3, 0, 1, 0.5], [0.1, 0.9, 0.8, -0.5], [2.5, 2.4, -1, 0.3], [0, 0.2, 0.4, 1.6]]
)


@pytest.mark.parametrize(
    "formula, expected",
    [
        ("mesh", (19, 19, 16, 16)),
        ("flaxformer", (20, 20, 17, 17)),
        ("gshard", (20, 20, 16, 16)),
        ("vmoe", (20, 40, 20, 36)),
        ("deepspeed", (20, 40, 17, 34)),
        ("fairseq", (20, 32, 16, 32)),
        ("tutel", (20, 40, 16, 32)),
        ("fastmoe", (20, 39, 17, 33)),
        ("review", (20, 20, 17, 17)),
    ],
)
def test_formulas_give_what_the_code_bases_give(formula, expected):
    found = [capacity(t, 64, k, f, formula) for t, f in ((1000, 1.25), (1024, 1.05)) for k in (1, 2)]
    assert tuple(found) == expected


@pytest.mark.parametrize("formula", FORMULAS)
def test_an_expert_always_has_a_slot(formula):
    """However short the input is, as in decoding a token at a time."""
    for tokens in range(1, 40):
        for experts in (1, 8, 24, 64):
            for k in (1, 2):
                for factor in (0.1, 0.5, 1.0, 2.0):
                    assert capacity(tokens, experts, k, factor, formula) >= 1
    moe = MoE(8, 4, 64, "topk", top_k=1, capacity_factor=0.5, capacity_formula=formula).eval()
    assert (moe(torch.randn(1, 1, 8)) != 0).any(), "a decoding step has an expert"


def test_short_inputs_of_gshard_reach_their_experts():
    moe = MoE(8, 4, 64, "gshard").eval()
    routing = moe.router.assign(moe.router.score(torch.randn(4, 8)))
    assert routing.token.numel() == 8, "4 slots each, at most 4 ask"


def test_factors_are_decimal():
    assert capacity(10, 1, 1, 1.1) == 11
    assert capacity(100, 1, 1, 1.1, "vmoe") == 112


@pytest.mark.parametrize("factor", [0, -1, float("nan"), float("inf")])
@pytest.mark.parametrize("formula", FORMULAS)
def test_impossible_factors_are_refused(factor, formula):
    with pytest.raises(ValueError, match="must be a positive number"):
        capacity(10, 2, 1, factor, formula)
    with pytest.raises(ValueError, match="'other' is unknown; choose from review"):
        capacity(10, 2, 1, 1.0, "other")


def _greedy(routing, slots, rank):
    """Serve requests one by one: all first choices by rank, then all second choices …"""
    requests = sorted(range(routing.token.numel()), key=lambda i: (int(routing.choice[i]), rank[int(routing.token[i])]))
    free = [slots] * routing.num_experts
    kept = set()
    for i in requests:
        e = int(routing.expert[i])
        if free[e]:
            free[e] -= 1
            kept.add((int(routing.token[i]), e))
    return kept


@pytest.mark.parametrize("order", ["position", "batch"])
@pytest.mark.parametrize("slots", [1, 3, 100])
def test_slots_go_by_choice_then_priority(order, slots):
    index = torch.stack([torch.randperm(5)[:3] for _ in range(30)])
    routing = Routing.from_topk(index, torch.rand(30, 3), 5)
    score = torch.randperm(30).float()  # no two alike
    rank = list(range(30)) if order == "position" else (-score).argsort().argsort().tolist()
    limited = limit(routing, slots, order, score)
    found = set(zip(limited.token.tolist(), limited.expert.tolist(), strict=True))
    assert found == _greedy(routing, slots, rank)
    assert torch.equal(limited.demand, routing.counts)
    limited.check_values()


def test_golden_switch_and_batch_priority():
    probs = LOGITS.softmax(-1)
    weight, index = probs.max(-1, keepdim=True)
    routing = Routing.from_topk(index, weight, 4)
    assert sorted(limit(routing, 2).token.tolist()) == [0, 1, 3, 5]
    assert sorted(limit(routing, 2, "batch", weight[:, 0]).token.tolist()) == [0, 2, 3, 5]


def test_random_order_is_uniform():
    routing = Routing.from_topk(torch.zeros(6, 1, dtype=torch.int64), torch.ones(6, 1), 1)
    kept = torch.stack([limit(routing, 2, "random").dense()[:, 0] for _ in range(4000)]).mean(0)
    assert (kept - 2 / 6).abs().max() < deviation(4000, 6)


def test_batch_order_keeps_the_heaviest_of_each_expert():
    routing = random_routing(40, 4, density=0.5)
    score = torch.rand(40)
    limited = limit(routing, 5, "batch", score)
    for e in range(4):
        asked = score[routing.token[routing.expert == e]].sort(descending=True).values[:5]
        got = score[limited.token[limited.expert == e]].sort(descending=True).values
        assert torch.equal(asked, got)


def test_bad_orders_are_refused():
    routing = random_routing(4, 2)
    with pytest.raises(ValueError, match="choose from position, random, batch"):
        limit(routing, 1, "first")
    with pytest.raises(ValueError, match="needs score"):
        limit(routing, 1, "batch")
