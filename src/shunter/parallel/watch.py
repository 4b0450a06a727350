"""Signs of life of every process: an exchange that failed in, the ranks that are gone, stopped or elsewhere out.

An error of a collective names no rank. Here each process writes to the store of the group, once a second and over a
connection of its own, how many exchanges it has done and where it is; who finds one failed reads that of all.
"""

from __future__ import annotations

import atexit
import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from ..errors import LostRank, one_line

__all__ = ["at", "begin", "named_errors"]

PERIOD = 1.0  # seconds between signs of life
SILENCE = 4.0  # seconds without one after which a process does not live


class _Watch:
    """The signs of life of this process, and a look at those of the others."""

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self.store, self.rank, self.size = store, rank, size
        self.process = f"process {os.getpid()} on {socket.gethostname()}"
        self.done, self.place, self.failed, self.beats = 0, "the start", False, 0
        self.ended = threading.Event()
        store.set_timeout(timedelta(seconds=SILENCE))
        self.write()
        self.thread = threading.Thread(target=self._go_on, daemon=True, name="shunter signs of life")
        self.thread.start()
        atexit.register(self.end)

    def end(self) -> None:
        self.ended.set()
        self.thread.join(2 * SILENCE)
        del self.store

    def write(self) -> None:
        self.beats += 1
        said = [self.beats, self.done, self.place, self.failed, self.process]
        self.store.set(f"shunter/{self.rank}", json.dumps(said))

    def _go_on(self) -> None:
        with suppress(Exception):  # the store ends with the process that holds it
            while not self.ended.wait(PERIOD):
                self.write()

    def read(self) -> dict[int, list[Any]]:
        """What each rank said last."""
        said = {}
        for rank in range(self.size):
            with suppress(Exception):
                said[rank] = json.loads(self.store.get(f"shunter/{rank}"))
        return said

    def look(self, found: list[str]) -> None:
        """Put in words who is missing."""
        self.failed = True
        with suppress(Exception):
            self.write()
        before = self.read()
        self.ended.wait(SILENCE)
        after = self.read()
        known = after or before
        silent = [rank for rank in known if not known[rank][3] and known[rank][0] == before.get(rank, [None])[0]]
        late = [rank for rank in known if rank not in silent and known[rank][1] < self.done and not known[rank][3]]
        for rank in silent:
            found.append(f"rank {rank} ({known[rank][4]}) gives no sign of life: it was killed, or is stopped")
        for rank in () if silent else late:
            found.append(
                f"rank {rank} ({known[rank][4]}) lives, and has not come to this exchange: it is at {known[rank][2]}, "
                f"with {known[rank][1]} exchanges to this one's {self.done}. Every rank runs the same forwards and "
                "backwards, evaluation included"
            )


_WATCH: dict[str, Any] = {}
"""The one of this process, which has one life."""


def begin() -> None:
    """Give signs of life from now on, where there are several processes; once."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    store: Any = _get_default_store()
    if _WATCH.get("of") is store:
        return
    with suppress(Exception):  # a store that cannot be shared by threads: errors then name no rank
        _WATCH.update(of=store, watch=_Watch(store.clone(), dist.get_rank(), dist.get_world_size()))


def at(place: str) -> None:
    """Note that this process comes to its next exchange, and where."""
    watch: _Watch | None = _WATCH.get("watch")
    if watch is not None:
        watch.done, watch.place = watch.done + 1, place


@contextmanager
def named_errors() -> Iterator[None]:
    """Within the block, an error of a collective becomes a `LostRank` that says which ranks are missing.

    Raises:
        LostRank: a few seconds after the collective has failed; where nobody is missing, its own error.
    """
    try:
        yield
    except LostRank:
        raise
    except RuntimeError as error:
        words = str(error).lower()
        if not any(word in words for word in ("gloo", "nccl", "timed out", "connection", "store", "socket")):
            raise
        watch: _Watch | None = _WATCH.get("watch")
        if watch is None:
            raise
        found: list[str] = []
        looking = threading.Thread(target=watch.look, args=(found,), daemon=True)
        looking.start()
        looking.join(4 * SILENCE)
        if looking.is_alive():
            found = ["rank 0, whose process holds the group's store, does not answer: it was killed, or is stopped"]
        if not found:
            raise
        raise LostRank(f"rank {watch.rank} at {watch.place}: {'; '.join(found)} ({one_line(error)[:120]})") from error
