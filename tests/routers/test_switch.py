"""Switch: golden values, policies, no-token-left-behind and switch_max by brute force, precision, initial scale."""

import pytest
import torch
from torch.nn import functional as F

from shunter import MoE, aux_loss
from shunter.routers.registry import create

from ..helpers import deviation
from ..test_capacity import LOGITS
from . import contract

SORTS = [
    {},
    {"policy": "sample", "capacity_factor": 0.5},
    {"policy": "input_dropout", "capacity_factor": 0.5, "eval_capacity_factor": 0.5, "capacity_order": "probability"},
    {"policy": "argmax", "no_token_left_behind": 3, "capacity_factor": 0.6, "eval_capacity_factor": 0.6},
    {"no_token_left_behind": 1, "capacity_factor": 0.6, "group_size": 4, "capacity_order": "batch"},
]


@pytest.mark.parametrize("check", contract.CHECKS)
@pytest.mark.parametrize("options", SORTS)
def test_contract(options, check):
    check("switch", options, contract.plain)


def test_golden():
    # 6 tokens, 4 experts: the factor 4/3 makes C = 2.
    router = create("switch", 6, 4, capacity_factor=4 / 3, load_balancing_loss=1.0).train()
    routing = router.assign(LOGITS)
    assert routing.token.sort().values.tolist() == [0, 1, 3, 5]
    assert routing.demand.tolist() == [4, 1, 0, 1]
    assert LOGITS.softmax(-1).mean(0).tolist() == pytest.approx([0.437764, 0.270139, 0.140381, 0.151716], abs=1e-6)
    assert router.losses(LOGITS, routing)["load_balancing_loss"].item() == pytest.approx(1.448608, abs=1e-6)
    raw = LOGITS.softmax(-1)[routing.token, routing.expert]
    assert torch.equal(routing.weight, raw), "raw probabilities, or the router gets no gradient"


def test_the_balance_loss_can_be_below_its_value_at_balance():
    """A trap in the paper's wording: uniform routing does not minimise it."""
    logits = torch.tensor([[0.01, 0.0], [0.01, 0.0], [-9.0, 9.0]])
    router = create("switch", 6, 2, load_balancing_loss=1.0, capacity_factor=None).train()
    loss = router.losses(logits, router.assign(logits))["load_balancing_loss"]
    # f = (2/3, 1/3) and P = (1/3, 2/3): 2 * (2/9 + 2/9).
    assert loss.item() == pytest.approx(8 / 9, rel=0.01)


def test_sampling_draws_from_the_softmax_and_weighs_by_it():
    router = create("switch", 6, 4, policy="sample", capacity_factor=None)
    draws = 50_000
    logits = torch.tensor([[1.0, 0.0, 0.5, -1.0]]).repeat(draws, 1)
    routing = router.train().assign(logits)
    p = logits[0].softmax(0)
    assert (routing.counts / draws - p).abs().max() < deviation(draws, 4)
    assert torch.allclose(routing.weight, p[routing.expert])
    assert router.eval().assign(logits).counts.tolist() == [draws, 0, 0, 0]


def test_input_dropout_is_for_training_only():
    router = create("switch", 6, 4, policy="input_dropout", input_dropout=0.5).train()
    torch.nn.init.ones_(router.weight)
    logits = router.score(torch.ones(20000, 6))
    assert set(logits[:, 0].tolist()) <= {2.0 * n for n in range(7)}
    # Of 120,000 entries that are 0 or 2 each row is a sum of 6; the four experts see the same ones.
    assert abs(logits.mean().item() - 6) < 6 * deviation(120_000, width=2)
    assert router.eval().score(torch.ones(3, 6)).eq(6).all()


def test_argmax_and_sample_leave_the_input_alone():
    for policy in ("argmax", "sample"):
        router = create("switch", 6, 4, policy=policy).train()
        x = torch.randn(5, 6)
        assert torch.equal(router.score(x), F.linear(x, router.weight))


def _left_behind(probs, slots, rounds, priority):
    """Round by round, token by token."""
    tokens, experts = probs.shape
    order = probs.sort(dim=1, descending=True, stable=True).indices
    place, used = {}, [0] * experts
    for rank in range(rounds + 1):
        for t in [t for t in priority if t not in place]:
            e = int(order[t, rank])
            if used[e] < slots:
                used[e] += 1
                place[t] = e
    return place


