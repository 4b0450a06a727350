"""A stopped run goes on with what it began with, from its newest whole checkpoint, or says in one line why not."""

import json
import random
import shutil
import signal
import subprocess
import sys
from functools import partial

import pytest
from safetensors.torch import load_file, save_file

from shunter.analysis.runs import Metrics
from shunter.cli import look, main
from shunter.data.windows import TextData
from shunter.durable import MANIFEST, only_process, seal, verify
from shunter.errors import NotWritten, UserError
from shunter.recipes import run as engine
from shunter.recipes.run import configuration_of
from shunter.recipes.run import train as run_recipe
from shunter.recipes.text import RECIPE
from shunter.training import loop
from tests.conftest import SEED
from tests.helpers import TIME_LIMIT

train = partial(run_recipe, RECIPE)
OPTIONS = [
    "training.steps=6",
    "training.save_every=2",
    "training.eval_every=3",
    "sparse.options={selection_bias: true}",
]


@pytest.mark.parametrize("facts", [{"versions": None}, {"versions": "2"}, {"versions": {}, "files": []}])
def test_a_manifest_that_is_not_of_a_run_is_one_line(facts, tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 0")
    seal(tmp_path, **{"versions": {}, "data": "0"} | {"files": ["config.yaml"]} | facts)
    with pytest.raises(UserError, match=f"{MANIFEST}: is not that of a run, which names its versions and config.yaml"):
        engine._decided(RECIPE.config(), tmp_path, {"config.yaml": "seed: 0"})


def outcome(run):
    """All that must be the same bits, whether a run was stopped or not."""
    weights = [(run / which / "model.safetensors").read_bytes() for which in ("dense", "sparse")]
    timed = {"seconds"}
    lines = [{k: v for k, v in line.items() if k not in timed} for line in Metrics(run / "metrics.jsonl").lines()]
    return weights, lines


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A corpus, a run of it that never stopped, and one that stopped in its sparse model, with two checkpoints."""
    root = tmp_path_factory.mktemp("runs")
    (root / "corpus/letters").mkdir(parents=True)
    (root / "corpus/digits").mkdir()
    for i in range(6):
        (root / f"corpus/letters/{i}.txt").write_text("abc de fgh " * 12)
        (root / f"corpus/digits/{i}.txt").write_text("12 345 6 78 " * 12)
    from shunter.recipes.config import load_config
    from shunter.recipes.text import TextConfig
    from tests.recipes.conftest import SMALL

    config = load_config(TextConfig, None, [*SMALL, f"data.source=['{root / 'corpus'}']", *OPTIONS])
    train(config, root / "straight")
    inner = loop._Watch.on_step_begin

    def stop(watch, args, state, control, **kwargs):
        inner(watch, args, state, control, **kwargs)
        watch.asked = watch.asked or (watch.name == "sparse" and state.global_step == 4)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Watch, "on_step_begin", stop)
        with pytest.raises(loop.Interrupted):
            train(config, root / "stopped")
    return root, config


@pytest.fixture
def again(stopped, tmp_path):
    root, config = stopped
    shutil.copytree(root / "stopped", tmp_path / "run")
    return tmp_path / "run", config, outcome(root / "straight")


def test_a_signal_that_comes_while_ranks_agree_is_for_the_next_step(stopped, tmp_path, monkeypatch):
    root, config = stopped
    steps = []
    number = random.Random(SEED).choice([signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_DFL)  # under nohup, too
    monkeypatch.setattr(loop, "_leave_terminal", lambda: None)

    def agree(*counts):
        steps.append(1)
        if len(steps) == 2:
            signal.raise_signal(number)

    monkeypatch.setattr(loop, "sum_over_ranks", agree)
    with pytest.raises(loop.Interrupted, match="dense model, step 3 of 6"):
        train(config, tmp_path / "run")
    monkeypatch.undo()
    train(config, tmp_path / "run", resume=True)
    assert outcome(tmp_path / "run") == outcome(root / "straight")


def test_a_checkpoint_of_other_weights_is_refused_and_one_of_tied_weights_is_not_remarked_on(again, capfd):
    run, config, straight = again
    shutil.copytree(run, run.with_name("short"))
    train(config, run, resume=True)
    assert outcome(run) == straight and "missing keys" not in capfd.readouterr().err
    short = run.with_name("short") / "checkpoints/sparse/checkpoint-5"
    weights = load_file(short / "model.safetensors")
    del weights["model.layers.1.mlp.experts.down_proj"]
    save_file(weights, short / "model.safetensors", {"format": "pt"})
    facts = verify(short.with_name("checkpoint-4"))
    seal(short, **{name: facts[name] for name in facts.keys() - {"format", "files"}})
    assert main(["train", "text", "--resume", "--run", str(run.with_name("short"))]) == 2
    assert (
        capfd.readouterr()
        .err.strip()
        .endswith("has other weights: 'model.layers.1.mlp.experts.down_proj' in one alone")
    )


def checkpoints(run):
    return sorted(path.name for path in (run / "checkpoints/sparse").glob("checkpoint-*"))


@pytest.mark.parametrize("case", range(5))
def test_a_damaged_checkpoint_is_passed_over_for_an_older_whole_one(again, case, capsys):
    run, config, straight = again
    assert checkpoints(run) == ["checkpoint-4", "checkpoint-5"]
    draw = random.Random(f"{SEED} {case}")
    newest = run / "checkpoints/sparse/checkpoint-5"
    file = draw.choice(sorted(newest.iterdir()))
    content = bytearray(file.read_bytes())
    how = draw.choice(["flip", "cut", "remove"])
    if how == "flip":
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        file.write_bytes(content)
    elif how == "cut":
        file.write_bytes(content[: draw.randrange(len(content))])
    else:
        file.unlink()
    train(config, run, resume=True)
    assert f"{newest} is passed over" in capsys.readouterr().err, (file.name, how)
    assert outcome(run) == straight


def test_with_no_whole_checkpoint_the_model_starts_anew(again, capsys):
    run, config, straight = again
    for path in (run / "checkpoints/sparse").glob("checkpoint-*"):
        (path / "optimizer.pt").write_bytes(b"")
    train(config, run, resume=True)
    assert capsys.readouterr().err.count("is passed over") == 2 and outcome(run) == straight


def test_a_checkpoint_of_another_model_is_passed_over(again, capsys):
    run, config, straight = again
    shutil.copytree(run / "checkpoints/dense/checkpoint-6", run / "checkpoints/sparse/checkpoint-6")
    train(config, run, resume=True)
    assert "checkpoint-6 is passed over" in capsys.readouterr().err and outcome(run) == straight


def test_a_log_that_is_torn_lost_or_ahead_is_that_of_the_checkpoint_again(again):
    run, config, straight = again
    log = run / "metrics.jsonl"
    lines = log.read_text()
    strange = '{"seconds": 1.0}\n{"kind": "train", "model": ["dense"], "step": 1}\n{"kind": "eval", "model": "dunse"}\n'
    ahead = lines + '{"kind": "train", "model": "sparse", "step": 6}\n{"ki'
    for content in ("", strange + lines[: len(lines) // 3], ahead):
        log.write_text(content)
        shutil.copytree(run, run.with_name("copy"))
        train(config, run.with_name("copy"), resume=True)
        assert outcome(run.with_name("copy")) == straight
        shutil.rmtree(run.with_name("copy"))


def test_what_was_decided_cannot_be_changed(again, capsys):
    run, config, _ = again
    other = config.model_copy(update={"seed": config.seed + 1})
    with pytest.raises(UserError, match="config.yaml says other settings"):
        train(other, run, resume=True)
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("steps: 6", "steps: 9"))
    assert main(["train", "text", "--resume", "--run", str(run)]) == 2
    assert "config.yaml: is damaged or changed" in capsys.readouterr().err
    (run / "config.yaml").write_text(text[: len(text) // 2])
    for verb in (["train", "text", "--resume", "--run"], ["eval"]):
        assert main([*verb, str(run)]) == 2
        assert "config.yaml: is damaged or changed" in capsys.readouterr().err


def test_a_run_that_began_before_a_setting_existed_goes_on_with_its_default(stopped, tmp_path, monkeypatch, capsys):
    root, config = stopped
    text = engine.dump_config(config)
    older = text[: text.index("parallel:")] + text[text.index("sparse:") :]
    with monkeypatch.context() as patch:
        patch.setattr(engine, "dump_config", lambda config: older)
        patch.setattr(loop.NaNGuard, "on_step_end", lambda *given, **state: signal.raise_signal(signal.SIGINT))
        with pytest.raises(loop.Interrupted):
            train(config, tmp_path / "run")
    train(config, tmp_path / "run", resume=True)
    assert "config.yaml was written before some settings existed" in capsys.readouterr().err
    assert outcome(tmp_path / "run") == outcome(root / "straight")


def test_other_versions_are_said(again, capsys, monkeypatch):
    run, config, straight = again
    monkeypatch.setattr(engine, "run_versions", lambda: {"torch": "0.1"})
    train(config, run, resume=True)
    assert "when this run began, and is 0.1" in capsys.readouterr().err and outcome(run) == straight


def test_a_run_that_another_process_trains_is_left_alone(again, capsys):
    run, _, _ = again
    code = f"import faulthandler\nfaulthandler.dump_traceback_later({TIME_LIMIT}, exit=True)\n"
    code += "import sys, pathlib\nfrom shunter.durable import only_process\n"
    code += "with only_process(pathlib.Path(sys.argv[1])):\n    print('in', flush=True)\n    sys.stdin.read()\n"
    command = [sys.executable, "-c", code, str(run)]
    other = subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == "in\n"
        assert main(["train", "text", "--resume", "--run", str(run)]) == 2
        assert f"process {other.pid} on" in capsys.readouterr().err
    finally:
        other.kill()
        other.communicate(timeout=TIME_LIMIT)
    with only_process(run):
        pass


def test_several_ranks_are_refused_before_anything_is_written(again, tmp_path, monkeypatch):
    _, config, _ = again
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="torchrun has started 2"):
        train(config, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_run_that_was_killed_before_its_data_were_read_goes_on_or_begins_anew(again, tmp_path, monkeypatch):
    _, config, straight = again

    def kill(config):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RECIPE, "prepare", kill)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "new")
    shutil.copytree(tmp_path / "new", tmp_path / "other")
    recipe, found = configuration_of(tmp_path / "new")
    assert (recipe, found) == (RECIPE, config)
    train(found, tmp_path / "new", resume=True)
    train(config, tmp_path / "other")
    assert outcome(tmp_path / "new") == outcome(tmp_path / "other") == straight


def test_a_tokenizer_that_the_disk_does_not_take_is_one_line(again, tmp_path, monkeypatch, capsys):
    """Rust says so by an exception that is no OSError."""
    _, config, _ = again

    def full(*given):
        raise Exception("No space left on device (os error 28)")

    monkeypatch.setattr(TextData, "save_pretrained", full)
    with pytest.raises(NotWritten, match="tokenizer cannot be written: No space left on device"):
        train(config, tmp_path / "new")
    monkeypatch.setattr(look, "_routers", full)
    assert main(["routers"]) == 1
    assert capsys.readouterr().err.endswith("shunter routers: a file cannot be written: No space left on device\n")


def test_there_is_a_run_or_there_is_none(again, tmp_path, capsys):
    run, config, _ = again
    with pytest.raises(UserError, match="holds a run already"):
        train(config, run)
    (run / MANIFEST).unlink()
    assert main(["train", "text", "--resume", "--run", str(run)]) == 2
    assert "holds no run to go on with" in capsys.readouterr().err


def test_eval_says_where_its_numbers_are_others_than_the_summarys(stopped, capsys, tmp_path):
    shutil.copytree(stopped[0] / "straight", tmp_path / "run")
    assert main(["eval", str(tmp_path / "run")]) == 0
    assert not capsys.readouterr().err
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    summary["sparse"]["eval_loss"] += 0.1
    (tmp_path / "run/summary.json").write_text(json.dumps(summary))
    assert main(["eval", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().err.strip()
    assert said.startswith("sparse: the loss is") and "summary.json says" in said and "\n" not in said


def plant(patch, times, value=float("nan"), model="sparse", first=3):
    """Make the loss of a model not finite from a step on, so many times."""
    inner, left = loop._Trainer.compute_loss, [times]

    def compute_loss(trainer, *args, **kwargs):
        found = inner(trainer, *args, **kwargs)
        if trainer.watch.name == model and trainer.state.global_step + 1 >= first and left[0] > 0:
            left[0] -= 1
            found = found * value
        return found

    patch.setattr(loop._Trainer, "compute_loss", compute_loss)


def test_a_step_that_is_not_finite_is_skipped_and_said(stopped, tmp_path, monkeypatch, capsys):
    _, config = stopped
    plant(monkeypatch, 1)
    train(config, tmp_path / "run")
    lines = Metrics(tmp_path / "run/metrics.jsonl").lines("sparse")
    assert sum(line["skipped"] for line in lines if line["kind"] == "train") == 1
    assert [(line["step"], line["what"]) for line in lines if line["kind"] == "alarm"] == [
        (3, "the loss or the gradient is not finite: the step was skipped")
    ]
    assert "sparse model, step 3: the loss or the gradient is not finite" in capsys.readouterr().err
    assert "step was skipped" in (tmp_path / "run/report.html").read_text()


def test_after_three_strikes_a_run_goes_back_once_and_ends_as_if_nothing_had_been(
    stopped, tmp_path, monkeypatch, capsys
):
    root, config = stopped
    plant(monkeypatch, 3)
    train(config, tmp_path / "run")
    assert "Once, it goes back to a checkpoint from before" in capsys.readouterr().err
    assert outcome(tmp_path / "run") == outcome(root / "straight")


def test_what_comes_again_after_going_back_ends_the_run_in_one_line(again, monkeypatch, capsys):
    run, config, straight = again
    with monkeypatch.context() as patch:
        plant(patch, 99, float("inf"), "sparse", first=4)
        shutil.rmtree(run / "checkpoints/sparse")
        assert main(["train", "text", "--resume", "--run", str(run)]) == 1
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said.startswith(
            "shunter train: step 6: the loss is not finite, and 3 of the last 100 steps were skipped"
        )
        assert "try a lower learning rate" in said
    train(config, run, resume=True)
    assert outcome(run) == straight


def test_a_model_that_is_not_finite_at_its_end_is_not_kept(stopped, tmp_path, monkeypatch, capsys):
    _, config = stopped
    inner = loop._Watch.on_step_end

    def spoil(watch, args, state, control, **kwargs):
        if watch.name == "dense" and state.global_step == 6:
            next(kwargs["model"].parameters()).data[0, 0] = float("nan")
        inner(watch, args, state, control, **kwargs)

    monkeypatch.setattr(loop._Watch, "on_step_end", spoil)
    with pytest.raises(loop.Diverged, match="held-out loss of the dense model is not finite; first not finite is"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run/dense").exists()
