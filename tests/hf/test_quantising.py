"""`quantize`: every kind of experts module in codes, calibrated, saved, loaded to the bit, refused where it must be."""

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import shunter
from shunter.cli import main
from shunter.data.windows import train_tokenizer
from shunter.errors import UserError
from shunter.experts import Experts, QuantisedExperts
from shunter.hf.backend import layout_of
from shunter.hf.checkpoints.loading import load_folder
from shunter.hf.observe.listening import listening
from shunter.hf.observe.taps import taps
from shunter.hf.quantising import describe
from shunter.training.roles import roles
from tests.helpers import relative_error

from .families import VOCAB, build

# A family for each way that a module runs: on the backends, transposed, interleaved with bias, not gated, Llama 4's.
WAYS = ["qwen3_moe", "aria_text", "gpt_oss", "nemotron_h", "llama4_text"]


def _sparse(vocab=VOCAB, width=48, **options):
    sizes = {"hidden_size": 32, "intermediate_size": width, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=4, vocab_size=vocab))
    return shunter.sparsify(model, 4, "topk", top_k=2, **options).eval()


def _model(kind):
    ours = {"sparsified": {"num_shared_experts": 1}, "square": {"width": 32}}
    model = _sparse(**ours[kind]) if kind in ours else build(kind)
    for name, parameter in model.named_parameters():
        if "experts" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def _modules(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, Experts) or layout_of(m) is not None}


@torch.no_grad()
def _logits(model, input_ids):
    return model(input_ids, use_cache=False).logits


def _with_decoded(model, coded):
    """The model before, with the matrices that the codes of another say."""
    for name, module in _modules(model).items():
        weights = module.weights if isinstance(module, Experts) else layout_of(module)
        experts = coded.get_submodule(name)
        decoded = (experts if isinstance(experts, QuantisedExperts) else experts.coded).weights(torch.float32)
        for e in range(weights.num_experts):
            for into, value in zip(weights.expert(e)[:2], decoded.expert(e)[:2], strict=True):
                into.data.copy_(value)
    return model


@pytest.mark.parametrize("kind", [*WAYS, "sparsified", "square"])
def test_a_model_computes_what_its_codes_say_and_loads_to_the_same_bits(kind, tmp_path):
    model, ids = _model(kind), torch.randint(3, VOCAB, (2, 9))
    before = copy.deepcopy(model)
    report = shunter.quantize(model, bits=8, calibrate=[ids, {"input_ids": ids}])
    expected = _logits(_with_decoded(before, model), ids)
    found = _logits(model, ids)
    assert relative_error(found, expected) < 1e-4
    assert torch.equal(_logits(copy.deepcopy(model), ids), found)
    matrices = sum(p.numel() for n, p in before.named_parameters() if "experts" in n and p.dim() == 3)
    assert report["quantised_share"] == pytest.approx(matrices / sum(p.numel() for p in before.parameters()))
    assert json.loads(json.dumps(report)) == report and 0 < report["bytes_after"] < report["bytes_before"]
    model.save_pretrained(tmp_path / "model")
    for load in (AutoModelForCausalLM.from_pretrained, shunter.from_pretrained, load_folder):
        loaded = load(tmp_path / "model").eval()
        assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
        assert torch.equal(_logits(loaded, ids), found)
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(_logits(again, ids), found)
    with pytest.raises(UserError, match="quantised experts do not learn"):
        loaded.train()(ids, labels=ids, use_cache=False).loss.backward()
    with pytest.raises(UserError, match="quantised already"):
        shunter.quantize(loaded)


@pytest.mark.parametrize("kind", [*WAYS, "sparsified"])
def test_a_quantised_model_has_the_layers_and_the_roles_that_it_had(kind):
    model, ids = _model(kind), torch.randint(3, VOCAB, (2, 9))
    before = copy.deepcopy(model)
    shunter.quantize(model, bits=8)
    assert list(taps(model)) == list(taps(before))
    assert roles(model).items() <= roles(before).items()
    seen = {}
    with listening(model, lambda name, observation: seen.setdefault(name, observation.routing)):
        _logits(model, ids)
    assert set(seen) == set(taps(before))
    assert all(int(routing.counts.sum()) for routing in seen.values())


def test_bits_by_module_and_by_expert(tmp_path):
    model, ids = _model("qwen3_moe"), torch.randint(3, VOCAB, (2, 9))
    first, second, *_ = _modules(model)
    report = shunter.quantize(model, {first: [4, 8, 8, 4, 4, 4, 4, 8], second: 4}, group=64, zero_point=True)
    assert list(report["layers"]) == [first, second] and report["layers"][second]["bits"] == [4] * 8
    found = _logits(model, ids)
    model.save_pretrained(tmp_path / "model")
    assert torch.equal(_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval(), ids), found)
    assert "8 and 4 bits (2 layers" in describe(report)


def test_calibration_reaches_experts_that_no_token_chose():
    model = _sparse()
    layer = next(iter(shunter.moe_layers(model).values()))
    layer.router.weight.data.copy_(torch.tensor([1.0, 0.5, -0.5, -1.0])[:, None] * torch.ones(32))
    plain, ids = copy.deepcopy(model), torch.randint(3, VOCAB, (8, 40))
    training = [module.training for module in model.modules()]
    report = shunter.quantize(model, 4, calibrate=[ids])
    shunter.quantize(plain, 4)
    entries = list(report["layers"].values())
    assert all(sum(entry["tokens"]) == 8 * 40 * 2 for entry in entries)
    for (name, entry), other in zip(report["layers"].items(), shunter.moe_layers(plain).values(), strict=True):
        assert entry["few"] == [e for e, count in enumerate(entry["tokens"]) if count < 16]
        experts = model.get_submodule(name).weights(torch.float32)
        for e in range(4):
            assert all(matrix.isfinite().all() for matrix in experts.expert(e)[:2])
            assert not torch.equal(experts.expert(e)[0], other.experts.weights(torch.float32).expert(e)[0])
    assert [module.training for module in model.modules()] == training


