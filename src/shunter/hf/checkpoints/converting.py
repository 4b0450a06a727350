"""One model folder made of another, tensor by tensor, with a receipt of what became of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ...environment import Memory
from .reading import Checkpoint, Stored
from .writing import Writer

__all__ = ["Transfer", "describe_check", "megabytes"]


class Transfer:
    """Writes a new folder's tensors and keeps account of the old one's.

    Args:
        source: the tensors of the old folder, each of which must be accounted for.
        unused: names there that the model has no use for.
        folder: the new folder.
        specs: name in the new folder -> dtype and shape.
        max_shard_bytes: of a file.
        memory: notes the peak with every tensor.

    Attributes:
        became: name in the old folder -> {"how": in words, "to": names in the new folder}.
        new: name of a tensor that comes from none of the old ones -> in words.
    """

    def __init__(
        self,
        source: Checkpoint,
        unused: Sequence[str],
        folder: Path,
        specs: Mapping[str, Stored],
        max_shard_bytes: int,
        memory: Memory,
    ) -> None:
        self._source = source
        self._writer = Writer(folder, specs, max_shard_bytes)
        self._memory = memory
        self.became: dict[str, dict[str, Any]] = {name: {"how": "unused by the model", "to": []} for name in unused}
        self.new: dict[str, str] = {}

    def write(self, name: str, tensor: Tensor, offset: int = 0) -> None:
        """Put the elements of a tensor into the new tensor `name`, from element `offset` on."""
        self._memory.note()
        self._writer.write(name, tensor, offset)

    def write_new(self, name: str, tensor: Tensor, words: str) -> None:
        """Write a tensor that comes from none of the old ones."""
        self.write(name, tensor)
        self.new[name] = words

    def account(self, name: str, how: str, to: Sequence[str]) -> None:
        """Note what became of a tensor of the old folder."""
        self.became[name] = {"how": how, "to": list(dict.fromkeys(to))}

    def finish(self) -> None:
        """Make sure that every byte was written once, and that no tensor of the old folder is left over."""
        self._writer.finish()
        left_over = set(self._source.tensors) - set(self.became)
        if left_over:
            raise RuntimeError(f"{len(left_over)} tensors were left over, the first is {min(left_over)!r}; report this")


def megabytes(size: int) -> str:
    """A number of bytes in words."""
    return f"{size / 1e6:,.1f} MB"


def describe_check(check: Mapping[str, float]) -> str:
    """What `compare_logits` measured, in words."""
    return (
        f"largest difference {check['max_difference']:.2g}, root mean square {check['rms_difference']:.2g}; rounding "
        f"alone moves the first model by {check['rms_rounding']:.2g}, and its logits are {check['rms_logits']:.2g}."
    )
