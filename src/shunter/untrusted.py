"""Files of others in bounded time and memory: regular ones alone, up to a size; JSON up to a number of values."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from .errors import UserError

__all__ = ["MAX_DEPTH", "MAX_VALUES", "few_values", "inside", "open_file", "parse_json", "read_file"]

MAX_VALUES = 2_000_000
"""Of a JSON text: a value takes up to some hundred bytes of memory, however short it is written."""

MAX_DEPTH = 500
"""Of lists and objects in one another: Python itself ends between 1,000 and 10,000, by its version."""

_MAX_FILE = 100_000_000


def inside(file: Path, folder: Path | None = None) -> Path:
    """The file, where it lies in its folder, links followed (or among the blobs of the Hub's cache).

    Args:
        file: may be missing.
        folder: that it must lie in, or below; None for its parent.

    Raises:
        UserError: where it does not.
    """
    folder = (folder or file.parent).resolve()
    real = Path(os.path.realpath(file))  # which a loop of links does not stop
    cached = folder.parent.name == "snapshots" and folder.parents[1] / "blobs" == real.parent
    if not real.is_relative_to(folder) and not cached:
        raise UserError(f"{file}: leads to {real}, outside {folder}; put the file itself there")
    return file


def open_file(file: Path) -> BinaryIO:
    """Open a file to read bytes from it.

    Raises:
        UserError: where it is a folder, a FIFO, a socket or a device, which could block or never end.
        FileNotFoundError: where there is none.
        OSError: where it cannot be opened.
    """
    if file.exists() and not stat.S_ISREG(file.stat().st_mode):
        raise UserError(f"{file}: is a {_kind(file)}, not a file")
    # What took its place meanwhile must not block either.
    return os.fdopen(os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb")


def _kind(file: Path) -> str:
    mode = file.stat().st_mode
    kinds = {stat.S_ISDIR: "folder", stat.S_ISFIFO: "FIFO", stat.S_ISSOCK: "socket"}
    return next((name for test, name in kinds.items() if test(mode)), "device")


def read_file(file: Path, at_most: int = _MAX_FILE) -> bytes:
    """The bytes of a file.

    Raises:
        UserError: as `open_file`, and where it is larger than `at_most` bytes.
    """
    with open_file(file) as stream:
        raw = stream.read(at_most + 1)
    if len(raw) > at_most:
        raise UserError(f"{file}: is larger than {at_most:,} bytes, which no file of its kind needs")
    return raw


def parse_json(raw: bytes | str, pairs: Any = None) -> Any:
    """What a JSON text says.

    Args:
        raw: the text, in UTF-8 (with or without a byte order mark) where it is bytes.
        pairs: of `json.loads`, object_pairs_hook.

    Raises:
        ValueError: where it is not JSON, deeper than `MAX_DEPTH`, or has more than `MAX_VALUES` values.
    """
    text = raw.decode("utf-8-sig") if isinstance(raw, bytes) else raw
    few_values(text)
    try:
        found = json.loads(text, object_pairs_hook=pairs)
        if _deeper(found, MAX_DEPTH):
            raise RecursionError
        return found
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _deeper(value: Any, most: int) -> bool:
    """Whether more than so many lists and dictionaries are in one another."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(most):
        parts = (part for each in level for part in (each.values() if isinstance(each, dict) else each))
        level = [part for part in parts if isinstance(part, dict | list)]
        if not level:
            return False
    return bool(level)


def few_values(text: Any) -> None:
    """Raises ValueError where a JSON text, or its bytes in UTF-8, may hold more than `MAX_VALUES` values."""
    marks = (b",", b"[", b"{") if isinstance(text, bytes) else (",", "[", "{")
    count = sum(text.count(mark) for mark in marks)
    if count > MAX_VALUES:
        raise ValueError(f"it may hold {count:,} values; at most {MAX_VALUES:,} are read")
