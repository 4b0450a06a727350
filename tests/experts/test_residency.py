"""What is read of an opened file, and what of experts is in memory, against what was written."""

import ctypes
import os
import random
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from shunter.errors import UserError
from shunter.experts import residency
from shunter.experts.residency import BLOCK, PIECE, HeldFile, Residency, Stacks, spilled


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


@pytest.mark.parametrize("able", [True, False])
def test_memory_goes_from_expert_to_expert_and_what_is_not_in_it_reads_as_zeros(monkeypatch, able):
    libc, moved = residency._libc(), []

    def mremap(*args):
        moved.append(able and libc.mremap(*args) == args[-1])
        return args[-1] if moved[-1] else ctypes.c_void_p(-1).value

    monkeypatch.setattr(residency, "_libc", lambda: SimpleNamespace(mremap=mremap, mmap=libc.mmap))
    memory, layers = Residency(0), []
    for shape in [(6, 64, 64), (6, 64, 64), (6, 10, 7)]:  # four pages each, and less than one
        whole = torch.randn(shape)
        memory.add(Stacks(nn.Module(), spilled({"w": whole}), {"w": (whole.shape, whole.dtype, 0)}))
        layers.append(whole)
    memory.memory = random.randint(3, 7) * memory._layers[0].resident_bytes
    for _ in range(60):
        layer, experts = random.randrange(3), random.sample(range(6), random.randint(1, 3))
        with memory.holding(layer, experts):
            assert memory.used <= memory.memory
            for own, whole in enumerate(layers):
                there = memory._layers[own].parameters["w"]
                for e in range(6):
                    if (own, e) in memory._resident:
                        assert torch.equal(there[e], whole[e])
                    elif own < 2:  # in the third, neighbours share pages
                        assert not there[e].any()
    assert any(moved) == able
