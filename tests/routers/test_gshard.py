"""GShard: golden values, policies by frequency, groups as separate batches, fairseq's router as oracle."""

import pytest
import torch
from transformers import NllbMoeConfig
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeTop2Router

from shunter.context import Context
from shunter.losses import load_balancing_loss
from shunter.routers.registry import create

from ..helpers import deviation
from ..test_capacity import LOGITS
from . import contract

SORTS = [
    {},
    {"second_policy": "sampling", "capacity_factor": 1.0, "capacity_formula": "review"},
    {"second_policy": "all", "renormalize": "after_drop", "capacity_factor": 0.5, "capacity_formula": "review"},
    {"second_policy": "all", "group_size": 5, "capacity_factor": 0.5, "capacity_formula": "review", "z_loss": 0.1},
]


@pytest.mark.parametrize("check", contract.CHECKS)
@pytest.mark.parametrize("options", SORTS)
def test_contract(options, check):
    check("gshard", options, contract.plain)


def _gshard(**options):
    return create("gshard", 6, 4, **{"second_policy": "all", "capacity_factor": None, **options}).train()


@pytest.mark.parametrize(
    "renormalize, rows",
    [("before_drop", [[0.524979, 0], [0, 0.119203]]), ("after_drop", [[1.0, 0.0], [0.0, 1.0]])],
)
def test_golden(renormalize, rows):
    # 6 tokens, 4 experts: the factor 4/3 makes C = 2.
    router = _gshard(renormalize=renormalize, capacity_factor=4 / 3, capacity_formula="review")
    routing = router.assign(LOGITS)
    matrix = routing.dense().gather(1, LOGITS.topk(2).indices)
    assert (matrix[:, 0] > 0).tolist() == [True, True, False, True, False, True]
    assert (matrix[:, 1] > 0).tolist() == [True, False, True, True, False, False]
    assert torch.allclose(matrix[1:3], torch.tensor(rows), atol=1e-6)
    loss = router.losses(LOGITS, routing)["load_balancing_loss"]
    assert loss.item() == pytest.approx(0.01 * 1.448608, abs=1e-7), "first choices alone"


def test_the_paper_is_the_preset():
    router = create("gshard", 6, 64)
    assert (router.second_policy, router.second_threshold, router.renormalize) == ("random", 0.5, "before_drop")
    assert router.capacity(1000) == 32, "int(1000 * 2 / 64) up to a multiple of 4"
    assert router.coefficients["load_balancing_loss"] == 0.01 and router.balance_choices == "first"


@pytest.mark.parametrize("threshold", [0.2, 0.5])
def test_random_second_expert_is_kept_in_proportion(threshold):
    router = _gshard(second_policy="random", second_threshold=threshold)
    draws = 40_000
    logits = torch.randn(5, 4).repeat(draws, 1)
    share = logits[:5].softmax(-1).topk(2).values
    share = share[:, 1] / share.sum(1)
    routing = router.assign(logits)
    second = torch.bincount(routing.token[routing.choice == 1] % 5, minlength=5) / draws
    assert torch.equal(torch.bincount(routing.token[routing.choice == 0] % 5), torch.full((5,), draws))
    expected = (share / threshold).clamp(max=1)
    assert (second - expected).abs().max() < deviation(draws, 5)
    alone = torch.bincount(routing.token, minlength=len(logits))[routing.token] == 1
    first = routing.weight[alone]
    assert torch.allclose(first, (1 - share)[routing.token[alone] % 5]), "before_drop: the first keeps its share"


def test_sampled_second_expert_follows_the_softmax_without_the_first():
    router = _gshard(second_policy="sampling")
    logits = torch.tensor([[2.0, 1.0, 0.0, 0.5]])
    draws = 50_000
    routing = router.assign(logits.repeat(draws, 1))
    second = routing.expert[routing.choice == 1]
    assert (routing.expert[routing.choice == 0] == 0).all() and (second != 0).all()
    share = torch.bincount(second, minlength=4)[1:] / draws
    assert (share - logits[0, 1:].softmax(0)).abs().max() < deviation(draws, 3)
    p = logits[0].softmax(0)
    drawn = routing.token[(routing.expert == 3)]
    weight = routing.dense()[drawn[0]]
    assert torch.allclose(weight[[0, 3]], p[[0, 3]] / p[[0, 3]].sum()), "weights are of the drawn pair"


