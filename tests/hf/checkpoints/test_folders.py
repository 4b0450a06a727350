"""Broken and hostile model folders: one clear line and exit code 2, no code run, nothing half-written."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import shunter
from shunter.cli import main
from shunter.hf.checkpoints.reading import Checkpoint
from shunter.recipes.config import save_config
from shunter.recipes.sections import TextConfig
from tests.hf.checkpoints.test_upcycling import save_tokenizer
from tests.hf.conftest import BUILD
from tests.hf.families import build


class Evil:
    """Unpickled, it makes a file."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


def header_of(file):
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_header(file, header, data):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


def tensors(change):
    """A damage that changes the tensors of model.safetensors."""

    def damage(folder, marker):
        found = load_file(folder / "model.safetensors")
        change(found, next(name for name in found if name.endswith("embed_tokens.weight")))
        save_file(found, folder / "model.safetensors", {"format": "pt"})

    return damage


def config(**changes):
    def damage(folder, marker):
        found = json.loads((folder / "config.json").read_text()) | changes
        kept = {name: value for name, value in found.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(kept))

    return damage


def index_to(where):
    """Weights that an index places elsewhere, where they lie indeed."""

    def damage(folder, marker):
        file = folder / "model.safetensors"
        names = list(load_file(file))
        outside = marker.parent / "outside.safetensors"
        file.rename(outside)
        target = {"relative": "../outside.safetensors", "absolute": str(outside), "link": "link.safetensors"}[where]
        if where == "link":
            (folder / target).symlink_to(outside)
        weight_map = dict.fromkeys(names, target)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    return damage


def linked(folder, marker):
    outside = marker.parent / "outside.safetensors"
    (folder / "model.safetensors").rename(outside)
    (folder / "model.safetensors").symlink_to(outside)


def pickled(folder, marker):
    (folder / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.pt"):
        (folder / name).write_bytes(pickle.dumps(Evil(marker)))


def remote_code(folder, marker):
    (folder / "modeling_evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    names = {"AutoConfig": "modeling_evil.EvilConfig", "AutoModelForCausalLM": "modeling_evil.Evil"}
    config(model_type="evil", auto_map=names)(folder, marker)


def short(folder, marker):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def header(change):
    def damage(folder, marker):
        file = folder / "model.safetensors"
        write_header(file, *change(*header_of(file)))

    return damage


def overlapping(found, data):
    names = [name for name in found if name != "__metadata__"]
    found[names[0]]["data_offsets"] = found[names[1]]["data_offsets"]
    return found, data


def text(name, content):
    def damage(folder, marker):
        (folder / name).write_text(content)

    return damage


def without(name):
    def damage(folder, marker):
        (folder / name).unlink()

    return damage


DAMAGE = {
    "huge header": lambda folder, marker: (folder / "model.safetensors").write_bytes(b"\xff" * 8 + b"{}"),
    "empty file": lambda folder, marker: (folder / "model.safetensors").write_bytes(b""),
    "header not JSON": header(lambda found, data: (b"{{{{", data)),
    "deep header": header(lambda found, data: (b"[" * 100_000, data)),
    "overlapping tensors": header(overlapping),
    "truncated": short,
    "index up": index_to("relative"),
    "index absolute": index_to("absolute"),
    "index to a link": index_to("link"),
    "link": linked,
    "pickles only": pickled,
    "wrong shape": tensors(lambda found, name: found.update({name: found[name][:-1].clone()})),
    "NaN": tensors(lambda found, name: found[name][0].fill_(float("nan"))),
    "missing tensor": tensors(lambda found, name: found.pop(name)),
    "extra tensor": tensors(lambda found, name: found.update({"model.layers.0.evil": torch.zeros(3)})),
    "no config": without("config.json"),
    "config not JSON": text("config.json", "{'a': 1"),
    "config a list": text("config.json", "[]"),
    "unknown model": config(model_type="evil"),
    "no model type": config(model_type=None),
    "no architecture": config(architectures=None),
    "unknown architecture": config(architectures=["EvilForCausalLM"]),
    "architecture a number": config(architectures=[3]),
    "a module as architecture": config(architectures=["os"]),
    "absurd size": config(hidden_size=10**12),
    "absurd layers": config(num_hidden_layers=10**6),
    "negative size": config(num_attention_heads=-4),
    "text for a number": config(hidden_size="many"),
    "remote code": remote_code,
}
SPARSE = {
    "spec not an object": config(shunter=3),
    "spec absurd": config(shunter={"num_experts": -1, "router": "topk"}),
    "spec of unknown words": config(shunter={"num_experts": 4, "router": "topk", "evil": 1}),
    "spec of an unknown layout": config(shunter={"num_experts": 4, "router": "topk", "layout": "(d, f, E)"}),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """kind -> a sound folder: dense, sparse (Shunter's format), native."""
    root = tmp_path_factory.mktemp("whole")
    models = {
        "dense": BUILD["llama"](),
        "sparse": shunter.sparsify(BUILD["llama"](), 4, "topk"),
        "native": build("mixtral"),
    }
    for kind, model in models.items():
        model.save_pretrained(root / kind)
        save_tokenizer(root / kind)
    return {kind: root / kind for kind in models}


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


@pytest.mark.parametrize("verb, damage", CASES)
def test_one_clear_line(verb, damage, whole, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asked whether to run code"))
    kind, marker = KIND[verb], tmp_path / "marker"
    folder = tmp_path / "run" / kind
    shutil.copytree(whole[kind], folder)
    save_config(TextConfig(), tmp_path / "run" / "config.yaml")
    (DAMAGE | SPARSE)[damage](folder, marker)
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    assert main(command(verb, folder, tmp_path / "out")) == 2
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"shunter {verb.split()[0]}: ") and not said.out, said.err
    assert str(tmp_path) in lines[0] and "report this" not in lines[0]
    assert sorted(tmp_path.rglob("*")) == before and not marker.exists()


@pytest.mark.parametrize("damage", [name for name in DAMAGE | SPARSE if name != "NaN"])
def test_from_pretrained_says_it_too(damage, whole, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asked whether to run code"))
    folder = tmp_path / "sparse"
    shutil.copytree(whole["sparse"], folder)
    (DAMAGE | SPARSE)[damage](folder, tmp_path / "marker")
    with pytest.raises(ValueError) as caught:
        shunter.from_pretrained(str(folder))
    assert str(folder) in str(caught.value) and len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "marker").exists()


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


def test_companions_that_are_links_to_elsewhere_are_not_copied(whole, tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    shutil.copytree(whole["dense"], tmp_path / "dense")
    (tmp_path / "dense/vocab.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(ValueError, match="outside its folder"):
        shunter.upcycle(tmp_path / "dense", tmp_path / "out", check=False)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["dense", "secret.txt"]


def test_the_hubs_cache_links_to_its_blobs(whole, tmp_path):
    blobs, snapshot = tmp_path / "models--a--b/blobs", tmp_path / "models--a--b/snapshots/0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(whole["dense"].iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    assert shunter.upcycle(snapshot, tmp_path / "out", check=False)["format"] == "mixtral"


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
