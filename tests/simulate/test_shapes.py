"""Shapes against published totals, and against models of transformers counted."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from shunter.errors import UserError
from shunter.simulate.files import names
from shunter.simulate.shapes import load_model

# By name: published parameters, and how near the count comes without norms and biases.
PUBLISHED = {
    "switch-base": (7.41e9, 0.005),
    "switch-large": (26e9, 0.05),
    "switch-xxl": (395e9, 0.002),
    "switch-c": (1571e9, 0.001),
    "st-moe-32b": (269e9, 0.001),
    "gshard-600b": (600e9, 0.04),
    "glam-64b-64e": (1.2e12, 0.04),
    "shazeer-131072": (137e9, 0.005),
    "deepseek-v3": (671e9, 0.001),
    "qwen3-235b-a22b": (235e9, 0.001),
    "mixtral-8x7b": (46.7e9, 0.001),
    "gpt-3": (175e9, 0.005),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_as_published(name):
    total, tolerance = PUBLISHED[name]
    assert load_model(name).total == pytest.approx(total, rel=tolerance)


def test_every_description_loads():
    assert set(PUBLISHED) | {"t5-base", "t5-large"} == {load_model(name) and name for name in names("models")}
    assert load_model("shazeer-131072").parameters["experts"] == 137_438_953_472
    assert load_model("deepseek-v3").active == pytest.approx(37e9, rel=0.02)
    assert load_model("qwen3-235b-a22b").active == pytest.approx(22e9, rel=0.03)


SIZES = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 40}
CONFIGS = {
    "qwen3_moe": {
        "num_key_value_heads": 2, "head_dim": 16, "moe_intermediate_size": 24, "num_experts": 6,
        "num_experts_per_tok": 3, "decoder_sparse_step": 2,
    },
    "mixtral": {
        "num_key_value_heads": 2, "num_local_experts": 6, "num_experts_per_tok": 2, "tie_word_embeddings": True,
    },
    "deepseek_v3": {
        "num_key_value_heads": 4, "moe_intermediate_size": 24, "n_routed_experts": 8, "num_experts_per_tok": 2,
        "n_group": 2, "topk_group": 1, "q_lora_rank": 12, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8, "v_head_dim": 12, "first_k_dense_replace": 1,
    },
    "llama": {"num_key_value_heads": 2},
}  # fmt: skip


@pytest.mark.parametrize("family", CONFIGS)
def test_a_config_of_transformers_counts_as_its_model(tmp_path, family):
    config = AutoConfig.for_model(family, **SIZES, **CONFIGS[family])
    config.save_pretrained(tmp_path)
    shape = load_model(str(tmp_path))
    eager = {"attn_implementation": "eager"} | ({"experts_implementation": "eager"} if shape.experts else {})
    model = AutoModelForCausalLM.from_config(config, **eager)
    assert shape.total == sum(p.numel() for p in model.parameters() if p.dim() > 1)
    length = 10
    ids = torch.randint(SIZES["vocab_size"], (1, length))
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        model.eval()(ids)
    said = shape.flops(2 * length)  # the kernel computes whole scores, not half of them
    rotary = counted.get_total_flops() / length - sum(said.values())
    assert 0 <= rotary <= 2 * 64  # the positions' angles, a product in transformers


def test_a_dense_model_of_equal_operations():
    for name in ("qwen3-235b-a22b", "deepseek-v3", "st-moe-32b"):
        sparse = load_model(name)
        dense = sparse.without_experts()
        difference = sum(sparse.flops().values()) - sparse.flops()["routers"] - sum(dense.flops().values())
        assert abs(difference) < 1e-3 * sum(dense.flops().values())
        assert dense.total < sparse.total and not dense.experts


def config(**given):
    """A config.json of three layers with four experts each, but for what is given."""
    return json.dumps(
        {
            "model_type": "qwen3_moe", "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
            "intermediate_size": 128, "num_experts": 4, "num_experts_per_tok": 2, "vocab_size": 99,
        } | given
    )  # fmt: skip


@pytest.mark.parametrize(
    "given, sparse",
    [
        ({}, 3),
        ({"decoder_sparse_step": 2}, 1),
        ({"decoder_sparse_step": 1, "mlp_only_layers": [0, 2]}, 1),
        ({"decoder_sparse_step": 0}, 0),
        ({"first_k_dense_replace": 2}, 1),
        ({"moe_layer_freq": 2}, 2),
        ({"moe_layer_freq": [0, 1, 1]}, 2),
        ({"mlp_layer_types": ["dense", "sparse", "sparse"]}, 2),
        ({"num_experts": 0, "expert_layer_period": 2}, 0),
    ],
)
def test_which_layers_have_experts(tmp_path, given, sparse):
    (tmp_path / "config.json").write_text(config(**given), encoding="utf-8")
    assert load_model(str(tmp_path)).sparse_layers == sparse


@pytest.mark.parametrize(
    "text, message",
    [
        ("dim: 4", "lacks 'name'"),
        ("nonsense: 1", "'nonsense' is unknown; the names are name, dim"),
        ("[1, 2]", "must hold names and their values"),
        ("a: [", "cannot be read as YAML"),
        ("name: !!int ''", "cannot be read as YAML"),
        ("name: &a [1]\ndim: [*a, *a]", "the alias"),
        ("name: a\ndim: x\ndecoder_layers: 1\nheads: 1\nhead_dim: 1", "dim must be a number"),
        ("name: a\ndim: 1.5\ndecoder_layers: 1\nheads: 1\nhead_dim: 1", "dim must be a whole number"),
        ("name: a\ndim: 0\ndecoder_layers: 1\nheads: 1\nhead_dim: 1", "at least one layer"),
        ("name: a\ndim: 8\ndecoder_layers: 1\nheads: 1\nhead_dim: 8\nsparse_layers: 2", "more than the 1 layers"),
        ("name: a\ndim: 8\ndecoder_layers: 1\nheads: 1\nhead_dim: 8\nsparse_layers: 1\nexperts: 2\ntop_k: 3", "3 of 2"),
        (json.dumps({"model_type": "llama"}), "lacks hidden_size"),
        (config(num_attention_heads=0), "num_attention_heads must be a whole number of at least 1; it is 0"),
        (config(num_attention_heads=True), "num_attention_heads must be a whole number"),
        (config(num_hidden_layers=10**11), "100,000,000,000 layers are more than any model has"),
        (config(num_hidden_layers=-2), "num_hidden_layers must be a whole number of at least 1"),
        (config(hidden_size="64"), "hidden_size must be a whole number"),
        (config(num_experts_per_tok=9), "a token takes 9 of 4 experts"),
        (config(decoder_sparse_step=-1), "decoder_sparse_step must be a whole number"),
        (config(first_k_dense_replace="one"), "first_k_dense_replace must be a whole number"),
        (config(mlp_only_layers=3), "mlp_only_layers must be a list"),
        (config(moe_layer_freq=[0, 1]), "says of 2 layers whether they have experts; it has 3"),
        (config(n_shared_experts=[1]), "n_shared_experts must be a whole number"),
        (config(expert_layer_period=2), "is in expert_layer_period, which is not read"),
        (json.dumps({"model_type": "t5", "is_encoder_decoder": True}), "encoder-decoder"),
    ],
)  # fmt: skip
def test_what_describes_no_model(tmp_path, text, message):
    file = tmp_path / "model.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        load_model(str(file))


def test_an_unknown_name_lists_the_known():
    with pytest.raises(UserError, match="deepseek-v3"):
        load_model("nowhere")
