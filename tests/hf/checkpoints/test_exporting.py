"""Export: the round trip between Shunter's format and every native family is exact, and says no where it must."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, OlmoeConfig, OlmoeForCausalLM

import shunter
from shunter.cli import main
from shunter.hf.checkpoints.exporting import describe
from shunter.hf.checkpoints.native import FAMILIES, make_dense
from tests.helpers import TIME_LIMIT
from tests.hf.checkpoints.models import BUILD, lively
from tests.hf.checkpoints.models import NATIVE as UPCYCLED
from tests.hf.conftest import _LM, VOCAB
from tests.hf.families import build, steady

NATIVE = {
    "mixtral": {"router_jitter_noise": 0.1, "router_aux_loss_coef": 0.03},
    "qwen3_moe": {"mlp_only_layers": [1], "norm_topk_prob": True},
    "flex_olmo": {"norm_topk_prob": False},
    "olmoe": {"norm_topk_prob": False},
    "deepseek_v3": {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "n_shared_experts": 2},
}
DENSE = {"mixtral": "llama", "qwen3_moe": "qwen3", "flex_olmo": "olmo2", "olmoe": "olmoe", "deepseek_v3": "deepseek_v3"}
BUILD = {
    **BUILD,
    "olmoe": lambda: OlmoeForCausalLM(
        OlmoeConfig(**_LM, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, eos_token_id=2)
    ),
}


def stir(model):
    """Every number matters, the routers' most: no ones, no zeros, no ties."""
    with torch.no_grad():
        for tensor in [*model.parameters(), *(b for n, b in model.named_buffers() if n.endswith("bias"))]:
            if tensor.dim() >= 2:
                tensor.normal_(std=max(1, tensor.shape[-1]) ** -0.5)
            else:
                tensor.add_(torch.randn_like(tensor) * 0.2)
    return model.eval()


def native(family, **changes):
    return stir(build(family, **{**NATIVE[family], **changes}))


def sparsified(family, **options):
    """A model of Shunter's that the family can express."""
    model = BUILD[DENSE[family]]()
    make_dense(model)
    if family == "deepseek_v3":
        options = {
            "router": "deepseek",
            "top_k": 3,
            "expert_groups": 4,
            "top_groups": 2,
            "num_shared_experts": 2,
            "layers": [1],
            **options,
        }
    else:
        options = {"router": "topk", "top_k": 3, **options}
    options.setdefault("hidden", 16)
    return stir(shunter.sparsify(model, 8, **options))


def tensors_of(folder):
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def same_bytes(first, second):
    first, second = tensors_of(first), tensors_of(second)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]), name


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(ids).logits


def differing(first, second):
    """Fields of two configurations that differ, without those that say where a model comes from."""
    one, two = (json.loads((folder / "config.json").read_text()) for folder in (first, second))
    free = {"shunter_dense", "transformers_version", "output_router_logits"}
    # Where the family derives it from the width, it comes back in so many words.
    free |= {"head_dim"} if "head_dim" not in one else set()
    return {name for name in (one.keys() | two.keys()) - free if one.get(name) != two.get(name)}


@pytest.mark.parametrize(
    "family, dtype",
    [
        *((family, torch.float32) for family in FAMILIES if family != "mixtral"),
        ("mixtral", torch.bfloat16),
        *(
            pytest.param(family, torch.float32 if family == "mixtral" else torch.bfloat16, marks=pytest.mark.slow)
            for family in FAMILIES
        ),
    ],
)
def test_a_native_model_comes_back_bit_for_bit(family, dtype, tmp_path):
    model = native(family).to(dtype)
    model.save_pretrained(tmp_path / "native")
    receipt = shunter.export(tmp_path / "native", tmp_path / "ours")
    assert receipt["from"] == family and receipt["format"] == "shunter" and receipt["check"]["rms_logits"] > 0.1
    loaded = shunter.from_pretrained(str(tmp_path / "ours"), dtype=torch.float32)
    wide = AutoModelForCausalLM.from_pretrained(tmp_path / "native", dtype=torch.float32)
    ids = steady(wide, lambda: {"input_ids": torch.randint(VOCAB, (2, 9))})["input_ids"]
    torch.testing.assert_close(logits(loaded, ids), logits(wide, ids), rtol=1e-4, atol=1e-4)
    back = shunter.export(tmp_path / "ours", tmp_path / "back")
    assert back["format"] == family and back["from"] == "shunter"
    same_bytes(tmp_path / "native", tmp_path / "back")
    assert not differing(tmp_path / "native", tmp_path / "back")


