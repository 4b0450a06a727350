"""`python -m tests.campaigns`: campaigns at full size, or some at another, from where they were interrupted; a table.

With `--keep` every finished part of a campaign is a line of progress.jsonl in that folder, and a later call with the
same code, versions and seed goes on from there.
"""

import argparse
import hashlib
import itertools
import json
import os
import sys
import tempfile
import time
import traceback
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

import torch

from shunter.durable import make_folder, write
from shunter.environment import machine, run_versions
from tests.campaigns.campaign import Result
from tests.campaigns.campaigns import CAMPAIGNS

ALL = 10**9
UNKNOWN = 1500  # about how many a campaign has whose cases are as many as there are
ROOT = Path(__file__).parents[2]


def main():
    """Run what was asked for; the exit code is 1 where anything failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaigns", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(CAMPAIGNS)}, or NAME=FAULTS; none: all at full size")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="repeat one case of one campaign")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--minutes", type=float, help="begin no more parts after so many; 0: the table of what is kept")
    parser.add_argument("--keep", type=Path, help="a folder for the progress")
    parser.add_argument("--out", type=Path, help="a folder for campaigns.json and campaigns.md, at the end")
    args = parser.parse_args()
    torch.set_num_threads(1)  # also what the progress says of the machine
    wanted = {}
    for word in args.names or CAMPAIGNS:
        name, _, size = word.partition("=")
        wanted[name] = int(size or CAMPAIGNS[name].full or ALL)
    base = Path("/dev/shm")  # syncs cost nothing there
    with tempfile.TemporaryDirectory(prefix="campaigns-", dir=base if os.access(base, os.W_OK) else None) as folder:
        if args.only is not None:
            (name,) = wanted
            results = [CAMPAIGNS[name].run(name, folder, [args.only], args.seed)]
            print(*results[0].failures or ["nothing is wrong"], sep="\n")
        else:
            progress = Progress(wanted, args.seed, args.keep)
            try:
                _run(progress, Path(folder), args)
            except KeyboardInterrupt:
                print("Stopped; the same call goes on.", file=sys.stderr)
                return 130
            results = progress.results()
            print(progress.page())
            if args.out:
                make_folder(args.out)
                write(args.out / "campaigns.json", json.dumps(progress.as_json(), indent=1) + "\n")
                write(args.out / "campaigns.md", progress.page())
    return 1 if any(result.failures for result in results) else 0


def _run(progress, folder, args):
    """Give parts of campaigns to the workers until each has its size."""
    began, running = time.monotonic(), {}
    options = {"mp_context": get_context("fork"), "initializer": torch.set_num_threads, "initargs": (1,)}
    with ProcessPoolExecutor(args.workers, **options) as pool:
        while True:
            over = args.minutes is not None and time.monotonic() - began > 60 * args.minutes
            while len(running) < args.workers and not over and (part := progress.next()):
                running[pool.submit(_part, *part, progress.wanted[part[0]], args.seed, folder)] = part
            if not running:
                return
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                progress.add(*running.pop(done), *done.result())
            print(progress.line(time.monotonic() - began), file=sys.stderr, flush=True)


def _part(name, first, size, seed, folder):
    """Cases of one campaign, in the folder of this process; and the seconds they took."""
    began = time.monotonic()
    own = folder / str(os.getpid())
    own.mkdir(exist_ok=True)
    cases = range(first, first + min(CAMPAIGNS[name].part, size))
    try:
        result = CAMPAIGNS[name].run(name, own, cases, seed)
    except Exception:  # the other cases are tried all the same
        failure = f"the campaign itself failed from case {first} on: {traceback.format_exc()}"
        result = Result(name, seed, injected=len(cases), failures=[failure])
    return result, time.monotonic() - began


class Progress:
    """Which parts of the campaigns are done, and what came of them.

    Args:
        wanted: name -> faults.
        seed: of all cases.
        keep: a folder to keep it in, or None.
    """

    def __init__(self, wanted, seed, keep):
        self.wanted, self.seed = wanted, seed
        self.done = {name: {} for name in wanted}  # first case -> line
        self.running = dict.fromkeys(wanted, 0)
        self.known = {"code": _code(), "versions": run_versions(), "machine": machine(), "seed": seed}
        self.file = None
        if keep:
            make_folder(keep)
            path = keep / "progress.jsonl"
            lines = [json.loads(line) for line in _whole_lines(path)]
            if lines and lines[0] != self.known:
                aside = path.with_suffix(f".{int(path.stat().st_mtime)}.jsonl")
                print(f"{path} is of other code, versions or another seed; it is now {aside}", file=sys.stderr)
                path.rename(aside)
                lines = []
            for line in lines[1:]:
                self.done.setdefault(line["campaign"], {})[line["first"]] = line
            content = "".join(json.dumps(line) + "\n" for line in lines or [self.known])
            if not path.exists() or path.read_text() != content:  # or a process that adds to it would lose it
                write(path, content)
            self.file = path.open("a")
        self.given = {name: set(self.done[name]) for name in wanted}

    def next(self):
        """The name and the first case of the part that is furthest behind; None where all are done or being done."""
        behind = {}
        for name, size in self.wanted.items():
            lines, cases = self.done[name].values(), CAMPAIGNS[name].part * self.running[name]
            injected = sum(line["injected"] for line in lines)
            if injected + cases < size and all(line["injected"] for line in lines):
                behind[name] = (injected + cases) / min(size, UNKNOWN)
        if not behind:
            return None
        name = min(behind, key=behind.get)
        first = next(first for first in itertools.count(0, CAMPAIGNS[name].part) if first not in self.given[name])
        self.given[name].add(first)
        self.running[name] += 1
        return name, first

    def add(self, name, first, result, seconds):
        """Note a part that is done."""
        line = asdict(result) | {"first": first, "seconds": round(seconds, 1), "load": os.getloadavg()[0]}
        self.done[name][first] = line
        self.running[name] -= 1
        if self.file:
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
        for failure in result.failures:
            print(failure, file=sys.stderr)

    def results(self):
        """The sum of the parts of each campaign."""
        found = []
        for name, parts in self.done.items():
            result = Result(name, self.seed)
            for _, line in sorted(parts.items()):
                result.injected += line["injected"]
                result.survived += line["survived"]
                result.detected += line["detected"]
                result.failures += line["failures"]
            found.append(result)
        return found

    def line(self, seconds):
        """How far all are."""
        told = [f"{result.campaign} {result.injected:,}/{self._size(result.campaign)}" for result in self.results()]
        failed = sum(len(result.failures) for result in self.results())
        return f"{seconds / 60:.0f} min: {', '.join(told)}; {failed} failed"

    def _size(self, name):
        return f"{size:,}" if (size := self.wanted.get(name, ALL)) != ALL else "all"

    def as_json(self):
        """As the file of results has it."""
        lines = [line for parts in self.done.values() for line in parts.values()]
        seconds = sum(line["seconds"] for line in lines)
        load = sum(line["load"] * line["seconds"] for line in lines) / max(seconds, 1)
        sums = []
        for result in self.results():
            spent = sum(line["seconds"] for line in self.done[result.campaign].values())
            sums.append(asdict(result) | {"wanted": self._size(result.campaign), "seconds": round(spent)})
        return self.known | {"hours_of_workers": round(seconds / 3600, 2), "mean_load": round(load, 1), "results": sums}

    def page(self):
        """The results in Markdown."""
        heads = ("", "campaign", "faults", "injected", "of", "survived", "detected", "failed")
        lines = [
            "# Campaigns of faults",
            "",
            "What they are: [Reliability](../reliability.md). `make campaigns` runs them.",
            "",
            f"| {' | '.join(heads)} |",
            "|" + "---|" * len(heads),
        ]
        for result in sorted(self.results(), key=lambda result: list(CAMPAIGNS).index(result.campaign)):
            campaign = CAMPAIGNS[result.campaign]
            numbers = (result.survived, result.detected, len(result.failures))
            cells = [
                campaign.letter,
                result.campaign,
                campaign.what,
                f"{result.injected:,}",
                self._size(result.campaign),
            ]
            lines.append(f"| {' | '.join([*cells, *(f'{number:,}' for number in numbers)])} |")
        found = self.as_json()
        versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
        failures = [f"- {failure}" for result in self.results() for failure in result.failures]
        made = (
            f"Seed {self.seed}; {found['hours_of_workers']} hours of processes, at a mean load of {found['mean_load']} "
            f"on {found['machine']['cores']} cores. With {versions}."
        )
        return "\n".join([*lines, "", *failures, *[""] * bool(failures), made, ""])


def _whole_lines(path):
    """The lines of a file that end."""
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] if path.exists() else []


def _code():
    """A fingerprint of what is tried, and of what tries it."""
    digest = hashlib.sha256()
    for path in sorted([*(ROOT / "src").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
