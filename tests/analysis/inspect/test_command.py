"""shunter inspect: a page and its numbers from folders of models; every broken input is one line."""

import json
import math
import os
import re
import signal

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralForCausalLM

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

import shunter
from shunter.analysis.inspect import inspecting as room
from shunter.analysis.inspect import recording
from tests.analysis.inspect.subjects import LM, Page, mixtral, run_inspect, saved, sparse, vit


@pytest.mark.parametrize("whose", ["theirs", "ours"])
def test_the_verb_on_folders_of_transformers_and_of_shunter(request, capsys, tmp_path, text_file, whose):
    if whose == "theirs":
        request.getfixturevalue("undrawn")
    model = mixtral(num_hidden_layers=1) if whose == "theirs" else sparse("topk", top_k=2).model
    folder, out = saved(tmp_path / whose, model), tmp_path / "report"
    code, printed = run_inspect(
        capsys, folder, "--data", text_file, "--out", out, "--tokens", 1500, "--length", 32, "--ablate", 3, "--json"
    )
    assert code == 0, printed.err
    findings = json.loads((out / "inspect.json").read_text())
    assert json.loads(printed.out) == findings and findings["complete"]
    text = (out / "inspect.html").read_text()
    page = Page(text)
    assert page.open == [] and "script" not in page.tags
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.links)
    assert "49" not in re.findall(r"\{\{ 7 \* 7 \}\}|>49<", text)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u202a-\u202e\u2066-\u2069]", text)
    assert text.count("<svg") > 8


@pytest.mark.usefixtures("undrawn")
def test_before_and_after_on_the_command_line(capsys, tmp_path, text_file):
    before, after = saved(tmp_path / "before", mixtral()), tmp_path / "after"
    model = MixtralForCausalLM.from_pretrained(before)
    with torch.no_grad():
        for parameter in model.model.layers[0].parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    saved(after, model)
    code, printed = run_inspect(
        capsys,
        before,
        after,
        "--data",
        text_file,
        "--out",
        tmp_path / "r",
        "--tokens",
        600,
        "--length",
        32,
        "--ablate",
        0,
    )
    assert code == 0, printed.err
    findings = json.loads((tmp_path / "r" / "inspect.json").read_text())
    assert (findings["comparison"]["before"], findings["comparison"]["after"]) == ("before", "after")
    first, second = findings["comparison"]["layers"].values()
    assert min(first["weights_moved"]) > 0 and max(second["weights_moved"]) == 0


