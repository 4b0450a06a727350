"""Tensors and companions into the files of a new model folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...durable import MANIFEST
from ...errors import UserError
from ...untrusted import inside
from .reading import CODES, INDEX, SINGLE, Stored

__all__ = ["Writer", "copy_companions"]

_COMPANIONS = {".json", ".jinja", ".model", ".txt", ".tiktoken"}


class Writer:
    """Writes a set of tensors, known beforehand by dtype and shape, into shards, in any order and in pieces.

    Args:
        folder: exists and is empty of weights.
        tensors: name -> `Stored` (dtype and shape).
        max_shard_bytes: a shard is closed before it outgrows this.

    Raises:
        UserError: where the disk has no room for them.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, Stored], max_shard_bytes: int = 5_000_000_000) -> None:
        total = sum(stored.nbytes for stored in tensors.values())
        free = shutil.disk_usage(folder).free
        if total > free:
            raise UserError(f"the model takes {total:,} bytes, and {folder.parent} has {free:,} bytes free")
        shards: list[dict[str, Stored]] = [{}]
        for name, stored in tensors.items():
            if shards[-1] and sum(s.nbytes for s in shards[-1].values()) + stored.nbytes > max_shard_bytes:
                shards.append({})
            shards[-1][name] = stored
        self.tensors: dict[str, Stored] = {}
        self._missing = {name: stored.nbytes for name, stored in tensors.items()}
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards, 1):
            name = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            self.tensors |= _allocate(folder / name, shard)
            weight_map |= dict.fromkeys(shard, name)
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def write(self, name: str, tensor: Tensor, offset: int = 0) -> None:
        """Put the elements of a tensor into the tensor `name`, from element `offset` on."""
        stored = self.tensors[name]
        assert stored.file is not None and tensor.dtype == stored.dtype
        data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        assert offset * stored.dtype.itemsize + data.numel() <= stored.nbytes
        with stored.file.open("r+b") as file:
            file.seek(stored.start + offset * stored.dtype.itemsize)
            file.write(data.numpy().data)
        self._missing[name] -= data.numel()

    def finish(self) -> None:
        """Make sure that every byte has been written, once."""
        wrong = [name for name, missing in self._missing.items() if missing]
        if wrong:
            raise RuntimeError(f"{len(wrong)} tensors were not written whole, the first is {wrong[0]!r}; report this")


def _allocate(file: Path, tensors: dict[str, Stored]) -> dict[str, Stored]:
    """Write the header of a file and give it its full size."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    starts, end = {}, 0
    # Wide elements first, so that each tensor is aligned.
    for name, stored in sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize):
        starts[name] = end
        shape = list(stored.shape)
        offsets = [end, end + stored.nbytes]
        header[name] = {"dtype": CODES[stored.dtype], "shape": shape, "data_offsets": offsets}
        end += stored.nbytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with file.open("wb") as stream:
        stream.write(len(raw).to_bytes(8, "little") + raw)
        stream.truncate(8 + len(raw) + end)
    base = 8 + len(raw)
    return {name: Stored(s.dtype, s.shape, file, base + starts[name]) for name, s in tensors.items()}


def copy_companions(source: Path, target: Path) -> None:
    """Copy what stands beside a model's weights (tokenizer, generation settings, licence), no code and no pickles."""
    written_anew = {"config.json", "receipt.json", INDEX, MANIFEST}
    for file in sorted(source.iterdir()):
        known = file.suffix in _COMPANIONS or file.name.upper().startswith(("LICENSE", "LICENCE", "NOTICE"))
        if file.name in written_anew or file.name.endswith(".bin.index.json"):
            continue
        if known and file.is_file() and not (target / file.name).exists():
            shutil.copyfile(inside(file), target / file.name)
