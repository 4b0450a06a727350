"""Experts larger than memory: stacks of E matrices of which a bounded number is in memory, and the files of the rest.

A stack is an ordinary tensor (E, …) whose pages are there for some of its experts alone: one is read into its own place
before it computes, and the pages of the least recently used are given back. So every backend runs as it is, on the same
addresses and strides as on a whole stack, to the same bits. What is not in memory reads as zeros.
"""

from __future__ import annotations

import mmap
import os
import sys
import tempfile
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..untrusted import open_file

__all__ = ["Extent", "HeldFile", "PagedParameter", "Residency", "Stacks", "lacks", "spilled"]

PAGE = mmap.PAGESIZE

READERS = 2  # a disk is faster with two reads waiting than with one


class HeldFile:
    """A file, opened once: its bytes are read as long as it is the file that was opened, and unchanged.

    Args:
        path: of the file; a file that takes its place later is another, and not read.

    Raises:
        UserError: where it is no regular file.
        OSError: where it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stream: Any = open_file(path)
        self._state = self._now()
        _without_readahead(self._stream)

    def _now(self) -> tuple[int, int]:
        state = os.fstat(self._stream.fileno())
        return state.st_size, state.st_mtime_ns

    def read(self, start: int, target: memoryview) -> None:
        """Fill the target with the bytes from `start` on, which the page cache then forgets.

        Raises:
            UserError: where the file has changed since it was opened.
            OSError: where it cannot be read.
        """
        handle, done = self._stream.fileno(), 0
        while done < len(target):
            found = os.preadv(handle, [target[done:]], start + done)
            if not found:
                break
            done += found
        if done < len(target) or self._now() != self._state:
            raise UserError(
                f"{self.path}: has changed since the model was loaded, which reads its experts from it; load it again"
            )
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(handle, start, len(target), os.POSIX_FADV_DONTNEED)


def _without_readahead(stream: Any) -> None:
    """Have the system read what is asked for and not what lies behind it, which is another expert."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_RANDOM)


class _Spill(HeldFile):
    """A file without a name, on the disk of temporary files, gone with the process; tensors are written to its end."""

    def __init__(self) -> None:
        self._stream = tempfile.TemporaryFile(prefix="shunter-experts-")
        self.path = Path(tempfile.gettempdir())
        self._end, self._state = 0, (0, 0)
        _without_readahead(self._stream)

    def append(self, tensor: Tensor) -> int:
        """Write a contiguous tensor on the CPU; where its first byte lies."""
        data = tensor.detach().reshape(-1).view(torch.uint8).numpy().data
        start, done = self._end, 0
        while done < len(data):
            done += os.pwrite(self._stream.fileno(), data[done : done + 2**26], start + done)
        self._end += len(data)
        self._state = self._now()
        return start


@dataclass(frozen=True)
class Extent:
    """A run of bytes in a file.

    Args:
        file: that holds it.
        start: where its first byte lies.
        nbytes: how many it is.
    """

    file: HeldFile
    start: int
    nbytes: int


Sources = Sequence[Sequence[Extent]]
"""By expert the runs of bytes that make up its matrix, in order."""


def spilled(tensors: dict[str, Tensor]) -> dict[str, Sources]:
    """Write stacks (E, …) of experts to a temporary file without a name, and say where each expert lies.

    Raises:
        OSError: where the disk of temporary files (TMPDIR) has no room for them.
    """
    file = _Spill()
    found: dict[str, Sources] = {}
    for name, tensor in tensors.items():
        start, size = file.append(tensor), tensor[0].nbytes
        found[name] = [[Extent(file, start + e * size, size)] for e in range(tensor.shape[0])]
    return found


class PagedParameter(nn.Parameter):
    """A parameter of which some experts are in memory; copying or pickling it would make zeros of the others."""

    def __deepcopy__(self, memo: Any) -> NoReturn:
        raise _not_whole("copied")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise _not_whole("pickled")


def _not_whole(what: str) -> UserError:
    return UserError(
        f"a model whose experts are offloaded cannot be {what}: most of them are in a file; load it without offload"
    )


