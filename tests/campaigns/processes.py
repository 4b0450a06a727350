"""A piece of work in a forked process, where torch is loaded already: its exit code and what it said, killed or not."""

import contextlib
import gc
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

LIMIT = 300.0  # seconds; a process hangs that has used more of the processor, or none for so long
BROKEN = 70  # the exit code of a traceback


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code, minus a signal's number, or None where it hung; and its standard error."""

    code: int | None
    said: str

    @property
    def line(self):
        """The last line that it said."""
        return (self.said.strip().splitlines() or [""])[-1]


def in_child(work, *, kill_after=None, limit=LIMIT):
    """Run work() -> exit code in a forked process; SIGKILL it after some seconds, if asked to."""
    sys.stdout.flush(), sys.stderr.flush()
    gc.freeze()  # or the child would copy what it collects
    with tempfile.TemporaryFile() as said:
        pid = os.fork()
        if pid == 0:
            os.dup2(said.fileno(), 1), os.dup2(said.fileno(), 2)
            sys.stdout = os.fdopen(1, "w", closefd=False)
            sys.stderr = os.fdopen(2, "w", closefd=False)
            tqdm.set_lock(threading.RLock())  # not the parent's, which a child that was killed may hold for ever
            code = BROKEN
            try:
                code = work()
            except BaseException:
                traceback.print_exc()
            finally:
                with contextlib.suppress(OSError):  # or the child would go on as its parent
                    sys.stdout.flush(), sys.stderr.flush()
                os._exit(code)
        start, status = time.monotonic(), None
        looked, moved, spent = start, start, 0.0
        while status is None:
            ended, value = os.waitpid(pid, os.WNOHANG)
            if ended:
                status = os.waitstatus_to_exitcode(value)
            elif kill_after is not None and time.monotonic() - start >= kill_after:
                os.kill(pid, signal.SIGKILL)
                status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            elif spent > limit or time.monotonic() - moved > limit:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                break
            else:
                time.sleep(0.002)
                if (now := time.monotonic()) - looked > 1:
                    looked, before, spent = now, spent, _spent(pid)
                    moved = now if spent > before else moved
        said.seek(0)
        return Ended(status, said.read().decode(errors="replace"))


def _spent(pid):
    """The seconds of the processor that a process has used: on a busy machine others pass meanwhile."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


class Points:
    """Numbers the operations on files below a folder in this process, and does something before one of them.

    An operation is a file opened to be written, a rename, a removal, a folder made, a sync of a file or folder. What
    other languages write (tensors) is between two points.

    Args:
        root: the folder.
        act: called as act(points) before operation number `at`, counted from 0; an OSError of it fails the operation.
        at: None only counts.

    Attributes:
        count: the operations so far.
        synced: inode -> (size, time of change) of each file when it was last synced.
    """

    def __init__(self, root, act=None, at=None):
        self.root, self.act, self.at = str(root), act, at
        self.count, self.synced, self._inside = 0, {}, False
        self._fsync = os.fsync
        os.fsync = self._sync
        sys.addaudithook(self._hear)

    @staticmethod
    def kept(root):
        """The file beside the folder that `write` leaves."""
        return Path(root).with_name(f"{Path(root).name}.synced")

    def write(self):
        """Leave what was synced, a line a file: inode, size, time of change."""
        lines = [f"{inode} {size} {changed}" for inode, (size, changed) in self.synced.items()]
        self._inside = True
        self.kept(self.root).write_text("\n".join(lines))

    def _hear(self, event, args):
        if event == "open":
            path, _, flags = args
            if not isinstance(path, str) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
            self._point(path)
        elif event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir") and isinstance(args[0], str | os.PathLike):
            self._point(os.fspath(args[0]))

    def _sync(self, descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        self._point(path)
        self._fsync(descriptor)
        status = os.fstat(descriptor)
        self.synced[status.st_ino] = (status.st_size, status.st_mtime_ns)

    def _point(self, path):
        if self._inside or (os.path.isabs(path) and not path.startswith(self.root)):
            return
        number, self.count = self.count, self.count + 1
        if number == self.at:
            self._inside = True
            try:
                self.act(self)
            finally:
                self._inside = False
