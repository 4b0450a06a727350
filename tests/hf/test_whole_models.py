"""Whole models of every family that builds from its configuration: "shunter" computes, learns, generates as "eager"."""

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import shunter.hf  # noqa: F401 (registers the experts)
from shunter.benchmarks.finetune import finetune
from tests.helpers import relative_error
from tests.hf.families import FAMILIES, VOCAB, build

UNDECORATED = {"jetmoe", "llama4_text"}


def _outcome(model, name, ids):
    model.set_experts_implementation(name)
    model.zero_grad()
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    gradients = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    return {"logits": out.logits.detach(), **gradients}


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - UNDECORATED))
def test_a_model_computes_and_learns_as_under_eager(family):
    model = build(family)
    ids = torch.randint(3, VOCAB, (2, 9))
    expected, found = (_outcome(model, name, ids) for name in ("eager", "shunter"))
    assert any("experts" in name for name in expected)
    assert found.keys() == expected.keys()
    whole = max(value.norm() for value in expected.values())
    for name, value in expected.items():
        # Gradients that are themselves rounding (of a key's bias in softmax attention) are left to the others' scale.
        assert relative_error(found[name], value) < 1e-4 or (found[name] - value).norm() < 1e-7 * whole, name


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - UNDECORATED))
def test_a_model_generates_as_under_eager(family):
    model = build(family)
    ids = torch.randint(3, VOCAB, (1, 5))
    texts = []
    for name in ("eager", "shunter"):
        model.set_experts_implementation(name)
        texts.append(model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0))
    assert texts[0].shape[1] == 9 and torch.equal(*texts)


def test_fine_tuning_has_the_losses_of_eager():
    config = Qwen3MoeConfig(
        vocab_size=VOCAB, hidden_size=32, moe_intermediate_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=8, num_experts_per_tok=2,
        output_router_logits=True,
    )  # fmt: skip
    found = finetune(Qwen3MoeForCausalLM, config, ["eager", "shunter"], steps=6, batch=4, length=12)
    eager, ours = (found[name]["losses"] for name in ("eager", "shunter"))
    assert len(eager) == 6 and eager[-1] < eager[0]
    assert eager == pytest.approx(ours, rel=1e-4)