class _Pages:
    """Address space for a tensor, without memory; and which of its pages are somebody's.

    Args:
        shape, dtype: of the tensor.
        address: the tensor begins where this address does within 64 bytes, for products round otherwise elsewhere.
    """

    def __init__(self, shape: torch.Size, dtype: torch.dtype, address: int = 0) -> None:
        self.lead = address % 64
        size = self.lead + shape.numel() * dtype.itemsize
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        self._map = mmap.mmap(-1, size, flags=flags)
        if hasattr(mmap, "MADV_NOHUGEPAGE"):  # a huge page would bring neighbours along
            self._map.madvise(mmap.MADV_NOHUGEPAGE)
        self.tensor = torch.frombuffer(self._map, dtype=dtype, count=shape.numel(), offset=self.lead).view(shape)
        self.stride = shape[1:].numel() * dtype.itemsize
        self._users: Counter[int] = Counter()

    @property
    def most(self) -> int:
        """The most bytes of memory that one expert takes."""
        return (self.stride + 2 * PAGE - 2) // PAGE * PAGE if (self.lead or self.stride % PAGE) else self.stride

    def _of(self, e: int) -> tuple[int, int]:
        start = self.lead + e * self.stride
        return start, start + self.stride

    def view(self, e: int) -> memoryview:
        """The bytes of expert e."""
        start, end = self._of(e)
        return memoryview(self._map)[start:end]

    def take(self, e: int) -> None:
        """The pages of expert e are used."""
        for page in self._edges(e):
            self._users[page] += 1

    def drop(self, e: int) -> None:
        """Give back the pages of expert e, but those at its ends that a neighbour uses too."""
        edges = self._edges(e)
        for page in edges:
            self._users[page] -= 1
        start = edges[0] if not self._users[edges[0]] else edges[0] + 1
        end = edges[-1] + 1 if not self._users[edges[-1]] else edges[-1]
        if start < end:
            self._map.madvise(mmap.MADV_DONTNEED, start * PAGE, min(end * PAGE, len(self._map)) - start * PAGE)

    def _edges(self, e: int) -> tuple[int, ...]:
        start, end = self._of(e)
        first, last = start // PAGE, (end - 1) // PAGE
        return (first, last) if first != last else (first,)


class Stacks:
    """The matrices of one layer's experts, in stacks that `Residency` fills.

    Args:
        module: holds the parameters, which become `PagedParameter`s.
        sources: by the parameter's name, where its experts are.
        shapes: by the parameter's name, its shape (E, …), dtype, and an address that it is to be aligned like.
    """

    def __init__(
        self,
        module: nn.Module,
        sources: dict[str, Sources],
        shapes: dict[str, tuple[torch.Size, torch.dtype, int]],
    ) -> None:
        self.sources = sources
        self.pages = {key: _Pages(*shape) for key, shape in shapes.items()}
        self.num_experts = next(iter(shapes.values()))[0][0]
        self.parameters = {key: PagedParameter(p.tensor, requires_grad=False) for key, p in self.pages.items()}
        for key, parameter in self.parameters.items():
            module._parameters.pop(key, None)
            module.register_parameter(key, parameter)

    @property
    def expert_bytes(self) -> int:
        """Of the matrices of one expert."""
        return sum(pages.stride for pages in self.pages.values())

    @property
    def resident_bytes(self) -> int:
        """What one expert in memory takes at most, in whole pages."""
        return sum(pages.most for pages in self.pages.values())

    def read(self, e: int, into: dict[str, memoryview] | None = None) -> None:
        """Read the matrices of expert e into their place, or into other memory."""
        for key, pages in self.pages.items():
            target, done = into[key] if into else pages.view(e), 0
            for extent in self.sources[key][e]:
                extent.file.read(extent.start, target[done : done + extent.nbytes])
                done += extent.nbytes
            assert done == pages.stride

    def take(self, e: int) -> None:
        """Expert e is about to be read."""
        for pages in self.pages.values():
            pages.take(e)

    def drop(self, e: int) -> None:
        """Give back the memory of expert e."""
        for pages in self.pages.values():
            pages.drop(e)


Key = tuple[int, int]
"""A layer and an expert of it."""


