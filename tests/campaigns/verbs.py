"""Campaign D for every verb of the command line: full and read-only disks, files for folders, no file handles left.

The verbs are those that the parser knows, but for some that are named; the arguments of one that it learns are filled
in by their names.
"""

import argparse
import contextlib
import functools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

from shunter import sparsify
from shunter.cli import _parser, main
from shunter.durable import sealed, verify
from shunter.hf.checkpoints.loading import load_folder
from tests.campaigns.campaign import drawn
from tests.campaigns.processes import Points, in_child
from tests.campaigns.runs import fresh, job
from tests.campaigns.stops import ERRORS, mounted

TINY = "8,8,8,2,1"  # of a benchmark
READ = ("run", "model", "models", "table", "teacher", "forest")  # what is read, as the arguments call it
SIZES = (10**6, 10**7, 10**8)  # parameters of runs
TUNED = ["--rates", "1e-3", "--batches", "4", "--train", "moe", "--examples", "8", "--length", "8", "--windows", "10"]
BUDGET = ["--flops", "1e21", "--memory", "80GiB", "--devices", "8", "--bandwidth", "50GB"]
QUICK = {
    "advise": BUDGET,
    "branch": ["training.steps=2"],
    "compare": ["--routers", "topk,hash"],
    "distill": ["--steps", "2", "--tokens", "640", "--length", "16"],
    "eval": ["--calibration"],  # of a run, on its own data
    "extract": ["--domain", "1"],
    "finetune": TUNED,
    "generate": ["--max-new-tokens", "3", "--prompt", "abc"],
    "inspect": ["--tokens", "64", "--length", "16", "--ablate", "2"],
    "prune": ["--keep", "2", "--tokens", "128", "--length", "16"],
    "quantize": ["--bits", "8"],
    "reproduce": ["figure-1"],
    "simulate": ["--gpus", "8,16"],
    "upcycle": ["--experts", "2"],
    "law fit": ["--resamples", "0"],
    "bench experts": ["--shapes", TINY, "--dtype", "float32", "--backends", "reference", "--peers", "eager"],
    "bench gpu": ["--shapes", TINY],
    "bench layer": ["--experts", "2", "--tokens", "8", "--dim", "8", "--width", "8", "--top-k", "1"],
    "bench quantised": ["--windows", "1"],
    "bench routers": ["--shape", TINY, "--routers", "topk"],
}
"""What makes a verb quick."""
UNTRIED = ["bench offload", "bench parallel"]
"""Benchmarks whose processes measure together: these are left out."""
WHOLE = ["distill", "export", "extract", "merge", "prune", "quantize", "upcycle"]
"""Verbs whose folder is whole or absent."""


def verbs(parser=None, words=()):
    """Each verb of the command line, as "bench routers", and the parser of its arguments."""
    parser = parser or _parser()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                yield from verbs(inner, (*words, name))
            return
    if " ".join(words) not in UNTRIED:
        yield " ".join(words), parser


class Verb:
    """A verb with arguments that are right, on a finished run of its own.

    Args:
        name: as `verbs` has it.
        parser: of its arguments.
        work: a job whose run is read.
    """

    def __init__(self, name, parser, work):
        self.name, self.work = name, work
        self.actions = [action for action in parser._actions if action.dest not in ("help", "version")]
        folders = [a for a in self.actions if a.type is Path and a.option_strings and a.dest in ("out", "run")]
        self.writes = folders[0].option_strings[0] if folders else ""
        self.reads = [a for a in self.actions if not a.option_strings and a.dest in READ]

    def arguments(self, place, source=None):
        """The words after `shunter`: results go to a place; what is read is another than the right one."""
        given = self.name.split()
        for action in self.actions:
            if action in self.reads:
                given.append(str(source or self.source(action)))
            elif not action.option_strings and action.dest == "recipe":
                given.append("text")
            elif action.option_strings:
                if action.required and action.option_strings[0] != self.writes:
                    given += [action.option_strings[0], str(action.choices[0]) if action.choices else "1"]
            elif action.nargs not in ("*", "?"):
                raise AssertionError(f"say in QUICK what {self.name!r} takes for {action.dest}")
        if self.writes:
            given += [self.writes, str(place)]
        if any(action.dest == "rounds" for action in self.actions):
            given += ["--rounds", "1"]
        if self.name in ("train", "compare"):
            given += self.work.settings
        elif self.name != "eval" and any(action.dest == "data" for action in self.actions):
            given += ["--data", str(self.work.folder / "corpus")]
        return given + QUICK.get(self.name, [])

    def source(self, action):
        """A right folder to read."""
        if action.dest == "run":
            return self.work.straight
        if action.dest == "forest":
            return self.work.folder / "forest"
        if action.dest == "table":
            return _table(self.work.folder / "runs.csv")
        if self.name == "extract":
            return self.work.folder / "domains"
        return self.work.straight / ("dense" if self.name == "upcycle" else "sparse")

    def call(self, place, source=None, before=lambda: None, out=None):
        """Do it in a process of its own, as the program would; out: where standard output goes."""

        def child():
            _without_timing()
            arguments = self.arguments(place, source)
            if out:
                os.dup2(os.open(out, os.O_WRONLY), 1)
            os.chdir(place.parent if place.parent.is_dir() else place.parents[1])
            before()
            try:
                return main(arguments)
            except SystemExit as ended:
                return ended.code

        return in_child(child)


