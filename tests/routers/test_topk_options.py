"""The options of topk: forced experts, groups, scaling, what the linear map may do before."""

import pytest
import torch

from shunter import MoE
from shunter.context import Context
from shunter.routers.registry import create

from . import contract

SORTS = [
    {"top_k": 2},
    {"top_k": 3, "expert_groups": 4, "top_groups": 2, "group_score": "top2_sum", "score_function": "sigmoid"},
    {"top_k": 2, "expert_groups": 4, "top_groups": 1, "scaling_factor": 2.5, "renormalize": "no"},
    {"top_k": 2, "score_function": "sqrt_softplus", "norm_eps": 0.1, "selection_bias": True},
    {"top_k": 2, "renormalize": "after_drop", "capacity_factor": 1.0, "norm_order": 2.0, "per_expert_scale": True},
    {"top_k": 2, "router_bias": True, "input_norm": True, "logit_scale": 0.7, "logit_cap": 2.0, "norm_min": 0.5},
]


@pytest.mark.parametrize("check", contract.CHECKS)
@pytest.mark.parametrize("options", SORTS)
def test_contract(options, check):
    check("topk", options, contract.plain)


@pytest.mark.parametrize("score", ["max", "top2_sum"])
def test_choices_stay_within_the_best_groups(score):
    router = create("topk", 6, 12, top_k=4, expert_groups=4, top_groups=2, group_score=score)
    logits = torch.randn(50, 12, dtype=torch.float64)
    routing = router.assign(logits)
    probs = logits.softmax(-1)
    for t in range(50):
        runs = probs[t].reshape(4, 3)
        of_run = [float(r.max()) if score == "max" else float(r.topk(2).values.sum()) for r in runs]
        best = sorted(range(4), key=lambda g: -of_run[g])[:2]
        allowed = [e for e in range(12) if e // 3 in best]
        expected = sorted(sorted(allowed, key=lambda e: -float(probs[t, e]))[:4])
        assert sorted(routing.expert[routing.token == t].tolist()) == expected


def test_a_score_outside_the_groups_beats_negative_ones_inside():
    options = {"top_k": 2, "expert_groups": 2, "top_groups": 1, "score_function": "sigmoid", "selection_bias": True}
    logits = 3 * torch.randn(40, 4)
    logits[:, :2] += 20  # the first run is the best one
    chosen = {}
    for outside in (None, 0.0):
        router = create("topk", 6, 4, outside_score=outside, **options)
        router.selection_bias.copy_(torch.tensor([0.5, -3.0, -2.0, -2.5]))
        chosen[outside] = router.select(logits).sort().values
        assert (chosen[outside][:, 0] == 0).all()
    assert (chosen[None][:, 1] == 1).all(), "an expert outside the groups was taken"
    assert (chosen[0.0][:, 1] != 1).all(), "an expert ranked below 0 was taken before those outside, ranked as 0"


def test_the_bias_chooses_and_does_not_weigh():
    router = create("topk", 6, 4, top_k=1, selection_bias=True, renormalize="no")
    router.selection_bias.copy_(torch.tensor([0.0, 0.0, 5.0, 0.0]))
    logits = torch.randn(20, 4)
    routing = router.assign(logits)
    assert (routing.expert == 2).all()
    assert torch.equal(routing.weight, logits.softmax(-1)[:, 2])


@pytest.mark.parametrize("options", [{"renormalize": "no"}, {}, {"score_after": True, "renormalize": "no"}])
def test_forced_experts_leave_the_router_the_weights(options):
    router = create("topk", 6, 5, top_k=2, **options)
    logits = torch.randn(30, 5, dtype=torch.float64)
    own = router.assign(logits)
    index = logits.topk(2).indices
    again = router.assign(logits, Context(experts=index))
    assert torch.equal(again.dense(), own.dense()), "forced to its own choice"
    other = torch.stack([torch.randperm(5)[:2] for _ in range(30)])
    routing = router.assign(logits, Context(experts=other))
    assert torch.equal(routing.dense() != 0, torch.zeros(30, 5).scatter(1, other, 1) != 0)
    assert torch.autograd.gradcheck(
        lambda h: router.assign(h, Context(experts=other)).dense(), logits.clone().requires_grad_()
    )


def test_fewer_forced_experts_share_the_weight():
    router = create("topk", 6, 4, top_k=2)
    experts = torch.tensor([[1, -1], [-1, -1], [2, 3]])
    routing = router.assign(torch.randn(3, 4), Context(experts=experts))
    assert routing.token.tolist() == [0, 2, 2] and routing.expert.tolist() == [1, 2, 3]
    assert torch.allclose(routing.dense().sum(1), torch.tensor([1.0, 0.0, 1.0]))


def test_a_layer_follows_forced_experts():
    layer = MoE(6, 8, 4, "topk", top_k=2)
    x = torch.randn(2, 5, 6)
    experts = torch.stack([torch.randperm(4)[:2] for _ in range(10)]).reshape(2, 5, 2)
    layer(x, experts=experts)
    chosen = layer.routing.dense() != 0
    assert torch.equal(chosen, torch.zeros(10, 4).scatter(1, experts.reshape(10, 2), 1) != 0)


@pytest.mark.parametrize(
    "experts, message",
    [
        ([[0, 4]], "experts 4 is out of range"),
        ([[-2, 0]], "experts -2 is out of range"),
        ([[3, 3]], "may come once only"),
        ([[0, 1], [1, 2]], "2 entries for 1 tokens"),
    ],
)
def test_impossible_forced_experts(experts, message):
    with pytest.raises(ValueError, match=message):
        create("topk", 6, 4).assign(torch.randn(1, 4), Context(experts=torch.tensor(experts)))


def test_a_router_that_decides_itself_refuses_forced_experts():
    with pytest.raises(ValueError, match="decides itself"):
        create("expert_choice", 6, 4).assign(torch.randn(1, 4), Context(experts=torch.tensor([[0]])))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"expert_groups": 3}, "must divide num_experts"),
        ({"expert_groups": 4, "top_groups": 5}, "top_groups 5 must be between"),
        ({"expert_groups": 8, "top_groups": 1, "top_k": 2}, "more than the 1 experts"),
        ({"group_score": "min"}, "'min' is unknown"),
        ({"norm_order": 0}, "must be positive"),
        ({"logit_cap": 0.0}, "must be positive"),
        ({"score_function": "tanh"}, "'tanh' is unknown"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        create("topk", 6, 8, **options)


def test_a_vanishing_score_has_a_finite_gradient():
    logits = torch.full((2, 4), -200.0, requires_grad=True)
    routing = create("topk", 6, 4, top_k=2, score_function="sqrt_softplus").assign(logits)
    routing.weight.sum().backward()
    assert logits.grad.isfinite().all()
