"""GGUF files of sparse models: read back they compute the same, codes lie in llama.cpp's blocks, llama.cpp agrees."""

import json

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import shunter
from shunter.cli import main
from shunter.errors import UserError
from shunter.experts import QuantisedExperts
from shunter.hf.checkpoints.gguf import unpack
from shunter.hf.checkpoints.gguf_writing import write_gguf

gguf = pytest.importorskip("gguf")

SIZES = {
    "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_experts_per_tok": 2,
    "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
    "initializer_range": 0.1,
}  # fmt: skip


def made(family, **more):
    sizes = {**SIZES, **more}
    if family == "mixtral":
        rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}
        given = {"num_local_experts": 4, "intermediate_size": 96, "num_key_value_heads": 2, "rope_parameters": rope}
        return MixtralForCausalLM(MixtralConfig(**{**sizes, **given, "tie_word_embeddings": True})).eval()
    if family == "qwen3_moe":
        given = {"num_experts": 4, "moe_intermediate_size": 96, "num_key_value_heads": 2, "head_dim": 32}
        given |= {"norm_topk_prob": True, "intermediate_size": 96}
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**given, **sizes})).eval()
    given = {"num_experts": 4, "intermediate_size": 96, "num_key_value_heads": 4, "norm_topk_prob": False}
    return OlmoeForCausalLM(OlmoeConfig(**{**given, **sizes})).eval()


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def back(file, folder):
    unpack(file, folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_read_back_is_the_model_that_it_was(family, dtype, tmp_path):
    model = made(family).to(dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # norms, too
    write_gguf(model, tmp_path / "m.gguf")
    found = back(tmp_path / "m.gguf", tmp_path / "back").state_dict()
    expected = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name].float()) for name in expected)


@pytest.mark.parametrize(
    "options, kind",
    [
        ({"bits": 8}, "Q8_0"),
        ({"bits": 4}, "Q4_0"),
        ({"bits": 4, "group": 64}, "Q4_0"),
        ({"bits": 4, "zero_point": True}, "Q4_1"),
        ({"bits": 4, "group": 64, "zero_point": True}, "Q4_1"),
        ({"bits": {f"model.layers.{i}.mlp.experts": [4, 8, 4, 8] for i in (0, 1)}}, "Q8_0"),
        ({"bits": {"model.layers.0.mlp.experts": [8, 4, 4, 4]}, "zero_point": True, "group": 64}, "Q8_0"),
    ],
)
def test_codes_keep_their_bits(options, kind, tmp_path):
    """What the package gguf decodes is what Shunter does, but for zeros' products, which float16 may round."""
    model = made("qwen3_moe")
    shunter.quantize(model, **options)
    receipt = write_gguf(model, tmp_path / "m.gguf")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    f = 96
    for path, experts in model.named_modules():
        if not isinstance(experts, QuantisedExperts):
            continue
        layer, weights = path.split(".")[2], experts.weights(torch.float32)
        for part, side, rows in (
            ("gate", "up", slice(f)),
            ("up", "up", slice(f, None)),
            ("down", "down", slice(None)),
        ):
            name = f"blk.{layer}.ffn_{part}_exps.weight"
            assert tensors[name].tensor_type.name == kind == receipt["tensors"][name]["type"]
            found = torch.from_numpy(gguf.dequantize(tensors[name].data, tensors[name].tensor_type).copy())
            expected = torch.stack([getattr(weights, side).matrix(e)[rows] for e in range(4)])
            error = float((found - expected).norm() / expected.norm())
            assert receipt["tensors"][name]["error"] == pytest.approx(error, rel=1e-3, abs=1e-9)
            assert error == 0 if kind != "Q4_1" else error < 2**-11
    ids = torch.randint(96, (2, 9))
    theirs, ours = logits(back(tmp_path / "m.gguf", tmp_path / "back"), ids), logits(model, ids)
    torch.testing.assert_close(
        theirs, ours, rtol=1e-2 if kind == "Q4_1" else 1e-4, atol=1e-2 if kind == "Q4_1" else 1e-4
    )