@pytest.mark.usefixtures("undrawn")
def test_ctrl_c_on_the_command_line_leaves_a_report_and_exit_code_130(monkeypatch, capsys, tmp_path, text_file):
    """Two signals as the terminal sends them: one during the forwards, one while experts are removed."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as Python has it, whatever ran before
    folder = saved(tmp_path / "model", mixtral(num_hidden_layers=1))
    capsys.readouterr()
    arguments = ["--data", text_file, "--out", tmp_path / "r", "--tokens", 4000, "--length", 32]
    for name in ("batch_losses", "ablate"):
        where = room if name == "ablate" else recording
        inner, calls = getattr(where, name), []

        def interrupted(*args, inner=inner, calls=calls):
            calls.append(1)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGINT)
            return inner(*args)

        with monkeypatch.context() as patched:
            patched.setattr(where, name, interrupted)
            code, printed = run_inspect(capsys, folder, *arguments)
        assert code == 130 and "Report: " in printed.err and "Traceback" not in printed.err
        findings = json.loads((tmp_path / "r" / "inspect.json").read_text())
        assert not findings["complete"] and "Stopped early" in (tmp_path / "r" / "inspect.html").read_text()
        [layer] = findings["models"][0]["layers"].values()
        if name == "ablate":
            assert sum(row is not None for row in layer["ablation"]) == 1
        else:
            assert findings["models"][0]["targets"] < 1000 and layer["ablation"] is None


def _broken(kind, tmp_path):
    folder = tmp_path / "model"
    if kind == "missing folder":
        return [folder]
    if kind == "no config":
        folder.mkdir()
        return [folder]
    if kind == "dense":
        return [saved(folder, LlamaForCausalLM(LlamaConfig(**LM)))]
    saved(folder, mixtral())
    weights = folder / "model.safetensors"
    if kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif kind == "bad header":
        weights.write_bytes(b"\xff" * 64)
    elif kind == "pickle":
        weights.unlink()
        torch.save({}, folder / "pytorch_model.bin")
    elif kind == "weights missing":
        from safetensors.torch import load_file, save_file

        tensors = load_file(weights)
        save_file({n: t for n, t in tensors.items() if "layers.1" not in n}, weights, {"format": "pt"})
    elif kind in ("index outside", "shard missing"):
        from safetensors import safe_open

        outside = weights.rename(tmp_path / "elsewhere.safetensors")
        shard = "../elsewhere.safetensors" if kind == "index outside" else "gone.safetensors"
        with safe_open(outside, "pt") as file:
            index = {"metadata": {}, "weight_map": dict.fromkeys(file.keys(), shard)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif kind == "wrong shapes":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    elif kind == "unknown architecture":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"architectures": ["NoSuchForCausalLM"]}))
    elif kind == "remote code":
        config = json.loads((folder / "config.json").read_text())
        changes = {"model_type": "mine", "auto_map": {"AutoConfig": "evil.Config"}}
        (folder / "config.json").write_text(json.dumps(config | changes))
        (folder / "evil.py").write_text("raise SystemExit('the code ran')")
    elif kind == "config is a list":
        (folder / "config.json").write_text("[]")
    elif kind == "no tokenizer":
        for file in folder.glob("tokenizer*"):
            file.unlink()
    elif kind == "unlike":
        return [folder, saved(tmp_path / "other", mixtral(num_local_experts=2))]
    elif kind == "other words":
        other = saved(tmp_path / "other", mixtral())
        tokenizer = json.loads((other / "tokenizer.json").read_text())
        words = tokenizer["model"]["vocab"]
        words["a"], words["b"] = words["b"], words["a"]
        (other / "tokenizer.json").write_text(json.dumps(tokenizer))
        return [folder, other]
    elif kind == "three":
        return [folder] * 3
    return [folder]


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("missing folder", "no such folder"),
        ("no config", "holds no config.json"),
        ("dense", "has no mixture-of-experts layer"),
        ("truncated", "is truncated or damaged"),
        ("bad header", "is truncated or not a safetensors file"),
        ("pickle", "is a pickle, which can run code"),
        ("index outside", "a shard is a .safetensors file in the same folder"),
        ("shard missing", "names gone.safetensors, which is missing"),
        ("wrong shapes", "cannot be loaded"),
        ("weights missing", "tensors are missing, such as 'model.layers.1."),
        ("unknown architecture", "names the architecture 'NoSuchForCausalLM', which transformers does not have"),
        ("remote code", "config.json: transformers cannot use it"),
        ("config is a list", "config.json: must hold a JSON object, not a list"),
        ("no tokenizer", "no tokenizer can be loaded"),
        ("unlike", "do not have the same layers of experts"),
        ("other words", "differ: token"),
        ("three", "3 models are given"),
    ],
)
def test_a_broken_model_is_one_line_and_nothing_is_written(capsys, tmp_path, text_file, kind, says):
    models = _broken(kind, tmp_path)
    capsys.readouterr()
    code, printed = run_inspect(capsys, *models, "--data", text_file, "--out", tmp_path / "r", "--tokens", 600)
    line = printed.err.strip().splitlines()[-1]
    assert code == 2 and line.startswith("shunter inspect: ") and says in line
    assert "Traceback" not in printed.err
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("content", "options", "says"),
    [
        (None, [], "no such file or folder"),
        ("", [], "holds no text"),
        ("  \n\n ", [], "the data hold no text"),
        ("a", [], "too short"),
        ("some text", ["--tokens", "0"], "--tokens 0 must be at least"),
        ("some text", ["--length", "1"], "--length 1 must be at least"),
        ("some text", ["--ablate", "-1"], "--ablate -1 must be at least"),
    ],
)
def test_bad_data_are_one_line(capsys, tmp_path, content, options, says):
    folder = saved(tmp_path / "model", mixtral())
    file = tmp_path / "data.txt"
    if content is not None:
        file.write_text(content)
    capsys.readouterr()
    code, printed = run_inspect(capsys, folder, "--data", file, "--out", tmp_path / "r", *options)
    line = printed.err.strip().splitlines()[-1]
    assert code == 2 and line.startswith("shunter inspect: ") and says in line
    assert not (tmp_path / "r").exists()


@pytest.mark.usefixtures("undrawn")
def test_patches_of_a_vision_transformer(capsys, tmp_path):
    model, images = vit(tmp_path)
    shunter.sparsify(model, 2, "topk", top_k=1)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    code, printed = run_inspect(capsys, folder, "--data", images, "--out", tmp_path / "r", "--ablate", 4)
    assert code == 0, printed.err
    findings = json.loads((tmp_path / "r" / "inspect.json").read_text())
    found = findings["models"][0]
    assert findings["data"] == {
        "kind": "images",
        "tokens": 12 * 16,
        "window": 16,
        "domains": {"dark": 96, "light": 96},
        "languages": {},
    }
    assert found["targets"] == 12 and math.isfinite(found["loss"])
    for layer in found["layers"].values():
        assert layer["tokens"] == 12 * 17
        for patches in layer["patches"]:
            assert all(0 <= image < 12 and 0 <= patch < 16 for image, patch, _ in patches)
            weights = [weight for _, _, weight in patches]
            assert weights == sorted(weights, reverse=True)
    page = Page((tmp_path / "r" / "inspect.html").read_text())
    sheets = [layer for layer in found["layers"].values() for patches in layer["patches"] if patches]
    assert page.tags.count("img") == len(sheets)


def test_images_are_asked_for_and_read_or_refused(capsys, tmp_path):
    model, images = vit(tmp_path)
    shunter.sparsify(model, 2, "topk", top_k=1)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    empty = tmp_path / "empty"
    empty.mkdir()
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "x.png").write_bytes(b"no image")
    for data, says in ((None, "this model sees images"), (empty, "no file ends in"), (bad, "not an image")):
        capsys.readouterr()
        code, printed = run_inspect(capsys, folder, *(["--data", data] if data else []), "--out", tmp_path / "r")
        assert code == 2 and says in printed.err and "Traceback" not in printed.err
    assert not (tmp_path / "r").exists()
