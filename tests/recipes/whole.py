"""What every recipe must do: train, stop, go on to the same bits, evaluate to the same numbers, and leave a page."""

import json

import pytest

from shunter.analysis.runs import Metrics, read_run
from shunter.cli import main
from shunter.training import loop
from tests.recipes.browser import complaints


def outcome(run):
    """All that must be the same bits, whether a run was stopped or not."""
    weights = [(run / which / "model.safetensors").read_bytes() for which in ("dense", "sparse")]
    lines = [{k: v for k, v in line.items() if k != "seconds"} for line in Metrics(run / "metrics.jsonl").lines()]
    shown = [(run / name).read_bytes() for name in ("exhibits.json", "specialisation.json") if (run / name).exists()]
    return weights, lines, shown


def whole(recipe, settings, folder, capsys):
    """Train one run straight and one that stops in its sparse model at step 2; returns the straight one's folder."""
    straight, stopped = folder / "straight", folder / "stopped"
    assert main(["train", recipe, "--run", str(straight), "--json", *settings]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {line["kind"] for line in lines} >= {"train", "eval"}
    inner = loop._Watch.on_step_begin

    def stop(watch, args, state, control, **kwargs):
        inner(watch, args, state, control, **kwargs)
        watch.asked = watch.asked or (watch.name == "sparse" and state.global_step == 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Watch, "on_step_begin", stop)
        assert main(["train", recipe, "--run", str(stopped), *settings]) == 130
    assert not (stopped / "summary.json").exists() and (stopped / "checkpoints/sparse/checkpoint-2").is_dir()
    assert main(["train", recipe, "--resume", "--run", str(stopped)]) == 0
    assert outcome(stopped) == outcome(straight)
    capsys.readouterr()
    assert main(["eval", str(straight), "--json"]) == 0
    said = capsys.readouterr()
    summary = json.loads((straight / "summary.json").read_text())
    for which, found in json.loads(said.out).items():
        assert found["loss"] == summary[which]["eval_loss"], which
        assert found["domains"] == summary[which]["domains"]
    assert "summary.json says" not in said.err
    page = (straight / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page and "NaN" not in page and ">nan" not in page
    assert complaints(straight / "report.html", folder / "browser") == []
    for one in read_run(straight).exhibits:
        assert f"<h2>{one.title}</h2>" in page
    return straight
