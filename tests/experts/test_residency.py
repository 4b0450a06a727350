"""What is read of an opened file, past the page cache and by way of it, against the bytes that were written."""

import os
import random

import pytest

from shunter.errors import UserError
from shunter.experts.residency import BLOCK, PIECE, HeldFile


@pytest.mark.parametrize("direct", [True, False])
def test_any_run_of_bytes_is_read_and_none_beyond_the_end(tmp_path, monkeypatch, direct):
    size = 2 * PIECE + random.randrange(2 * BLOCK)
    written = random.randbytes(size)
    (tmp_path / "file").write_bytes(written)
    if not direct:
        monkeypatch.delattr(os, "O_DIRECT")
    held = HeldFile(tmp_path / "file")
    bounds = [(0, size), (size - 1, size), (BLOCK, BLOCK + PIECE), (1, PIECE + 2 * BLOCK)]
    bounds += [sorted(random.sample(range(size + 1), 2)) for _ in range(20)]
    for start, end in bounds:
        around = bytearray(b"\xaa" * (end - start + 2))
        held.read(start, memoryview(around)[1:-1])
        assert around == b"\xaa" + written[start:end] + b"\xaa"
    for start, end in [(size - 3, size + 1), (size, size + 1), (size + 2 * BLOCK, size + 3 * BLOCK)]:
        with pytest.raises(UserError, match="has changed"):
            held.read(start, memoryview(bytearray(end - start)))
