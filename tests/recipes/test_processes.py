"""`shunter train` on several processes: the curve of one, resumed to the end, and a lost process named."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from shunter.parallel.processes import launch
from tests.helpers import TIME_LIMIT
from tests.recipes.conftest import SMALL

# A balance loss that weighs, and a capacity that drops, as the whole batch has them.
SETTINGS = [*SMALL, "training.save_every=3", "training.log_every=1", "sparse.router=switch"]
SETTINGS += ["sparse.options={load_balancing_loss: 0.5, capacity_factor: 1.0, jitter: 0.0}"]
TWO = ["parallel.processes=2", "parallel.expert_parallel=2"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def _train(corpus, run, *words, launcher=(), steps=8, wait=True, kind="text", given=None):
    # torchrun takes --run for the beginning of an option of its own, unless told where its own end.
    command = [
        sys.executable,
        *launcher,
        "-m",
        *(["--"] if launcher else []),
        "shunter",
        "train",
        kind,
        "--run",
        str(run),
        *words,
    ]
    if "--resume" not in words:
        command += [*(given or ["--data", str(corpus), *SETTINGS]), f"training.steps={steps}"]
    process = subprocess.Popen(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    if not wait:
        return process
    out, error = process.communicate(timeout=TIME_LIMIT)
    return process.returncode, out + error


def _last_child(process):
    """The number of the process that it started last."""
    command = ["pgrep", "-P", str(process.pid)]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=TIME_LIMIT)
    return max(map(int, found.stdout.split()))


def _losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = {(line["model"], line["kind"], line["step"]): line.get("loss") for line in lines if line["kind"] != "load"}
    assert len(found) == sum(line["kind"] != "load" for line in lines), "each line once"
    return found


def _same(one, other):
    assert one.keys() == other.keys()
    for key, loss in one.items():
        assert loss == pytest.approx(other[key], rel=1e-5), key


@pytest.mark.slow
def test_two_processes_have_the_curve_of_one(corpus, tmp_path):
    assert _train(corpus, tmp_path / "one")[0] == 0
    status, said = _train(corpus, tmp_path / "two", *TWO)
    assert status == 0, said
    assert said.count("Held-out loss") == 1, "one process speaks"
    _same(_losses(tmp_path / "two"), _losses(tmp_path / "one"))
    status, said = _train(corpus, tmp_path / "three", TWO[1], launcher=TORCHRUN)
    assert status == 0, said
    assert _losses(tmp_path / "three") == _losses(tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("stacks", ["encoder", "encoder-decoder"])
def test_other_stacks_have_the_curve_of_one(corpus, tmp_path, stacks):
    """Whose ranks have unlike numbers of labels, and whose class makes its loss the mean of its own rank's."""
    runs = [tmp_path / "one", tmp_path / "two"]
    for run, more in zip(runs, ([], TWO), strict=True):
        status, said = _train(corpus, run, "--model", stacks, *more, steps=4)
        assert status == 0, said
    _same(*map(_losses, runs))


@pytest.mark.slow
def test_translation_has_the_curve_of_one(tmp_path):
    """Each rank translates the held-out sentences alike, by an encoder that it calls alone."""
    from tests.recipes.test_translation import settings, write_sentences  # which asks for a package of its own

    given = [*settings(write_sentences(tmp_path / "sentences.tsv")), *SETTINGS[-2:]]
    runs = [tmp_path / "one", tmp_path / "two"]
    for run, more in zip(runs, ([], [*TWO, "parallel.overlap_degree=2"]), strict=True):
        status, said = _train(None, run, *more, steps=4, kind="translation", given=given)
        assert status == 0, said
    _same(*map(_losses, runs))
    one, two = (json.loads((run / "summary.json").read_text()) for run in runs)
    for language, found in one["dense"]["domains"].items():
        assert found["chrf"] == pytest.approx(two["dense"]["domains"][language]["chrf"], rel=1e-3), language


@pytest.mark.slow
def test_a_killed_process_is_named_and_the_run_goes_on(corpus, tmp_path):
    steps = 60
    process = _train(corpus, tmp_path / "run", *TWO, steps=steps, wait=False)
    end = time.monotonic() + TIME_LIMIT
    folder = tmp_path / "run" / "checkpoints" / "sparse"
    while time.monotonic() < end and not list(folder.glob("checkpoint-*")) and process.poll() is None:
        time.sleep(0.05)
    victim = _last_child(process)
    os.kill(victim, signal.SIGKILL)
    said = process.communicate(timeout=TIME_LIMIT)[1]
    assert process.returncode == 1
    line = said.strip().splitlines()[-1]
    assert re.search(rf"rank 1 of 2, process {victim}, was killed by SIGKILL", line), said
    status, said = _train(corpus, tmp_path / "run", "--resume")
    assert status == 0, said
    assert _train(corpus, tmp_path / "whole", *TWO, steps=steps)[0] == 0
    assert _losses(tmp_path / "run") == _losses(tmp_path / "whole")


