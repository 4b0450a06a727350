"""Reading safetensors: flipped and missing bytes are seen, links stay inside."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import shunter
from shunter.errors import UserError
from shunter.hf.checkpoints.reading import Checkpoint
from tests.hf.checkpoints.damage import write_header


def test_the_hubs_cache_links_to_its_blobs(whole, tmp_path):
    blobs, snapshot = tmp_path / "models--a--b/blobs", tmp_path / "models--a--b/snapshots/0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(whole["dense"].iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    assert shunter.upcycle(snapshot, tmp_path / "out", check=False)["format"] == "mixtral"


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    which=st.sampled_from(["model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json"]),
    flips=st.lists(st.tuples(st.integers(0, 4000), st.integers(1, 255)), max_size=4),
    cut=st.one_of(st.none(), st.integers(0, 5000)),
)
def test_flipped_and_missing_bytes(which, flips, cut, whole, tmp_path):
    """Either a damage is seen, in one line, or what is read lies inside the files and the result is whole."""
    folder, out = tmp_path / "fuzz", tmp_path / "out"
    for path in (folder, out):
        shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(whole["dense"], folder)
    (folder / "model.safetensors").unlink()
    found = load_file(whole["dense"] / "model.safetensors")
    names = sorted(found)
    halves = [names[: len(names) // 2], names[len(names) // 2 :]]
    weight_map = {}
    for number, half in enumerate(halves, 1):
        shard = f"model-{number:05}-of-00002.safetensors"
        save_file({name: found[name] for name in half}, folder / shard, {"format": "pt"})
        weight_map |= dict.fromkeys(half, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    data = bytearray((folder / which).read_bytes())
    for place, flip in flips:
        data[place % len(data)] ^= flip
    (folder / which).write_bytes(bytes(data[: len(data) if cut is None else cut % (len(data) + 1)]))
    try:
        checkpoint = Checkpoint(folder)
        for stored in checkpoint.tensors.values():
            assert stored.file.parent == folder and stored.start + stored.nbytes <= stored.file.stat().st_size
        shunter.upcycle(folder, out, 2, check=False)
    except ValueError as error:
        assert len(str(error).splitlines()) == 1
        assert sorted(file.name for file in tmp_path.iterdir()) == ["fuzz"]
    else:
        assert len(Checkpoint(out).tensors) > len(names)


@pytest.mark.parametrize("field", ["dtype", "shape", "data_offsets"])
@pytest.mark.parametrize("lie", [[], {}, [[0]], None, True, 2**70, "../F32", float("nan")], ids=repr)
def test_fields_of_a_tensor_that_are_something_else_are_one_line(field, lie, tmp_path):
    header = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], field: lie}}
    write_header(tmp_path / "model.safetensors", header, bytes(8))
    with pytest.raises(UserError, match="model.safetensors: .*") as error:
        Checkpoint(tmp_path)
    assert "\n" not in str(error.value)