@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_model_of_shunters_comes_back_bit_for_bit(family, square, tmp_path):
    """2f = d makes gate_up_proj and down_proj of the stack, f = d those of one expert, look like their transposes."""
    model = sparsified(family, hidden=16 if square else 32)
    model.save_pretrained(tmp_path / "ours")
    receipt = shunter.export(tmp_path / "ours", tmp_path / "native", check=False)
    ids = steady(model, lambda: {"input_ids": torch.randint(VOCAB, (2, 9))})["input_ids"]
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "native", output_loading_info=True)
    assert type(loaded).__name__ == FAMILIES[family].architecture
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(logits(loaded, ids), logits(model, ids), rtol=1e-4, atol=1e-4)
    back = shunter.export(tmp_path / "native", tmp_path / "back", check=False)
    assert back["layout"] == "gate_up_proj (E, 2f, d), gate first; down_proj (E, d, f)"
    assert receipt["layout"] == back["from_layout"] == FAMILIES[family].layout
    if "experts.{e}" in receipt["from_layout"]:  # as transformers saves these families' stacks
        model = shunter.from_pretrained(str(tmp_path / "ours"))
        again = shunter.from_pretrained(str(tmp_path / "back"))
        expected, found = model.state_dict(), again.state_dict()
        assert expected.keys() == found.keys() and all(torch.equal(expected[n], found[n]) for n in expected)
    else:
        same_bytes(tmp_path / "ours", tmp_path / "back")
    torch.testing.assert_close(logits(shunter.from_pretrained(str(tmp_path / "back")), ids), logits(model, ids))


@pytest.mark.parametrize("family", list(FAMILIES))
def test_transformers_stacked_layout_is_read(family, tmp_path):
    """As save_original_format=False writes it, and as a model is saved that was loaded from such a folder."""
    model = native(family)
    model.save_pretrained(tmp_path / "split")
    model.save_pretrained(tmp_path / "stacked", save_original_format=False)
    AutoModelForCausalLM.from_pretrained(tmp_path / "stacked").save_pretrained(tmp_path / "again")
    for name in ("stacked", "again"):
        assert any(key.endswith("mlp.experts.gate_up_proj") for key in tensors_of(tmp_path / name)), "not stacked"
        receipt = shunter.export(tmp_path / name, tmp_path / f"{name}-ours", check=False)
        assert receipt["from_layout"] == receipt["layout"] and set(receipt["tensors"]) == set(
            tensors_of(tmp_path / name)
        )
        shunter.export(tmp_path / f"{name}-ours", tmp_path / f"{name}-back", check=False)
        same_bytes(tmp_path / "split", tmp_path / f"{name}-back")


@pytest.mark.parametrize(
    "family", [name if name == "olmoe" else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_experts_of_an_odd_width_pass_the_check(family, tmp_path):
    """torch's grouped product, which transformers takes by default, refuses them."""
    width = FAMILIES[family].width_field
    native(family, **{width: 21}).save_pretrained(tmp_path / "native")
    for source, out in (("native", "ours"), ("ours", "back")):
        assert shunter.export(tmp_path / source, tmp_path / out)["check"]["rms_logits"] > 0.1


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "deepseek_v3"])
def test_the_balancing_loss_keeps_its_strength(family, layers, tmp_path):
    """transformers takes one loss over all layers in which k choices count; at one layer they are the same numbers."""
    coefficient, k = round(float(torch.rand(())) + 0.01, 4), int(torch.randint(2, 5, ()))
    changes = {"router_aux_loss_coef": coefficient, "num_experts_per_tok": k, "num_hidden_layers": layers}
    if family == "qwen3_moe":
        changes["mlp_only_layers"] = []
    model = native(family, **changes, router_jitter_noise=0.0) if family == "mixtral" else native(family, **changes)
    model.save_pretrained(tmp_path / "native")
    shunter.export(tmp_path / "native", tmp_path / "ours", check=False)
    ours = shunter.from_pretrained(str(tmp_path / "ours")).train()
    found = {layer.router.coefficients["load_balancing_loss"] for layer in shunter.moe_layers(ours).values()}
    assert found == {coefficient * k / layers} and len(shunter.moe_layers(ours)) == layers
    if layers == 1:
        ids = steady(model, lambda: {"input_ids": torch.randint(VOCAB, (2, 9))})["input_ids"]
        with torch.no_grad():
            theirs = coefficient * model(ids, output_router_logits=True).aux_loss
        ours(ids)
        torch.testing.assert_close(shunter.aux_loss(ours).detach(), theirs, rtol=1e-4, atol=1e-6)
    shunter.export(tmp_path / "ours", tmp_path / "back", check=False)
    assert json.loads((tmp_path / "back/config.json").read_text())["router_aux_loss_coef"] == coefficient


