"""Whole models of every family that builds from its configuration: "shunter" computes, learns, generates as "eager"."""

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import shunter.hf
from shunter.benchmarks.finetune import finetune
from tests.helpers import relative_error
from tests.hf.families import FAMILIES, VOCAB, build

# Not among those that Shunter runs.
FAMILIES = sorted(set(FAMILIES) - {"jetmoe"})


def _outcome(model, name, ids):
    if name == "shunter":
        shunter.hf.use_experts(model)
    model.zero_grad()
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    gradients = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    return {"logits": out.logits.detach(), **gradients}


@pytest.mark.parametrize("family", FAMILIES)
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


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_generates_as_under_eager(family):
    model = build(family)
    ids = torch.randint(3, VOCAB, (1, 5))
    texts = []
    for name in ("eager", "shunter"):
        if name == "shunter":
            shunter.hf.use_experts(model)
        texts.append(model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0))
    assert texts[0].shape[1] == 9 and torch.equal(*texts)


def test_only_the_rows_that_llama4_chose_are_computed(monkeypatch):
    from shunter.hf import llama4

    model = shunter.hf.use_experts(build("llama4_text"))
    rows, choose = [], llama4.choose
    monkeypatch.setattr(llama4, "choose", lambda name, x, weights: rows.append(len(x)) or choose(name, x, weights))
    model(input_ids=torch.randint(3, VOCAB, (2, 9)))
    assert rows and all(n == 18 * model.config.num_experts_per_tok for n in rows)


def test_models_without_such_experts_are_refused():
    with pytest.raises(ValueError, match="JetMoeForCausalLM has no experts that Shunter can run"):
        shunter.hf.use_experts(build("jetmoe"))


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
