"""The campaigns: a folder, a size and a seed in; how many faults were injected, survived and detected, failures out."""

import errno
import os
import random
import shutil
import signal
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from shunter.durable import new_folder, verify
from shunter.errors import UserError
from shunter.recipes.config import load_config
from shunter.recipes.text import TextConfig
from shunter.training.alarms import LoadAlarm, SpikeAlarm
from tests.campaigns.processes import BROKEN, Points, in_child
from tests.campaigns.runs import KINDS, STEPS, Job, fresh


@dataclass
class Result:
    """What came of a campaign: faults injected; survived with the right outcome; refused in one line; failures."""

    campaign: str
    what: str
    seed: int
    size: int
    injected: int = 0
    survived: int = 0
    detected: int = 0
    failures: list = field(default_factory=list)

    def count(self, case, fault, *, detected=False, faults=1):
        """One more case, of some faults: what is wrong after it, in words, or nothing."""
        self.injected += faults
        if fault:
            again = f"python -m tests.campaigns {self.campaign}={self.size} --seed {self.seed} --only {case}"
            self.failures.append(f"{fault} [{again}]")
        elif detected:
            self.detected += 1
        else:
            self.survived += faults

    def as_json(self):
        """As the results file has it."""
        return asdict(self)


class Jobs:
    """A job of each kind, made when it is first drawn."""

    def __init__(self, folder):
        self.folder, self.made = Path(folder), {}

    def draw(self, draw):
        """One of them."""
        kind = draw.choice(list(KINDS))
        return self.made.get(kind) or self.make(kind)

    def make(self, kind, pages=False):
        """That of a kind."""
        self.made[kind] = Job(self.folder / kind, kind, pages)
        return self.made[kind]


def cases(size, only):
    """The numbers of the cases: all, or one to be repeated."""
    return range(size) if only is None else [only]


def kills(folder, size, seed, only=None):
    """A: SIGKILL at a random time, again and again until a run ends."""
    result, made = Result("kills", "SIGKILL at random times of a run, first and resumed", seed, size), Jobs(folder)
    for case in cases(size, only):  # of up to three kills, until there were enough
        if result.injected >= size:
            break
        draw = random.Random(f"{seed} {case}")
        job = made.draw(draw)
        with fresh(folder) as run:
            killed = 0
            for _ in range(draw.randrange(1, 4)):
                ended = job.go(run, kill_after=draw.uniform(0.0, 1.2))
                killed += ended.code == -signal.SIGKILL
                if ended.code == 0:
                    break
            result.count(case, job.finish(run), faults=killed)
    return result


