"""Upcycling: the function is kept, native results load without Shunter, every tensor is accounted for."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    PreTrainedTokenizerFast,
)

import shunter
from shunter.cli import main
from shunter.hf.checkpoints.upcycling import describe
from tests.hf.conftest import _LM, BUILD, VOCAB

BUILD = {
    **BUILD,
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_LM, num_key_value_heads=2, sliding_window=4)),
    "olmo2": lambda: Olmo2ForCausalLM(Olmo2Config(**_LM, num_key_value_heads=2, eos_token_id=2)),
    "deepseek_v3": lambda: DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **_LM,
            kv_lora_rank=8,
            q_lora_rank=8,
            qk_rope_head_dim=4,
            v_head_dim=8,
            qk_nope_head_dim=4,
            first_k_dense_replace=2,
        )  # fmt: skip
    ),
}
NATIVE = {
    "llama": "mixtral",
    "mistral": "mixtral",
    "qwen3": "qwen3_moe",
    "olmo2": "flex_olmo",
    "deepseek_v3": "deepseek_v3",
}


def lively(name, **config):
    """A dense model in which every tensor matters: no zeros, no ones, feed-forward blocks as strong as attention."""
    model = LlamaForCausalLM(LlamaConfig(**_LM, num_key_value_heads=2, **config)) if config else BUILD[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.eval()


@pytest.fixture
def dense(tmp_path):
    """(name, …) -> the folder of a lively dense model, and the model."""

    def make(name="llama", folder="dense", dtype=torch.float32, **options):
        model = lively(name, **options.pop("config", {})).to(dtype)
        model.save_pretrained(tmp_path / folder, **options)
        return tmp_path / folder, model

    return make


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def batch_for(inputs, name):
    batch = inputs("llama" if name in NATIVE else name)
    return {key: value for key, value in batch.items() if key != "attention_mask"}


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def load(folder):
    config = json.loads((folder / "config.json").read_text())
    loaded = (
        shunter.from_pretrained(str(folder)) if "shunter" in config else AutoModelForCausalLM.from_pretrained(folder)
    )
    return loaded.eval()


@pytest.mark.parametrize("method", ["copy", "split"])
@pytest.mark.parametrize("name", list(BUILD))
def test_the_function_is_kept_natively_where_there_is_a_family(name, method, dense, inputs, tmp_path):
    folder, model = dense(name)
    receipt = shunter.upcycle(folder, tmp_path / "out", 8, 4, method=method)
    assert receipt["format"] == NATIVE.get(name, "shunter")
    assert (receipt["not_native_because"] is None) == (name in NATIVE)
    batch = batch_for(inputs, name)
    assert relative(logits(load(tmp_path / "out"), batch), logits(model, batch)) < 1e-5
    assert receipt["check"]["rms_difference"] < 1e-5 * receipt["check"]["rms_logits"]


@pytest.mark.parametrize("method", ["copy", "split"])
@pytest.mark.parametrize("name", list(BUILD))
def test_the_function_is_kept_in_shunters_format(name, method, dense, inputs, tmp_path):
    folder, model = dense(name)
    assert shunter.upcycle(folder, tmp_path / "out", 6, 2, method=method, to="shunter", check=False)["check"] is None
    sparse = load(tmp_path / "out")
    batch = batch_for(inputs, name)
    assert relative(logits(sparse, batch), logits(model, batch)) < 1e-5
    for layer in shunter.moe_layers(sparse).values():
        assert layer.num_experts == 6 and layer.router.top_k == 2 and layer.routing.counts.sum() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "t5_gated"])
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


@pytest.mark.parametrize("to", ["auto", "shunter"])
@pytest.mark.parametrize("name", list(BUILD))
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
    assert sum("router" in words for words in receipt["new"].values()) == (4 if name.startswith("t5") else 2)


@pytest.mark.parametrize("every", [1, 2])
def test_every_second_block(every, dense, inputs, tmp_path):
    for name in ("qwen3", "t5", "llama", "deepseek_v3"):
        folder, model = dense(name, folder=name)
        receipt = shunter.upcycle(folder, tmp_path / f"{name}-out", 4, every=every, check=False)
        assert receipt["format"] == ("shunter" if name == "t5" or (name, every) == ("llama", 2) else NATIVE[name])
        batch = batch_for(inputs, name)
        assert relative(logits(load(tmp_path / f"{name}-out"), batch), logits(model, batch)) < 1e-5


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


def test_shards_in_and_out(dense, inputs, tmp_path):
    folder, model = dense(max_shard_size="20kB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    shunter.upcycle(folder, tmp_path / "out", max_shard_bytes=30_000)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3 and set(index["weight_map"].values()) == {file.name for file in files}
    batch = batch_for(inputs, "llama")
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


def experts_of(folder, layer=0):
    """(gate, up, down) of each expert of a Mixtral's layer."""
    tensors = load_file(folder / "model.safetensors")
    count = len({name for name in tensors if f"layers.{layer}." in name and "w1" in name})
    path = f"model.layers.{layer}.block_sparse_moe"
    return [[tensors[f"{path}.experts.{e}.{w}.weight"] for w in ("w1", "w3", "w2")] for e in range(count)], tensors


