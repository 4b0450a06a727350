"""Null experts: choices that are the token itself or nothing, cost nothing, and count in balance and capacity."""

import pytest
import torch

from shunter import MoE
from shunter.routers.registry import create

from . import contract


@pytest.mark.parametrize("check", contract.CHECKS)
@pytest.mark.parametrize(
    "options",
    [{"num_null": 3}, {"num_null": 2, "identity": False, "top_k": 3, "selection_bias": True}],
)
def test_contract(options, check):
    check("null_experts", options, contract.plain)


def test_null_choices_weigh_the_token_itself():
    layer = MoE(6, 8, 4, "null_experts", top_k=2, num_null=3, activation="relu").double()
    x = torch.randn(20, 6, dtype=torch.float64)
    with torch.no_grad():
        layer.router.weight /= layer.router.weight.norm(dim=1, keepdim=True)
        x[0] = layer.router.weight[4]  # of rows of one length the nearest is itself: a null choice
    logits = layer.router.score(x)
    weight, index = logits.softmax(-1).topk(2)
    weight = weight / weight.sum(-1, keepdim=True)
    expected = torch.zeros_like(x)
    for t in range(20):
        for w, e in zip(weight[t], index[t].tolist(), strict=True):
            if e >= 4:
                expected[t] += w * x[t]
            else:
                weights = layer.experts.weights
                expected[t] += w * (weights.down[e] @ (weights.up[e] @ x[t]).relu())
    assert torch.allclose(layer(x), expected)
    assert (index >= 4).any() and layer.routing.num_experts == 4
    zero = MoE(6, 8, 4, "null_experts", top_k=2, num_null=3, identity=False)
    with torch.no_grad():
        zero.router.weight[:4] = 0
        zero.router.weight[4:] = 1
    assert not zero(torch.ones(5, 6)).any(), "zero experts add nothing"


def test_null_columns_count_in_the_losses_and_the_bias():
    router = create("null_experts", 6, 4, top_k=1, num_null=2, selection_bias=True, renormalize="no")
    logits = torch.randn(30, 6)
    share = torch.bincount(logits.argmax(1), minlength=6) / 30
    expected = 6 * (share * logits.softmax(-1).mean(0)).sum()
    routing = router.assign(logits)
    assert torch.allclose(router.losses(logits, routing)["load_balancing_loss"] / 0.01, expected)
    router.observe(logits, routing)
    assert torch.equal(router.observed, torch.bincount(logits.argmax(1), minlength=6).float())
    router.update()
    assert router.selection_bias.shape == (6,)


@pytest.mark.parametrize("formula", ["review", "deepspeed"])
def test_null_choices_cost_nothing(formula):
    """What a token costs counts the experts that compute; an even share of E + Z columns is what a slot is of."""
    options = {"capacity_factor": 1.0, "capacity_formula": formula}
    layer = MoE(6, 8, 4, "null_experts", top_k=3, num_null=8, num_shared_experts=1, **options).train()
    assert layer.router.experts_per_token == pytest.approx(3 * 4 / 12), "before the first step an even share"
    assert layer.router.capacity(120) == {"review": 10, "deepspeed": 30}[formula]
    mask = torch.rand(5, 20) < 0.7
    mask[0, 0] = True
    for _ in range(2):
        x = torch.randn(5, 20, 6)
        layer(x, mask=mask)
    logits = layer.router.score(x[mask])
    index = logits.topk(3).indices
    layer.router.uses.zero_()
    layer(x, mask=mask)
    layer.router.update()
    computed = float((index < 4).sum()) / int(mask.sum())
    assert layer.router.experts_per_token == pytest.approx(computed)
    one = 2 * 3 * 6 * 8  # FLOPs of a token in one expert
    assert layer.flops_per_token(20)["experts"] == pytest.approx(one * (computed + 1))
    everything = sum(p.numel() for p in layer.experts.parameters())
    assert layer.inactive_parameters(20) == pytest.approx(everything * (1 - computed / 4))
    layer.router.update()
    assert layer.router.experts_per_token == pytest.approx(computed), "nothing was seen"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_null": 0}, "at least 1"),
        ({"renormalize": "after_drop"}, "leave the null choices out"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        create("null_experts", 6, 8, **options)