@pytest.mark.parametrize("order", ["position", "batch"])
@pytest.mark.parametrize("rounds", [1, 2, 4])
def test_no_token_left_behind_is_rounds_of_offers(rounds, order):
    tokens, experts = 40, 5
    logits = torch.randn(tokens, experts, dtype=torch.float64) + torch.linspace(2, 0, experts)
    # Nine tokens ask for 8 slots of expert 0, and the last of them then for expert 4, who is the last wish of others.
    logits[:9, 0], logits[:9, 4], logits[9:, 4] = 20.0, 10.0, -10.0
    router = create(
        "switch", 6, experts, no_token_left_behind=rounds, capacity_factor=1.0, capacity_order=order
    ).train()
    routing = router.assign(logits)
    routing.check_values()
    probs = logits.softmax(-1)
    priority = list(range(tokens)) if order == "position" else probs.amax(1).argsort(descending=True).tolist()
    expected = _left_behind(probs, router.capacity(tokens), rounds, priority)
    assert dict(zip(routing.token.tolist(), routing.expert.tolist(), strict=True)) == expected
    assert torch.equal(routing.weight, probs[routing.token, routing.expert])
    if order == "position":
        assert len(expected) > len(_left_behind(probs, router.capacity(tokens), 0, priority))
    if rounds == 4:
        assert len(expected) == tokens, "with every expert tried and slots for all, none is left behind"
    assert torch.equal(routing.first_choices, torch.bincount(probs.argmax(1), minlength=experts)), (
        "the balance loss still sees what tokens asked for"
    )


def test_no_token_left_behind_stays_in_its_group():
    router = create("switch", 6, 4, no_token_left_behind=3, capacity_factor=1.0, group_size=8).train()
    alone = create("switch", 6, 4, no_token_left_behind=3, capacity_factor=1.0).train()
    logits = torch.randn(20, 4) + torch.tensor([1.0, 0, 0, 0])
    parts = torch.cat([alone.assign(part).dense() for part in logits.split(8)])
    assert torch.equal(router.assign(logits).dense(), parts)


def test_no_token_left_behind_leaks():
    assert create("switch", 6, 4, no_token_left_behind=1).leak
    assert create("switch", 6, 4, no_token_left_behind=1, capacity_factor=None).leak is None
    assert create("switch", 6, 4).leak is None


def test_switch_max_keeps_the_most_probable_tokens_of_each_expert():
    for policy in ("argmax", "sample"):
        router = create("switch", 6, 4, policy=policy, capacity_factor=0.5, capacity_order="probability").train()
        logits = torch.randn(40, 4, dtype=torch.float64)
        routing = router.assign(logits)
        probs = logits.softmax(-1)
        for e in range(4):
            asked = torch.cat([part.token[part.expert == e] for part in (routing, routing.dropped)])
            best = asked[probs[asked, e].argsort(descending=True)][: router.capacity(40)]
            assert set(routing.token[routing.expert == e].tolist()) == set(best.tolist())


def test_selective_precision():
    """No bfloat16 operation stands between the layer's input and the softmax."""
    router = create("switch", 64, 16, jitter=0.0).bfloat16()
    x = torch.randn(200, 64, dtype=torch.bfloat16)
    exact = F.linear(x.double(), router.weight.double())
    logits = router.score(x)
    assert logits.dtype == torch.float32 and router.assign(logits).weight.dtype == torch.float32
    assert (logits - exact).abs().max() < 1e-5 < (F.linear(x, router.weight) - exact).abs().max()


def test_initial_scale_is_a_tenth_of_the_default():
    weight = create("switch", 64, 8192).weight  # of 2 ** 19 numbers the deviation is right to 0.1 %
    std = (0.1 / 64) ** 0.5
    assert weight.abs().max() <= 2 * std
    # A normal cut at two standard deviations has 0.880 of its standard deviation.
    assert weight.std().item() == pytest.approx(0.8796 * std, rel=0.02)


def test_no_token_left_behind_computes_tokens_that_would_be_lost():
    x = torch.randn(1, 1, 6).expand(1, 40, 6)  # who all ask for the 10 slots of one expert
    lost = []
    for rounds in (0, 3):
        torch.manual_seed(5)
        moe = MoE(6, 8, 4, router="switch", no_token_left_behind=rounds, capacity_factor=1.0, policy="argmax")
        out = moe(x)
        lost.append(int((out == 0).all(-1).sum()))
        (out.sum() + aux_loss(moe)).backward()
    assert lost[0] > 0 and lost[1] == 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"policy": "greedy"}, "choose from argmax, sample, input_dropout, jitter"),
        ({"input_dropout": 1.0}, r"must be in \[0, 1\)"),
        ({"no_token_left_behind": 4}, "between 0 and 3"),
        ({"top_k": 2}, 'use router="topk"'),
        ({"score_function": "sigmoid"}, 'use router="topk"'),
        ({"renormalize": "before_drop"}, "the router gets no gradient"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        create("switch", 6, 4, **options)
