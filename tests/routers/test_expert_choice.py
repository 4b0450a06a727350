"""Expert choice and its capped form: the linear program of scipy, the entropic optimum by its own conditions."""

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize

from shunter.context import Context
from shunter.routers.expert_choice import capped_plan
from shunter.routers.registry import create

from . import contract

SORTS = [
    {},
    {"capacity_factor": 0.7, "z_loss": 0.1},
    {"max_experts": 2},
    {"max_experts": 3, "capacity_factor": 1.3, "eval_capacity_factor": 2.0, "entropy": 0.02},
]


@pytest.mark.parametrize("check", contract.CHECKS)
@pytest.mark.parametrize("options", SORTS)
def test_contract(options, check):
    check("expert_choice", options, contract.plain)


def _constraints(tokens, experts):
    columns = np.kron(np.ones((1, tokens)), np.eye(experts))
    rows = np.kron(np.eye(tokens), np.ones((1, experts)))
    return columns, rows


def _program(scores, slots, cap):
    """The value of the linear program that the entropy term smoothes."""
    columns, rows = _constraints(*scores.shape)
    return -linprog(
        -scores.numpy().ravel(),
        A_eq=columns,
        b_eq=np.full(scores.shape[1], slots),
        A_ub=rows,
        b_ub=np.full(scores.shape[0], cap),
        bounds=(0, 1),
    ).fun


@pytest.mark.parametrize("tokens, experts, slots, cap", [(12, 4, 6, 2), (40, 8, 10, 3), (9, 3, 3, 1), (7, 5, 4, 3)])
def test_the_plan_keeps_its_limits_and_nears_the_linear_program(tokens, experts, slots, cap):
    scores = (2 * torch.randn(tokens, experts, dtype=torch.float64)).softmax(-1)
    best = _program(scores, slots, cap)
    for entropy in (0.1, 0.01):
        plan = capped_plan(scores, slots, cap, entropy, iterations=20000, tolerance=1e-9)
        assert (plan.sum(0) - slots).abs().max() < 1e-3
        assert plan.sum(1).max() <= cap + 1e-9 and plan.min() >= 0 and plan.max() <= 1
        # A vertex of the program is integral, with H = 0, and the plan's value + entropy * H(A) is no smaller than its.
        value = float((plan * scores).sum())
        assert best - entropy * float(torch.special.entr(plan).sum()) - 1e-3 <= value <= best + 1e-3


def test_the_plan_is_the_entropic_optimum():
    """Against a general solver of the same concave programme."""
    tokens, experts, slots, cap, entropy = 6, 3, 2, 1, 0.1
    scores = torch.randn(tokens, experts, dtype=torch.float64).softmax(-1)
    plan = capped_plan(scores, slots, cap, entropy, iterations=20000, tolerance=1e-10)
    columns, rows = _constraints(tokens, experts)
    flat = scores.numpy().ravel()

    def loss(a):
        return -(a @ flat) + entropy * (a * np.log(a)).sum()

    def slope(a):
        return -flat + entropy * (np.log(a) + 1)

    found = minimize(
        loss,
        np.full(flat.size, slots / tokens),
        jac=slope,
        bounds=[(1e-9, 1)] * flat.size,
        constraints=[
            {"type": "eq", "fun": lambda a: columns @ a - slots, "jac": lambda a: columns},
            {"type": "ineq", "fun": lambda a: cap - rows @ a, "jac": lambda a: -rows},
        ],
        options={"maxiter": 1000, "ftol": 1e-12},
    )
    assert loss(plan.numpy().ravel().clip(1e-300)) <= loss(found.x) + 1e-7
    assert np.allclose(plan.numpy().ravel(), found.x, atol=2e-3)


