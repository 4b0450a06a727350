"""A model and its optimizer, sharded or whole, to a folder and back, at any number of processes.

The folder holds safetensors that torch's distributed checkpoint wrote (the model's names, whole shapes), the scalars as
JSON, and a manifest with checksums: nothing in it is unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from ..durable import new_folder, verify
from ..errors import Elsewhere, UserError, one_line
from ..ranks import is_first_rank
from .experts import ShardedExperts
from .watch import named_errors

__all__ = ["first_does", "load", "save", "save_pretrained", "together"]

_OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)
_SCALARS = "scalars.json"
T = TypeVar("T")


def save(model: nn.Module, optimizer: torch.optim.Optimizer | None, folder: str | Path) -> None:
    """Write a model and its optimizer to a new folder; every rank calls it, and the folder is whole or absent.

    Args:
        model: sharded by `shard_model` or `shard_experts`, or whole.
        optimizer: of its parameters; None leaves it out.
        folder: that all ranks see.

    Raises:
        UserError: where the folder exists.
        NotWritten: where the disk does not take it.
    """
    with together(Path(folder)) as part, named_errors():
        for name, state in _states(model, optimizer).items():
            tensors, scalars = _split(state)
            (part / name).mkdir(exist_ok=True)
            if tensors:
                dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(str(part / name), save_distributed=True))
            if is_first_rank():
                (part / name / _SCALARS).write_text(json.dumps(scalars), encoding="utf-8")


def load(model: nn.Module, optimizer: torch.optim.Optimizer | None, folder: str | Path) -> None:
    """Read what `save` wrote into a model and its optimizer, whatever the number of processes then and now.

    Args:
        model: sharded or whole, of the same parameters.
        optimizer: None leaves the folder's aside.
        folder: of `save`.

    Raises:
        UserError: naming the file or the parameter, where the folder is damaged or of another model.
    """
    folder = Path(folder)
    first_does(partial(verify, folder))
    for name, state in _states(model, optimizer).items():
        tensors, scalars = _split(state)
        saved = first_does(partial(_read_scalars, folder / name))
        reader = HuggingFaceStorageReader(str(folder / name))
        known = {**(reader.read_metadata().state_dict_metadata if tensors else {}), **saved}
        _compare(folder / name, {**tensors, **scalars}, known)
        if tensors:
            with named_errors():
                dcp.load(tensors, storage_reader=reader)
        filled = {**tensors, **{key: _like(saved[key], state[key]) for key in scalars}}
        if optimizer is not None and name == "optimizer":
            placed = {key: _by_number(model, key, value, back=True) for key, value in filled.items()}
            set_optimizer_state_dict(model, optimizer, placed, options=_OPTIONS)
        else:
            set_model_state_dict(model, filled, options=StateDictOptions(strict=False))  # but for repeated names


def save_pretrained(model: Any, folder: str | Path) -> None:
    """Write a sharded model as its own `save_pretrained` would write it whole; every rank calls it.

    Args:
        model: a Hugging Face model that `shard_model` or `shard_experts` sharded.
        folder: that the first rank writes, and plain `from_pretrained` reads.
    """
    if getattr(model.config, "distributed_config", None) is not None:  # transformers gathers by itself
        model.save_pretrained(folder, is_main_process=is_first_rank())
        return
    with named_errors():
        whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    first_does(lambda: model.save_pretrained(folder, state_dict=whole))


def _read_scalars(folder: Path) -> dict[str, Any]:
    scalars: dict[str, Any] = json.loads((folder / _SCALARS).read_text(encoding="utf-8"))
    return scalars


def _states(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, dict[str, Any]]:
    twice = _repeated(model)
    states: dict[str, dict[str, Any]] = {
        "model": {key: value for key, value in get_model_state_dict(model).items() if key not in twice}
    }
    if optimizer is not None:
        found = get_optimizer_state_dict(model, optimizer, options=_OPTIONS)
        states["optimizer"] = {key: _by_number(model, key, value) for key, value in found.items()}
    return states


def _by_number(model: nn.Module, key: str, value: Any, back: bool = False) -> Any:
    """A value of an optimizer's state, of experts that are placed in the order of their numbers; or back."""
    for name, experts in model.named_modules():
        if isinstance(experts, ShardedExperts) and experts.order is not None and f"state.{name}." in key:
            whole = isinstance(value, Tensor) and value.dim() and len(value) == experts.num_experts
            return experts.by_number(value, back) if whole else value
    return value


def _repeated(model: nn.Module) -> set[str]:
    """Further names of tensors that have one already, as a tied output layer's."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    first: dict[int, str] = {}
    return {name for name, value in named if first.setdefault(id(value), name) != name}


def _split(state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors with dimensions, and everything else as JSON."""
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor) and value.dim()}
    rest = {key: value for key, value in state.items() if key not in tensors}
    return tensors, {key: value.item() if isinstance(value, Tensor) else value for key, value in rest.items()}


def _like(saved: Any, value: Any) -> Any:
    """A saved scalar in the form of the one that is there."""
    if isinstance(value, Tensor):
        return torch.full_like(value, saved)
    return tuple(saved) if isinstance(value, tuple) else saved


def _compare(folder: Path, own: dict[str, Any], known: dict[str, Any]) -> None:
    """Raise UserError where a folder holds other names or shapes than the model has."""
    for name in sorted(own.keys() ^ known.keys()):
        raise UserError(f"{folder}: {name} is {'not there' if name in own else 'no part of this model'}")
    for name, value in own.items():
        size = getattr(known[name], "size", None)
        if isinstance(value, Tensor) and size is not None and tuple(size) != tuple(value.shape):
            raise UserError(f"{folder}: {name} has shape {tuple(size)}, and this model's {tuple(value.shape)}")


def first_does(call: Callable[[], T]) -> T:
    """What a call gives on the first rank, on every rank; what it raises there is raised on every rank."""
    if not (dist.is_available() and dist.is_initialized()):
        return call()
    said: list[Any] = [None, None]
    error: Exception | None = None
    if is_first_rank():
        try:
            said = [call(), None]
        except Exception as raised:
            error, said = raised, [None, one_line(raised)]
    with named_errors():
        dist.broadcast_object_list(said)
    if error is not None:
        raise error
    if said[1] is not None:
        raise Elsewhere(f"on the first rank: {said[1]}")
    result: T = said[0]
    return result


@contextmanager
def together(out: Path, **facts: Any) -> Iterator[Path]:
    """A folder in which all ranks write, which becomes `out`, sealed with facts; or disappears with an error of any."""
    with ExitStack() as stack:
        part = first_does(lambda: stack.enter_context(new_folder(out, **facts)))
        error: Exception | None = None
        try:
            yield part
        except Exception as raised:
            error = raised
        said: list[Any] = [None if error is None else one_line(error)]
        if dist.is_available() and dist.is_initialized():
            said *= dist.get_world_size()
            with named_errors():
                dist.all_gather_object(said, said[0])
        if error is not None:
            raise error
        for rank, text in enumerate(said):
            if text is not None:
                raise Elsewhere(f"{out} is not written: rank {rank}: {text}")
        first_does(stack.close)
