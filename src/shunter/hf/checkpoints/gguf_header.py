"""A GGUF file's header, checked against the file's size before anything believes its counts and lengths."""

from __future__ import annotations

import os
from pathlib import Path

from ...errors import UserError, escaped
from ...untrusted import open_file

__all__ = ["check_header"]

_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_TEXT, _ARRAY = 8, 9
_LONGEST_NAME, _MOST_SIZES = 65535, 4
_MOST_FIELDS, _MOST_TENSORS = 10_000, 100_000
_MOST_VALUES = 2_000_000  # of arrays; a vocabulary of 262,144 tokens with its merges has 1,300,000


class _Header:
    """Reads the numbers of a header, and refuses what its file cannot hold."""

    def __init__(self, file: Path) -> None:
        self.file, self.stream = file, open_file(file)
        self.size = os.fstat(self.stream.fileno()).st_size
        self.values = 0  # of arrays so far

    def refuse(self, why: str) -> UserError:
        return UserError(f"{self.file}: is damaged or not a GGUF file: {why}")

    def take(self, count: int) -> bytes:
        if count > self.left():
            raise self.refuse(f"it ends within {count:,} bytes of its header")
        return self.stream.read(count)

    def left(self) -> int:
        return self.size - self.stream.tell()

    def number(self, count: int) -> int:
        """An unsigned one of so many bytes."""
        return int.from_bytes(self.take(count), "little")

    def count(self, what: str, least: int) -> int:
        """A number of things that take at least so many bytes each."""
        found = self.number(8)
        if found * least > self.left():
            raise self.refuse(f"it says {found:,} {what}, for which it has no room")
        return found

    def text(self, what: str, most: int) -> str:
        length = self.count(f"bytes of {what}", 1)
        if length > most:
            raise self.refuse(f"it has {what} of {length:,} bytes")
        return self.take(length).decode("utf-8", "replace")

    def skip(self, kind: int, name: str) -> None:
        if kind in _BYTES:
            self.take(_BYTES[kind])
        elif kind == _TEXT:
            self.text(f"the text {name}", self.size)
        elif kind == _ARRAY:
            inner = self.number(4)
            if inner not in _BYTES and inner != _TEXT:
                raise self.refuse(f"{name} is an array of the kind {inner}, of which there is none")
            count = self.count(f"values of {name}", _BYTES.get(inner, 8))
            self.values += count
            if self.values > _MOST_VALUES:
                raise self.refuse(f"its fields have more than {_MOST_VALUES:,} values")
            if inner in _BYTES:
                self.take(_BYTES[inner] * count)
            else:
                for _ in range(count):
                    self.text(f"a text of {name}", self.size)
        else:
            raise self.refuse(f"{name} is of the kind {kind}, of which there is none")


def check_header(file: Path) -> None:
    """Make sure that a GGUF file of version 2 or 3 has room for all that its header says, and says nothing twice.

    Raises:
        UserError: naming the file and what is wrong.
    """
    header = _Header(file)
    with header.stream:
        if header.take(4) != b"GGUF":
            raise header.refuse("it does not begin with GGUF")
        version = header.number(4)
        if version not in (2, 3):
            raise header.refuse(f"it is of version {version}; 2 and 3 are read, in little-endian order")
        num_tensors, num_fields = header.count("tensors", 24), header.count("fields", 13)
        if num_tensors > _MOST_TENSORS or num_fields > _MOST_FIELDS:
            raise header.refuse(f"it says {num_tensors:,} tensors and {num_fields:,} fields, which no model has")
        names: set[str] = set()
        alignment = 32
        for _ in range(num_fields):
            name = header.text("a field's name", _LONGEST_NAME)
            kind = header.number(4)
            if name == "general.alignment" and kind == 4:
                alignment = header.number(4)
            else:
                header.skip(kind, escaped(name))
            if name in names:
                raise header.refuse(f"the field {escaped(name)} comes twice")
            names.add(name)
        if not 0 < alignment <= 2**20 or alignment & (alignment - 1):
            raise header.refuse(f"its alignment is {alignment}, not a power of 2")
        names = set()
        for _ in range(num_tensors):
            name = header.text("a tensor's name", _LONGEST_NAME)
            if name in names:
                raise header.refuse(f"the tensor {escaped(name)} comes twice")
            names.add(name)
            sizes = header.number(4)
            if not 0 < sizes <= _MOST_SIZES:
                raise header.refuse(f"the tensor {escaped(name)} has {sizes} sizes")
            elements = 1
            for _ in range(sizes):
                elements *= header.number(8)
            header.take(4)
            # The densest kinds take about a bit an element.
            if header.number(8) > header.size or elements > 16 * header.size:
                raise header.refuse(f"the tensor {escaped(name)} does not fit into it")
