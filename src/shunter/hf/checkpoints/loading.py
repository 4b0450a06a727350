"""Model folders to models of transformers, loaded whole, or one sentence on what is wrong with the folder."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from ...errors import UserError, one_line
from ...experts import QuantisedExperts
from ...moe import moe_layers
from .folders import COMPUTED, match_names, model_class, on_meta, read_config, without_marks
from .formats import made_here, sparse_class, split_layers
from .reading import Checkpoint

__all__ = ["align", "from_pretrained", "load_folder", "load_without", "modules_of"]

# Of the memory that torch allocates, in bytes.
ALIGNMENT = 64

# What transformers wants with the configuration and again with the weights.
_OF_BOTH = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
_OF_WEIGHTS = ("dtype", "torch_dtype")


def from_pretrained(path: str, **kwargs: Any) -> PreTrainedModel:
    """Load a sparsified model that `save_pretrained` wrote, bit for bit.

    Args:
        path: the folder, or a Hub name. Nothing in a folder is trusted: no code is run, no pickle is opened.
        **kwargs: of transformers' `from_pretrained` (dtype=, device_map=, …); trust_remote_code= makes no difference.

    Raises:
        UserError: where the folder holds a model that Shunter did not make, or is damaged: it lacks tensors or has
            others, shapes are wrong, files are cut short or reach outside the folder.
    """
    folder = Path(path)
    if folder.is_dir() and not kwargs.get("subfolder"):
        checkpoint = Checkpoint(folder)
        _match(checkpoint, read_config(folder, checkpoint.tensors, quantised=True))
    return _sparse(path, kwargs)


def _match(checkpoint: Checkpoint, config: PreTrainedConfig) -> None:
    """Raises UserError where a folder is not the whole of the sparse model that its configuration describes."""
    folder = checkpoint.folder
    model = on_meta(sparse_class(config, str(folder)), config, folder)
    split, stacked = split_layers(model, checkpoint)
    rest = {name: stored for name, stored in checkpoint.tensors.items() if name not in split}
    match_names(folder, model, rest, stacked)


def _sparse(path: str, kwargs: dict[str, Any]) -> PreTrainedModel:
    """A sparse model by transformers, from a folder that has been compared or from the Hub."""
    kept = {name: kwargs[name] for name in (*_OF_BOTH, *_OF_WEIGHTS) if name in kwargs}
    kwargs = {name: value for name, value in kwargs.items() if name not in (*_OF_WEIGHTS, "trust_remote_code")}
    try:
        config, rest = AutoConfig.from_pretrained(path, return_unused_kwargs=True, trust_remote_code=False, **kwargs)
    except Exception as error:  # no such folder, no network, not a configuration
        raise UserError(f"{path}: transformers cannot use its config.json: {one_line(error)}") from None
    options = {"use_safetensors": True, **rest, **kept, "config": without_marks(config)}
    return _load(sparse_class(config, path), path, options)


def load_folder(folder: Path, **options: Any) -> PreTrainedModel:
    """Any model of a folder, in evaluation, every tensor of it finite and in its place.

    Args:
        folder: of `shunter.sparsify` or of any model of transformers, in safetensors.
        **options: of transformers' `from_pretrained`.

    Raises:
        UserError: naming the folder or file and what is wrong with it.
    """
    checkpoint = Checkpoint(folder)
    config = read_config(folder, checkpoint.tensors, quantised=True)
    if made_here(config):
        _match(checkpoint, config)
        model = _sparse(str(folder), options)
    else:
        kind = model_class(config, str(folder))
        quantised = getattr(config, "quantization_config", None) is not None
        _refuse_more(folder, on_meta(kind, config, folder), checkpoint, 16 if quantised else 2)
        model = _load(kind, str(folder), {"use_safetensors": True, **options})
        # The grouped product that transformers takes by default knows rows of 16 bytes or a multiple, and no float64.
        stacks = [p for p in model.parameters() if p.dim() == 3]
        if any(p.dtype == torch.float64 or p.shape[-1] * p.element_size() % 16 for p in stacks):
            model.set_experts_implementation("eager")
        if not quantised:
            _refuse_integers(folder, model, checkpoint)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.is_meta and not bool(tensor.isfinite().all()):
            raise UserError(f"{folder}: {name!r} holds NaN or infinity; the model is broken, take an earlier one")
    for name, module in model.named_modules():
        if isinstance(module, QuantisedExperts) and not module.finite():
            raise UserError(f"{folder}: the scales of {name!r} hold NaN or infinity; quantize the model again")
    return model.eval()


def modules_of(folder: Path) -> PreTrainedModel:
    """The modules of any model of a folder, dense or sparse, without memory: none of its weights is read.

    Raises:
        UserError: naming the folder or file and what is wrong with it.
    """
    config = read_config(folder, Checkpoint(folder).tensors, quantised=True)
    kind = sparse_class(config, str(folder)) if made_here(config) else model_class(config, str(folder))
    model = on_meta(kind, config, folder)
    model.tie_weights()
    return model


def load_without(kind: Any, path: str, absent: Collection[str], options: dict[str, Any]) -> Any:
    """The model of a folder without some parameters, for which no memory is taken and nothing is read.

    Args:
        kind: the class of the model.
        path: the folder, which holds those parameters too.
        absent: their qualified names; the modules of them count as initialised.
        options: of transformers' `from_pretrained`.

    Raises:
        UserError: as `from_pretrained`.
    """
    base = model_class(options["config"], path)

    def __init__(self: PreTrainedModel, config: Any, *args: Any, **rest: Any) -> None:
        kind.__init__(self, config, *args, **rest)
        for name in absent:
            owner, _, key = name.rpartition(".")
            module: Any = self.get_submodule(owner)
            del module._parameters[key]
            module._is_hf_initialized = True

    ignored = [*(kind._keys_to_ignore_on_load_unexpected or ()), *(f"{re.escape(name)}$" for name in absent)]
    members = {"__init__": __init__, "__module__": kind.__module__, "_keys_to_ignore_on_load_unexpected": ignored}
    model = _load(type(kind.__name__, (kind,), members), path, {"use_safetensors": True, **options})
    model.__class__ = base  # which can be pickled
    return model.eval()


def _refuse_more(folder: Path, model: PreTrainedModel, checkpoint: Checkpoint, times: int) -> None:
    """Raises UserError where a model is far larger than what its folder holds: transformers would draw the rest."""
    wanted = sum(tensor.numel() for tensor in model.state_dict().values())
    held = sum(stored.numel for stored in checkpoint.tensors.values())
    if wanted > times * held + 10**6:  # tied weights are held once
        raise UserError(f"{folder}: config.json describes a model of {wanted:,} numbers; the folder holds {held:,}")


def _refuse_integers(folder: Path, model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Raises UserError for integers on disk where the model has none: transformers makes weights of them."""
    known = {name.rpartition(".")[2] for name, t in model.state_dict().items() if not t.is_floating_point()}
    for name, stored in checkpoint.tensors.items():
        computed = any(re.search(pattern, name) for pattern in COMPUTED)
        if not stored.dtype.is_floating_point and name.rpartition(".")[2] not in known and not computed:
            raise UserError(f"{folder}: {name!r} is of {stored.dtype}, where the model has floating-point numbers")