def test_native_models_load_where_shunter_is_not_installed(tmp_path):
    expected, ids = {}, {}
    for family in FAMILIES:
        model = sparsified(family)
        model.save_pretrained(tmp_path / f"{family}-ours")
        shunter.export(tmp_path / f"{family}-ours", tmp_path / family, check=False)
        ids[family] = steady(model, lambda model=model: {"input_ids": torch.randint(50, (2, 9))})["input_ids"]
        expected[family] = logits(model, ids[family])
    for name in UPCYCLED:
        model = lively(name)
        model.save_pretrained(tmp_path / f"{name}-dense")
        shunter.upcycle(tmp_path / f"{name}-dense", tmp_path / f"{name}-sparse", 4, check=False)
        ids[f"{name}-sparse"] = torch.randint(50, (2, 9))  # its experts are alike
        expected[f"{name}-sparse"] = logits(model, ids[f"{name}-sparse"])
    torch.save(ids, tmp_path / "ids.pt")
    code = """
import sys
sys.modules["shunter"] = None  # importing it fails
import torch
from transformers import AutoModelForCausalLM
folder, *names = sys.argv[1:]
ids = torch.load(folder + "/ids.pt")
found = {}
for name in names:
    model, info = AutoModelForCausalLM.from_pretrained(f"{folder}/{name}", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.no_grad():
        found[name] = model.eval()(ids[name]).logits
torch.save(found, folder + "/logits.pt")
"""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), *expected], check=True, env=environment, timeout=TIME_LIMIT
    )
    for family, found in torch.load(tmp_path / "logits.pt").items():
        torch.testing.assert_close(found, expected[family], rtol=1e-4, atol=1e-4)


def test_what_upcycle_writes_natively_goes_both_ways(tmp_path):
    BUILD["llama"]().save_pretrained(tmp_path / "dense")
    shunter.upcycle(tmp_path / "dense", tmp_path / "native", 4, check=False)
    shunter.upcycle(tmp_path / "dense", tmp_path / "ours", 4, check=False, to="shunter")
    shunter.export(tmp_path / "native", tmp_path / "exported", check=False)
    same_bytes(tmp_path / "ours", tmp_path / "exported")
    assert json.loads((tmp_path / "exported/config.json").read_text())["shunter_dense"] == "llama"


def test_the_receipt_accounts_for_every_tensor(tmp_path):
    for family in ("qwen3_moe", "deepseek_v3"):
        native(family, n_shared_experts=0).save_pretrained(tmp_path / family)
        receipt = shunter.export(tmp_path / family, tmp_path / f"{family}-ours", check=False)
        before, after = tensors_of(tmp_path / family), tensors_of(tmp_path / f"{family}-ours")
        assert set(receipt["tensors"]) == set(before)
        assert {name for entry in receipt["tensors"].values() for name in entry["to"]} == set(after)
        assert receipt == json.loads((tmp_path / f"{family}-ours/receipt.json").read_text())
        back = shunter.export(tmp_path / f"{family}-ours", tmp_path / f"{family}-back", check=False)
        assert all("empty" in words for words in back["new"].values()) and bool(back["new"]) == (family[0] == "d")
        same_bytes(tmp_path / family, tmp_path / f"{family}-back")


def test_shards_and_memory(tmp_path):
    model = native("mixtral", hidden_size=256, intermediate_size=1024, num_hidden_layers=6)
    model.save_pretrained(tmp_path / "native", max_shard_size="40MB")
    assert len(list((tmp_path / "native").glob("*.safetensors"))) > 2
    for source, out in (("native", "ours"), ("ours", "back")):
        receipt = shunter.export(tmp_path / source, tmp_path / out, check=False, max_shard_bytes=30_000_000)
        assert receipt["bytes"] > 150_000_000 and receipt["peak_bytes"] < receipt["bytes"] / 4
    same_bytes(tmp_path / "native", tmp_path / "back")


