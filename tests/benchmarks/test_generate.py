"""`shunter bench generate`: clocks share out a step, pages say what was timed, and models agree before it."""

import importlib.util

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from shunter.benchmarks import generate
from shunter.benchmarks.generate import PARTS, PHASES, _ratios, _Torch, bench, markdown, parts, right
from shunter.errors import UserError

TINY = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2,
    "norm_topk_prob": True, "max_position_embeddings": 1024,
}  # fmt: skip


def test_the_parts_of_a_step_are_all_there_and_leave_the_model_as_it_was():
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**TINY)).eval()
    before = torch.nn.functional.scaled_dot_product_attention
    found = parts(_Torch(model, "eager"), torch.randint(64, (1, 8)))
    assert set(found) == set(PARTS) and all(ms > 0 for name, ms in found.items() if name != "rest of generate")
    assert torch.nn.functional.scaled_dot_product_attention is before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_ratios_are_to_the_best_of_transformers_and_to_llama_cpp():
    ms = {"eager": 6.0, "grouped_mm": 4.0, "shunter": 2.0, "llama.cpp": 1.0}
    case = {"results": {name: {"ms": dict.fromkeys(PHASES, each)} for name, each in ms.items()}}
    found = _ratios(case)
    assert all(found[phase, "transformers"] == 2 and found[phase, "llama.cpp"] == 0.5 for phase in PHASES)


@pytest.mark.parametrize("given", [{"models": ["x"]}, {"precisions": ["x"]}, {"contestants": ["x"]}, {"minutes": 0}])
def test_what_is_unknown_is_refused(given):
    choice = {"models": ["qwen3-moe"], "precisions": ["float32"], "contestants": ["eager"], **given}
    with pytest.raises(UserError):
        bench(**choice)


@pytest.mark.slow
def test_contestants_agree_before_they_are_timed(monkeypatch):
    monkeypatch.setattr(generate, "QWEN3", TINY)
    monkeypatch.setattr(
        generate, "SMOLLM2", {**generate.SMOLLM2, "hidden_size": 288, "intermediate_size": 128, "vocab_size": 64}
    )
    found = bench(["qwen3-moe", "smollm2-32"], list(generate.PRECISIONS), list(generate.CONTESTANTS), 2, 0.01, 1)
    assert right(found) and len(found["cases"]) == 6
    page = markdown(found)
    assert page.count("## ") == 6 and "times the best of transformers (goal 2.0)" in page
    assert ("| llama.cpp |" in page) == (importlib.util.find_spec("llama_cpp") is not None)
    assert ("| torchao |" in page) == (importlib.util.find_spec("torchao") is not None)
    found["cases"][0]["results"]["shunter"]["error"] = 0.1
    assert not right(found)
