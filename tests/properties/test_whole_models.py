"""Whole models of every family that Shunter runs: "shunter" computes, learns and generates as "eager"."""

import copy

import pytest
import torch
import transformers
from packaging.version import Version
from tools.families import experts_classes
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

import shunter.hf
from shunter.benchmarks.finetune import finetune
from shunter.hf.observe.taps import taps
from shunter.hf.rules import KNOWN_UP_TO, NOT_TOP_K, RULES
from tests.hf.families import FAMILIES, VOCAB, build, build_around, steady

CLASSES = [*(experts for found in experts_classes().values() for experts in found), Llama4TextExperts]
# They cannot run in float64.
SINGLE = {"inkling2", "inkling2_loop"}
# Not among those that Shunter runs.
FAMILIES = sorted(set(FAMILIES) - {"jetmoe"})


def _use(model, name):
    if name == "shunter":
        shunter.hf.use_experts(model)
    elif model.config.model_type != "llama4_text":  # whose loop cannot be exchanged by name
        model.set_experts_implementation("eager")


def _outcome(model, name, inputs, grad):
    _use(model, name)
    model.zero_grad()
    out = model(**inputs)[0]
    out.backward(grad.to(out)[..., : out.shape[-1]])
    gradients = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    return {"output": out.detach(), **gradients}


@pytest.mark.parametrize("experts", CLASSES, ids=lambda experts: experts.__name__)
def test_a_model_computes_and_learns_as_under_eager(experts):
    family = experts.__module__.split(".")[2]
    if family not in {*RULES, *NOT_TOP_K} and Version(transformers.__version__) > Version(KNOWN_UP_TO):
        pytest.skip(f"{family} is new in transformers {transformers.__version__}")
    built = build_around(experts)
    inputs, grad = {"input_ids": torch.randint(3, VOCAB, (2, 9))}, torch.randn(2, 9, 2**18)
    if experts.__name__ == "Qwen3OmniMoeTalkerTextExperts":
        inputs = {"inputs_embeds": torch.randn(2, 9, 32)}
    for dtype in [torch.float32] if family in SINGLE else [torch.float64, torch.float32]:
        model = copy.deepcopy(built).to(dtype)  # Llama 4 does not go back to its own loop
        inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
        if dtype == torch.float32 and taps(model) and "input_ids" in inputs:
            inputs = steady(model, lambda: {"input_ids": torch.randint(3, VOCAB, (2, 9))})
        expected, found = (_outcome(model, name, inputs, grad) for name in ("eager", "shunter"))
        assert any("experts" in name for name in expected)
        assert found.keys() == expected.keys()
        whole = max(value.norm() for value in expected.values())
        allowed = 1e-5 if dtype == torch.float64 else 1e-3  # several round to float32 on the way
        for name, value in expected.items():
            # Gradients that are themselves rounding, as of a key's bias in softmax attention, have the others' scale.
            error = (found[name] - value).norm()
            assert error < allowed * value.norm() or error < allowed / 1000 * whole, (dtype, name, error / value.norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_generates_as_under_eager(family):
    model = build(family)
    how = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    _use(model, "eager")
    nearest = 0.0
    while nearest < 0.03:  # of the logits' deviation: each word is the best by far
        ids = torch.randint(3, VOCAB, (1, 5))
        eager = model.generate(ids, **how, output_logits=True, return_dict_in_generate=True)
        best = [logits[0, 3:].topk(2).values for logits in eager.logits]
        nearest = min(float((a - b) / logits.std()) for (a, b), logits in zip(best, eager.logits, strict=True))
    _use(model, "shunter")
    text = model.generate(ids, **how)
    assert text.shape[1] == 9 and torch.equal(text, eager.sequences)


def test_only_the_rows_that_llama4_chose_are_computed(monkeypatch):
    from shunter.hf import backend as llama4

    model = shunter.hf.use_experts(shunter.hf.use_experts(build("llama4_text")))  # a second time changes nothing
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