def test_rows_that_blocks_do_not_fit_and_scales_beyond_float16_are_written_whole(tmp_path):
    for change in ("width", "scale"):
        model = made("qwen3_moe", **({"moe_intermediate_size": 40} if change == "width" else {}))
        if change == "scale":
            with torch.no_grad():
                model.model.layers[1].mlp.experts.down_proj[2] *= 1e9
        shunter.quantize(model, bits=8)
        receipt = write_gguf(model, tmp_path / f"{change}.gguf")
        kinds = {name: entry["type"] for name, entry in receipt["tensors"].items() if "_exps" in name}
        assert kinds["blk.1.ffn_down_exps.weight"] == "F32" and kinds["blk.1.ffn_gate_exps.weight"] == "Q8_0"
        experts = model.model.layers[1].mlp.experts.coded.weights(torch.float32)
        found = back(tmp_path / f"{change}.gguf", tmp_path / change).state_dict()[
            "model.layers.1.mlp.experts.down_proj"
        ]
        assert torch.equal(found, torch.stack([experts.down.matrix(e) for e in range(4)]))


def test_export_writes_a_file_of_shunters_own_model_quantised_or_not(tmp_path, capsys):
    sizes = {key: value for key, value in SIZES.items() if key != "num_experts_per_tok"}
    model = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=96, num_key_value_heads=2)).eval()
    shunter.sparsify(model, 4, "topk", top_k=2, hidden=96)
    ids = torch.randint(96, (2, 9))
    for bits in (None, 8):
        if bits:
            shunter.quantize(model, bits=bits)
        model.save_pretrained(tmp_path / f"own{bits}")
        file = tmp_path / f"m{bits}.gguf"
        assert main(["export", str(tmp_path / f"own{bits}"), "--out", str(file)]) == 0
        assert "Every weight is kept bit for bit" in capsys.readouterr().out
        receipt = json.loads((tmp_path / f"m{bits}.gguf.json").read_text())
        assert receipt["architecture"] == "llama" and receipt["check"]["rms_difference"] < 1e-4
        torch.testing.assert_close(logits(back(file, tmp_path / f"back{bits}"), ids), logits(model, ids))


@pytest.mark.parametrize(
    "family, change, message",
    [
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob=False"),
        ("olmoe", {"norm_topk_prob": True}, "norm_topk_prob=True"),
        ("olmoe", {"clip_qkv": 2.0}, "clip_qkv=2.0"),
        ("mixtral", {"sliding_window": 16}, "sliding_window=16"),
        ("qwen3_moe", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "1 dense layers"),
        ("qwen3_moe", {"attention_bias": True}, "no place for 'model.layers.0.self_attn.q_proj.bias'"),
        ("mixtral", {"dtype": torch.float64}, "float64"),
    ],
)
def test_what_a_file_cannot_say_is_refused(family, change, message, tmp_path):
    config = made(family).config
    dtype = change.get("dtype", torch.float32)
    for name, value in change.items():
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        write_gguf(model, tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def test_a_name_without_the_ending_is_refused(tmp_path, capsys):
    made("olmoe").save_pretrained(tmp_path / "m")
    for to, out in (("gguf", "x"), ("shunter", "x.gguf")):
        assert main(["export", str(tmp_path / "m"), "--out", str(tmp_path / out), "--to", to]) != 0
        assert "end in .gguf" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe"])
def test_llama_cpp_computes_the_same(family, tmp_path):
    """In float32 to rounding; of codes it rounds the tokens, too, to 8 bits. Only where llama-cpp-python is."""
    pytest.importorskip("llama_cpp")
    from shunter.benchmarks.llama_cpp import LlamaCpp

    model = made(family)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    ids = torch.randint(96, (2, 20))
    for bits, most in ((None, 1e-4), (8, 0.1)):
        if bits:
            shunter.quantize(model, bits=bits)
        write_gguf(model, tmp_path / f"{bits}.gguf")
        with LlamaCpp(tmp_path / f"{bits}.gguf", 2, 24, threads=1) as other:
            first = other.forward(ids[:, :16], everywhere=True)
            rest = [other.forward(ids[:, i : i + 1], past=i, everywhere=True) for i in range(16, 20)]
        found, expected = torch.cat([first, *rest], 1), logits(model, ids)
        off = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert off.median() < most  # a token whose experts are almost equally likely may go to others
