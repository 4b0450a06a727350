"""Slots and who gets them, against a greedy allocator written out."""

import pytest
import torch

from shunter import MoE
from shunter.capacity import FORMULAS, capacity, limit
from shunter.context import Context
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


def _tutel(index, experts, factor):
    """The pairs that Tutel's layer keeps of choices (T, k): by the place of each in its expert's queue."""
    tokens, k = index.shape
    queue, place = [0] * experts, {}
    for choice in range(k):
        for token, expert in enumerate(index[:, choice].tolist()):
            place[token, expert] = queue[expert]
            queue[expert] += 1
    bound = k * int(abs(factor) * -(-tokens // experts))
    slots = bound if factor > 0 else max(place.values()) + 1
    return {pair for pair, p in place.items() if p < (min(slots, bound) if factor < 0 else slots)}


@pytest.mark.parametrize("factor", [0, 0.0, -0.5, -1, -8.0, 1.25])
def test_tutels_factors_of_at_most_zero_go_by_the_fullest_expert(factor):
    options = {"top_k": 2, "capacity_factor": factor, "capacity_formula": "tutel", "eval_capacity_factor": 1.0}
    moe = MoE(8, 4, 6, "topk", load_balancing_loss=0.0, **options)
    x = torch.randn(50, 8) + moe.router.weight.detach()[0]
    moe(x)
    index = moe.router.score(x).topk(2).indices
    found = set(zip(moe.routing.token.tolist(), moe.routing.expert.tolist(), strict=True))
    assert found == _tutel(index, 6, factor)
    assert len(found) == 100 if factor in (0, -8.0) else factor != -0.5 or len(found) <= 6 * 8
    assert ("dropless" in moe.explain(50)) == (not factor)
    if not factor:
        assert moe.eval().router.present_capacity_factor is None, "as None, in evaluation too"


def test_slots_shared_out_by_load_drop_nothing_that_fits():
    """A total of T slots, even or by shares: with those of the load itself each expert has room for its own."""
    options = {"top_k": 1, "load_balancing_loss": 0.0, "z_loss": 0.0}
    for group_size in (None, 40):
        moe = MoE(8, 4, 6, "topk", capacity_factor=1.0, group_size=group_size, **options)
        free = MoE(8, 4, 6, "topk", **options)
        free.load_state_dict(moe.state_dict())
        x = torch.randn(120, 8) + moe.router.weight.detach()[0]
        if group_size:  # the same in each group
            x = x[:40].repeat(3, 1)
        mask = torch.ones(120, dtype=torch.bool) if group_size else torch.rand(120) < 0.9
        moe(x, mask=mask)
        assert moe.routing.dropped.token.numel() > 0
        load = moe.routing.demand
        moe.router.share_capacity(load.tolist())
        assert torch.equal(moe(x, mask=mask), free(x, mask=mask))
        assert "in proportion to capacity_shares" in moe.explain()
        again = MoE(8, 4, 6, moe.router.__class__(8, 6, **moe.router.options))
        again.load_state_dict(moe.state_dict())
        assert torch.equal(again(x, mask=mask), moe(x, mask=mask)), "an option that a saved model keeps"
        slots = moe.router.slots(torch.zeros(60, 6), None, Context())
        total = load.double().sum()
        expected = [max(1, int(-(-10 * 6 * n // total))) for n in load.tolist()]
        assert slots.tolist() == [expected]
        moe.router.share_capacity(None)
        assert moe.router.slots(torch.zeros(60, 6), None, Context()) == 10


@pytest.mark.parametrize("shares", [[1.0] * 5, [1.0, -1.0] * 3, [0.0] * 6, [float("nan")] * 6, [float("inf")] * 6])
def test_shares_that_are_none_are_refused(shares):
    with pytest.raises(ValueError, match="capacity_shares must be 6 numbers"):
        MoE(8, 4, 6, "topk", capacity_shares=shares)


@pytest.mark.parametrize("router", ["expert_choice", "two_sided"])
def test_routers_of_one_capacity_take_no_shares(router):
    with pytest.raises(ValueError, match="decides by a capacity that all experts have"):
        MoE(8, 4, 6, router, capacity_shares=[1.0] * 6)
    if router == "expert_choice":
        for factors in ((0, None), (-1.0, None), (1.0, 0.0), (1.0, "dropless"), (None, None)):
            with pytest.raises(ValueError, match="capacity_factor above 0"):
                MoE(8, 4, 6, router, capacity_factor=factors[0], eval_capacity_factor=factors[1])


def test_null_experts_share_in_the_mean():
    moe = MoE(8, 4, 6, "null_experts", capacity_factor=0.5, capacity_shares=[3, 1, 1, 1, 1, 1])
    moe(torch.randn(50, 8))
    even = moe.router.capacity(50)
    assert moe.routing.counts[0] <= -(-even * 3 * 6 // 8) and bool((moe.routing.counts[1:6] <= even).all())
