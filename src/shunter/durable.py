"""Bytes in, files and folders out that are whole or absent: written aside, synced, renamed, sealed with their SHA-256.

A file or folder is written under a name of its own beside its place, `.NAME.xxxxxxxx.partial`, which the writer
keeps locked; what a killed one left is removed by the next that writes there. A sealed folder has a manifest of its
files, which is written last: with it the folder is whole, and `verify` tells whether it still is.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import NotWritten, UserError, one_line
from .untrusted import inside, open_file, parse_json, read_file

fcntl: Any
try:
    import fcntl
except ImportError:  # a system without the locks of Unix
    fcntl = None

__all__ = [
    "FORMAT",
    "MANIFEST",
    "NO_ROOM",
    "aside",
    "check_new_folder",
    "discard",
    "make_folder",
    "naming",
    "new_folder",
    "only_process",
    "publish",
    "seal",
    "sealed",
    "verify",
    "why_not_written",
    "write",
    "writing",
]

FORMAT = 1
MANIFEST = "shunter-manifest.json"
_LARGEST = 100_000_000  # bytes of a manifest
_READ = {".bin", ".json", ".jinja", ".model", ".pt", ".pth", ".safetensors"}
"""The endings of files that a loader would read, though no manifest names them."""
_LOCK = ".lock"
_ASIDE = re.compile(r"\..+\.[0-9a-f]{8}\.partial", re.DOTALL)
_CURE = "take another copy, or remove the manifest if you changed it yourself"


def write(path: Path, content: str | bytes) -> None:
    """Write a file whole, or leave the one that is there.

    Raises:
        NotWritten: naming the path and why.
    """
    with writing(path) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A path to write a file at, which takes its place at the end of the block, or disappears with an error.

    Raises:
        NotWritten: naming the path and why.
    """
    with naming(path), aside(path, folder=False) as part:
        yield part
        _sync(part)
        part.replace(path)
        _sync(path.parent)


@contextmanager
def new_folder(out: Path, **facts: Any) -> Iterator[Path]:
    """A folder beside `out` to write into, which becomes `out`, sealed, at the end, or disappears with an error.

    Args:
        out: the new folder; those above it are made.
        **facts: of the manifest.

    Raises:
        UserError: where `out` exists.
        NotWritten: where the disk is full, or the place cannot be written to.
    """
    check_new_folder(out)
    with naming(out, NO_ROOM), aside(out) as part:
        yield part
        seal(part, **facts)
        if out.exists():
            raise UserError(f"{out} has appeared meanwhile; choose a new folder, nothing is overwritten")
        with naming(out):
            part.rename(out)
            _sync(out.parent)


def check_new_folder(out: Path) -> None:
    """See that `new_folder` could begin, before hours of work for what it is to hold.

    Args:
        out: the new folder; those above it are made.

    Raises:
        UserError: where `out` exists.
        NotWritten: where the place cannot be written to.
    """
    if out.exists() or out.is_symlink():
        raise UserError(f"{out} exists already; choose a new folder, nothing is overwritten")
    make_folder(out.parent)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it that are missing, to stay and to be written to.

    Raises:
        NotWritten: naming the folder and why: it cannot be made, or is there and read-only.
    """
    with naming(folder):
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        for path in missing:
            _sync(path.parent)
    if not os.access(folder, os.W_OK):
        raise NotWritten(f"{folder} cannot be written: it is read-only")


def publish(part: Path, out: Path, **facts: Any) -> None:
    """Seal a folder that was written aside and put it in its place; an older one of that name goes first.

    Raises:
        NotWritten: naming the folder and why.
    """
    with naming(out):
        seal(part, **facts)
        if os.path.lexists(out):
            discard(out)
        part.rename(out)
        _sync(out.parent)


def discard(folder: Path) -> None:
    """Remove a folder, its manifest first, so that what a kill leaves of it does not count as whole.

    Of a link that is in its place, or a file, that alone goes.
    """
    if folder.is_symlink() or not folder.is_dir():
        folder.unlink()
        return
    if not (folder / MANIFEST).is_dir():
        (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder)


def seal(folder: Path, files: Iterable[str] | None = None, **facts: Any) -> None:
    """Sync the files of a folder and leave their sizes and SHA-256 in its manifest.

    Args:
        folder: whose files are complete.
        files: paths below it; None for all.
        **facts: what else the manifest says, as JSON.

    Raises:
        NotWritten: naming the folder and why.
    """
    with naming(folder):
        found = sorted(path for path in folder.rglob("*") if path.name != MANIFEST)
        for path in found:
            if path.is_dir():
                _sync(path)
        names = [path.relative_to(folder).as_posix() for path in found if path.is_file()] if files is None else files
        entries = {name: _entry(folder / name, sync=True) for name in names}
        content = {"format": FORMAT, **facts, "files": entries}
        write(folder / MANIFEST, json.dumps(content | {"sha256": _digest(content)}, indent=1))


def sealed(folder: Path) -> bool:
    """Whether a folder has a manifest, or something in its place."""
    return os.path.lexists(folder / MANIFEST)


def verify(folder: Path, *, others: bool = False, cure: str = _CURE) -> dict[str, Any]:
    """What the manifest of a folder says, after every file has been read and compared with it.

    Args:
        folder: sealed.
        others: whether there may be more files than the manifest names, such as a loader would read.
        cure: what the error says that can be done.

    Raises:
        UserError: naming the file, where one is missing, changed or too many, or the manifest is.
    """
    path = folder / MANIFEST
    try:
        content = parse_json(read_file(inside(path), _LARGEST))
        said = content.pop("sha256")
        if said != _digest(content):
            raise ValueError("it has been changed")
        if content["format"] != FORMAT:
            raise UserError(f"{path}: has the format {content['format']!r}, and this version reads {FORMAT}")
        entries = {name: (inside(folder / name, folder), entry) for name, entry in content["files"].items()}
    except FileNotFoundError:
        raise UserError(f"{folder}: has no {MANIFEST}; it was not written to its end") from None
    except UserError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: cannot be used: {one_line(error)}") from None
    for file, entry in entries.values():
        _compare(file, entry, cure)
    if not others:
        for file in folder.rglob("*"):
            name = file.relative_to(folder).as_posix()
            if file.suffix in _READ and name not in entries and name != MANIFEST:
                raise UserError(f"{file}: is not in the folder's {MANIFEST}; remove one of them")
    return dict(content)


def _compare(file: Path, entry: Any, cure: str) -> None:
    try:
        open_file(file).close()
        said = entry.get("bytes") if isinstance(entry, dict) else None
        changed = file.stat().st_size != said or _entry(file, sync=False) != entry
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}, and {MANIFEST} names it") from None
    if changed:
        raise UserError(f"{file}: is damaged or changed: its size or SHA-256 is not that of {MANIFEST}; {cure}")


def _entry(file: Path, *, sync: bool) -> dict[str, Any]:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if sync:
            os.fsync(stream.fileno())
        return {"bytes": stream.tell(), "sha256": digest}


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@contextmanager
def only_process(folder: Path) -> Iterator[None]:
    """Be the only process that works in a folder, for the length of the block; warns where there are no locks.

    Raises:
        UserError: naming the process that is there already.
        NotWritten: where the folder cannot be written to.
    """
    path = folder / _LOCK
    while True:
        with naming(path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        locked = _lock(descriptor)
        if not locked or (path.exists() and os.path.samestat(os.fstat(descriptor), path.stat())):
            break
        os.close(descriptor)  # another process has removed the folder, and what is there now is not this lock
    try:
        if locked is None:
            warnings.warn(f"{folder}: has no file locks; see yourself that no other process works there", stacklevel=3)
        if locked is False:
            other = os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
            raise UserError(f"{folder}: {one_line(other)} is at work there; wait for it, or stop it")
        with naming(path):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool | None:
    """Whether this process has the lock now; None where the system or the file system has no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise
        return None
    return True


