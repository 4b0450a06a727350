"""A dense model on disk: what it is, which tensors it has, what they are called in the model, all checked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ...errors import UserError
from ..blocks import FeedForward, Rows, find_feed_forwards
from .folders import match_names, model_class, on_meta, read_config
from .reading import Checkpoint

__all__ = ["Dense"]


@dataclass(frozen=True)
class Dense:
    """A dense model in a folder.

    Args:
        folder: where it is.
        checkpoint: its tensors.
        config: its configuration.
        model: its modules, without memory (on the meta device).
        names: name on disk -> name in the model.
        unused: names on disk that the model has no use for, as transformers says.
        stacks: its feed-forward blocks, a list for each stack of layers.
    """

    folder: Path
    checkpoint: Checkpoint
    config: PreTrainedConfig
    model: PreTrainedModel
    names: dict[str, str]
    unused: list[str]
    stacks: list[list[FeedForward]]
    on_disk: dict[str, str] = field(repr=False)
    """Name in the model -> name on disk."""

    @classmethod
    def open(cls, folder: Path) -> Dense:
        """Read everything but the weights, and check that it fits together.

        Raises:
            UserError: naming the folder or file and what is wrong with it.
        """
        checkpoint = Checkpoint(folder)
        config = read_config(folder, checkpoint.tensors)
        if getattr(config, "shunter", None) is not None:
            raise UserError(f"{folder}: is sparse already; Shunter made it")
        kind = model_class(config, str(folder))
        model = on_meta(kind, config, folder)
        names, unused = match_names(folder, model, checkpoint.tensors)
        try:
            stacks = find_feed_forwards(model)
        except ValueError as error:
            raise UserError(f"{folder}: {error}") from None
        on_disk = {name: disk for disk, name in names.items()}
        return cls(folder, checkpoint, config, model, names, unused, stacks, on_disk)

    def _stored(self, block: FeedForward) -> Iterator[tuple[str, str, Rows, bool]]:
        """A block's tensors: what each is, the name on disk of that of which it is rows, which, and if it is a bias."""
        for part, rows in block.maps.items():
            for ending, attribute in (("", "weight"), ("_bias", "bias")):
                if getattr(rows.linear, attribute, None) is not None:
                    yield (
                        part + ending,
                        self.on_disk[f"{rows.path}.{attribute}"],
                        rows,
                        bool(ending),
                    )

    def disk_names(self, block: FeedForward) -> dict[str, str]:
        """A block's tensors on disk, by what they are: gate, up, down, gate_bias, up_bias, down_bias."""
        return {part: disk for part, disk, *_ in self._stored(block)}

    def parts(self, block: FeedForward) -> dict[str, Tensor]:
        """A block's tensors: gate and up (f, d), down (d, f), biases where it has them."""
        found = {}
        for part, disk, rows, is_bias in self._stored(block):
            tensor = self.checkpoint.read(disk)
            found[part] = (tensor.T if rows.is_transposed and not is_bias else tensor)[rows.start : rows.stop]
        return found

    def read(self, name: str) -> Tensor:
        """A tensor by its name in the model."""
        return self.checkpoint.read(self.on_disk[name])

    def nbytes_of(self, block: FeedForward) -> int:
        """The bytes of a block."""
        return sum(self.checkpoint.tensors[disk].nbytes for disk in {*self.disk_names(block).values()})

    def dtype_of(self, blocks: list[FeedForward]) -> torch.dtype:
        """The one floating dtype of the blocks' tensors.

        Raises:
            UserError: where there are several, or one that is not floating.
        """
        found = {self.checkpoint.tensors[disk].dtype for block in blocks for disk in self.disk_names(block).values()}
        if len(found) > 1 or not next(iter(found)).is_floating_point:
            kinds = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in found))
            raise UserError(
                f"{self.folder}: the feed-forward blocks have dtype {kinds}; they must share a floating one"
            )
        return next(iter(found))

    def must_match(self, other: Dense) -> None:
        """Raises UserError where this is not a sibling: the same architecture, names and shapes."""
        if type(self.model) is not type(other.model):
            raise UserError(
                f"{self.folder} is a {type(self.model).__name__}, {other.folder} a {type(other.model).__name__}; "
                "siblings have one architecture"
            )
        ours = {name: self.checkpoint.tensors[disk] for disk, name in self.names.items()}
        theirs = {name: other.checkpoint.tensors[disk] for disk, name in other.names.items()}
        for name in sorted(ours.keys() ^ theirs.keys()):
            raise UserError(f"{self.folder} and {other.folder}: only one of them has {name!r}; siblings have the same")
        for name, stored in ours.items():
            if (stored.shape, stored.dtype) != (theirs[name].shape, theirs[name].dtype):
                raise UserError(
                    f"{self.folder}: {name!r} is {list(stored.shape)} {stored.dtype}, in {other.folder} "
                    f"{list(theirs[name].shape)} {theirs[name].dtype}; siblings have the same"
                )
