"""Campaigns A to D: runs that are killed, lose power, are stopped, or cannot write; all must end in the same bits."""

import errno
import functools
import os
import random
import shutil
import signal
import subprocess

from shunter.recipes import run as engine
from tests.campaigns.campaign import drawn
from tests.campaigns.processes import Points, in_child
from tests.campaigns.runs import KINDS, STEPS, fresh, job


def kills(result, folder, cases, seed):
    """A: SIGKILL at random times, up to five in a run, of which the later ones meet it resumed."""
    for case in cases:
        draw = drawn(seed, case)
        work = job(folder, draw.choice(list(KINDS)))
        with fresh(folder) as run:
            killed = 0
            for again in range(draw.randrange(1, 6)):
                ended = work.go(run, kill_after=draw.uniform(0.0, work.seconds / (2 if again else 1)))
                killed += ended.code == -signal.SIGKILL
                if ended.code == 0:
                    break
            result.count(case, work.finish(run), faults=killed)


def crash_points(result, folder, cases, seed):
    """B: SIGKILL before each operation on files of a first and of a resumed run; twice with a power loss, too.

    The report is drawn, which takes half of the time, in those alone that come to it.
    """
    points = _points(job(folder, "bias", pages=True), seed)
    for case in cases:
        if case >= 3 * len(points):
            break
        (resumed, at, pages), power = points[case % len(points)], case // len(points)
        work = job(folder, "bias", pages=pages)
        with fresh(folder) as run:
            known = _stopped(work, run) if resumed else {}
            ended = in_child(_crashing(work, run, at, known))
            if ended.code != -signal.SIGKILL:
                result.count(case, f"no crash at point {at}, resumed: {resumed}: exit code {ended.code}: {ended.line}")
                continue
            if power:
                _lose_power(run, drawn(seed, case))
            result.count(case, work.finish(run))


def _points(work, seed):
    """The points of a first and of a resumed run, shuffled: whether resumed, which, and if the report is begun."""
    points = []
    for resumed in (False, True):
        with fresh(work.folder) as run:
            if resumed:
                _stopped(work, run)
            drawing, count = map(int, in_child(_counted(work, run)).line.split())
            points += [(resumed, at, at >= drawing) for at in range(count)]
    random.Random(seed).shuffle(points)
    return points


def _stopped(work, run):
    """Copy a stopped run; the files in it that were synced, as `Points` has them."""
    shutil.copytree(work.origin, run)
    synced = _synced(work.origin)
    files = [path for path in run.rglob("*") if path.is_file()]
    inodes = {path.stat().st_ino: (work.origin / path.relative_to(run)).stat().st_ino for path in files}
    return {inode: synced[before] for inode, before in inodes.items() if before in synced}


def _counted(work, run):
    """Prints the number of the first point of the report, or of all without one; and how many points there are."""

    def child():
        points, first = Points(run), []

        def heard(inner, *given):
            first.append(points.count)
            return inner(*given)

        for name in ("write_report", "write_picture"):
            setattr(engine, name, functools.partial(heard, getattr(engine, name)))
        code = work.work(run)()
        print(f"\n{(first or [points.count])[0]} {points.count}", flush=True)
        return code

    return child


def _crashing(work, run, at, known):
    def crash(points):
        points.write()
        os.kill(os.getpid(), signal.SIGKILL)

    def child():
        Points(run, crash, at).synced.update(known)
        return work.work(run)()

    return child


def _synced(run):
    rows = [tuple(map(int, line.split())) for line in Points.kept(run).read_text().splitlines()]
    return {inode: (size, changed) for inode, size, changed in rows}


def _lose_power(run, draw):
    """Cut each file that was changed after its last sync: to nothing, somewhere, or to zeros."""
    synced = _synced(run)
    for path in [path for path in run.rglob("*") if path.is_file()] if run.exists() else []:
        status = path.stat()
        if synced.get(status.st_ino) != (status.st_size, status.st_mtime_ns) and status.st_size:
            how, kept = draw.randrange(3), draw.randrange(status.st_size)
            content = path.read_bytes()
            path.write_bytes(b"" if how == 0 else content[:kept] if how == 1 else bytes(len(content)))


def chains(result, folder, cases, seed):
    """C: five stops and resumptions of one run."""
    for case in cases:
        draw = drawn(seed, case)
        work = job(folder, draw.choice(list(KINDS)))
        stops = [("dense", step) for step in sorted(draw.sample(range(1, STEPS), 2))]
        stops += [("sparse", step) for step in sorted(draw.sample(range(1, STEPS), 3))]
        with fresh(folder) as run:
            codes = [work.stopped(run, step, model).code for model, step in stops]
            result.count(case, work.finish(run) if codes == [130] * 5 else f"the stops ended with {codes}", faults=1)


ERRORS = [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EACCES, errno.EMFILE, errno.EROFS]


def disks(result, folder, cases, seed):
    """D: an operation on files fails with an error of the system; on a file system of its own, the disk is full."""
    work = job(folder, "topk")
    total = None
    for case in cases:
        draw = drawn(seed, case)
        with fresh(folder) as run:
            if case % 2 and mounted(run.parent, draw.randrange(4, 1200)):
                try:
                    ended = work.go(run)
                    subprocess.run(["mount", "-o", "remount,size=100m", run.parent], check=True)
                    fault = _told(ended) or work.finish(run)
                finally:
                    subprocess.run(["umount", run.parent], check=True)
            else:
                total = total or int(in_child(_counted(work, run.with_name("counted"))).line.split()[1])
                shutil.rmtree(run.with_name("counted"), ignore_errors=True)
                ended = in_child(_failing(work, run, draw.randrange(total), draw.choice(ERRORS)))
                fault = _told(ended) or work.finish(run)
            result.count(case, fault)


def mounted(folder, kilobytes):
    """Whether a file system of so many kilobytes could be mounted at a folder: not without the right to."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


def _failing(work, run, at, number):
    def fail(points):
        raise OSError(number, os.strerror(number))

    def child():
        Points(run, fail, at)
        return work.work(run)()

    return child


def _told(ended):
    """What is wrong with how a verb ended: it is done, or has failed in one line."""
    if ended.code == 0 or (ended.code in (1, 2) and ended.line.startswith("shunter train: ")):
        return ""
    return f"exit code {ended.code}: {ended.line}"
