"""A folder of data to the files in it that are read, and a word on those that are left out."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError, escaped

__all__ = ["LeftOut", "files_in", "say_left_out", "sentences"]

_NAMED = 5  # of the files left out
_MOST = 100_000  # files of a folder


class LeftOut(UserWarning):
    """What of a source is not read, and why."""


@contextmanager
def sentences() -> Iterator[list[str]]:
    """The warnings of what is left out within the block, as sentences; they are given behind it, like all others."""
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", LeftOut)
        yield said
    for one in caught:
        if issubclass(one.category, LeftOut):
            said.append(f"{escaped(str(one.message))}.")
        warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)


def files_in(folder: Path, wanted: Callable[[Path], bool]) -> tuple[list[Path], list[Path]]:
    """The files of a folder and of those within that are wanted, in order, and the paths that are left out.

    Left out are hidden files and folders (.git, AppleDouble's ._name), what is no regular file, links to somewhere
    outside of the folder, and what is not wanted. Links to folders are not followed.

    Raises:
        UserError: where there are more than a hundred thousand, and where the folder cannot be read.
    """
    root = folder.resolve()
    found: list[Path] = []
    left_out: list[Path] = []
    closed: list[Path] = []

    def cannot_read(error: OSError) -> None:
        place = Path(error.filename)
        if place == folder:
            raise UserError(f"{escaped(str(folder))}: {error.strerror}")
        closed.append(place)

    for where, folders, files in os.walk(folder, onerror=cannot_read):
        here = Path(where)
        left_out += [here / name for name in folders if name.startswith(".") or (here / name).is_symlink()]
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            file = here / name
            real = Path(os.path.realpath(file))  # of a link to itself that link, where Path.resolve raises
            good = real.is_file() and real.is_relative_to(root) and not name.startswith(".") and wanted(file)
            (found if good else left_out).append(file)
        if len(found) + len(left_out) > _MOST:
            raise UserError(f"{folder}: holds more than {_MOST:,} files; give some of its folders")
    say_left_out(folder, closed, "folders that cannot be read")
    return found, left_out


def say_left_out(folder: Path, left_out: list[Path], why: str) -> None:
    """Warn of the paths that were left out, naming the first of them."""
    if left_out:
        names = ", ".join(escaped(str(path.relative_to(folder))) for path in left_out[:_NAMED])
        more = f" and {len(left_out) - _NAMED:,} more" if len(left_out) > _NAMED else ""
        warnings.warn(f"{escaped(str(folder))}: left out {names}{more}: {why}", LeftOut, stacklevel=3)