@pytest.mark.parametrize(
    "family, options, message",
    [
        ("mixtral", {"router": "switch"}, "drops no token; .*set capacity_factor to null"),
        ("mixtral", {"router": "hash", "top_k": None}, "Hash does not: keep Shunter's own format"),
        ("mixtral", {"renormalize": "no"}, "always divides .*train with renormalize='before_drop'"),
        ("mixtral", {"num_shared_experts": 1}, "no shared experts; the layers have 1"),
        ("mixtral", {"layers": [0]}, "experts in every layer"),
        ("qwen3_moe", {"score_function": "sigmoid"}, "scores by softmax, the router by sigmoid"),
        ("qwen3_moe", {"selection_bias": True}, "has no selection bias"),
        ("qwen3_moe", {"scaling_factor": 2.0}, "does not scale"),
        ("qwen3_moe", {"expert_groups": 4, "top_groups": 2}, "no groups of experts"),
        ("qwen3_moe", {"router_bias": True}, "plain matrix as its router"),
        ("qwen3_moe", {"logit_cap": 5.0}, "leaves the logits as they are"),
        ("qwen3_moe", {"per_expert_scale": True}, "no learned scale"),
        ("qwen3_moe", {"norm_order": 2.0}, "plain sum"),
        ("deepseek_v3", {"group_score": "max"}, "sum of their best two experts"),
        ("deepseek_v3", {"expert_groups": 8, "top_groups": 8}, "best two experts, even where"),
        ("deepseek_v3", {"outside_score": 0.0}, "no expert outside a token's groups"),
        ("deepseek_v3", {"layers": [0]}, "keep its first layers dense"),
        ("deepseek_v3", {"router": "topk"}, "scores by sigmoid, the router by softmax"),
    ],
)
def test_what_a_family_cannot_say(family, options, message, tmp_path, capsys):
    options = dict(options)
    if options.get("router") in ("switch", "hash"):
        options["top_k"] = None
    model = BUILD[DENSE[family]]()
    router = {"deepseek_v3": "deepseek"}.get(family, "topk")
    options = {"router": router, "top_k": 3, "hidden": 16, **options}
    options = {name: value for name, value in options.items() if value is not None}
    if family == "deepseek_v3" and options["router"] == "deepseek":
        options = {"expert_groups": 4, "top_groups": 2, **options}
    shunter.sparsify(model, 8, allow_leak=True, **options).save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match=message):
        shunter.export(tmp_path / "ours", tmp_path / "out")
    capsys.readouterr()
    assert main(["export", str(tmp_path / "ours"), "--out", str(tmp_path / "out")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours"]


@pytest.mark.parametrize(
    "config, options, message",
    [
        ({}, {"num_experts": 6}, "mixtral has layers of one size"),
        ({}, {"hidden": 24}, "mixtral has layers of one size"),
        ({}, {"top_k": 2}, "mixtral has one routing rule for all layers"),
        ({"hidden_act": "gelu"}, {}, "mixtral has the activation of config.json, swiglu"),
    ],
)
def test_a_family_has_layers_of_one_kind(config, options, message, tmp_path):
    model, other = sparsified("mixtral"), lively("llama", **config)
    options = {"num_experts": 8, "router": "topk", "top_k": 3, "hidden": 16, **options}
    shunter.sparsify(other, **options)
    name = "model.layers.1.mlp"
    model.set_submodule(name, shunter.moe_layers(other)[name])
    model.save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match=message) as caught:
        shunter.export(tmp_path / "ours", tmp_path / "out")
    assert len(str(caught.value).splitlines()) == 1 and not (tmp_path / "out").exists()


def test_other_models_are_told_where_to_go(tmp_path):
    BUILD["llama"]().save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="becomes sparse with shunter upcycle"):
        shunter.export(tmp_path / "dense", tmp_path / "out")
    shunter.sparsify(BUILD["gpt2"](), 4, "topk").save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match="stays in Shunter's format: no sparse family .* 'gpt2'"):
        shunter.export(tmp_path / "gpt2", tmp_path / "out")
    sparsified("mixtral").save_pretrained(tmp_path / "ours")
    for to, message in (("qwen3_moe", "continues as mixtral"), ("shunter", "already"), ("gpt5", "choose from auto")):
        with pytest.raises(ValueError, match=message):
            shunter.export(tmp_path / "ours", tmp_path / "out", to)
    native("mixtral", num_experts_per_tok=1).save_pretrained(tmp_path / "one")
    with pytest.raises(ValueError, match="the constant 1"):
        shunter.export(tmp_path / "one", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_wrong_result_is_not_kept(tmp_path, monkeypatch):
    """The command's own check sees that gate and up have changed places, in matrices of one shape."""
    sparsified("mixtral").save_pretrained(tmp_path / "ours")
    monkeypatch.setattr(type(FAMILIES["mixtral"]), "names", ("w3", "w1", "w2"))
    with pytest.raises(ValueError, match="the function was not kept"):
        shunter.export(tmp_path / "ours", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours"]


def test_command_line(tmp_path, capsys):
    sparsified("qwen3_moe", z_loss=0.01).save_pretrained(tmp_path / "ours")
    assert main(["export", str(tmp_path / "ours"), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "shunter as qwen3_moe; plain transformers loads it" in said and "largest difference" in said
    assert "without a field there: z_loss=0.01" in said
    assert main(["export", str(tmp_path / "out"), "--out", str(tmp_path / "back"), "--json"]) == 0
    assert describe(json.loads(capsys.readouterr().out)).startswith("qwen3_moe as shunter; shunter.from_pretrained")


def test_mixed_dtypes_are_not_mixed_up(tmp_path):
    native("mixtral").save_pretrained(tmp_path / "native")
    tensors = tensors_of(tmp_path / "native")
    name = next(name for name in tensors if "experts.0.w1" in name)
    save_file({**tensors, name: tensors[name].bfloat16()}, tmp_path / "native/model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="different dtypes"):
        shunter.export(tmp_path / "native", tmp_path / "out")