def _table(file):
    """The runs of a law."""
    if not file.exists():
        rows = [
            f"{size},{experts},{3 * size**-0.08 * experts**-0.03 + 1:.6f}" for size in SIZES for experts in (1, 2, 4, 8)
        ]
        file.write_text("\n".join(["parameters,experts,loss", *rows, ""]))
    return file


def _domains(work):
    """A model whose router goes by the domain of the text, from a run's dense one."""
    if not (work.folder / "domains").exists():
        sparsify(load_folder(work.straight / "dense"), 4, "domain").save_pretrained(work.folder / "domains")


def _forest(work):
    """A forest whose branches are trained."""
    forest = work.folder / "forest"
    if not forest.exists():
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            assert main(["branch", str(work.straight), "--out", str(forest), "training.steps=2"]) == 0
            for folder in sorted((forest / "branches").iterdir()):
                assert main(["train", "text", "--resume", "--run", str(folder), "--json"]) == 0


def _without_timing():
    """A benchmark of minutes is over at once; a report's pictures, which no fault is in, are left out."""
    from shunter.benchmarks import finetune, lora
    from shunter.recipes import run as engine

    finetune.finetune = lambda *given, **options: {
        name: {"seconds": [1.0] * 4, "losses": [1.0]} for name in finetune.IMPLEMENTATIONS
    }
    lora.measured = lambda name, *given: {
        "seconds": [1.0 + (name != "none")], "peak": 1e9 * (1 + (name != "none")), "losses": [1.0]
    }  # fmt: skip
    engine.write_report = engine.write_picture = lambda *given: None


@functools.cache
def every_verb(folder):
    """The verbs, and how many operations on files each has; all are right, or say in a line why they cannot be."""
    work = job(folder, "topk")
    _domains(work)
    _forest(work)
    found = []
    for name, parser in verbs():
        verb = Verb(name, parser, work)
        with fresh(folder) as place:
            ended = verb.call(place)
            assert ended.code == 0 or (name == "bench gpu" and ended.code == 2), f"{name}: {ended.said}"
            os.mkdir(place.with_name("counted"))
            counted = verb.call(place.with_name("counted") / "place", before=lambda: _count(place.with_name("counted")))
            verb.points = int(counted.said.rsplit("points: ")[-1].split()[0])
            verb.code = ended.code
        found.append(verb)
    return found


def _count(root):
    points = Points(root)
    inner = os._exit

    def leave(code):
        print(f"\npoints: {points.count}", flush=True)
        inner(code)

    os._exit = leave


def broken_verbs(result, folder, cases, seed):
    """D: each verb in turn meets a fault; it ends in one line, leaves nothing half-written, and works afterwards."""
    all_verbs = every_verb(folder)
    for case in cases:
        draw, verb = drawn(seed, case), all_verbs[case % len(all_verbs)]
        with fresh(folder) as run:
            kind = draw.choice(FAULTS)
            fault = kind(verb, run.parent / "place", draw)
            if fault is None:
                fault = unreadable(verb, run.parent / "place", draw) if verb.reads else no_output(verb, run, draw)
            result.count(case, fault and f"{verb.name}, {kind.__name__}: {fault}")


def wrong(verb, ended, place):
    """What is wrong with how a verb ended, in words."""
    if "Traceback" in ended.said or ended.code not in (0, 1, 2, 130):
        return f"exit code {ended.code}: {ended.said[-600:]}"
    if ended.code in (1, 2) and not ended.line.startswith(("shunter", "Stopped")):
        return f"the last line is {ended.line!r}"
    if "[Errno" in ended.line:
        return f"the last line has Python's words for an error: {ended.line!r}"
    left = [path.name for path in place.parent.rglob("*.partial")]
    if left:
        return f"something is left over: {left}"
    if place.is_dir() and sealed(place) and verb.name in WHOLE:
        verify(place)
    elif place.exists() and verb.name in WHOLE and place.is_dir():
        return "a folder that is not whole is there"
    halves = [path.name for path in place.parent.rglob("*") if path.is_file() and not _whole(path)]
    return f"half-written: {halves}" if halves else ""