def _load(kind: Any, path: str, options: dict[str, Any]) -> Any:
    wants_info = options.pop("output_loading_info", False)
    try:
        model, info = kind.from_pretrained(path, output_loading_info=True, trust_remote_code=False, **options)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a damaged folder fails in as many ways as there are readers
        raise UserError(f"{path}: cannot be loaded: {one_line(error)}") from error
    wrong = {
        "are missing": info["missing_keys"],
        "have no place in the model": [
            name for name in info["unexpected_keys"] if not any(re.search(pattern, name) for pattern in COMPUTED)
        ],
        "have another shape": () if options.get("ignore_mismatched_sizes") else info["mismatched_keys"],
    }
    for what, names in wrong.items():
        if names:
            first = sorted(str(name[0] if isinstance(name, tuple) else name) for name in names)[0]
            raise UserError(f"{path}: {len(names)} tensors {what}, such as {first!r}")
    align(model)
    return (model, info) if wants_info else model


def align(model: PreTrainedModel) -> None:
    """Make a model that was loaded as one that was trained here, bit for bit.

    CPU parameters that lie at odd addresses in the file's memory map are copied, for products round otherwise there;
    buffers that are in no file get their first values.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.data_ptr() % ALIGNMENT:
            parameter.data = parameter.data.clone()
    # transformers leaves buffers that are not in the file as the memory happens to be.
    for layer in moe_layers(model).values():
        layer.decider.reset_unsaved()
