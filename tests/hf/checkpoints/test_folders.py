"""Broken and hostile model folders: one clear line and exit code 2, no code run, nothing half-written."""

import json
import pickle
import shutil
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPTNeoConfig, GPTNeoForCausalLM

import shunter
from shunter.cli import main
from shunter.errors import UserError
from shunter.hf.checkpoints import folders
from shunter.hf.checkpoints.folders import load_tokenizer
from shunter.hf.checkpoints.loading import load_folder
from shunter.recipes.config import dump_config
from shunter.recipes.text import TextConfig
from tests.hf.checkpoints.damage import DAMAGE, HOSTILE, OTHER, SPARSE, Evil, config


def command(verb, folder, out):
    """The arguments of a verb, and the folder that it reads."""
    return {
        "upcycle": ["upcycle", str(folder), "--out", str(out)],
        "export": ["export", str(folder), "--out", str(out)],
        "export native": ["export", str(folder), "--out", str(out)],
        "inspect": ["inspect", str(folder), "--out", str(out)],
        "inspect native": ["inspect", str(folder), "--out", str(out)],
        "generate": ["generate", str(folder.parent)],
        "generate dense": ["generate", str(folder.parent), "--model", "dense"],
        "eval": ["eval", str(folder.parent)],
    }[verb]


KIND = {
    "upcycle": "dense",
    "export": "sparse",
    "export native": "native",
    "inspect": "sparse",
    "inspect native": "native",
    "generate": "sparse",
    "generate dense": "dense",
    "eval": "dense",
}
# Generation and evaluation read a folder by the same function as inspection.
FEW = ["truncated", "pickles only", "NaN", "missing tensor", "no config", "remote code"]
CASES = [(verb, damage) for verb in KIND for damage in (FEW if verb in ("eval", "generate dense") else DAMAGE)]
CASES += [(verb, damage) for verb, kind in KIND.items() if kind == "sparse" for damage in SPARSE]
CASES += [("inspect", damage) for damage in OTHER]


@pytest.mark.parametrize("verb, damage", CASES)
def test_one_clear_line(verb, damage, whole, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asked whether to run code"))
    kind, marker = KIND[verb], tmp_path / "marker"
    folder = tmp_path / "run" / kind
    shutil.copytree(whole[kind], folder)
    (tmp_path / "run" / "config.yaml").write_text(dump_config(TextConfig()))
    (DAMAGE | SPARSE | OTHER)[damage](folder, marker)
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    assert main(command(verb, folder, tmp_path / "out")) == 2
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"shunter {verb.split()[0]}: ") and not said.out, said.err
    assert str(tmp_path) in lines[0] and "report this" not in lines[0]
    assert sorted(tmp_path.rglob("*")) == before and not marker.exists()


