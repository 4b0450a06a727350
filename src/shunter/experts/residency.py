"""Experts larger than memory: stacks of E matrices of which a bounded number is in memory, and the files of the rest.

A stack is an ordinary tensor (E, …) whose pages are there for some of its experts alone: one is read into its own place
before it computes, and the pages of the least recently used move there, or are given back. So every backend runs as it
is, on the same addresses and strides as on a whole stack, to the same bits. What is not in memory reads as zeros.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import sys
import tempfile
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import UserError
from ..untrusted import open_file
from .foresight import Foresight

__all__ = ["Extent", "HeldFile", "PagedParameter", "Residency", "Stacks", "lacks", "spilled"]

PAGE = mmap.PAGESIZE

READERS = 2  # a disk is faster with two reads waiting than with one

BLOCK = 4096  # bytes: what a disk reads at least, and where reads past the page cache begin and end

# Of the maps that a process may have (vm.max_map_count, 65530): experts whose pages move take one for each matrix.
MAPS = 2**15

PIECE = 2**20  # bytes of one read at most: what is waited for begins after no more than that of something else


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
        self._direct = _past_the_page_cache(self._stream)

    def _now(self) -> tuple[int, int]:
        state = os.fstat(self._stream.fileno())
        return state.st_size, state.st_mtime_ns

    def read(self, start: int, target: memoryview) -> None:
        """Fill the target with the bytes from `start` on, none of which stays in the page cache.

        Raises:
            UserError: where the file has changed since it was opened.
            OSError: where it cannot be read.
        """
        handle, done = self._stream.fileno(), 0
        while done < len(target):
            read = _read_direct if self._direct else _read_cached
            found = read(handle, start + done, target[done:])
            if found <= 0:
                break
            done += found
        if done < len(target) or self._now() != self._state:
            raise UserError(
                f"{self.path}: has changed since the model was loaded, which reads its experts from it; load it again"
            )
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(handle, start, len(target), os.POSIX_FADV_DONTNEED)


_of_thread = threading.local()


def _buffer() -> memoryview:
    """This thread's memory, in whole blocks, that a file system can fill without the page cache."""
    if not hasattr(_of_thread, "buffer"):
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        _of_thread.buffer = memoryview(mmap.mmap(-1, PIECE + 2 * BLOCK, flags=private))
    found: memoryview = _of_thread.buffer
    return found


def _past_the_page_cache(stream: Any) -> bool:
    """Have reads of a file go past the page cache (O_DIRECT), where its file system can do that; whether it can.

    Filling the page cache and emptying it again takes the processor several times as long as the reading. Where it has
    to be, the system is to read what is asked for and not what lies behind it, which is another expert.
    """
    import fcntl  # not everywhere; `lacks` says where not

    handle = stream.fileno()
    if hasattr(os, "O_DIRECT"):
        flags = fcntl.fcntl(handle, fcntl.F_GETFL)
        try:
            fcntl.fcntl(handle, fcntl.F_SETFL, flags | os.O_DIRECT)
            os.preadv(handle, [_buffer()[:BLOCK]], 0)
            return True
        except OSError:
            fcntl.fcntl(handle, fcntl.F_SETFL, flags)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_RANDOM)
    return False


def _read_cached(handle: int, start: int, target: memoryview) -> int:
    """Read from a file, by way of the page cache, what one read gives; how many bytes."""
    return os.preadv(handle, [target], start)