def _whole(file):
    """Whether a file of results has its end."""
    if file.suffix == ".json":
        try:
            json.loads(file.read_bytes())
        except ValueError:
            return False
        return True
    end = {".png": b"IEND\xaeB`\x82", ".html": b"</html>"}.get(file.suffix, b"")
    return file.read_bytes().rstrip().endswith(end)


def again(verb, place):
    """What is wrong with the verb where nothing keeps it from working."""
    if place.exists():
        shutil.rmtree(place)
    ended = verb.call(place)
    return wrong(verb, ended, place) or ("" if ended.code == verb.code else f"afterwards {ended.code}: {ended.line}")


def failing(verb, place, draw):
    """An operation on files fails."""
    if not verb.points:
        return None
    number, at = draw.choice(ERRORS), draw.randrange(verb.points)

    def fail(points):
        raise OSError(number, os.strerror(number))

    ended = verb.call(place, before=lambda: Points(place.parent, fail, at))
    return wrong(verb, ended, place) or again(verb, place)


def full(verb, place, draw):
    """The disk is full after so many kilobytes, or takes nothing from the beginning."""
    readonly = draw.random() < 0.3
    if not verb.writes or not mounted(place.parent, draw.randrange(4, 600)):
        return None
    try:
        if readonly:
            subprocess.run(["mount", "-o", "remount,ro", place.parent], check=True)
        ended = verb.call(place)
        subprocess.run(["mount", "-o", "remount,rw,size=100m", place.parent], check=True)
        told = not readonly or ended.code in (1, verb.code or 1)
        return wrong(verb, ended, place) or ("" if told else f"exit code {ended.code}") or again(verb, place)
    finally:
        subprocess.run(["umount", place.parent], check=True)


def in_the_way(verb, place, draw):
    """A file stands where a folder should be, or above it."""
    if not verb.writes:
        return None
    blocking = place if draw.random() < 0.5 else place.parent / "file"
    blocking.write_text("mine")
    ended = verb.call(place if blocking == place else blocking / "place")
    if blocking.read_text() != "mine" or ended.code == 0:
        return f"the file in the way holds {blocking.read_text()!r}, exit code {ended.code}"
    return wrong(verb, ended, place)


def no_handles(verb, place, draw):
    """So many more files can be opened."""
    more = draw.randrange(8)

    def limit():
        used = max(map(int, os.listdir("/proc/self/fd")))
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + more, used + more))

    ended = verb.call(place, before=limit)
    return wrong(verb, ended, place) or again(verb, place)


def no_output(verb, place, draw):
    """Standard output takes nothing, is closed, or is a pipe that nobody reads, which ends a program in silence."""
    how = draw.choice(["full", "closed", "pipe"])
    ended = verb.call(place, out="/dev/full") if how == "full" else verb.call(place, before=OUTPUTS[how])
    silent = how == "pipe" and ended.code == 1 and "Traceback" not in ended.said
    return "" if silent else wrong(verb, ended, place)


def _close():
    os.close(1)
    sys.stdout = None  # as Python begins then


def _unread():
    end, beginning = os.pipe()
    os.dup2(beginning, 1)
    os.close(end)


OUTPUTS = {"closed": _close, "pipe": _unread}


def unreadable(verb, place, draw):
    """What is to be read is missing, a file, an empty folder, a FIFO, a device, or has a name of control characters."""
    if not verb.reads:
        return None
    source = place.parent / draw.choice(["source", "so\x1b[31m\nurce", "s" * 300])
    how = draw.choice(["missing", "file", "empty", "fifo", "device"])
    if len(source.name) < 256:
        {
            "missing": lambda: None,
            "file": lambda: source.write_bytes(random.Random(0).randbytes(100)),
            "empty": source.mkdir,
            "fifo": lambda: os.mkfifo(source),
            "device": lambda: source.symlink_to("/dev/zero"),
        }[how]()
    ended = verb.call(place, source)
    return wrong(verb, ended, place) or ("" if ended.code == 2 else f"{how}: exit code {ended.code}: {ended.line}")


def interrupted(verb, place, draw):
    """Ctrl-C."""
    after = draw.uniform(0.0, 1.0)

    def ring():
        thread = threading.Timer(after, os.kill, (os.getpid(), signal.SIGINT))
        thread.daemon = True
        thread.start()

    ended = verb.call(place, before=ring)
    return wrong(verb, ended, place) or again(verb, place)


FAULTS = [failing, failing, full, full, in_the_way, no_handles, no_output, unreadable, interrupted]
