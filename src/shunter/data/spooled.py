"""Bytes, texts and rows of numbers that may be more than memory: in it up to a size, in a temporary file beyond."""

from __future__ import annotations

import os
import tempfile
from array import array
from collections.abc import Sequence
from typing import IO, overload

import numpy as np

__all__ = ["IN_MEMORY", "Pieces", "Rows", "Texts", "spool"]

IN_MEMORY = 2**26
"""The bytes that a spool holds before it goes to the folder of temporary files (TMPDIR)."""


class _Spool(tempfile.SpooledTemporaryFile[bytes]):
    def __del__(self) -> None:
        self.close()  # without the warning that nobody closed it


def spool() -> IO[bytes]:
    """An empty file that is in memory as long as it is small, has no name, and is closed with its last user."""
    return _Spool(IN_MEMORY)


class Pieces:
    """Pieces of bytes in the order in which they are added.

    Args:
        file: of `spool`, which several may share.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._starts, self._sizes = array("Q"), array("Q")

    def append(self, raw: bytes) -> None:
        """Add a piece."""
        self._file.seek(0, os.SEEK_END)
        self._starts.append(self._file.tell())
        self._sizes.append(len(raw))
        self._file.write(raw)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, i: int) -> bytes:
        self._file.seek(self._starts[i])
        return self._file.read(self._sizes[i])


class Texts(Sequence[str]):
    """Texts in the order in which they are added.

    Args:
        file: as of `Pieces`.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._pieces = Pieces(file)

    def append(self, text: str) -> None:
        """Add a text, which UTF-8 must be able to encode."""
        self._pieces.append(text.encode())

    def __len__(self) -> int:
        return len(self._pieces)

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> list[str]: ...
    def __getitem__(self, i: int | slice) -> str | list[str]:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        return self._pieces[i].decode()


class Rows:
    """Rows (n, length) of whole numbers, which are added some at a time and then read.

    Args:
        length: of a row.
        largest: the largest number.
    """

    def __init__(self, length: int, largest: int) -> None:
        self._file, self._length, self._dtype = spool(), length, np.min_scalar_type(largest)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, rows: np.ndarray) -> None:
        """Add rows (k, length)."""
        self._file.write(rows.astype(self._dtype).tobytes())
        self._count += len(rows)

    def read(self) -> np.ndarray:
        """All rows, mapped where they are in a file, in the smallest dtype; none can be added any more."""
        shape = self._count, self._length
        with self._file as file:
            file.seek(0)
            if self._count * self._length * self._dtype.itemsize <= IN_MEMORY:
                return np.frombuffer(file.read(), self._dtype).reshape(shape)
            file.flush()
            return np.asarray(np.memmap(file, self._dtype, "r", shape=shape))