@pytest.mark.parametrize("batch_prioritized", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_fairseqs_router_agrees(batch_prioritized, before):
    tokens, experts = 24, 4
    config = NllbMoeConfig(
        hidden_size=6,
        num_experts=experts,
        expert_capacity=2 * tokens // experts,
        second_expert_policy="all",
        normalize_router_prob_before_dropping=before,
        batch_prioritized_routing=batch_prioritized,
        moe_eval_capacity_token_fraction=-1.0,
    )
    theirs = NllbMoeTop2Router(config)
    # A skewed batch: capacity 2 * ceil(T / E) = 12 drops one of the 13 tokens that ask first for expert 0, and their
    # probabilities there, their priorities, are apart, as their sort is not stable.
    logits = torch.randn(tokens, experts) + torch.tensor([2.0, 1.0, 0.0, -1.0])
    logits[:13, 0] = logits[:13, 1:].amax(1) + 0.1
    while logits.softmax(-1).amax(-1).sort().values.diff().min() < 1e-5:
        logits[:, 0] += 0.1 * torch.rand(tokens)
    _, weights = theirs.route_tokens(logits.clone())
    router = _gshard(
        capacity_factor=1.0,
        capacity_formula="fairseq",
        capacity_order="batch" if batch_prioritized else "position",
        renormalize="before_drop" if before else "after_drop",
    )
    routing = router.assign(logits)
    assert routing.dropped.token.numel() > 0
    assert torch.allclose(routing.dense(), weights, atol=1e-6)


def test_a_group_is_a_batch_of_its_own():
    sizes = [5, 5, 3]
    options = {"capacity_factor": 0.8, "capacity_formula": "review", "load_balancing_loss": 1.0}
    whole, alone = _gshard(group_size=5, **options), _gshard(**options)
    logits = torch.randn(13, 4)
    mask = torch.tensor([1] * 4 + [0] * 2 + [1] * 7, dtype=torch.bool)
    context = Context(mask=mask)
    routing = whole.assign(logits, context)
    rows, losses = [], []
    for part, m in zip(logits.split(sizes), mask.split(sizes), strict=True):
        own = alone.assign(part, Context(mask=m))
        rows.append(own.dense())
        losses.append(alone.losses(part, own, Context(mask=m))["load_balancing_loss"])
    assert torch.equal(routing.dense(), torch.cat(rows))
    loss = whole.losses(logits, routing, context)["load_balancing_loss"]
    assert torch.allclose(loss, torch.stack(losses).mean())
    joint = alone.losses(logits, alone.assign(logits, context), context)["load_balancing_loss"]
    assert loss.shape == joint.shape == ()
    # Groups that have each an expert of their own: a loss of E in each, and of less where they are one batch.
    skew = torch.eye(4)[torch.arange(13) // 5] * 50
    loss = whole.losses(skew, whole.assign(skew))["load_balancing_loss"]
    joint = alone.losses(skew, alone.assign(skew))["load_balancing_loss"]
    assert loss == pytest.approx(4) and joint == pytest.approx(4 * (5**2 + 5**2 + 3**2) / 13**2)


@pytest.mark.parametrize("choices", ["first", "all", "mean"])
def test_balance_of_groups_written_out(choices):
    logits = torch.randn(12, 4, dtype=torch.float64, requires_grad=True)
    group = torch.tensor([0, 2, 1, 0, 2, 1, 0, 2, 1, 4, 4, 4])
    mask = torch.rand(12) < 0.8
    mask[9:] = False
    router = _gshard(balance_choices=choices, capacity_factor=None)
    routing = router.assign(logits, Context(mask=mask))
    expected = []
    for g in range(3):
        rows = mask & (group == g)
        if rows.any():
            part = router.assign(logits[rows])
            expected.append(load_balancing_loss(logits[rows].softmax(-1), part, choices=choices))
    loss = load_balancing_loss(logits.softmax(-1), routing, mask, choices, group)
    assert torch.allclose(loss, torch.stack(expected).mean() if expected else loss * 0)
    assert torch.autograd.gradcheck(lambda h: load_balancing_loss(h.softmax(-1), routing, mask, choices, group), logits)


def test_order_matters_only_where_capacity_binds():
    """Reversed: some expert is the first choice of 5 of 20 tokens or more, and keeps other 4 of them."""
    logits = torch.randn(20, 4)
    for factor, equal in ((None, True), (4.0, True), (0.4, False)):
        router = _gshard(capacity_factor=factor, capacity_formula="review")
        same = torch.equal(router.assign(logits.flip(0)).dense(), router.assign(logits).dense().flip(0))
        assert same == equal


def test_weights_sum_to_one_where_nothing_is_dropped():
    routing = _gshard().assign(torch.randn(30, 4))
    assert torch.allclose(routing.dense().sum(1), torch.ones(30))


def test_a_weight_of_zero_keeps_its_expert():
    logits = torch.tensor([[0.0, -200.0, -300.0, -400.0]])
    routing = _gshard().assign(logits)
    assert routing.expert.tolist() == [0, 1] and routing.weight[1] == 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"second_policy": "some"}, "choose from all, random, sampling"),
        ({"second_threshold": 0}, "must be positive"),
        ({"top_k": 3}, 'use router="topk"'),
        ({"group_size": 0}, "at least 1, or None"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        create("gshard", 6, 4, **options)