def test_an_expert_without_tokens_is_reported():
    model = _sparse()
    name, layer = next(iter(shunter.moe_layers(model).items()))
    weight = next(iter(layer.router.parameters()))
    weight.data.zero_()  # ties go to the lowest index: experts 0 and 1 have all tokens
    report = shunter.quantize(model, 4, calibrate=[torch.randint(3, VOCAB, (2, 20))])
    entry = report["layers"][f"{name}.experts"]
    assert entry["tokens"] == [40, 40, 0, 0] and entry["few"] == [2, 3]
    assert "Chosen by fewer than 16 tokens of the calibration" in describe(report)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: shunter.quantize(torch.nn.Linear(2, 2)), "Linear has no experts that Shunter knows"),
        (lambda m: shunter.quantize(m, 5), "5 bits cannot be had; choose 8 or 4"),
        (lambda m: shunter.quantize(m, group=16), "a group of 16 cannot be had"),
        (lambda m: shunter.quantize(m, {"model.layers.9": 4}), "'model.layers.9' is no module of experts; the first"),
        (lambda m: shunter.quantize(m, {}), "bits names no module of experts"),
        (lambda m: shunter.quantize(m, calibrate=[]), "calibrate has no batch"),
        (lambda m: shunter.quantize(m.to("meta")), "offloaded or sharded"),
    ],
)
def test_errors_say_what_is_allowed_and_leave_the_model(call, message):
    model = _sparse()
    with pytest.raises(UserError, match=message):
        call(model)
    assert all(isinstance(layer.experts, Experts) for layer in shunter.moe_layers(model).values())


def test_weights_that_are_not_finite_name_their_layer():
    model = _sparse()
    name, layer = list(shunter.moe_layers(model).items())[-1]
    layer.experts.down_proj.data[1, 2, 3] = float("inf")
    with pytest.raises(UserError, match=f"expert 1 hold NaN or infinity.*{name}"):
        shunter.quantize(model)
    assert not any(isinstance(module, QuantisedExperts) for module in model.modules())


def test_a_folder_of_it_is_refused_where_float_weights_are_wanted(tmp_path):
    model = _model("qwen3_moe")
    shunter.quantize(model)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="the weights are quantised; take the model that they were made of"):
        shunter.export(tmp_path / "model", tmp_path / "out")
    with pytest.raises(
        ValueError, match="Shunter's sparse experts"
    ):  # the class itself, which knows nothing of Shunter
        type(model).from_pretrained(tmp_path / "model")
    name, experts = next((n, m) for n, m in model.named_modules() if isinstance(m, QuantisedExperts))
    experts.up_scale[3] = 0x7FC0  # a NaN of bfloat16
    model.save_pretrained(tmp_path / "broken")
    with pytest.raises(UserError, match=f"the scales of '{name}' hold NaN or infinity"):
        load_folder(tmp_path / "broken")
    raw = json.loads((tmp_path / "model" / "config.json").read_text())
    raw["shunter_quantised"]["layers"] = {"model.layers.7.mlp.experts": 4}
    (tmp_path / "model" / "config.json").write_text(json.dumps(raw))
    for load in (AutoModelForCausalLM.from_pretrained, shunter.from_pretrained):
        with pytest.raises(UserError, match="does not describe quantised experts"):
            load(tmp_path / "model")


def test_the_command_writes_a_folder_that_loads(tmp_path, capsys):
    model, text = _sparse(vocab=300), tmp_path / "text.txt"
    tokenizer = train_tokenizer(["many words of a text, and some more of them. " * 20], 300)
    text.write_text("many words of a text. " * 200, encoding="utf-8")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    out = tmp_path / "coded"
    assert main(["quantize", str(tmp_path / "model"), "--out", str(out), "--bits", "8", "--calibrate", str(text)]) == 0
    said = capsys.readouterr().out
    assert "of the model's numbers are in 8 bits (2 layers of experts)" in said
    receipt = json.loads((out / "receipt.json").read_text())
    assert all(sum(entry["tokens"]) > 0 for entry in receipt["layers"].values())
    expected = shunter.from_pretrained(str(tmp_path / "model")).eval()
    batch = {"input_ids": torch.randint(3, 50, (2, 9))}
    shunter.quantize(expected, 8)
    loaded = AutoModelForCausalLM.from_pretrained(out).eval()
    assert relative_error(_logits(loaded, **batch), _logits(expected, **batch)) < 0.01
    assert AutoTokenizer.from_pretrained(out)("many words").input_ids
    other = tmp_path / "other"
    for source, target, options, message in (
        (tmp_path / "model", other, ["--bits", "3"], "3 bits cannot be had"),
        (tmp_path / "model", other, ["--tokens", "1"], "--tokens 1 must be at least 2"),
        (tmp_path / "model", out, [], "exists already"),
        (out, other, [], "quantised already"),
    ):
        assert main(["quantize", str(source), "--out", str(target), *options]) == 2
        assert message in capsys.readouterr().err and not other.exists()
