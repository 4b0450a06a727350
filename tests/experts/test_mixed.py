"""Experts that differ, against loops over tokens, and the FLOPs that each token spends, by hand."""

import pytest
import torch

import shunter
from shunter.experts import Experts, MixedExperts, Operation
from shunter.losses import cost_loss

from ..helpers import _act, random_routing

OPERATIONS = ["swiglu 5", "gelu 7 x2", "identity", "zero", "constant", "relu"]


def _network(block, x):
    weights = block.weights
    h = weights.up[0] @ x
    if weights.up_bias is not None:
        h = h + weights.up_bias[0]
    y = weights.down[0] @ _act(weights.activation, h)
    return y if weights.down_bias is None else y + weights.down_bias[0]


def _expected(experts, e, x):
    op, blocks = experts.operations[e], list(experts.each[e])
    if op.name in ("identity", "zero"):
        return x * (op.name == "identity")
    if op.name == "constant":
        a, b = (blocks[0].mix.weight @ x).softmax(0)
        return a * x + b * blocks[0].value
    for block in blocks[:-1]:
        x = x + _network(block, x)
    return _network(blocks[-1], x)


@pytest.mark.parametrize("bias", [False, True])
def test_each_expert_computes_its_operation(bias):
    experts = MixedExperts(6, OPERATIONS, 4, bias=bias, dtype=torch.float64)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    x, routing = torch.randn(9, 6, dtype=torch.float64), random_routing(9, 6)
    matrix = routing.dense()
    wanted = torch.stack([sum(matrix[t, e] * _expected(experts, e, x[t]) for e in range(6)) for t in range(9)])
    out = experts(x, routing)
    assert torch.allclose(out, wanted)
    out.sum().backward()
    assert all(p.grad is not None for p in experts.parameters())


def test_alike_experts_equal_the_stacked_ones():
    plain = Experts(3, 6, 5, activation="geglu", dtype=torch.float64)
    mixed = MixedExperts(6, ["geglu 5"] * 3, 5, dtype=torch.float64)
    with torch.no_grad():
        for e in range(3):
            mixed.each[e][0].gate_up_proj[0] = plain.gate_up_proj[e]
            mixed.each[e][0].down_proj[0] = plain.down_proj[e]
    x, routing = torch.randn(8, 6, dtype=torch.float64), random_routing(8, 3)
    assert torch.allclose(mixed(x, routing), plain(x, routing))


def test_what_a_token_spends_is_counted_by_hand():
    moe = shunter.MoE(6, 4, 6, "topk", top_k=2, operations=OPERATIONS).eval()
    costs = [2 * 3 * 6 * 5, 2 * 2 * 2 * 6 * 7, 0, 0, 2 * 2 * 6, 2 * 2 * 6 * 4]
    assert moe.experts.costs.tolist() == costs
    moe(torch.randn(2, 10, 6))
    chosen = moe.routing.dense() != 0
    by_hand = [sum(c for c, here in zip(costs, row, strict=True) if here) for row in chosen.tolist()]
    assert moe.spent().tolist() == by_hand
    assert moe.flops_per_token(10)["experts"] == pytest.approx(sum(by_hand) / 20)


def test_the_cost_loss_is_the_expected_cost_and_moves_tokens_to_cheap_experts():
    probs, cost = torch.rand(7, 3, dtype=torch.float64), torch.tensor([1.0, 0.25, 0.0])
    mask = torch.tensor([True] * 5 + [False] * 2)
    by_hand = sum(float(probs[t] @ cost.double()) for t in range(5)) / 5
    assert cost_loss(probs, cost, mask).item() == pytest.approx(by_hand)
    moe = shunter.MoE(
        8, 16, 4, "topk", top_k=1, operations=["swiglu", "swiglu", "identity", "gelu 2"], cost_loss=1.0,
        load_balancing_loss=0.0,
    )  # fmt: skip
    x = 0.1 * torch.randn(64, 8)
    x[:, 0] = 1  # in place of a bias, without which x and -x cannot both prefer one expert
    with torch.no_grad():
        moe.router.weight.zero_()
    moe(x)
    assert (moe.spent() == 2 * 3 * 8 * 16).all(), "scores tie, so that the first and dearest expert has all tokens"
    optimizer = torch.optim.SGD(moe.router.parameters(), lr=20.0)
    for _ in range(60):
        optimizer.zero_grad()
        moe(x)
        shunter.aux_loss(moe).backward()
        optimizer.step()
    moe(x)
    assert (moe.spent() == 0).all(), "all tokens have gone to the one that costs nothing"


def test_null_columns_cost_nothing():
    moe = shunter.MoE(8, 16, 3, "null_experts", num_null=2, cost_loss=1.0, load_balancing_loss=0.0)
    moe(torch.randn(5, 8))
    assert 0 < shunter.aux_loss(moe).item() < 1


@pytest.mark.parametrize(
    ("words", "message"),
    [("tanh 4", "unknown"), ("identity 4", "neither"), ("gelu 0", "at least 1"), ("gelu 4 x0", "at least 1")],
)
def test_wrong_words_are_one_line(words, message):
    with pytest.raises(ValueError, match=message) as error:
        Operation.parse(words, 4)
    assert "\n" not in str(error.value)


def test_as_many_operations_as_experts():
    with pytest.raises(ValueError, match="2 operations for 3 experts"):
        shunter.MoE(8, 16, 3, operations=["gelu", "zero"])
