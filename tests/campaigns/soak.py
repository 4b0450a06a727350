"""Campaign R: a run that goes on for long takes no more memory, files, threads or disk than it did at first."""

import os
import signal
import time
from contextlib import suppress
from glob import glob
from pathlib import Path

import numpy as np

from shunter.cli import main
from tests.campaigns.processes import in_child
from tests.campaigns.runs import fresh, job

WARM = 0.4  # of the time, in which caches fill
SLOPE, SLACK = 1e6, 8e6  # bytes a minute, and bytes of noise


def soak(result, folder, cases, seed):
    """R: a training of as many seconds as there are cases; a checkpoint, a line and an evaluation every 50 steps."""
    work, seconds = job(folder, "bias"), len(cases)
    if cases[0]:
        return
    every = [f"training.{name}_every=50" for name in ("save", "eval", "log")]
    settings = [*work.settings, f"training.steps={1500 * seconds + 500}", *every, "model.layers=1", f"seed={seed}"]
    with fresh(folder) as run:
        arguments = ["train", "text", "--run", str(run), *settings]
        ended = in_child(lambda: _watched(arguments, run, seconds), limit=10 * seconds + 600)
        fault = "" if ended.code == 130 else f"exit code {ended.code}: {ended.line}"
        found = np.loadtxt(run.with_name("samples"), ndmin=2)
        if found[-1, 0] < 0.9 * seconds:
            fault = fault or f"it was watched for {found[-1, 0]:.0f} s alone"
        late = found[found[:, 0] > WARM * seconds]
        minutes = late[-1, 0] / 60 - late[0, 0] / 60
        slope = np.polyfit(late[:, 0] / 60, late[:, 1], 1)[0]
        if slope * minutes > SLOPE * minutes + SLACK:
            fault = fault or f"memory grows by {slope:,.0f} bytes a minute"
        for column, what, slack in ((2, "open files", 10), (3, "threads", 1), (4, "checkpoints", 3)):
            early = found[: len(found) - len(late), column].max()
            if late[:, column].max() > early + slack:
                fault = fault or f"there are more {what}: {late[:, column].max():.0f}, and {early:.0f} at first"
        result.count(0, fault, faults=seconds)


def _watched(arguments, run, seconds):
    """Train in this process, sampled from another after its first checkpoint, and end it as Ctrl-C would."""
    parent = os.getpid()
    if os.fork() == 0:
        try:
            while not list(run.rglob("checkpoint-*/shunter-manifest.json")):
                time.sleep(0.1)
            began = time.monotonic()
            with run.with_name("samples").open("w") as out:
                while (now := time.monotonic() - began) < seconds:
                    out.write(" ".join(map(str, (now, *_sample(parent, run)))) + "\n")
                    out.flush()
                    time.sleep(seconds / 50)
        finally:
            with suppress(ProcessLookupError):
                os.kill(parent, signal.SIGINT)  # also where a sample could not be taken
            os._exit(0)
    return main(arguments)


def _sample(process, run):
    """Bytes in memory, open files, threads, checkpoints."""
    here = Path(f"/proc/{process}")
    pages = int((here / "statm").read_text().split()[1])
    counts = len(os.listdir(here / "fd")), len(os.listdir(here / "task"))
    return pages * os.sysconf("SC_PAGE_SIZE"), *counts, len(glob(f"{run}/**/checkpoint-*", recursive=True))