@pytest.mark.slow
def test_a_lost_process_restarts_all_from_the_newest_checkpoint(corpus, tmp_path):
    steps, more = 40, ["parallel.restarts=1", "parallel.timeout=60"]
    assert _train(corpus, tmp_path / "whole", *TWO, steps=steps)[0] == 0
    for lost in (signal.SIGKILL, signal.SIGSTOP):
        run = tmp_path / lost.name
        process = _train(corpus, run, *TWO, *more, steps=steps, wait=False)
        end = time.monotonic() + TIME_LIMIT
        folder = run / "checkpoints" / "sparse"
        while time.monotonic() < end and not list(folder.glob("checkpoint-*")) and process.poll() is None:
            time.sleep(0.05)
        os.kill(_last_child(process), lost)
        said = process.communicate(timeout=TIME_LIMIT)[1]
        assert process.returncode == 0, said
        assert said.count("starting again, 1 of 1 times") == 1, said
        assert _losses(run) == _losses(tmp_path / "whole")
        for name in ("dense", "sparse"):
            one, other = (folder / name / "model.safetensors" for folder in (run, tmp_path / "whole"))
            assert one.read_bytes() == other.read_bytes(), name


DIES = """
import os, signal, sys
from pathlib import Path
if os.environ["RANK"] == "1":
    marks = len(list(Path(sys.argv[1]).iterdir()))
    Path(sys.argv[1], str(marks)).touch()
    if marks < int(sys.argv[2]):
        sys.exit(75) if sys.argv[3] == "told" else os.kill(os.getpid(), signal.SIGKILL)
sys.exit(int(sys.argv[4]))
"""


@pytest.mark.parametrize("way, deaths, restarts, status", [("told", 2, 1, 1), ("killed", 1, 2, 0), ("told", 0, 1, 2)])
def test_the_launcher_starts_again_as_often_as_it_may(tmp_path, way, deaths, restarts, status, capfd):
    """Where a process is lost; other errors, as of exit status 2, start nothing again."""
    ends = "0" if deaths else "2"
    assert (
        launch(2, lambda: ["-c", DIES, str(tmp_path), str(deaths), way, ends], timeout=5, restarts=restarts) == status
    )
    starts = min(deaths, restarts) + 1
    assert len(list(tmp_path.iterdir())) == starts
    assert capfd.readouterr().err.count("starting again") == starts - 1


@pytest.mark.slow
def test_one_that_is_stopped_says_so_once_and_goes_on(corpus, tmp_path):
    steps = 60
    process = _train(corpus, tmp_path / "run", *TWO, steps=steps, wait=False)
    end = time.monotonic() + TIME_LIMIT
    metrics = tmp_path / "run" / "metrics.jsonl"
    while time.monotonic() < end and process.poll() is None:
        if metrics.exists() and '"kind": "train"' in metrics.read_text():
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)  # to the launcher, as from a terminal: its processes have sessions of their own
    said = process.communicate(timeout=TIME_LIMIT)[1]
    assert process.returncode == 130, said
    assert said.count("Stopping after this step") == said.count("Stopped at the dense model, step ") == 1, said
    assert "signal" not in said and "Traceback" not in said
    assert _train(corpus, tmp_path / "run", "--resume")[0] == 0
    assert _train(corpus, tmp_path / "whole", *TWO, steps=steps)[0] == 0
    assert _losses(tmp_path / "run") == _losses(tmp_path / "whole")


@pytest.mark.slow
def test_an_error_of_all_is_said_once(corpus, tmp_path):
    assert _train(corpus, tmp_path / "run", steps=1)[0] == 0
    status, said = _train(corpus, tmp_path / "run", *TWO)
    assert status == 2 and len(said.splitlines()) == 1 and "holds a run already" in said, said


@pytest.mark.parametrize(
    "settings, words",
    [
        (["parallel.processes=3"], "a step has 4 items, which 3 processes cannot share equally"),
        (["parallel.expert_parallel=3"], "parallel.expert_parallel 3 must divide sparse.num_experts 4"),
        (["parallel.expert_parallel=2", "parallel.processes=3"], "must divide parallel.processes 3"),
        (["parallel.expert_parallel=2"], "must divide the number of processes, 1"),
    ],
)
def test_settings_that_do_not_fit(corpus, tmp_path, capsys, settings, words):
    from shunter.cli import main

    assert main(["train", "text", "--data", str(corpus), "--run", str(tmp_path / "run"), *SETTINGS, *settings]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "run").exists()
