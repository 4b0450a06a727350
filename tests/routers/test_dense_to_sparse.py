"""The dense-to-sparse gate: annealing, its state, and what it costs on the way."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from shunter import BalanceCallback, MoE, sparsify, update_routers
from shunter.moe import expect_steps
from shunter.routers.registry import create

from ..helpers import deviation
from . import contract

SORTS = [{}, {"hard_after": 0}, {"min_temperature": 2.0, "capacity_factor": 0.5, "load_balancing_loss": 0.1}]


@pytest.mark.parametrize("check", contract.CHECKS)
@pytest.mark.parametrize("options", SORTS)
def test_contract(options, check):
    check("dense_to_sparse", options, contract.plain)


def _at(temperature, **options):
    return create("dense_to_sparse", 6, 8, max_temperature=temperature, min_temperature=temperature, **options).train()


def test_fewer_experts_at_lower_temperatures_and_one_in_the_limit():
    logits = torch.randn(3000, 8)
    active = [_at(t).assign(logits).token.numel() / 3000 for t in (100.0, 2.0, 1.0, 0.5, 0.2, 0.05, 0.001)]
    assert active[0] == 8, "at a large temperature every expert is used"
    assert active == sorted(active, reverse=True)
    assert active[-1] == pytest.approx(1, abs=0.02)


def test_weights_are_the_gumbel_softmax():
    """The largest weight's expert is a draw from the softmax, whatever the temperature (Gumbel-max)."""
    draws = 50_000
    logits = torch.tensor([[1.0, 0.0, -1.0, 0.5]]).repeat(draws, 1)
    router = create("dense_to_sparse", 6, 4, max_temperature=1.3, threshold=0.0).train()
    matrix = router.assign(logits).dense()
    assert torch.allclose(matrix.sum(1), torch.ones(draws))
    share = torch.bincount(matrix.argmax(1), minlength=4) / draws
    assert (share - logits[0].softmax(0)).abs().max() < deviation(draws, 4)


def test_only_weights_above_the_threshold_and_at_least_one():
    router = _at(1.0, threshold=0.3)
    routing = router.assign(torch.zeros(500, 8))
    per_token = torch.bincount(routing.token, minlength=500)
    assert per_token.min() == 1
    first = routing.dense().argmax(1)
    others = routing.weight[routing.expert != first[routing.token]]
    assert (others > 0.3).all()


def test_evaluation_is_top_1_without_noise_or_drops():
    router = _at(2.0).eval()
    logits = torch.randn(40, 8)
    expected = torch.zeros(40, 8).scatter(1, logits.argmax(1, True), logits.softmax(-1).amax(1, True))
    assert torch.equal(router.assign(logits).dense(), expected)
    assert router.leak is None and router.experts_per_token == 1


@pytest.mark.parametrize("schedule", ["linear", "exponential"])
def test_the_schedule(schedule):
    options = {"max_temperature": 2.0, "min_temperature": 0.5, "anneal_steps": 4, "schedule": schedule}
    router = create("dense_to_sparse", 6, 4, **options)
    seen = [float(router.temperature)]
    for _ in range(6):
        router.update()
        seen.append(float(router.temperature))
    expected = {"linear": [2.0, 1.625, 1.25, 0.875, 0.5], "exponential": [2.0 * 0.25 ** (i / 4) for i in range(5)]}
    assert seen == pytest.approx(expected[schedule] + [0.5, 0.5])
    other = create("dense_to_sparse", 6, 4, **options)
    other.load_state_dict(router.state_dict())
    assert torch.equal(other.temperature, router.temperature) and int(other.steps) == 6


def test_without_a_length_of_its_own_the_fall_takes_the_training():
    moe = MoE(6, 4, 8, "dense_to_sparse")
    expect_steps(moe, 6)
    seen = []
    for _ in range(8):
        update_routers(moe)
        seen.append(float(moe.router.temperature))
    assert seen == pytest.approx([2.0 - 1.7 * min(i, 6) / 6 for i in range(1, 9)])
    own = create("dense_to_sparse", 6, 8, anneal_steps=3)
    own.expect_steps(1000)
    for _ in range(3):
        own.update()
    assert float(own.temperature) == pytest.approx(0.3)
    # Trained again, by a longer training or one that says nothing, it stays sparse.
    again = create("dense_to_sparse", 6, 8)
    again.load_state_dict(moe.router.state_dict())
    again.update()
    again.expect_steps(100_000)
    again.update()
    assert float(again.temperature) == pytest.approx(0.3)


def test_a_trainer_tells_the_length_of_its_training(tmp_path):
    config = LlamaConfig(vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    model = sparsify(LlamaForCausalLM(config), 4, "dense_to_sparse")
    rows = [{"input_ids": torch.randint(20, (5,))} for _ in range(4)]
    data = [row | {"labels": row["input_ids"]} for row in rows]
    arguments = TrainingArguments(str(tmp_path), max_steps=3, report_to="none", disable_tqdm=True, use_cpu=True)
    Trainer(model, arguments, train_dataset=data, callbacks=[BalanceCallback()]).train()
    assert float(model.model.layers[0].mlp.router.temperature) == pytest.approx(0.3)


def test_hard_after():
    router = _at(2.0, hard_after=2)
    logits = torch.randn(50, 8)
    sizes = []
    for _ in range(4):
        sizes.append(router.assign(logits).token.numel())
        router.update()
    assert sizes[0] > 50 and sizes[1] > 50 and sizes[2:] == [50, 50]


def test_the_cost_counts_every_training_token_once():
    moe = MoE(6, 4, 8, router="dense_to_sparse")
    assert moe.router.experts_per_token == 8
    used = 0
    for tokens in (10, 30):
        moe(torch.randn(tokens, 6))
        used += moe.routing.token.numel()
        moe.eval()(torch.randn(5, 6))
        moe.train()
        update_routers(moe)
    assert moe.router.experts_per_token == used / 40
    assert int(moe.router.steps) == 2


@pytest.mark.parametrize(
    "options", [{"min_temperature": 3.0}, {"anneal_steps": 0}, {"schedule": "cosine"}, {"threshold": 1.0}]
)
def test_errors(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        create("dense_to_sparse", 6, 4, **options)