def block_of(model, layer=0):
    mlp = model.model.layers[layer].mlp
    return [linear.weight.detach() for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)]


def test_split_parts_make_up_the_block(dense, tmp_path):
    folder, model = dense()
    shunter.upcycle(folder, tmp_path / "out", 6, 3, method="split", granularity=3)
    experts, tensors = experts_of(tmp_path / "out")
    gate, up, down = block_of(model)
    for copy in (0, 3):
        parts = experts[copy : copy + 3]
        assert torch.equal(torch.cat([part[0] for part in parts]), gate)
        assert torch.equal(torch.cat([part[1] for part in parts]), up)
        assert torch.equal(torch.cat([part[2] for part in parts], 1), down * 3)
    rows = tensors["model.layers.0.block_sparse_moe.gate.weight"]
    assert torch.equal(rows[0], rows[2]) and torch.equal(rows[3], rows[5]) and not torch.equal(rows[0], rows[3])


def test_dropped_units_are_drawn_anew_and_the_others_kept(tmp_path):
    config = LlamaConfig(
        vocab_size=9, hidden_size=64, intermediate_size=400, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight += 0.05  # a mean that must come back
    model.save_pretrained(tmp_path / "dense")
    receipt = shunter.upcycle(tmp_path / "dense", tmp_path / "out", 3, method="drop", drop=0.25)
    assert receipt["check"]["rms_difference"] > receipt["check"]["rms_rounding"]
    dense_parts = block_of(model)
    dropped = []
    for expert in experts_of(tmp_path / "out")[0]:
        changed = [(new != old).any(axis) for new, old, axis in zip(expert, dense_parts, (1, 1, 0), strict=True)]
        assert changed[0].sum() == 100 and torch.equal(changed[0], changed[1]) and torch.equal(changed[0], changed[2])
        dropped.append(changed[0])
        for new, old, units in zip(expert, dense_parts, (0, 0, 1), strict=True):
            new, old = (
                new.index_select(units, changed[0].nonzero()[:, 0]),
                old.index_select(units, changed[0].nonzero()[:, 0]),
            )
            # 6,400 draws: six standard errors of the mean and of the spread.
            assert abs(new.mean() - old.mean()) < 6 * old.std() / 80
            assert abs(new.std() / old.std() - 1) < 6 / (2 * 6400) ** 0.5
    assert not torch.equal(dropped[0], dropped[1])


def test_noise_has_the_spread_asked_for(dense, tmp_path):
    folder, model = dense()
    shunter.upcycle(folder, tmp_path / "out", 4, method="noise", noise=0.1)
    experts, _ = experts_of(tmp_path / "out")
    for expert in experts:
        for new, old in zip(expert, block_of(model), strict=True):
            assert abs((new - old).std() / (0.1 * old.std()) - 1) < 6 / (2 * new.numel()) ** 0.5
    assert not torch.equal(experts[0][0], experts[1][0])


def test_what_is_drawn_depends_on_the_seed_alone(dense, tmp_path):
    folder, _ = dense()
    for number, seed in enumerate((3, 3, 4)):
        shunter.upcycle(folder, tmp_path / str(number), 4, method="drop", seed=seed, check=False)
    first, again, other = [(tmp_path / str(n) / "model.safetensors").read_bytes() for n in range(3)]
    assert first == again != other


def save_tokenizer(folder):
    words = {f"w{i}": i for i in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def test_siblings_become_the_experts_and_the_rest_their_mean(dense, tmp_path):
    base, _ = dense()
    folders, siblings = zip(*(dense(folder=f"s{i}") for i in range(3)), strict=True)
    receipt = shunter.upcycle(base, tmp_path / "out", method="siblings", siblings=folders)
    assert receipt["options"]["num_experts"] == 3
    experts, tensors = experts_of(tmp_path / "out", layer=1)
    for expert, sibling in zip(experts, siblings, strict=True):
        assert all(torch.equal(new, old) for new, old in zip(expert, block_of(sibling, 1), strict=True))
    for name in ("model.embed_tokens.weight", "model.layers.1.self_attn.k_proj.weight", "model.norm.weight"):
        mean = sum(sibling.state_dict()[name].double() for sibling in siblings) / 3
        assert torch.equal(tensors[name], mean.float())


def test_equal_siblings_keep_the_function(dense, inputs, tmp_path):
    folder, model = dense()
    shunter.upcycle(folder, tmp_path / "out", method="siblings", siblings=[folder] * 4)
    batch = batch_for(inputs, "llama")
    assert relative(logits(load(tmp_path / "out"), batch), logits(model, batch)) < 1e-5


@pytest.mark.parametrize("apart", [False, True])
def test_prompts_make_gates_that_find_the_sibling(apart, dense, tmp_path):
    """The gate's rows are the directions of hidden states, recomputed here.

    Where prompts are apart their tokens go to their own sibling: with embeddings 100 e_i + n of prompt i, |n| < 1, that
    no layer changes, hidden states are within 0.02 of sqrt(d) e_i in direction, and a gate's row is within 0.1 of the
    direction of e_i less the mean, which is (1, -1/2, -1/2) times 0.8 to those of the three prompts.
    """
    base, model = dense()
    if apart:
        with torch.no_grad():
            embeddings = torch.nn.functional.normalize(torch.randn(VOCAB, 32))
            embeddings[1:46] += 100 * torch.eye(32)[torch.arange(45) // 15]
            model.model.embed_tokens.weight.copy_(embeddings)
            for layer in model.model.layers:
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
                layer.post_attention_layernorm.weight.fill_(1)
        model.save_pretrained(base)
    save_tokenizer(base)
    folders = [dense(folder=f"s{i}")[0] for i in range(3)]
    ids = torch.arange(3)[:, None] * 15 + torch.arange(1, 16)
    prompts = [
        [" ".join(f"w{i}" for i in row[:8].tolist()), " ".join(f"w{i}" for i in row[8:].tolist())] for row in ids
    ]
    shunter.upcycle(base, tmp_path / "out", method="siblings", siblings=folders, prompts=prompts, check=False)
    _, tensors = experts_of(tmp_path / "out")
    seen = {}
    model.model.layers[1].mlp.register_forward_pre_hook(lambda module, args: seen.update(x=args[0][0]))
    means = []
    for row in ids:
        states = []
        for part in (row[:8], row[8:]):
            logits(model, {"input_ids": part[None]})
            states.append(seen["x"])
        means.append(torch.cat(states).double().mean(0))
    expected = torch.stack(means) - torch.stack(means).mean(0)
    expected = expected / expected.norm(dim=1, keepdim=True)
    gate = tensors["model.layers.1.block_sparse_moe.gate.weight"]
    assert torch.allclose(gate.double(), expected, atol=1e-5)
    if apart:
        assert torch.equal((torch.stack(means) @ gate.double().T).argmax(1), torch.arange(3))


def test_what_stands_beside_the_weights_comes_along_but_no_code(dense, tmp_path):
    folder, _ = dense()
    save_tokenizer(folder)
    for name in ("LICENSE", "modeling_evil.py", "training_args.bin", "optimizer.pt"):
        (folder / name).write_text("x")
    shunter.upcycle(folder, tmp_path / "out", check=False)
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE"} < names
    assert not names & {"modeling_evil.py", "training_args.bin", "optimizer.pt"}


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
