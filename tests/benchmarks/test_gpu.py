"""`shunter bench gpu` but for the GPU: its checks, its arithmetic and its page, with the CPU as the device."""

import json

import pytest
import torch

from shunter.benchmarks import gpu
from shunter.benchmarks.experts import Shape
from shunter.benchmarks.gpu import GOALS, SHAPES, bench, markdown, right
from shunter.cli import main
from shunter.experts import Backend, register
from shunter.experts import choice as backends

TINY = Shape(40, 16, 8, 6, 2)


@pytest.fixture
def extra():
    """A backend that forgets the weights of a few triples, one that breaks and one that never runs."""
    reference = backends.get("reference").run

    def forgetful(x, weights, routing, recompute=False):
        return reference(x, weights, routing.with_weight(routing.weight * (routing.expert != 3)))

    def broken(x, weights, routing, recompute=False):
        raise RuntimeError("out of shared memory\nmore")

    register(Backend("forgetful", forgetful, lambda x, w: None, ""))
    register(Backend("broken", broken, lambda x, w: None, ""))
    register(Backend("never", reference, lambda x, w: "it never runs", ""))
    yield
    for name in ("forgetful", "broken", "never"):
        backends._BACKENDS.pop(name)


def _bench(names, name="tiny"):
    return json.loads(json.dumps(bench({name: TINY}, ["bfloat16"], names, rounds=1, device="cpu")))


def test_every_contestant_is_checked_timed_and_printed():
    found = _bench(["padded", "grouped_mm"])
    (case,) = found["cases"]
    assert set(case["results"]) == {"dense", "padded", "grouped_mm"} and right(found)
    for name, row in case["results"].items():
        forward, both = row["forward"], row["both"]
        assert both["tflops"] * both["ms"] == pytest.approx(3 * forward["tflops"] * forward["ms"])
        assert forward["tflops"] * forward["ms"] == pytest.approx(6 * 40 * 2 * 16 * 8 / 1e9)
        assert both["share"] == pytest.approx(case["results"]["dense"]["both"]["ms"] / both["ms"])
        if name != "dense":
            errors = row["errors"]["0.001"]
            assert set(errors) == {"y", "x", "weight", "up", "down"} and row["right"]
            assert all(0 < ours < 0.1 for ours, _ in errors.values())
    page = markdown(found)
    assert all(f"\n| {name} | " in page for name in case["results"]) and torch.__version__ in page


def test_a_wrong_backend_is_seen_and_one_that_cannot_run_says_why(extra):
    found = _bench(["forgetful", "broken", "never"])
    results = found["cases"][0]["results"]
    assert not results["forgetful"]["right"] and not right(found) and "| NO |" in markdown(found)
    assert results["broken"]["refused"] == "out of shared memory" and "it never runs" in results["never"]["refused"]
    assert "| never | backend 'never' cannot run this: it never runs |" in markdown(found)


def test_goals_are_told_on_the_device_that_they_are_for():
    found = _bench(["padded"], "qwen3-30B")
    case = found["cases"][0]
    case["results"]["triton"] = case["results"].pop("padded")
    assert "must" not in markdown(found)
    found["machine"]["gpu"] = {"name": "NVIDIA H100 80GB HBM3", "cuda": "13.0"}
    case["results"]["triton"]["forward"]["tflops"], case["results"]["triton"]["both"]["tflops"] = 441.0, 389.0
    page = markdown(found)
    assert "must: 340 forward, 270 both ways: reached" in page and "aim: 440 forward, 390 both ways: missed" in page


def test_the_shapes_of_one_model_are_equal_in_flops():
    sizes = {}
    for name, shape in SHAPES.items():
        sizes.setdefault(name.split("-")[0], set()).add(shape.flops)
    assert all(len(flops) == 1 for flops in sizes.values()) and set(GOALS) <= set(SHAPES)


def test_without_a_gpu_the_command_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "gpu"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "shunter bench: bench gpu needs an NVIDIA GPU" in line


def test_a_wrong_result_is_the_exit_code(tmp_path, monkeypatch, capsys, extra):
    monkeypatch.setattr(gpu, "bench", lambda shapes, dtypes, names, **_: _bench(names))
    assert main(["bench", "gpu", "--shapes", "40,16,8,6,2", "--backends", "padded", "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "bench-gpu.json").read_text())["cases"] and (tmp_path / "bench-gpu.md").exists()
    assert main(["bench", "gpu", "--backends", "forgetful"]) == 1
    assert main(["bench", "gpu", "--shapes", "S1"]) == 2
    assert "neither of 1.4B-256, " in capsys.readouterr().err
