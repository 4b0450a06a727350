"""Writing: shards, and what stands beside the weights."""

import json
import shutil

import pytest

import shunter
from tests.hf.checkpoints.models import (
    batch_for,
    load,
    logits,
    relative,
    save_tokenizer,
)


def test_companions_that_are_links_to_elsewhere_are_not_copied(whole, tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    shutil.copytree(whole["dense"], tmp_path / "dense")
    (tmp_path / "dense/vocab.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(ValueError, match="outside"):
        shunter.upcycle(tmp_path / "dense", tmp_path / "out", check=False)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["dense", "secret.txt"]


def test_shards_in_and_out(dense, inputs, tmp_path):
    folder, model = dense(max_shard_size="20kB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    shunter.upcycle(folder, tmp_path / "out", max_shard_bytes=30_000)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3 and set(index["weight_map"].values()) == {file.name for file in files}
    batch = batch_for(inputs, "llama")
    assert relative(logits(load(tmp_path / "out"), batch), logits(model, batch)) < 1e-5


def test_what_stands_beside_the_weights_comes_along_but_no_code(dense, tmp_path):
    folder, _ = dense()
    save_tokenizer(folder)
    for name in ("LICENSE", "modeling_evil.py", "training_args.bin", "optimizer.pt"):
        (folder / name).write_text("x")
    shunter.upcycle(folder, tmp_path / "out", check=False)
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE"} < names
    assert not names & {"modeling_evil.py", "training_args.bin", "optimizer.pt"}
