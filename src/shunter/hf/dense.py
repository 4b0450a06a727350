"""A dense model on disk: what it is, which tensors it has, what they are called in the model, all checked."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

from .architectures import FeedForward, find_feed_forwards
from .conversion import model_class
from .tensors import Checkpoint, read_json

__all__ = ["Dense", "local_folder", "read_config"]

_MOST = 2**31
_MOST_LAYERS = 1000
_COMPUTED = (r"rotary_emb\.inv_freq$", r"position_ids$", r"\.attn\.(masked_)?bias$")
"""Buffers of old checkpoints that models compute themselves today."""


def local_folder(model: str | Path) -> Path:
    """The folder of a model that is given by its path, or by its name on the Hugging Face Hub.

    Raises:
        ValueError: where there is neither.
    """
    path = Path(model)
    if path.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(model)):
        return path
    from huggingface_hub import snapshot_download

    wanted = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
    try:
        return Path(snapshot_download(str(model), allow_patterns=wanted))
    except Exception as error:  # no network, no such model, no access
        raise ValueError(f"{model}: no such folder, and not a model that can be downloaded: {_line(error)}") from None


def read_config(folder: Path, num_tensors: int) -> PreTrainedConfig:
    """A folder's configuration, by transformers, without running code from the folder.

    Args:
        folder: holds config.json.
        num_tensors: how many tensors the folder holds: a configuration cannot have more layers.

    Raises:
        ValueError: where it is missing, damaged, absurd, or of a model that transformers does not have.
    """
    file = folder / "config.json"
    raw = read_json(file)
    _plausible(file, raw, num_tensors)
    if "quantization_config" in raw:
        raise ValueError(f"{folder}: the weights are quantised; dequantise them first")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # a hostile configuration fails in as many ways as there are fields
        raise ValueError(f"{file}: transformers cannot use it: {_line(error)}") from None


def _plausible(file: Path, values: dict[str, Any], num_tensors: int) -> None:
    for name, value in values.items():
        if isinstance(value, dict):
            _plausible(file, value, num_tensors)
        elif isinstance(value, int) and not -_MOST < value < _MOST:
            raise ValueError(f"{file}: {name}={value} is absurd")
        elif isinstance(value, int) and "layer" in name and value > max(num_tensors, _MOST_LAYERS):
            raise ValueError(f"{file}: {name}={value}, but the folder holds {num_tensors} tensors in all")
        elif name == "num_labels" and isinstance(value, int) and value > 10**6:
            raise ValueError(f"{file}: {name}={value} is absurd")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


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
    modules: dict[int, str] = field(repr=False)
    """id of a module -> its name."""

    @classmethod
    def open(cls, folder: Path) -> Dense:
        """Read everything but the weights, and check that it fits together.

        Raises:
            ValueError: naming the folder or file and what is wrong with it.
        """
        checkpoint = Checkpoint(folder)
        config = read_config(folder, len(checkpoint.tensors))
        if getattr(config, "shunter", None) is not None:
            raise ValueError(f"{folder}: is sparse already; Shunter made it")
        kind = model_class(config, str(folder))
        try:
            with torch.device("meta"):
                model = kind(config)
        except Exception as error:
            raise ValueError(f"{folder}: config.json does not describe a model: {_line(error)}") from None
        names, unused = _names(folder, model, checkpoint)
        try:
            stacks = find_feed_forwards(model)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from None
        on_disk = {name: disk for disk, name in names.items()}
        modules = {id(module): name for name, module in model.named_modules()}
        return cls(folder, checkpoint, config, model, names, unused, stacks, on_disk, modules)

    def disk_names(self, block: FeedForward) -> dict[str, str]:
        """A block's tensors on disk, by what they are: gate, up, down, gate_bias, up_bias, down_bias."""
        found = {}
        for part, module in zip(_part_names(block), block.linears, strict=True):
            for ending, attribute in (("", "weight"), ("_bias", "bias")):
                if getattr(module, attribute, None) is not None:
                    found[part + ending] = self.on_disk[f"{self.modules[id(module)]}.{attribute}"]
        return found

    def parts(self, block: FeedForward) -> dict[str, Tensor]:
        """A block's tensors: gate and up (f, d), down (d, f), biases where it has them."""
        found = {}
        for part, disk in self.disk_names(block).items():
            tensor = self.checkpoint.read(disk)
            module = dict(zip(_part_names(block), block.linears, strict=True))[part.removesuffix("_bias")]
            found[part] = tensor.T if tensor.dim() == 2 and isinstance(module, Conv1D) else tensor
        return found

    def read(self, name: str) -> Tensor:
        """A tensor by its name in the model."""
        return self.checkpoint.read(self.on_disk[name])

    def nbytes_of(self, block: FeedForward) -> int:
        """The bytes of a block."""
        return sum(self.checkpoint.tensors[disk].nbytes for disk in self.disk_names(block).values())

    def dtype_of(self, blocks: list[FeedForward]) -> torch.dtype:
        """The one floating dtype of the blocks' tensors.

        Raises:
            ValueError: where there are several, or one that is not floating.
        """
        found = {self.checkpoint.tensors[disk].dtype for block in blocks for disk in self.disk_names(block).values()}
        if len(found) > 1 or not next(iter(found)).is_floating_point:
            kinds = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in found))
            raise ValueError(
                f"{self.folder}: the feed-forward blocks have dtype {kinds}; they must share a floating one"
            )
        return next(iter(found))

    def must_match(self, other: Dense) -> None:
        """Raises ValueError where this is not a sibling: the same architecture, names and shapes."""
        if type(self.model) is not type(other.model):
            raise ValueError(
                f"{self.folder} is a {type(self.model).__name__}, {other.folder} a {type(other.model).__name__}; "
                "siblings have one architecture"
            )
        ours = {name: self.checkpoint.tensors[disk] for disk, name in self.names.items()}
        theirs = {name: other.checkpoint.tensors[disk] for disk, name in other.names.items()}
        for name in sorted(ours.keys() ^ theirs.keys()):
            raise ValueError(f"{self.folder} and {other.folder}: only one of them has {name!r}; siblings have the same")
        for name, stored in ours.items():
            if (stored.shape, stored.dtype) != (theirs[name].shape, theirs[name].dtype):
                raise ValueError(
                    f"{self.folder}: {name!r} is {list(stored.shape)} {stored.dtype}, in {other.folder} "
                    f"{list(theirs[name].shape)} {theirs[name].dtype}; siblings have the same"
                )