def _read_direct(handle: int, start: int, target: memoryview) -> int:
    """Read whole blocks from a file's disk into this thread's buffer, and copy what was asked for; how many bytes."""
    buffer, lead = _buffer(), start % BLOCK
    size = min(lead + len(target), len(buffer) - BLOCK)
    found = os.preadv(handle, [buffer[: -(-size // BLOCK) * BLOCK]], start - lead)
    count = max(0, min(found, size) - lead)
    if count:  # numpy lets other threads run meanwhile, as a memoryview does not
        np.frombuffer(target, np.uint8)[:count] = np.frombuffer(buffer, np.uint8)[lead : lead + count]
    return count


class _Spill(HeldFile):
    """A file without a name, on the disk of temporary files, gone with the process; tensors are written to its end."""

    def __init__(self) -> None:
        self._stream = tempfile.TemporaryFile(prefix="shunter-experts-")
        self.path = Path(tempfile.gettempdir())
        self._end, self._state, self._direct = 0, (0, 0), False

    def append(self, tensor: Tensor) -> int:
        """Write a contiguous tensor on the CPU; where its first byte lies."""
        data = tensor.detach().reshape(-1).view(torch.uint8).numpy().data
        start, done = self._end, 0
        while done < len(data):
            done += os.pwrite(self._stream.fileno(), data[done : done + 2**26], start + done)
        self._end += len(data)
        return start

    def seal(self) -> None:
        """Nothing more is written."""
        self._state = self._now()
        self._direct = _past_the_page_cache(self._stream)


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

Piece = tuple[HeldFile, int, memoryview]
"""A file, where to read in it, and the memory to fill."""


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
    file.seal()
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
        self._without_huge_pages(0, len(self._map))
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

    def like(self, other: _Pages) -> bool:
        """Whether an expert's pages here, which no neighbour shares, can be those of an expert of the other tensor."""
        return not self.lead and not other.lead and self.stride == other.stride and not self.stride % PAGE

    def move(self, e: int, other: _Pages, to: int) -> None:
        """Give up the pages of expert e like `drop`, to one of the other tensor that is to be read."""
        for page in self._edges(e):
            self._users[page] -= 1
        if not _moved(self._address(e), other._address(to), self.stride):
            self._map.madvise(mmap.MADV_DONTNEED, e * self.stride, self.stride)
            other._without_huge_pages(to * self.stride, self.stride)

    def _without_huge_pages(self, start: int, size: int) -> None:
        if hasattr(mmap, "MADV_NOHUGEPAGE"):  # a huge page would bring neighbours along
            self._map.madvise(mmap.MADV_NOHUGEPAGE, start, size)

    def _address(self, e: int) -> int:
        return self.tensor.data_ptr() + e * self.stride

    def _edges(self, e: int) -> tuple[int, ...]:
        start, end = self._of(e)
        first, last = start // PAGE, (end - 1) // PAGE
        return (first, last) if first != last else (first,)


@cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    address, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    libc.mremap.argtypes, libc.mremap.restype = [address, size, size, number, address], address
    libc.mmap.argtypes, libc.mmap.restype = [address, size, number, number, number, ctypes.c_long], address
    return libc


def _moved(start: int, target: int, size: int) -> bool:
    """Whether pages are at the target now, and zeros where they were: new pages are zeroed first, which takes longer.

    Raises:
        MemoryError: where the system takes away what is at the target, and cannot put it back.
    """
    libc, fixed, failed = _libc(), 0x10, ctypes.c_void_p(-1).value
    if libc.mremap(start, size, size, 1 | 2 | 4, target) != failed:  # MAYMOVE, FIXED, DONTUNMAP
        return True
    # It may have unmapped the target already.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0) | fixed
    if libc.mmap(target, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0) == failed:
        raise MemoryError(f"no address space for an offloaded expert: {os.strerror(ctypes.get_errno())}")
    return False


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

    def pieces(self, e: int, into: dict[str, memoryview] | None = None) -> list[Piece]:
        """What is to be read for the matrices of expert e to be in their place, or in other memory."""
        found: list[Piece] = []
        for key, pages in self.pages.items():
            target, done = into[key] if into else pages.view(e), 0
            for extent in self.sources[key][e]:
                start, end = extent.start, extent.start + extent.nbytes
                while start < end:
                    size = min(end, (start // PIECE + 1) * PIECE) - start
                    found.append((extent.file, start, target[done : done + size]))
                    start, done = start + size, done + size
            assert done == pages.stride
        return found

    def take(self, e: int) -> None:
        """Expert e is about to be read."""
        for pages in self.pages.values():
            pages.take(e)

    def drop(self, e: int) -> None:
        """Give back the memory of expert e."""
        for pages in self.pages.values():
            pages.drop(e)

    def move(self, e: int, other: Stacks, to: int) -> None:
        """Give the memory of expert e to another that is to be read, or back where they differ."""
        for key, pages in self.pages.items():
            theirs = other.pages.get(key)
            if theirs is not None and pages.like(theirs):
                pages.move(e, theirs, to)
            else:
                pages.drop(e)


Key = tuple[int, int]
"""A layer and an expert of it."""


class _Arrival:
    """An expert on its way into memory.

    Args:
        pieces: that no reader has begun, the last of them first.
        due: the forward of a layer that needs it, by number; never where its layer chose others.
    """

    def __init__(self, pieces: list[Piece], due: float) -> None:
        self.pieces, self.due = pieces, due
        self.begun, self.reading = False, 0
        self.error: BaseException | None = None


class Residency:
    """Which experts of a model's layers are in memory: what is used is read, the least recently used leave.

    An expert is read in pieces, by a few threads and by the forward that waits for it; what a forward waits for comes
    first, then what the nearest layer is foreseen to need.

    Args:
        memory: bytes that all experts in memory may take.
        foresight: which experts the next layers will choose; they are read while a layer computes. None: not.

    Attributes:
        hits, misses: experts that a forward of a layer found in memory, and that it had to wait for; each once however
            many tokens chose it.
        ahead: of both, those whose reading had begun in foresight.
        read_bytes: from files, in all.
        waited_seconds: that forwards spent waiting for experts on their way, and reading them themselves meanwhile.
    """

    def __init__(self, memory: int, foresight: Foresight | None = None) -> None:
        self.memory, self.foresight = memory, foresight
        self.hits = self.misses = self.ahead = self.read_bytes = 0
        self.waited_seconds = 0.0
        self._layers: list[Stacks] = []
        self._resident: OrderedDict[Key, int] = OrderedDict()  # bytes, the least recently used first
        self._arriving: dict[Key, _Arrival] = {}
        self._in_use: set[Key] = set()  # of the layer that computes
        self._foreseen: dict[int, dict[Key, list[int]]] = {}  # by layer what was not in memory, and how far ahead
        self._used = self._now = self._maps = 0
        self._one_forward, self._state = threading.RLock(), threading.Condition()
        self._readers = ThreadPoolExecutor(READERS, "shunter-experts")

    def add(self, stacks: Stacks) -> int:
        """A layer more, in the order in which they run; its number."""
        self._layers.append(stacks)
        self._maps += stacks.num_experts * len(stacks.pages)
        return len(self._layers) - 1

    @property
    def used(self) -> int:
        """The bytes of the experts that are in memory."""
        return self._used

    @contextmanager
    def holding(self, layer: int, experts: list[int], x: Tensor | None = None, top_k: int = 1) -> Iterator[None]:
        """Within the block these experts of a layer are in memory; one forward at a time.

        Those that do not fit together are put in a temporary file that is mapped for the block, which the system may
        write out and read again: slow, and the same bits.

        Args:
            layer: by number.
            experts: of the layer.
            x: the hidden states (…, d) that the layer is given, to foresee what later layers will choose.
            top_k: experts a token.
        """
        stacks = self._layers[layer]
        with self._one_forward:
            if len(experts) * stacks.resident_bytes > self.memory:
                with self._mapped(stacks, experts):
                    yield
                return
            waited = self._ask(layer, experts)
            if self.foresight is not None and x is not None:
                self._look_ahead(layer, self.foresight, x, top_k)
            start = time.perf_counter()
            self._wait_for(waited)
            self.waited_seconds += time.perf_counter() - start
            yield

    def _ask(self, layer: int, experts: list[int]) -> list[_Arrival]:
        """Begin to read those of a layer's experts that are not there; what to wait for."""
        keys = [(layer, e) for e in experts]
        with self._state:
            self._now += 1
            self._in_use = set(keys)
            self._judge(layer)
            missing = [key for key in keys if key not in self._resident]
            self.hits += len(keys) - len(missing)
            self.misses += len(missing)
            for key in keys:
                if key in self._resident:
                    self._resident.move_to_end(key)
            for key in missing:
                while not self._begin(key, self._now, self._in_use):
                    self._state.wait()
            return [self._arriving[key] for key in missing if key in self._arriving]

    def _begin(self, key: Key, due: float, keep: set[Key]) -> bool:
        """Begin to read an expert in the place of those that were used longest ago, none of which are to be kept.

        Returns:
            Whether it is there or comes; else there is no room until a read for another has ended.
        """
        if key in self._resident:
            return True
        if key in self._arriving:
            self._arriving[key].due = min(due, self._arriving[key].due)
            return True
        size = self._layers[key[0]].resident_bytes
        leave: list[Key] = []
        old = (one for one in self._resident if one not in keep)
        unread = (one for one, to in self._arriving.items() if not to.begun and one not in keep)
        candidates, free = chain(old, unread), self.memory - self._used
        while free < size:
            if (one := next(candidates, None)) is None:
                return False
            leave.append(one)
            free += self._layers[one[0]].resident_bytes
        for one in leave:
            self._resident.pop(one, None)
            self._arriving.pop(one, None)
            self._drop(one, key)
        self._used += size
        self._layers[key[0]].take(key[1])
        arrival = self._arriving[key] = _Arrival(self._layers[key[0]].pieces(key[1])[::-1], due)
        for _ in arrival.pieces:
            self._readers.submit(self._read_piece)
        return True

    def _drop(self, key: Key, heir: Key | None = None) -> None:
        """An expert leaves memory, to another that is about to be read in its place or back to the system."""
        self._used -= self._layers[key[0]].resident_bytes
        if heir is None or self._maps > MAPS:
            self._layers[key[0]].drop(key[1])
        else:
            self._layers[key[0]].move(key[1], self._layers[heir[0]], heir[1])

    def _read_piece(self, by: int | None = None) -> bool:
        """Read the piece of an expert that is due first, or due by then; whether there was one."""
        with self._state:
            waiting = [one for one in self._arriving.items() if one[1].pieces and (by is None or one[1].due <= by)]
            if not waiting:
                return False
            key, arrival = min(waiting, key=lambda one: one[1].due)
            file, start, target = arrival.pieces.pop()
            arrival.begun = True
            arrival.reading += 1
        try:
            file.read(start, target)
        except BaseException as error:
            arrival.error = error
            if not isinstance(error, Exception):
                raise
        finally:
            with self._state:
                arrival.reading -= 1
                if arrival.error is not None:
                    arrival.pieces.clear()
                if not arrival.pieces and not arrival.reading:
                    self._end(key, arrival)
        return True

    def _end(self, key: Key, arrival: _Arrival) -> None:
        """An expert has arrived, or cannot be read."""
        del self._arriving[key]
        if arrival.error is not None:
            self._drop(key)
        else:
            self.read_bytes += self._layers[key[0]].expert_bytes
            self._resident[key] = self._layers[key[0]].resident_bytes
            if arrival.due == math.inf:
                self._resident.move_to_end(key, last=False)
        self._state.notify_all()

    def _wait_for(self, arrivals: list[_Arrival]) -> None:
        """Until these experts are there, reading with the readers."""
        while arrivals and self._read_piece(self._now):
            pass
        with self._state:
            for arrival in arrivals:
                while arrival.pieces or arrival.reading:
                    self._state.wait()
        for arrival in arrivals:
            if arrival.error is not None:
                raise arrival.error

    def _look_ahead(self, layer: int, foresight: Foresight, x: Tensor, top_k: int) -> None:
        """Begin to read what later layers are foreseen to choose, as far as there is room beside this layer's own."""
        coming = foresight.foresee(layer, x, top_k)
        with self._state:
            keep, room = set(self._in_use), self.memory - len(self._in_use) * self._layers[layer].resident_bytes
            for distance, experts in coming:
                later = layer + distance
                for e in experts:
                    key = later, e
                    room -= self._layers[later].resident_bytes
                    if room < 0:
                        return
                    keep.add(key)
                    if key in self._resident:
                        self._resident.move_to_end(key)
                        continue
                    self._foreseen.setdefault(later, {}).setdefault(key, []).append(distance)
                    if foresight.trusted(distance):
                        self._begin(key, self._now + distance, keep)

    def _judge(self, layer: int) -> None:
        """What was foreseen of a layer that now knows its experts: count it, and let go what is not among them."""
        for key, distances in self._foreseen.pop(layer, {}).items():
            right, arrival = key in self._in_use, self._arriving.get(key)
            for distance in distances:
                assert self.foresight is not None
                self.foresight.judge(distance, right)
            if right:
                self.ahead += key in self._resident or arrival is not None
            elif arrival is not None and arrival.begun:
                arrival.due = math.inf
            elif arrival is not None:
                del self._arriving[key]
                self._drop(key)
            elif key in self._resident:
                self._resident.move_to_end(key, last=False)

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
                into = {key: whole[a : a + stacks.pages[key].stride] for key, a in at.items()}
                for held, start, target in stacks.pieces(e, into):
                    held.read(start, target)
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