class Residency:
    """Which experts of a model's layers are in memory: what is used is read, the least recently used leave.

    Args:
        memory: bytes that all experts in memory may take.
        prefetch: whether experts of the next layer are read while a layer computes: those that followed one of its
            present experts more often than not.

    Attributes:
        hits, misses: experts that a forward of a layer found in memory, and that it had to wait for; each once however
            many tokens chose it.
        read_bytes: from files, in all.
    """

    def __init__(self, memory: int, prefetch: bool = True) -> None:
        self.memory, self.prefetch = memory, prefetch
        self.hits = self.misses = self.read_bytes = 0
        self._layers: list[Stacks] = []
        self._resident: OrderedDict[Key, int] = OrderedDict()  # bytes, the least recently used first
        self._arriving: dict[Key, Future[None]] = {}
        self._waited: set[Key] = set()  # of the arriving ones, those that a forward waits for
        self._used = 0
        self._followed: list[Tensor | None] = []  # by layer (E, 1 + E of the next): how often each was, and what then
        self._last: tuple[int, list[int]] | None = None
        self._one_forward, self._state = threading.RLock(), threading.RLock()
        self._readers = ThreadPoolExecutor(READERS, "shunter-experts")

    def add(self, stacks: Stacks) -> int:
        """A layer more, in the order in which they run; its number."""
        self._layers.append(stacks)
        self._followed.append(None)
        return len(self._layers) - 1

    @property
    def used(self) -> int:
        """The bytes of the experts that are in memory."""
        return self._used

    @contextmanager
    def holding(self, layer: int, experts: list[int]) -> Iterator[None]:
        """Within the block these experts of a layer are in memory; one forward at a time.

        Those that do not fit together are put in a temporary file that is mapped for the block, which the system may
        write out and read again: slow, and the same bits.
        """
        stacks = self._layers[layer]
        with self._one_forward:
            if len(experts) * stacks.resident_bytes > self.memory:
                with self._mapped(stacks, experts):
                    yield
                return
            self._bring(layer, experts)
            self._look_ahead(layer, experts)
            yield

    def _bring(self, layer: int, experts: list[int]) -> None:
        keys = [(layer, e) for e in experts]
        with self._state:
            self._waited = set(keys)
            here = [key for key in keys if key in self._resident]
            for key in here:
                self._resident.move_to_end(key)
            self.hits += len(here)
            self.misses += len(keys) - len(here)
        started = [self._start(key, keys, wait=True) for key in keys]
        for arriving in started:
            if arriving is not None:
                arriving.result()

    def _start(self, key: Key, keep: list[Key], wait: bool) -> Future[None] | None:
        """Begin to read an expert that is not there, in the place of those that were used longest ago.

        Args:
            key: the expert.
            keep: these stay.
            wait: until reads for others have ended, where there is no room before.

        Returns:
            What to wait for; None where it is there, or nothing was begun.
        """
        size = self._layers[key[0]].resident_bytes
        while True:
            with self._state:
                if key in self._resident or key in self._arriving:
                    return self._arriving.get(key)
                keeping = {*keep, *self._waited}
                while self._used + size > self.memory:
                    old = next((one for one in self._resident if one not in keeping), None)
                    if old is None:
                        break
                    self._used -= self._resident.pop(old)
                    self._layers[old[0]].drop(old[1])
                if self._used + size <= self.memory:
                    self._used += size
                    self._layers[key[0]].take(key[1])
                    arriving = self._arriving[key] = self._readers.submit(self._read, key, size)
                    return arriving
                others = [one for other, one in self._arriving.items() if other not in self._waited]
            if not wait or not others:
                return None
            for one in others:
                one.exception()

    def _read(self, key: Key, size: int) -> None:
        stacks = self._layers[key[0]]
        try:
            stacks.read(key[1])
        except BaseException:
            with self._state:
                stacks.drop(key[1])
                self._used -= size
                del self._arriving[key]
            raise
        with self._state:
            self.read_bytes += stacks.expert_bytes
            self._resident[key] = size
            del self._arriving[key]

    def _look_ahead(self, layer: int, experts: list[int]) -> None:
        """Note what followed the layer before, and begin to read what is likely to follow this one."""
        if not self.prefetch:
            return
        if self._last is not None and self._last[0] == (layer - 1) % len(self._layers):
            before, counts = self._last[1], self._followed[self._last[0]]
            if counts is None:
                shape = self._layers[self._last[0]].num_experts, 1 + self._layers[layer].num_experts
                with torch.inference_mode(False):  # what inference mode makes could not be written to outside of it
                    counts = self._followed[self._last[0]] = torch.zeros(shape)
            counts *= 0.99  # what was long ago counts less
            counts[before, 0] += 1
            counts[torch.tensor(before)[:, None], 1 + torch.tensor(experts)] += 1
        self._last = layer, experts
        counts = self._followed[layer]
        if counts is None:
            return
        coming, few = (layer + 1) % len(self._layers), len(experts)
        chance = (counts[experts, 1:] / counts[experts, :1].clamp_min(1)).amax(0)
        likely = [(coming, e) for e in chance.argsort(descending=True)[:few].tolist() if chance[e] > 0.5]
        room = self.memory - few * self._layers[layer].resident_bytes
        fit = likely[: max(0, room // self._layers[coming].resident_bytes)]
        for key in fit:
            self._start(key, fit, wait=False)

    @contextmanager
    def _mapped(self, stacks: Stacks, experts: list[int]) -> Iterator[None]:
        """The layer's stacks in a temporary file, with these experts."""
        with self._state:
            self.misses += len(experts)
        own = {key: pages.tensor for key, pages in stacks.pages.items()}
        with tempfile.TemporaryFile(prefix="shunter-experts-") as file:
            bounds, end = {}, 0
            for key, pages in stacks.pages.items():
                start = -(-end // PAGE) * PAGE + pages.lead
                end = start + own[key].nbytes
                bounds[key] = start, end
            os.posix_fallocate(file.fileno(), 0, end)  # a full disk is an error here, and would kill later
            memory = mmap.mmap(file.fileno(), end)
        whole = memoryview(memory)
        try:
            for e in experts:
                at = {key: start + e * stacks.pages[key].stride for key, (start, _) in bounds.items()}
                stacks.read(e, {key: whole[a : a + stacks.pages[key].stride] for key, a in at.items()})
                self.read_bytes += stacks.expert_bytes
            with torch.inference_mode(False):
                for key, (start, _) in bounds.items():
                    like = own[key]
                    there = torch.frombuffer(memory, dtype=like.dtype, count=like.numel(), offset=start)
                    stacks.parameters[key].data = there.view(like.shape)
            yield
        finally:
            with torch.inference_mode(False):
                for key, data in own.items():
                    stacks.parameters[key].data = data
            whole.release()


def lacks() -> str | None:
    """Why memory cannot be given back here page by page; None where it can."""
    return None if sys.platform == "linux" else f"experts are offloaded on Linux alone, not on {sys.platform}"
