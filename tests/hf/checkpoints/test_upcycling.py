"""Upcycling: the function is kept, native results load without Shunter, every tensor is accounted for."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
)

import shunter
from shunter.cli import main
from shunter.errors import UserError
from shunter.hf.checkpoints.upcycling import describe
from tests.hf.checkpoints.models import (
    BUILD,
    NATIVE,
    batch_for,
    load,
    logits,
    relative,
)
from tests.hf.conftest import BLOCKS


@pytest.mark.parametrize(
    "name, method",
    [(name, method) for name in BUILD for method in ("copy", "split") if method == "copy" or name in NATIVE],
)
def test_the_function_is_kept_natively_where_there_is_a_family(name, method, dense, inputs, tmp_path):
    folder, model = dense(name)
    receipt = shunter.upcycle(folder, tmp_path / "out", 8, 4, method=method)
    assert receipt["format"] == NATIVE.get(name, "shunter")
    assert (receipt["not_native_because"] is None) == (name in NATIVE)
    batch = batch_for(inputs, name)
    assert relative(logits(load(tmp_path / "out"), batch), logits(model, batch)) < 1e-5
    assert receipt["check"]["rms_difference"] < 1e-5 * receipt["check"]["rms_logits"]


@pytest.mark.parametrize(
    "name, method",
    [(name, method) for name in BUILD for method in ("copy", "split") if method == "split" or name in NATIVE],
)
def test_the_function_is_kept_in_shunters_format(name, method, dense, inputs, tmp_path):
    folder, model = dense(name)
    assert shunter.upcycle(folder, tmp_path / "out", 6, 2, method=method, to="shunter", check=False)["check"] is None
    sparse = load(tmp_path / "out")
    batch = batch_for(inputs, name)
    assert relative(logits(sparse, batch), logits(model, batch)) < 1e-5
    for layer in shunter.moe_layers(sparse).values():
        assert layer.num_experts == 6 and layer.router.top_k == 2 and layer.routing.counts.sum() > 0


@pytest.mark.parametrize(
    "name, dtype",
    [
        ("llama", torch.bfloat16),
        ("qwen3", torch.float16),
        ("gpt2", torch.float16),
        ("t5_gated", torch.bfloat16),
        *(
            pytest.param(*other, marks=pytest.mark.slow)
            for other in (
                ("llama", torch.float16),
                ("qwen3", torch.bfloat16),
                ("gpt2", torch.bfloat16),
                ("t5_gated", torch.float16),
            )
        ),
    ],
)
def test_half_precision_is_kept_within_its_rounding(name, dtype, dense, tmp_path):
    folder, _ = dense(name, dtype=dtype)
    receipt = shunter.upcycle(folder, tmp_path / "out")  # raises where the difference is beyond rounding
    assert receipt["format"] == NATIVE.get(name, "shunter")
    stored = load_file(tmp_path / "out/model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {dtype}


def test_split_in_half_precision_keeps_away_from_ties(dense, tmp_path):
    folder, _ = dense("llama", dtype=torch.bfloat16)
    receipt = shunter.upcycle(folder, tmp_path / "out", 8, 4, method="split")
    assert receipt["format"] == "shunter" and "ties between copies" in receipt["not_native_because"]
    with pytest.raises(ValueError, match="cannot write mixtral: .*ties"):
        shunter.upcycle(folder, tmp_path / "again", 8, 4, method="split", to="mixtral")


@pytest.mark.parametrize(
    "name, to", [(name, to) for name in BUILD for to in ("auto", "shunter") if to == "shunter" or name in NATIVE]
)
def test_the_receipt_accounts_for_every_tensor(name, to, dense, tmp_path):
    folder, _ = dense(name)
    receipt = shunter.upcycle(folder, tmp_path / "out", 4, to=to, check=False)
    assert receipt == json.loads((tmp_path / "out/receipt.json").read_text())
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert set(receipt["tensors"]) == set(before)
    made = {new for entry in receipt["tensors"].values() for new in entry["to"]}
    assert made | set(receipt["new"]) == set(after) and not made & set(receipt["new"])
    for old, entry in receipt["tensors"].items():
        if entry["how"] == "copied":
            assert torch.equal(after[entry["to"][0]], before[old])
    assert sum(tensor.nbytes for tensor in after.values()) == receipt["sparse_bytes"]
    assert sum("router" in words for words in receipt["new"].values()) == BLOCKS.get(name, 2)


@pytest.mark.parametrize("every", [1, 2])
def test_every_second_block(every, dense, inputs, tmp_path):
    for name in ("qwen3", "t5", "llama", "deepseek_v3"):
        folder, model = dense(name, folder=name)
        receipt = shunter.upcycle(folder, tmp_path / f"{name}-out", 4, every=every, check=False)
        assert receipt["format"] == ("shunter" if name == "t5" or (name, every) == ("llama", 2) else NATIVE[name])
        batch = batch_for(inputs, name)
        assert relative(logits(load(tmp_path / f"{name}-out"), batch), logits(model, batch)) < 1e-5


def test_the_last_block_in_words(dense, inputs, tmp_path):
    folder, model = dense("t5", folder="t5")
    receipt = shunter.upcycle(folder, tmp_path / "out", 4, placement="every 1, last 1", check=False)
    assert receipt["options"]["last"] == 1
    sparse = load(tmp_path / "out")
    assert [name.split(".")[2] for name in shunter.moe_layers(sparse)] == ["1", "1"]
    batch = batch_for(inputs, "t5")
    assert relative(logits(sparse, batch), logits(model, batch)) < 1e-5


@pytest.mark.parametrize(
    "method", ["copy", *(pytest.param(name, marks=pytest.mark.slow) for name in ("split", "noise", "drop"))]
)
def test_a_pyramid_has_twice_the_experts_in_the_last_blocks(method, dense, tmp_path):
    folder, _ = dense("llama", folder="llama")
    receipt = shunter.upcycle(folder, tmp_path / "new", 4, method=method, placement="pyramid")
    assert receipt["format"] == "shunter" and "one size" in receipt["not_native_because"]
    layers = shunter.moe_layers(shunter.from_pretrained(tmp_path / "new"))
    assert [layer.num_experts for layer in layers.values()] == [4, 8]
    assert all(layer.router.weight.std() > 0 for layer in layers.values())
    experts = list(layers.values())[1].experts.down_proj
    assert torch.equal(experts[0], experts[6]) == (method in ("copy", "split"))
    with pytest.raises(UserError, match="one size"):
        shunter.upcycle(folder, tmp_path / "other", 4, placement="pyramid", to="mixtral")
    with pytest.raises(UserError, match="than there are siblings"):
        shunter.upcycle(folder, tmp_path / "other", placement="pyramid", method="siblings", siblings=[folder, folder])
    assert not (tmp_path / "other").exists()


def test_tied_embeddings_stay_tied(dense, inputs, tmp_path):
    folder, model = dense(config={"tie_word_embeddings": True})
    shunter.upcycle(folder, tmp_path / "out")
    assert "lm_head.weight" not in load_file(tmp_path / "out/model.safetensors")
    sparse = load(tmp_path / "out")
    assert sparse.lm_head.weight is sparse.model.embed_tokens.weight


def test_what_mixtral_cannot_say_is_kept_in_shunters_format(dense, inputs, tmp_path):
    folder, model = dense(config={"attention_bias": True, "mlp_bias": True})
    receipt = shunter.upcycle(folder, tmp_path / "out", 4)
    assert receipt["format"] == "shunter" and "no biases" in receipt["not_native_because"]
    batch = batch_for(inputs, "llama")
    assert relative(logits(load(tmp_path / "out"), batch), logits(model, batch)) < 1e-5
    folder, _ = dense(folder="attention", config={"attention_bias": True})
    with pytest.raises(ValueError, match="mixtral has no field for attention_bias=True"):
        shunter.upcycle(folder, tmp_path / "mixtral", to="mixtral")


def test_checkpoints_without_the_models_prefix_and_with_old_buffers(dense, inputs, tmp_path):
    folder, model = dense("gpt2")
    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor.clone() for name, tensor in tensors.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
    save_file(bare, folder / "model.safetensors", {"format": "pt"})
    receipt = shunter.upcycle(folder, tmp_path / "out")
    assert receipt["tensors"]["h.0.attn.bias"]["how"] == "unused by the model"
    batch = batch_for(inputs, "gpt2")
    assert relative(logits(load(tmp_path / "out"), batch), logits(model, batch)) < 1e-5


def test_conversion_needs_less_memory_than_the_dense_model(tmp_path):
    config = LlamaConfig(
        vocab_size=64, hidden_size=384, intermediate_size=1536, num_hidden_layers=10, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    for to in ("mixtral", "shunter"):
        receipt = shunter.upcycle(tmp_path / "dense", tmp_path / to, 4, to=to, check=False)
        assert receipt["sparse_bytes"] > 3 * receipt["dense_bytes"] > 240_000_000
        assert receipt["peak_bytes"] < receipt["dense_bytes"] / 2 + receipt["layer_bytes"]


def test_equal_siblings_keep_the_function(dense, inputs, tmp_path):
    folder, model = dense()
    shunter.upcycle(folder, tmp_path / "out", method="siblings", siblings=[folder] * 4)
    batch = batch_for(inputs, "llama")
    assert relative(logits(load(tmp_path / "out"), batch), logits(model, batch)) < 1e-5


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_experts": 4, "top_k": 1}, "top_k=1 must be between 2"),
        ({"num_experts": 4, "top_k": 5}, "num_experts=4"),
        ({"num_experts": 10**9}, "at most 65536"),
        ({"method": "clone"}, "choose from copy, split"),
        ({"method": "split", "granularity": 3}, "divide num_experts=8"),
        ({"method": "split", "granularity": 8, "top_k": 8, "num_experts": 8, "to": "olmoe"}, "continues as mixtral"),
        ({"method": "split", "granularity": 5, "top_k": 5, "num_experts": 5}, "divide the width of every block"),
        ({"drop": 0.5}, "drop is for method 'drop'; the method is 'copy'"),
        ({"method": "drop", "drop": 1.5}, "at most 1"),
        ({"method": "noise", "noise": -1.0}, "above 0"),
        ({"method": "siblings"}, "needs siblings"),
        ({"siblings": ["a", "b"]}, "needs siblings"),
        ({"to": "gpt5"}, "choose from auto, shunter, mixtral"),
        ({"to": "qwen3_moe"}, "a llama model continues as mixtral, not as qwen3_moe"),
        ({"every": 5}, "leaves no block"),
        ({"every": 2, "to": "mixtral"}, "experts in every layer"),
    ],
)
def test_impossible_wishes_say_what_is_possible(options, message, dense, tmp_path):
    folder, _ = dense()
    with pytest.raises(ValueError, match=message):
        shunter.upcycle(folder, tmp_path / "out", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]


def test_families_that_have_no_sparse_one_say_so(dense, tmp_path):
    folder, _ = dense("gpt2")
    with pytest.raises(ValueError, match="no sparse family .* of 'gpt2'; there is one for .*qwen3 .qwen3_moe."):
        shunter.upcycle(folder, tmp_path / "out", to="mixtral")


def test_siblings_must_be_siblings(dense, tmp_path):
    base, _ = dense()
    other, _ = dense("qwen3", folder="other")
    with pytest.raises(ValueError, match="siblings have one architecture"):
        shunter.upcycle(base, tmp_path / "out", method="siblings", siblings=[base, other])
    biased, _ = dense(folder="biased", config={"attention_bias": True})
    with pytest.raises(ValueError, match="only one of them has"):
        shunter.upcycle(base, tmp_path / "out", method="siblings", siblings=[base, biased])
    with pytest.raises(ValueError, match="for each of the 2 siblings"):
        shunter.upcycle(base, tmp_path / "out", method="siblings", siblings=[base, base], prompts=[["w1"]])
    with pytest.raises(ValueError, match="need a tokenizer"):
        shunter.upcycle(base, tmp_path / "out", method="siblings", siblings=[base, base], prompts=[["a"], ["b"]])


def test_a_wrong_result_is_not_kept(dense, tmp_path, monkeypatch):
    """The command's own check sees a gate and an up projection that changed places."""
    folder, _ = dense()
    honest = shunter.hf.checkpoints.dense.Dense.parts

    def swapped(self, block):
        parts = honest(self, block)
        return {**parts, "gate": parts["up"], "up": parts["gate"]}

    monkeypatch.setattr(shunter.hf.checkpoints.dense.Dense, "parts", swapped)
    with pytest.raises(ValueError, match="the function was not kept"):
        shunter.upcycle(folder, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]


def test_command_line(dense, tmp_path, capsys):
    folder, _ = dense()
    assert main(["upcycle", str(folder), "--experts", "4", "--top-k", "2", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "4 experts, 2 a token" in said and "none left over" in said and "largest difference" in said
    assert main(["upcycle", str(folder), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == (
        f"shunter upcycle: {tmp_path}/out exists already; choose a new folder, nothing is overwritten\n"
    )
    assert main(["upcycle", str(folder), "--out", str(tmp_path / "json"), "--json"]) == 0
    assert describe(json.loads(capsys.readouterr().out)).startswith("8 experts")


def test_hub_names_are_downloaded_without_code(dense, tmp_path, monkeypatch):
    folder, _ = dense()
    asked = {}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **kw: asked.update(name=name, **kw) or folder)
    shunter.upcycle("someone/model", tmp_path / "out", check=False)
    assert asked["name"] == "someone/model" and "*.safetensors" in asked["allow_patterns"]
    assert not any("py" in pattern or "bin" in pattern for pattern in asked["allow_patterns"])
