"""A folder of safetensors to its tensors, whole or in pieces; and its JSON files.

Nothing in a folder is trusted: names stay inside it, headers are checked before anything is allocated, pickles are not
opened.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...durable import sealed, verify
from ...errors import UserError, one_line
from ...untrusted import open_file, parse_json, read_file

__all__ = ["CODES", "INDEX", "SINGLE", "Checkpoint", "Stored", "inside", "read_json", "read_texts"]

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000  # bytes, as the safetensors library allows
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Stored:
    """A tensor in a file.

    Args:
        dtype: of the elements.
        shape: row-major.
        file: the shard; None for a tensor that is yet to be written.
        start: where its first byte lies in the file.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path | None = None
    start: int = 0

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The number of bytes."""
        return self.numel * self.dtype.itemsize


class Checkpoint:
    """The tensors of a model folder, by the names on disk.

    Args:
        folder: holds model.safetensors, or model.safetensors.index.json and the shards that it names. Where it is
            sealed, every file is compared with its checksum first.

    Attributes:
        tensors: name -> `Stored`.

    Raises:
        UserError: for a folder without safetensors, and for files that are damaged or reach outside the folder; the
            message names the file and what is wrong.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, Stored] = {}
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder")
        if sealed(folder):
            verify(folder)
        # As transformers does, the single file goes first.
        if (folder / SINGLE).exists():
            self.tensors = _header(inside(folder / SINGLE))
        elif (folder / INDEX).exists():
            self._read_index(folder / INDEX)
        else:
            pickles = sorted(f.name for f in folder.iterdir() if f.suffix in {".bin", ".pt", ".pth", ".ckpt", ".pkl"})
            raise UserError(
                f"{folder}: holds no {SINGLE} and no {INDEX}"
                + (
                    f"; {pickles[0]} is a pickle, which can run code and is not opened: load it where you trust it and "
                    "save_pretrained the model"
                    if pickles
                    else ""
                )
            )
        if not self.tensors:
            raise UserError(f"{folder}: holds no tensors")

    def _read_index(self, file: Path) -> None:
        weight_map = read_json(file).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise UserError(f"{file}: has no weight_map from tensor names to file names")
        for shard in sorted(set(weight_map.values())):
            if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", shard):
                raise UserError(f"{file}: names the file {shard!r}; a shard is a .safetensors file in the same folder")
            if not (file.parent / shard).is_file():
                raise UserError(f"{file}: names {shard}, which is missing; the folder is incomplete")
            found = _header(inside(file.parent / shard))
            for name in found:
                if weight_map.get(name) != shard:
                    raise UserError(f"{file.parent / shard}: holds {name!r}, which the index does not place there")
            self.tensors |= found
        for name, shard in weight_map.items():
            if name not in self.tensors:
                raise UserError(f"{file}: places {name!r} in {shard}, which does not hold it")

    def must_hold(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises UserError where the folder lacks a weight, or holds it in another shape or as integers."""
        if name not in self.tensors:
            raise UserError(f"{self.folder}: lacks the tensor {name!r}")
        if self.tensors[name].shape != shape:
            raise UserError(
                f"{self.folder}: {name!r} has shape {list(self.tensors[name].shape)}; config.json asks for "
                f"{list(shape)}"
            )
        if not self.tensors[name].dtype.is_floating_point:
            raise UserError(f"{self.folder}: {name!r} is of {self.tensors[name].dtype}, not of floating point")

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors."""
        return sum(stored.nbytes for stored in self.tensors.values())

    def read(self, name: str, offset: int = 0, shape: tuple[int, ...] | None = None) -> Tensor:
        """A tensor, or the elements of it from `offset` on that fill a shape.

        Raises:
            UserError: where the file has become shorter, and where a value is not finite.
        """
        stored = self.tensors[name]
        assert stored.file is not None
        shape = stored.shape if shape is None else shape
        size = math.prod(shape) * stored.dtype.itemsize
        assert offset * stored.dtype.itemsize + size <= stored.nbytes
        if not size:
            return torch.empty(shape, dtype=stored.dtype)
        # The file is read, not mapped, so that what has been used is out of memory again.
        data = torch.empty(size, dtype=torch.uint8)
        with stored.file.open("rb") as file:
            file.seek(stored.start + offset * stored.dtype.itemsize)
            if file.readinto(data.numpy().data) != size:
                raise UserError(f"{stored.file}: ends within {name!r}")
        tensor = data.view(stored.dtype).reshape(shape)
        if stored.dtype.is_floating_point and not bool(tensor.isfinite().all()):
            raise UserError(f"{stored.file}: {name!r} holds NaN or infinity; the model is broken, take an earlier one")
        return tensor


def inside(file: Path) -> Path:
    """The file, where it is not a link to somewhere outside its folder (or the blobs of the Hub's cache).

    Raises:
        UserError: where it is.
    """
    real, folder = Path(os.path.realpath(file)), file.parent.resolve()
    cached = folder.parent.name == "snapshots" and folder.parents[1] / "blobs" == real.parent
    if real.parent != folder and not cached:
        raise UserError(f"{file}: is a link to {real}, outside its folder; put the file itself there")
    return file


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: naming the file, where there is none.
    """
    found = _json(file)
    if not isinstance(found, dict):
        raise UserError(f"{file}: must hold a JSON object, not a {type(found).__name__}")
    return found


def read_texts(file: Path) -> list[list[str]]:
    """The lists of texts in a JSON file.

    Raises:
        UserError: naming the file, where there are none.
    """
    found = _json(file)
    lists = isinstance(found, list) and all(isinstance(texts, list) for texts in found)
    if not lists or not all(isinstance(text, str) for texts in found for text in texts):
        raise UserError(f"{file}: must hold a list of lists of texts")
    return list(found)


def _json(file: Path) -> Any:
    try:
        return parse_json(read_file(file))
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as JSON ({one_line(error)})") from None


def _header(file: Path) -> dict[str, Stored]:
    """The tensors of one file, its header checked against the file's size."""
    with open_file(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise UserError(f"{file}: is truncated or not a safetensors file ({size} bytes)")
        raw = stream.read(length)
    try:
        header = parse_json(raw, _without_duplicates)
        if not isinstance(header, dict):
            raise UserError("it is not an object")
        header.pop("__metadata__", None)
        tensors = {name: _entry(name, entry) for name, entry in header.items()}
    except ValueError as error:
        raise UserError(f"{file}: its header is damaged: {one_line(str(error)[:200])}") from None
    found, end = {}, 0
    for name, (dtype, shape, start, stop) in sorted(tensors.items(), key=lambda item: item[1][2:]):
        stored = Stored(dtype, shape, file, 8 + length + start)
        if start != end or stop - start != stored.nbytes:
            raise UserError(f"{file}: its header is damaged: the bytes of {name!r} overlap, leave a gap or do not fit")
        found[name], end = stored, stop
    if 8 + length + end != size:
        raise UserError(f"{file}: is truncated or damaged: its tensors need {8 + length + end} bytes, it has {size}")
    return found


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise UserError("a name appears twice")
    return found


def _entry(name: str, entry: Any) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    if not isinstance(entry, dict):
        raise UserError(f"{name!r} is not described by an object")
    code, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(code, str) or code not in DTYPES:
        raise UserError(f"{name!r} has the dtype {code!r}; this reads {', '.join(DTYPES)}, no quantised tensors")
    sizes, (start, stop) = _sizes(name, shape, 16), (*_sizes(name, offsets, 2), 0, 0)[:2]
    return DTYPES[code], sizes, start, stop


def _sizes(name: str, numbers: Any, most: int) -> tuple[int, ...]:
    valid = isinstance(numbers, list) and len(numbers) <= most
    if not valid or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
        raise UserError(f"{name!r} has a shape or offsets that are not sizes: {str(numbers)[:80]}")
    return tuple(numbers)