def crash_points(folder, size, seed, only=None):
    """B: SIGKILL before each operation on files; and the data that were not synced by then lost, as with the power."""
    what = "SIGKILL before an operation on files, and with it a power loss"
    result, job = Result("crash_points", what, seed, size), Jobs(folder).make("bias", pages=True)
    with fresh(folder) as run:
        total = int(in_child(_counted(job, run)).line)
    draw = random.Random(seed)
    points = sorted(draw.sample(range(total), min(size, total)))
    for case in cases(2 * len(points), only):
        at, power = points[case // 2], case % 2
        with fresh(folder) as run:
            ended = in_child(_crashing(job, run, at))
            if ended.code != -signal.SIGKILL:
                result.count(case, f"no crash at point {at} of {total}: exit code {ended.code}: {ended.line}")
                continue
            if power:
                _lose_power(run, random.Random(f"{seed} {case}"))
            result.count(case, job.finish(run))
    return result


def _counted(job, run):
    def work():
        points = Points(run)
        code = job.work(run)()
        print(f"\n{points.count}", flush=True)
        return code

    return work


def _crashing(job, run, at):
    def crash(points):
        lines = [f"{inode} {size} {changed}" for inode, (size, changed) in points.synced.items()]
        (run.parent / "synced").write_text("\n".join(lines))
        os.kill(os.getpid(), signal.SIGKILL)

    def work():
        Points(run, crash, at)
        return job.work(run)()

    return work


def _lose_power(run, draw):
    """Cut each file that was changed after its last sync: to nothing, somewhere, or to zeros."""
    rows = [tuple(map(int, line.split())) for line in (run.parent / "synced").read_text().splitlines()]
    synced = {inode: (size, changed) for inode, size, changed in rows}
    for path in [path for path in run.rglob("*") if path.is_file()] if run.exists() else []:
        status = path.stat()
        if synced.get(status.st_ino) != (status.st_size, status.st_mtime_ns) and status.st_size:
            how, kept = draw.randrange(3), draw.randrange(status.st_size)
            content = path.read_bytes()
            path.write_bytes(b"" if how == 0 else content[:kept] if how == 1 else bytes(len(content)))


def chains(folder, size, seed, only=None):
    """C: five stops and resumptions of one run."""
    result, made = Result("chains", "five stops like Ctrl-C in one run", seed, size), Jobs(folder)
    for case in cases(size, only):
        draw = random.Random(f"{seed} {case}")
        job = made.draw(draw)
        stops = [("dense", step) for step in sorted(draw.sample(range(1, STEPS), 2))]
        stops += [("sparse", step) for step in sorted(draw.sample(range(1, STEPS), 3))]
        with fresh(folder) as run:
            codes = [job.stopped(run, step, model).code for model, step in stops]
            result.count(case, job.finish(run) if codes == [130] * 5 else f"the stops ended with {codes}")
    return result


ERRORS = [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EACCES, errno.EMFILE, errno.EROFS]


def disks(folder, size, seed, only=None):
    """D: an operation on files fails with an error of the system; on a file system of its own, the disk is full."""
    result, job = (
        Result("disks", "full disks, and operations on files that fail", seed, size),
        Jobs(folder).make("topk"),
    )
    with fresh(folder) as run:
        total = int(in_child(_counted(job, run)).line)
    for case in cases(size, only):
        draw = random.Random(f"{seed} {case}")
        with fresh(folder) as run:
            if case % 2 and _mounted(run.parent, draw.randrange(4, 1200)):
                try:
                    ended = job.go(run)
                    subprocess.run(["mount", "-o", "remount,size=100m", run.parent], check=True)
                    fault = _told(ended) or job.finish(run)
                finally:
                    subprocess.run(["umount", run.parent], check=True)
            else:
                fault = _told(in_child(_failing(job, run, draw.randrange(total), draw.choice(ERRORS)))) or job.finish(
                    run
                )
            result.count(case, fault)
    return result


def _mounted(folder, kilobytes):
    command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


def _failing(job, run, at, number):
    def fail(points):
        raise OSError(number, os.strerror(number))

    def work():
        Points(run, fail, at)
        return job.work(run)()

    return work


def _told(ended):
    """What is wrong with how a verb ended: it is done, or has failed in one line."""
    if ended.code == 0 or (ended.code in (1, 2) and ended.line.startswith("shunter train: ")):
        return ""
    return f"exit code {ended.code}: {ended.line}"


def damage(folder, size, seed, only=None):
    """E: a file of a stopped run has a bit flipped, is cut, lost, or swapped with another."""
    result, made = Result("damage", "a file of a stopped run flipped, cut, lost or swapped", seed, size), Jobs(folder)
    for case in cases(size, only):
        draw = random.Random(f"{seed} {case}")
        job = made.draw(draw)
        with fresh(folder) as run:
            if not (job.folder / "stopped").exists():
                job.stopped(job.folder / "stopped", STEPS - 1)
            shutil.copytree(job.folder / "stopped", run)
            files = [path for path in sorted(run.rglob("*")) if path.is_file() and path.stat().st_size]
            _damage(draw, files)
            fault = job.finish(run)
            refused = fault.startswith("exit code 2: shunter train: ") and str(run) in fault
            result.count(case, "" if refused else fault, detected=refused)
    return result


def _damage(draw, files):
    path, how = draw.choice(files), draw.choice(["flip", "flip", "cut", "lose", "swap"])
    content = bytearray(path.read_bytes())
    if how == "flip":
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
    elif how == "cut":
        path.write_bytes(content[: draw.randrange(len(content))])
    elif how == "lose":
        path.unlink()
    else:
        other = draw.choice(files)
        path.write_bytes(other.read_bytes())


def flips(folder, size, seed, only=None):
    """E: one bit of a sealed folder flipped."""
    result = Result("flips", "one bit of a sealed folder flipped", seed, size)
    draw = random.Random(seed)
    sealed = Path(folder) / "sealed"
    with new_folder(sealed, step=1) as part:
        for name in ("model.safetensors", "config.json", "optimizer.pt"):
            (part / name).write_bytes(draw.randbytes(2000))
    files = sorted(sealed.iterdir())
    for case in cases(size, only):
        draw = random.Random(f"{seed} {case}")
        path = draw.choice(files)
        before = path.read_bytes()
        content = bytearray(before)
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        try:
            verify(sealed)
            result.count(case, f"a bit of {path.name} was not missed")
        except UserError as error:
            result.count(case, "several lines" if "\n" in str(error) else "", detected=True)
        path.write_bytes(before)
    return result


def numbers(folder, size, seed, only=None):
    """G: NaN, infinity and minus infinity at five places of a step, in two dtypes."""
    from shunter.training.guards import NaNGuard, not_finite
    from tests.training.test_guards import SITES, Plant, make_model, train

    result = Result("numbers", "NaN and infinities in a step of a Trainer", seed, size)
    for case in cases(size, only):
        draw = random.Random(f"{seed} {case}")
        site, value = draw.choice(SITES), draw.choice([float("nan"), float("inf"), -float("inf")])
        step, dtype = draw.randrange(1, 7), draw.choice([torch.float32, torch.bfloat16])

        def work(site=site, value=value, step=step, dtype=dtype, case=case):
            torch.manual_seed(case)
            model, guard, plant = make_model(dtype), NaNGuard(), Plant(site, value, [step])
            train(folder, model, plant, [guard])
            right = guard.skipped == [step] and plant.same[step] and not not_finite(model)
            return 0 if right and sum(plant.same.values()) == 1 else 1

        ended = in_child(work)
        result.count(case, "" if ended.code == 0 else f"{value} at {site} in {dtype}: {ended.code} {ended.line}")
    return result


def spikes(folder, size, seed, only=None):
    """H: a leap planted in a falling, noisy loss; and as many losses without one."""
    result = Result("spikes", "a leap in 400 falling, noisy losses; no false alarm in as many without", seed, size)
    for case in cases(size, only):
        draw = torch.Generator().manual_seed(seed + case)
        step = torch.arange(400, dtype=torch.float64)
        quiet = 2 + 5 * torch.exp(-step / 150) + 0.1 * torch.randn(400, dtype=torch.float64, generator=draw)
        at = 40 + int(torch.randint(360, (), generator=draw))
        leap = quiet.clone()
        leap[at] += 1.5
        found = []
        for values in (quiet, leap):
            alarm = SpikeAlarm()
            found.append([i for i, value in enumerate(values.tolist()) if alarm.note(value) is not None])
        result.count(case, "" if found == [[], [at]] else f"planted at {at}, heard at {found}", detected=True)
    return result


def loads(folder, size, seed, only=None):
    """I: an expert that dies or a layer that collapses, heard within 50 steps; and as many healthy layers."""
    what = "a dead expert or a collapse heard within 50 steps; no false alarm in as many without"
    result = Result("loads", what, seed, size)
    for case in cases(size, only):
        draw = torch.Generator().manual_seed(seed + case)
        experts, tokens = 8 << case % 3, 2048
        healthy = (0.3 * torch.randn(experts, generator=draw)).softmax(-1)
        planted = healthy.clone()
        planted[int(torch.randint(experts, (), generator=draw))] = 0.0 if case % 2 else 50.0
        heard = []
        for weights in (healthy, planted):
            alarm = LoadAlarm()
            heard.append(None)
            for step in range(50):
                load = torch.multinomial(weights, tokens, True, generator=draw).bincount(minlength=experts)
                if alarm.note("layer", load, 1) and heard[-1] is None:
                    heard[-1] = step
        right = heard[0] is None and heard[1] is not None
        result.count(case, "" if right else f"healthy heard at {heard[0]}, planted at {heard[1]}", detected=True)
    return result


VALUES = [
    "1",
    "-1",
    "0",
    "1e400",
    ".nan",
    "true",
    "null",
    "[]",
    "{}",
    "'x'",
    "[1,2]",
    "{a: 1}",
    "1e-3",
    "-",
    "9" * 30,
    "ü",
    "!!x 1",
]


def settings(folder, size, seed, only=None):
    """P: wrong settings, one to three at a time: a configuration, or one line."""
    result = Result("settings", "settings of wrong names, types and ranges", seed, size)
    keys = ["nothing", "training", "sparse.options.jitter", "sparse.options.nothing"]
    for name, section in TextConfig.model_fields.items():
        inner = getattr(section.annotation, "model_fields", None)
        keys += [f"{name}.{key}" for key in inner] if inner else [name]
    for case in cases(size, only):
        draw = random.Random(f"{seed} {case}")
        given = [f"{draw.choice(keys)}={draw.choice(VALUES)}" for _ in range(draw.randrange(1, 4))]
        try:
            load_config(TextConfig, None, given)
            result.count(case, "")
        except UserError as error:
            result.count(case, "several lines" if "\n" in str(error) else "", detected=True)
        except Exception as error:
            result.count(case, f"{given}: {error!r}")
    return result


CAMPAIGNS = {
    "kills": (kills, 5000),
    "crash_points": (crash_points, 10**6),
    "chains": (chains, 200),
    "disks": (disks, 1000),
    "damage": (damage, 1000),
    "flips": (flips, 10000),
    "numbers": (numbers, 216),
    "spikes": (spikes, 100),
    "loads": (loads, 50),
    "settings": (settings, 20000),
}
"""Each campaign and its full size."""
assert BROKEN not in (0, 1, 2, 130)
