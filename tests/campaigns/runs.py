"""Small runs of `shunter train text` to be broken, and what must come out of them all the same."""

import contextlib
import functools
import hashlib
import json
import os
import random
import shutil
import time
from pathlib import Path

from shunter.analysis.runs import Metrics
from shunter.cli import main
from shunter.durable import sealed
from shunter.recipes import run as engine
from shunter.training import loop
from tests.campaigns.processes import Points, in_child
from tests.recipes.conftest import SMALL

SAVE = 2  # steps between checkpoints
STEPS = 6
KINDS = {
    "both": [],  # a router that is fixed, and one that learns
    "topk": ["sparse.router=topk"],
    "bias": ["sparse.top_k=1", "sparse.options={selection_bias: true, jitter: 0.1, capacity_factor: 1.0}"],
    "hash": ["sparse.router=hash"],
}


@functools.cache
def job(folder, kind, pages=False):
    """The job of a kind in a folder, made when it is first asked for."""
    return Job(Path(folder) / f"{kind}-{pages}", kind, pages)


class Job:
    """A configuration, its corpus, and the outcome of a run of it that nothing happened to.

    Args:
        folder: for the corpus and the run.
        kind: of `KINDS`.
        pages: whether its runs draw their report, which takes half of the time.
    """

    def __init__(self, folder, kind, pages):
        self.folder, self.kind, self.pages = Path(folder), kind, pages
        corpus = self.folder / "corpus"
        for domain, text in {"letters": "abc de fgh ", "digits": "12 345 6 78 "}.items():
            (corpus / domain).mkdir(parents=True, exist_ok=True)
            for i in range(6):
                (corpus / domain / f"{i}.txt").write_text(text * 12)
        every = [f"training.steps={STEPS}", f"training.save_every={SAVE}", "training.log_every=1"]
        self.settings = [*SMALL, *every, "training.eval_every=3", *KINDS[kind], f"data.source=['{corpus}']"]
        self.straight = self.folder / "straight"
        drawing = engine.write_report, engine.write_picture
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            assert self.work(self.straight)() == 0  # in this process, so that its children have all modules loaded
        engine.write_report, engine.write_picture = drawing
        self.outcome = outcome(self.straight)
        with fresh(self.folder) as run:
            began = time.monotonic()
            assert self.finish(run) == ""
            self.seconds = time.monotonic() - began

    @functools.cached_property
    def origin(self):
        """A run that stopped a step before its end, to be copied; what of it was synced is kept beside it."""
        run = self.folder / "stopped"
        self.stopped(run, STEPS - 1, watched=True)
        return run

    def work(self, run):
        """Begin a run, or go on with it where there is one; for a process of its own."""

        def work():
            if not self.pages:
                engine.write_report = engine.write_picture = lambda *given: None
            if sealed(run):
                return main(["train", "text", "--resume", "--run", str(run)])
            return main(["train", "text", "--run", str(run), *self.settings])

        return work

    def go(self, run, **options):
        """Begin a run or go on with it in a process of its own."""
        return in_child(self.work(run), **options)

    def finish(self, run):
        """Go on with a run to its end; what is wrong then, in words, or nothing; no work may be lost."""
        lost = lost_work(run)
        return self.ended(run) or (f"{lost} steps of work were lost" if lost > SAVE else "")

    def ended(self, run):
        """The same of a run whose log may be damaged, from which work that is lost cannot be told."""
        ended = self.go(run)
        if ended.code != 0:
            return f"exit code {ended.code}: {ended.line}"
        if outcome(run) != self.outcome:
            return "the outcome has other bits"
        left = [path.name for path in run.parent.rglob("*.partial")]
        if left or (run / "checkpoints").exists():
            return f"something is left over: {left}"
        return ""

    def stopped(self, run, step, model="sparse", watched=False):
        """A run that was asked to stop, like with Ctrl-C, after a step of a model; watched: its syncs are kept."""

        def work():
            points = Points(run) if watched else None
            inner = loop._Watch.on_step_begin

            def stop(watch, args, state, control, **kwargs):
                inner(watch, args, state, control, **kwargs)
                watch.asked = watch.asked or (watch.name == model and state.global_step + 1 == step)

            loop._Watch.on_step_begin = stop
            code = self.work(run)()
            if points:
                points.write()
            return code

        return in_child(work)


def outcome(run):
    """SHA-256 of both models and of all lines of the metrics, times left out."""
    digest = hashlib.sha256()
    for which in ("dense", "sparse"):
        digest.update((run / which / "model.safetensors").read_bytes())
    for line in Metrics(run / "metrics.jsonl").lines():
        digest.update(json.dumps({key: value for key, value in line.items() if key != "seconds"}).encode())
    return digest.hexdigest()


def lost_work(run):
    """How many logged steps of the model in training its newest sealed checkpoint does not have."""
    lines = [line for line in Metrics(run / "metrics.jsonl").lines() if line["kind"] == "train"]
    if not lines or (run / lines[-1]["model"]).exists():
        return 0
    steps = [
        path.parent for path in (run / "checkpoints" / lines[-1]["model"]).glob("checkpoint-*/shunter-manifest.json")
    ]
    return lines[-1]["step"] - max((int(path.name.split("-")[-1]) for path in steps), default=0)


@contextlib.contextmanager
def fresh(folder):
    """A path for a run, which is removed at the end."""
    run = Path(folder) / f"run-{random.getrandbits(32):08x}" / "run"
    run.parent.mkdir(parents=True)
    try:
        yield run
    finally:
        shutil.rmtree(run.parent, ignore_errors=True)