def _part_names(block: FeedForward) -> tuple[str, ...]:
    return ("gate", "up", "down") if len(block.linears) == 3 else ("up", "down")


def _names(folder: Path, model: PreTrainedModel, checkpoint: Checkpoint) -> tuple[dict[str, str], list[str]]:
    """What each tensor on disk is called in the model, and which it has no use for."""
    state = model.state_dict()
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    ignored = [*_COMPUTED, *(model._keys_to_ignore_on_load_unexpected or ())]
    names: dict[str, str] = {}
    unused = []
    for disk, stored in checkpoint.tensors.items():
        name, converted = rename_source_key(disk, renamings, converters, model.base_model_prefix, state)
        if converted is not None:
            raise ValueError(
                f"{folder}: {disk!r} is stored in a layout that transformers converts; load the model with "
                "transformers 5, save_pretrained it and take that folder"
            )
        if name in state:
            if tuple(state[name].shape) != stored.shape:
                raise ValueError(
                    f"{folder}: {disk!r} has shape {list(stored.shape)}; config.json asks for {list(state[name].shape)}"
                )
            names[disk] = name
        elif any(re.search(pattern, name) for pattern in ignored):
            unused.append(disk)
        else:
            raise ValueError(f"{folder}: {type(model).__name__} has no place for the tensor {disk!r}; it is left over")
    taken = set(names.values())
    if len(taken) < len(names):
        raise ValueError(f"{folder}: two tensors stand for the same parameter of {type(model).__name__}")
    tied: dict[str, str] = model.all_tied_weights_keys
    optional = [*_COMPUTED, *(model._keys_to_ignore_on_load_missing or ())]
    for name in state:
        if name not in taken and tied.get(name) not in taken and not any(re.search(p, name) for p in optional):
            raise ValueError(f"{folder}: lacks the tensor {name!r} of {type(model).__name__}")
    return names, unused
