"""Load a model folder whole, or say in one sentence what is wrong with it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from ...experts.weights import STACKED
from ...moe import MoE, moe_layers
from ..sparsifying import sparsify
from .folders import COMPUTED, line_of, match_names, model_class, on_meta, read_config
from .reading import Checkpoint

__all__ = ["from_pretrained", "load_folder", "make_dense", "skeleton", "split_layers"]

# Of the memory that torch allocates, in bytes.
ALIGNMENT = 64


def from_pretrained(path: str, **kwargs: Any) -> PreTrainedModel:
    """Load a sparsified model that `save_pretrained` wrote, bit for bit.

    Args:
        path: the folder, or a Hub name. Nothing in a folder is trusted: no code is run, no pickle is opened.
        **kwargs: of transformers' `from_pretrained` (dtype=, device_map=, …).

    Raises:
        ValueError: where the folder holds a model that Shunter did not make, or is damaged: it lacks tensors or has
            others, shapes are wrong, files are cut short or reach outside the folder.
    """
    folder = Path(path)
    if folder.is_dir() and not kwargs.get("subfolder"):
        checkpoint = Checkpoint(folder)
        config = read_config(folder, len(checkpoint.tensors))
        model = skeleton(config, folder)
        split, stacked = split_layers(model, checkpoint)
        rest = {name: stored for name, stored in checkpoint.tensors.items() if name not in split}
        match_names(folder, model, rest, stacked)
    else:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    kind = _sparse_class(config, path)
    # Whatever dtype the model is loaded in, routers decide in float32 and keep their state exact.
    kind._keep_in_fp32_modules_strict = {*(kind._keep_in_fp32_modules_strict or ()), "router"}
    return _load(kind, path, {"use_safetensors": True, **kwargs})


def skeleton(config: PreTrainedConfig, folder: Path) -> PreTrainedModel:
    """A sparsified model's modules, without memory.

    Raises:
        ValueError: where the configuration does not describe one.
    """
    return on_meta(_sparse_class(config, str(folder)), config, folder)


def _sparse_class(config: PreTrainedConfig, path: str) -> Any:
    spec = saved_options(config, path)
    base = model_class(config, path)

    def __init__(self: PreTrainedModel, config: Any, *args: Any, **options: Any) -> None:
        base.__init__(self, config, *args, **options)
        make_dense(self)
        sparsify(self, **spec)

    return type(base.__name__, (base,), {"__init__": __init__, "__module__": base.__module__})


def load_folder(folder: Path, **options: Any) -> PreTrainedModel:
    """Any model of a folder, in evaluation, every tensor of it finite and in its place.

    Args:
        folder: of `shunter.sparsify` or of any model of transformers, in safetensors.
        **options: of transformers' `from_pretrained`.

    Raises:
        ValueError: naming the folder or file and what is wrong with it.
    """
    checkpoint = Checkpoint(folder)
    config = read_config(folder, len(checkpoint.tensors), quantised=True)
    if getattr(config, "shunter", None) is not None:
        model = from_pretrained(str(folder), **options)
    else:
        model = _load(model_class(config, str(folder)), str(folder), {"use_safetensors": True, **options})
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f"{folder}: {name!r} holds NaN or infinity; the model is broken, take an earlier one")
    return model.eval()


def _load(kind: Any, path: str, options: dict[str, Any]) -> Any:
    wants_info = options.pop("output_loading_info", False)
    try:
        model, info = kind.from_pretrained(path, output_loading_info=True, trust_remote_code=False, **options)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a damaged folder fails in as many ways as there are readers
        raise ValueError(f"{path}: cannot be loaded: {line_of(error)}") from error
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
            raise ValueError(f"{path}: {len(names)} tensors {what}, such as {first!r}")
    _align(model)
    return (model, info) if wants_info else model


def _align(model: PreTrainedModel) -> None:
    """Copy the CPU parameters that lie at odd addresses in the file's memory map: products round otherwise there."""
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.data_ptr() % ALIGNMENT:
            parameter.data = parameter.data.clone()


def split_layers(model: PreTrainedModel, checkpoint: Checkpoint) -> tuple[set[str], set[str]]:
    """Where each expert's projections lie by themselves on disk, as transformers saves models of some families.

    Returns:
        The names on disk of those projections, and the names in the model of the stacks that they make up.

    Raises:
        ValueError: where one is missing or has a wrong shape.
    """
    on_disk: set[str] = set()
    stacked: set[str] = set()
    for path, layer in moe_layers(model).items():
        prefix = f"{path}.experts."
        if f"{prefix}gate_up_proj" in checkpoint.tensors or f"{prefix}0.gate_proj.weight" not in checkpoint.tensors:
            continue
        assert isinstance(layer, MoE)
        dim, hidden = layer.dim, layer.experts.hidden
        for e in range(layer.num_experts):
            for part, shape in (("gate", (hidden, dim)), ("up", (hidden, dim)), ("down", (dim, hidden))):
                name = f"{prefix}{e}.{part}_proj.weight"
                checkpoint.must_hold(name, shape)
                on_disk.add(name)
        stacked |= {f"{prefix}gate_up_proj", f"{prefix}down_proj"}
    return on_disk, stacked


def saved_options(config: PreTrainedConfig, path: str) -> dict[str, Any]:
    """The arguments of `sparsify` that a configuration keeps.

    Raises:
        ValueError: where Shunter did not make the model, or stored it in a layout that is unknown here.
    """
    spec = getattr(config, "shunter", None)
    if not isinstance(spec, dict):
        raise ValueError(f"{path} is not a model that shunter.sparsify made; load it with transformers")
    layout = spec.get("layout", STACKED)
    if layout != STACKED:
        raise ValueError(f"{path} stores its experts as {layout!r}; this version of Shunter reads {STACKED!r}")
    return {name: value for name, value in spec.items() if name != "layout"}


def make_dense(model: PreTrainedModel) -> None:
    """Give a model whose architecture has experts in every layer dense blocks in their place, for `sparsify`."""
    if model.config.model_type == "olmoe":
        from transformers.models.olmoe.modeling_olmoe import OlmoeMLP

        for layer in model.get_decoder().layers:
            layer.mlp = OlmoeMLP(model.config)