@contextmanager
def aside(path: Path, *, folder: bool = True) -> Iterator[Path]:
    """A new folder or file beside a path, locked; gone after the block where it is still there, or with the next one.

    Raises:
        NotWritten: where the place cannot be written to.
    """
    with naming(path):
        _sweep(path.parent)
        part, descriptor = _claim(path, folder)
    try:
        yield part
    finally:
        os.close(descriptor)
        with suppress(FileNotFoundError):
            shutil.rmtree(part) if folder else part.unlink()


def _claim(path: Path, folder: bool) -> tuple[Path, int]:
    while True:
        part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
        part.mkdir() if folder else part.touch(exist_ok=False)
        try:
            descriptor = os.open(part, os.O_RDONLY | os.O_NONBLOCK)
            if _lock(descriptor) is not False and part.exists():
                return part, descriptor
            os.close(descriptor)
        except FileNotFoundError:  # another process took it for one that a killed one left
            continue
        except OSError:
            part.rmdir() if folder else part.unlink()
            raise


def _sweep(folder: Path) -> None:
    """Remove what killed processes left in a folder: what was written aside and is not locked."""
    for part in [part for part in folder.iterdir() if _ASIDE.fullmatch(part.name)]:
        with suppress(OSError):  # gone meanwhile, or of another user
            descriptor = os.open(part, os.O_RDONLY | os.O_NONBLOCK)
            try:
                if _lock(descriptor):
                    shutil.rmtree(part) if part.is_dir() else part.unlink()
            finally:
                os.close(descriptor)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EMFILE, errno.ENFILE)
_NO_PLACE = (errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)
_REFUSED = (errno.EACCES, errno.EPERM, *_NO_PLACE)


@contextmanager
def naming(path: Path, numbers: tuple[int, ...] = (*NO_ROOM, *_REFUSED)) -> Iterator[None]:
    """Turn errors of the file system, of these numbers, into `NotWritten`."""
    try:
        yield
    except NotWritten:
        raise
    except Exception as error:
        if reason := why_not_written(error, numbers):
            raise NotWritten(f"{path} cannot be written: {reason}") from error
        raise


def why_not_written(error: Exception, numbers: tuple[int, ...] = (*NO_ROOM, *_REFUSED)) -> str:
    """Why the file system did not take what was written; empty for an error of another kind."""
    if isinstance(error, OSError):
        at = f" ({error.filename})" if error.filename else ""
        return f"{error.strerror}{at}" if error.errno in numbers else ""
    if isinstance(error, UserError):  # which says what was wrong: data that cannot be read are not a full disk
        return ""
    said = str(error)  # of Rust (safetensors, tokenizers), which names no number
    for number in numbers:
        if os.strerror(number) in said or f"(os error {number})" in said:
            return os.strerror(number)
    return ""