@pytest.mark.parametrize("training", [True, False])
def test_no_token_exceeds_the_cap_and_experts_stay_full(training):
    router = create("expert_choice", 6, 8, max_experts=2).train(training)
    plain = create("expert_choice", 6, 8)
    logits = 2 * torch.randn(64, 8)
    while torch.bincount(plain.assign(logits).token).max() <= 2:  # without the cap some token has more
        logits = 2 * torch.randn(64, 8)
    routing = router.assign(logits)
    assert torch.bincount(routing.token, minlength=64).max() <= 2
    assert routing.counts.max() <= 16 and routing.token.numel() >= 0.95 * 128
    assert torch.equal(routing.weight, logits.softmax(-1)[routing.token, routing.expert]), "the weight is the score"


def test_the_capped_choice_is_nearly_the_best_one():
    for _ in range(5):
        logits = 2 * torch.randn(48, 6, dtype=torch.float64)
        routing = create("expert_choice", 6, 6, capacity_factor=1.5, max_experts=2).assign(logits)
        assert routing.weight.sum() >= 0.97 * _program(logits.softmax(-1), 12, 2)


def test_a_cap_that_never_binds_changes_nothing():
    logits = torch.randn(30, 5, dtype=torch.float64)
    plain = create("expert_choice", 6, 5, capacity_factor=1.0).assign(logits)
    most = int(torch.bincount(plain.token).max())
    if most < 5:
        capped = create("expert_choice", 6, 5, capacity_factor=1.0, max_experts=most, entropy=1e-5).assign(logits)
        assert torch.equal(capped.dense(), plain.dense())
    every = create("expert_choice", 6, 5, capacity_factor=1.0, max_experts=5).assign(logits)
    assert torch.equal(every.dense(), plain.dense())


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_few_tokens_keep_the_cap(tokens):
    router = create("expert_choice", 6, 8, capacity_factor=2.0, max_experts=2)
    routing = router.assign(torch.randn(tokens, 8))
    assert routing.token.numel() == 0 or torch.bincount(routing.token).max() <= 2


def test_the_softmax_is_over_experts_not_tokens():
    """Mesh TensorFlow's expert selection normalises over tokens: another algorithm."""
    logits = torch.tensor([[0.0, 0.0], [5.0, 9.0]])
    routing = create("expert_choice", 6, 2, capacity_factor=1.0).assign(logits)
    assert routing.token.tolist() == [0, 1], "expert 0 prefers the token with the larger share, not the larger logit"


def test_later_tokens_change_earlier_ones():
    for options in ({}, {"max_experts": 2}):
        router = create("expert_choice", 6, 4, **options)
        logits = torch.randn(64, 4)
        logits[32:, 0] -= 20
        other = torch.cat([logits[:32], logits[32:] + torch.tensor([40.0, 0, 0, 0])])
        before, after = (router.assign(each).dense()[:32] for each in (logits, other))
        assert before[:, 0].any() and not after[:, 0].any()
        assert "later tokens" in router.leak


def test_experts_may_be_permuted():
    order = torch.randperm(6)
    for options in ({}, {"max_experts": 2}):
        router = create("expert_choice", 6, 6, **options)
        logits = torch.randn(24, 6, dtype=torch.float64)
        assert torch.allclose(router.assign(logits[:, order]).dense(), router.assign(logits).dense()[:, order])


def test_padding_takes_no_part_in_the_capped_plan():
    mask = torch.rand(40) < 0.6
    logits = torch.randn(40, 6, dtype=torch.float64)
    logits[~mask] = float("nan")
    router = create("expert_choice", 6, 6, max_experts=2)
    whole = router.assign(logits, Context(mask=mask)).dense()
    assert torch.equal(whole[mask], router.assign(logits[mask]).dense())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_experts": 1}, "less than the capacity_factor"),
        ({"max_experts": 2, "eval_capacity_factor": 3.0}, "less than the capacity_factor"),
        ({"max_experts": 2, "entropy": 0.0}, "must be positive"),
        ({"capacity_factor": None}, "needs a capacity_factor"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        create("expert_choice", 6, 4, **options)


def test_a_lone_token_is_taken_by_every_expert():
    """Decoding one token at a time it is no sparse layer: nobody competes."""
    router = create("expert_choice", 6, 4).eval()
    assert router.assign(torch.randn(1, 4)).counts.tolist() == [1] * 4
