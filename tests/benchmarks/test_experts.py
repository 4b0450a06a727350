"""`shunter bench experts` runs whatever can run, says why the rest does not, and checks what it times."""

import json

import pytest
import torch

from shunter.benchmarks import experts
from shunter.benchmarks.experts import SHAPES, CannotRunError, Shape, _Case, _transformers, bench, markdown
from shunter.cli import main
from shunter.experts import Backend, register
from shunter.experts import choice as registry

TINY = Shape(40, 16, 8, 6, 2)
NAMES = {"dense", "auto", "reference", "padded"}


@pytest.fixture
def extra():
    """A backend that computes something else, and one that never runs."""
    register(Backend("twice", lambda x, w, r: 2 * registry.get("reference").run(x, w, r), lambda x, w: None, ""))
    register(Backend("never", registry.get("reference").run, lambda x, w: "it never runs", ""))
    yield
    for name in ("twice", "never"):
        registry._BACKENDS.pop(name)


def test_every_contestant_is_timed_checked_and_printed():
    found = json.loads(json.dumps(bench({"tiny": TINY}, ["float32"], ["reference", "padded"], rounds=1)))
    (case,) = found["cases"]
    assert set(case["results"]) == NAMES | {f"transformers {name}" for name in ("eager", "batched_mm", "grouped_mm")}
    for name, row in case["results"].items():
        assert row["ms"] > 0 and row["gflops"] > 0 and row["saved_bytes"] > 0, name
        assert name == "dense" or row["error"] < 1e-5, name
    page = markdown(found)
    assert all(f"\n| {name} | " in page for name in case["results"]) and torch.__version__ in page


def test_saved_bytes_are_what_the_graph_keeps():
    (case,) = bench({"tiny": TINY}, ["float32"], ["reference"], peers=[], rounds=1)["cases"]
    # The pre-activations (2 f), the activated gate and its product with the other half: 4 f numbers a token and choice.
    assert case["results"]["dense"]["saved_bytes"] == 4 * TINY.tokens * TINY.top_k * TINY.hidden * 4


def test_decode_is_timed_against_reading_the_weights():
    shape = Shape(3, 16, 8, 6, 2, backward=False)
    (case,) = bench({"decode": shape}, ["bfloat16"], ["reference"], rounds=1)["cases"]
    assert case["read_ms"] > 0 and case["results"]["auto"]["saved_bytes"] == 0


def test_what_cannot_run_is_named_with_the_reason(extra, monkeypatch):
    huge = Shape(64, 2**14, 2**14, 2, 1, backward=False)
    case = _Case(TINY, torch.float32, 0)
    case.shape = huge
    with pytest.raises(CannotRunError, match="it copies 192 GiB of weights"):
        _transformers(case, "batched_mm")
    monkeypatch.setattr(experts, "PEERS", ["no_such"])
    (case,) = bench({"tiny": TINY}, ["float32"], ["never"], peers=["no_such"], rounds=1)["cases"]
    assert "it never runs" in case["results"]["never"]["refused"]
    assert "no_such" in case["results"]["transformers no_such"]["refused"]


def test_a_wrong_backend_is_seen(extra):
    (case,) = bench({"tiny": TINY}, ["float32"], ["twice"], peers=[], rounds=1)["cases"]
    assert case["results"]["twice"]["error"] > 0.5


def test_flops_are_those_of_the_dense_layer():
    shape = SHAPES["S1"]
    forward = 2 * shape.tokens * shape.dim * 3 * shape.top_k * shape.hidden
    assert shape.flops == 3 * forward and SHAPES["S5"].flops == 6 * 16 * 8 * 1024 * 768


def test_the_command_writes_a_page_and_json(tmp_path, capsys):
    arguments = ["--shapes", "40,16,8,6,2", "--dtype", "float32", "--backends", "reference", "--rounds", "1"]
    assert main(["bench", "experts", *arguments, "--out", str(tmp_path)]) == 0
    assert (tmp_path / "bench-experts.md").read_text() == capsys.readouterr().out
    assert json.loads((tmp_path / "bench-experts.json").read_text())["cases"][0]["tokens"] == 40


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--shapes", "S9"], "shape 'S9' is neither of S1, S2"),
        (["--shapes", "4,4,4,2,3"], "with k at most E"),
        (["--dtype", "int8"], "'int8' is unknown; choose from float32, bfloat16"),
        (["--peers", "fast"], "'fast' is unknown; choose from eager, batched_mm, grouped_mm"),
        (["--backends", "fast"], "'fast' is unknown; choose from "),
        (["--rounds", "0"], "must be at least 1"),
    ],
)
def test_bad_input_ends_in_one_message(arguments, message, capsys):
    assert main(["bench", "experts", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_what_is_slow_is_timed_once():
    taken, ran = {"slow": [11.0, 99.0], "fast": [9.0, 1.0, 2.0, 3.0]}, []
    runs = {name: lambda name=name: ran.append(name) for name in taken}

    def stopwatch(run):
        run()
        return taken[ran[-1]].pop(0)

    assert experts._medians(runs, 3, stopwatch) == {"slow": 11.0, "fast": 2.0}
    assert ran.count("slow") == 1 and ran.count("fast") == 4