@pytest.mark.parametrize("verb", ["upcycle", "export", "inspect native"])
@pytest.mark.parametrize("damage", HOSTILE)
def test_hostile_folders_cost_little(damage, verb, whole, tmp_path, capsys):
    """Memory stays below that of the files and 256 MB; nothing blocks, and nothing outside of the folder is read."""
    folder = tmp_path / "run" / KIND[verb]
    shutil.copytree(whole[KIND[verb]], folder)
    HOSTILE[damage](folder, tmp_path / "marker")
    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    capsys.readouterr()
    tracemalloc.start()
    code = main(command(verb, folder, tmp_path / "out"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    said = capsys.readouterr()
    assert code == 2 and len(said.err.splitlines()) == 1 and str(folder) in said.err and not said.out, said.err
    assert peak < size + 256_000_000
    assert not (tmp_path / "out").exists()


def tokenizer_of(**changes):
    """A tokenizer.json of one word, changed."""
    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    found = {"version": "1.0", "added_tokens": [], "model": model | changes.pop("model", {})}
    return json.dumps(found | changes)


MOST, MANY = 1000, range(1001)  # of tokens; a thousand times as many in earnest
GROW = {"type": "Replace", "pattern": {"String": "e"}, "content": "e" * 2000}
ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
BOUNDED = {
    "too many words": tokenizer_of(model={"vocab": {f"w{i}": i for i in MANY}}),
    "three million values": tokenizer_of(nothing=[[]] * 1_500_000),
    "too many pieces": tokenizer_of(model={"type": "Unigram", "unk_id": 0, "vocab": [["a", 0]] * len(MANY)}),
    "many added tokens": tokenizer_of(added_tokens=[{"id": i, "content": f"<{i}>", **ADDED} for i in range(1, 20_002)]),
    "replacements that grow": tokenizer_of(normalizer={"type": "Sequence", "normalizers": [GROW] * 3}),
    "a decoder that grows": tokenizer_of(decoder={"type": "Sequence", "decoders": [GROW] * 4}),
}


@pytest.mark.parametrize("damage", [*BOUNDED, "a long vocabulary", "a long sentencepiece", "many special tokens"])
def test_tokenizers_of_others_cost_little(damage, whole, tmp_path, monkeypatch):
    """What makes the libraries work for long, or ends the process for want of memory, is refused before them."""
    monkeypatch.setattr(folders, "_MOST_TOKENS", MOST)
    monkeypatch.setattr(folders, "_LARGEST_TOKENIZER", 2**14)
    shutil.copytree(whole["native"], tmp_path / "native")
    name, content = {
        "a long vocabulary": ("vocab.txt", "a\n" * len(MANY)),
        "a long sentencepiece": ("tokenizer.model", "a" * (2**14 + 1)),
        "many special tokens": ("tokenizer_config.json", json.dumps({"extra_special_tokens": ["x"] * 20_001})),
    }.get(damage) or ("tokenizer.json", BOUNDED[damage])
    (tmp_path / "native" / name).write_text(content)
    with pytest.raises(UserError, match=f"{name}: .* at most|{name}: is larger"):
        load_tokenizer(tmp_path / "native")


@pytest.mark.parametrize("name", [None, "added_tokens.json", "special_tokens_map.json", "tokenizer_config.json"])
def test_a_tokenizer_is_transformers_own_and_parsed_once(name, whole, tmp_path, monkeypatch):
    """Added tokens stand in tokenizer.json alone, or in a further file: then it is all left to transformers."""
    folder = tmp_path / "native"
    shutil.copytree(whole["native"], folder)
    raw, config = (json.loads((folder / f).read_text()) for f in ("tokenizer.json", "tokenizer_config.json"))
    raw["added_tokens"] = [
        {"id": len(raw["model"]["vocab"]) + i, "content": f"<{i}>", **ADDED, "special": i < 2} for i in range(4)
    ]
    config |= {"eos_token": "<0>", "pad_token": "<1>", "tokenizer_class": "GPT2Tokenizer"}
    token = raw["added_tokens"][3]
    if name == "tokenizer_config.json":
        config["added_tokens_decoder"] = {str(token["id"]): {"content": token["content"], **ADDED}}
    elif name is not None:
        more = {"added_tokens.json": {"<3>": token["id"]}, "special_tokens_map.json": {"bos_token": "<3>"}}[name]
        (folder / name).write_text(json.dumps(more))
    for file, content in (("tokenizer.json", raw), ("tokenizer_config.json", config)):
        (folder / file).write_text(json.dumps(content))
    theirs = AutoTokenizer.from_pretrained(folder)
    parsed, load = [], json.load
    monkeypatch.setattr(json, "load", lambda stream, **given: parsed.append(stream.name) or load(stream, **given))
    ours = load_tokenizer(folder)
    count = sum(Path(file).name == "tokenizer.json" for file in parsed)
    assert count <= 1 or name in ("added_tokens.json", "special_tokens_map.json")
    text = "some text<0> and <1><2> more<3>"
    assert ours(text).input_ids == theirs(text).input_ids
    assert ours.added_tokens_decoder == theirs.added_tokens_decoder
    for part, tokenizer in (("ours", ours), ("theirs", theirs)):
        tokenizer.save_pretrained(tmp_path / part)
    for file in (tmp_path / "theirs").iterdir():
        assert (tmp_path / "ours" / file.name).read_bytes() == file.read_bytes()


def test_how_long_texts_may_be_is_not_the_tokenizers(whole, tmp_path):
    """Files of models for whole sentences have a length that texts are cut and padded to."""
    folder = tmp_path / "native"
    shutil.copytree(whole["native"], folder)
    tokenizer = load_tokenizer(folder)
    text = "some text of more tokens than eight " * 3
    expected = tokenizer.backend_tokenizer.encode(text).ids
    tokenizer.backend_tokenizer.enable_padding(length=500)
    tokenizer.backend_tokenizer.enable_truncation(8)
    tokenizer.save_pretrained(folder)
    assert '"max_length":8' in (folder / "tokenizer.json").read_text().replace(" ", "")
    assert load_tokenizer(folder).backend_tokenizer.encode(text).ids == expected


def test_products_of_sizes_cost_nothing(whole, tmp_path):
    """Each size is one that a model may have, and no tensor of the folder is as large as their product."""
    for kind in ("sparse", "native", "dense"):
        shutil.copytree(whole[kind], tmp_path / kind)
        config(head_dim=2**14, num_attention_heads=2**14, num_key_value_heads=2**14)(tmp_path / kind, None)
        with pytest.raises(ValueError, match=str(tmp_path / kind)):
            load_folder(tmp_path / kind)


def test_tables_that_no_file_holds_cost_nothing(tmp_path):
    """A mask of all pairs of places is a gigabyte, where the vectors of the places are two megabytes."""
    places, sizes = 2**15, {"hidden_size": 8, "num_heads": 2, "vocab_size": 16, "max_position_embeddings": 8}
    GPTNeoForCausalLM(GPTNeoConfig(**sizes, attention_types=[[["global"], 1]], num_layers=1)).save_pretrained(tmp_path)
    load_folder(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["transformer.wpe.weight"] = torch.zeros(places, 8)
    save_file(weights, tmp_path / "model.safetensors")
    config(max_position_embeddings=places)(tmp_path, None)
    for use in (load_folder, lambda folder: shunter.upcycle(folder, tmp_path / "out", num_experts=2)):
        with pytest.raises(UserError, match="asks for tables of 1,073,741,824 bytes beside"):
            use(tmp_path)


TOKENIZERS = {
    "deep": "[" * 10**6,
    "a negative id": json.dumps(
        {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": -1}, "unk_token": "a"}}
    ),
    "no word for what is unknown": json.dumps({"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0}}}),
    "merges of nothing": json.dumps({"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["x y"]}}),
}


@pytest.mark.parametrize("damage", TOKENIZERS)
def test_tokenizers_that_lie_are_one_line(damage, whole, tmp_path, capsys):
    shutil.copytree(whole["native"], tmp_path / "native")
    (tmp_path / "native/tokenizer.json").write_text(TOKENIZERS[damage])
    capsys.readouterr()
    assert main(command("inspect native", tmp_path / "native", tmp_path / "out")) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and str(tmp_path) in said
    assert "no tokenizer can be loaded" in said or "tokenizer.json: cannot be read as JSON" in said


def test_names_with_control_characters_are_escaped_on_a_terminal(whole, tmp_path, capsys):
    folder = tmp_path / "evil\x1b]0;title\x07\n\u202e"
    shutil.copytree(whole["dense"], folder)
    DAMAGE["truncated"](folder, tmp_path / "marker")
    capsys.readouterr()
    assert main(["upcycle", str(folder), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and said.rstrip("\n").isprintable()
    assert "evil\\x1b]0;title\\x07\\n\\u202e" in said


def test_pickles_and_code_beside_sound_weights_are_left_alone(whole, tmp_path):
    """Models that transformers has itself often name code for older versions; it is neither run nor handed on."""
    marker = tmp_path / "marker"
    for kind, use in (("dense", shunter.upcycle), ("sparse", shunter.export)):
        folder = tmp_path / kind
        shutil.copytree(whole[kind], folder)
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(marker)))
        (folder / "modeling_evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
        config(auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})(folder, marker)
        for to in ("shunter", "auto") if kind == "dense" else ("auto",):
            use(folder, tmp_path / f"{kind}-{to}", to=to)
            assert "auto_map" not in json.loads((tmp_path / f"{kind}-{to}/config.json").read_text())
            assert not list((tmp_path / f"{kind}-{to}").glob("*.[bp][iy]*"))
    shunter.from_pretrained(str(tmp_path / "sparse"))
    assert not marker.exists()
