"""A model, or the folder of one, to a model whose experts are read from their file when tokens choose them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

from ..errors import UserError
from ..experts import Experts
from ..experts.foresight import Foresight
from ..experts.residency import Extent, HeldFile, PagedParameter, Residency, Sources, Stacks, lacks, spilled
from ..moe import MoE
from ..routing import Routing
from .checkpoints.folders import local_folder, model_class, on_meta, read_config
from .checkpoints.formats import made_here, sparse_class
from .checkpoints.loading import load_without
from .checkpoints.reading import Checkpoint, Stored

__all__ = ["offload", "parse_size"]

_STACKS = ("gate_up_proj", "up_proj", "down_proj")
_FEW = 64  # choices up to which a set of them takes less time than a sorted tensor
_UNITS = {"": 1, **{f"{p}B": 1000**i for i, p in enumerate(" KMGT") if i}, "B": 1}
_UNITS |= {f"{p}iB": 1024**i for i, p in enumerate(" KMGT") if i}


def offload(model: Any, memory: int | str, *, prefetch: bool = True, **options: Any) -> Any:
    """Keep a model's experts in their file, and in memory those alone that were used last.

    Every backend computes on them as on whole tensors, to the same bits. It is for inference: parameters are frozen,
    and a forward in training or with gradients is refused, as are copying, saving and moving the model.

    Args:
        model: the folder (or Hub name) of a model of `shunter.sparsify` or of transformers, in safetensors: then the
            experts are never in memory together. Or a model on the CPU, whose experts leave its memory: for the file
            that it was loaded from, where that holds the same bits, else for a temporary file (in TMPDIR).
        memory: what experts may take of it, in bytes, or as "8GiB" or "500MB"; the rest of the model comes on top.
        prefetch: whether the routers of the next layers are asked ahead of time, with the hidden states of the present
            one, and what they choose is read while it computes. Their matrices are copied for that.
        **options: of transformers' `from_pretrained`, for a folder.

    Returns:
        The model, in evaluation; `model.expert_memory` (`Residency`) counts hits, misses and bytes read.

    Raises:
        UserError: where memory does not hold the experts that one token takes, the model has no experts or is not on
            the CPU, and where the folder is damaged or stores experts otherwise than the model has them.

    A forward raises UserError where the file has changed meanwhile, and OSError where it cannot be read.
    """
    size = parse_size(memory)
    if (refusal := lacks()) is not None:
        raise UserError(f"offload: {refusal}")
    if isinstance(model, str | Path):
        return _from_folder(local_folder(model), size, prefetch, options)
    if options:
        raise UserError(f"offload: {', '.join(options)}= is for loading a folder; the model is loaded already")
    found = _expert_modules(model)
    for name, module in found.items():
        for key, stack in _stacks(module).items():
            if isinstance(stack, PagedParameter):
                raise UserError("offload: the experts of this model are offloaded already")
            if stack.device.type != "cpu" or not stack.is_contiguous():
                where = "is not contiguous" if stack.device.type == "cpu" else f"is on {stack.device}"
                raise UserError(f"offload: {name}.{key} {where}; experts are offloaded from the CPU's memory")
    _check_room(model, found, size)
    residency = Residency(size, _foresight(model, found) if prefetch else None)
    stored = _same_bits(model, found)
    for name, module in found.items():
        stacks = _stacks(module)
        kept = {key: stored[f"{name}.{key}"] for key in stacks if f"{name}.{key}" in stored}
        sources = kept | spilled({key: stack for key, stack in stacks.items() if key not in kept})
        _install(residency, name, module, sources, stacks)
    return _ready(model, residency)


def parse_size(memory: int | str) -> int:
    """Bytes, of a number of them or of a text such as "8GiB", "1.5 GB" or "800MiB".

    Raises:
        UserError: where it is neither.
    """
    if isinstance(memory, int) and not isinstance(memory, bool) and memory > 0:
        return memory
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(memory))
    units = {unit.lower(): times for unit, times in _UNITS.items()}
    if not isinstance(memory, str) or match is None or match[2].lower() not in units:
        raise UserError(f"memory {memory!r} is no size; give bytes, or a text such as '8GiB' or '500MB'")
    size = int(float(match[1]) * units[match[2].lower()])
    if size < 1:
        raise UserError(f"memory {memory!r} is nothing; give what the experts may take, such as '8GiB'")
    return size


def _expert_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules with stacks of more than one expert, by qualified name, in order."""
    found = {}
    for name, module in model.named_modules():
        decorated = "_apply_gate" in dir(module) and hasattr(module, "has_gate")
        if isinstance(module, Experts) or decorated or isinstance(module, Llama4TextExperts):
            stacks = _stacks(module)
            if stacks and next(iter(stacks.values())).shape[0] > 1:
                found[name] = module
    if not found:
        raise UserError(f"offload: {type(model).__name__} has no experts in stacks; nothing of it can be offloaded")
    return found


def _stacks(module: nn.Module) -> dict[str, nn.Parameter]:
    named = {key: module._parameters.get(key) for key in _STACKS}
    return {key: stack for key, stack in named.items() if stack is not None and stack.dim() == 3}


def _check_room(model: nn.Module, found: dict[str, nn.Module], memory: int) -> None:
    """Raises UserError where memory does not hold the experts of one token in one layer."""
    taken = {f"{name}.experts": layer.decider.top_k for name, layer in model.named_modules() if isinstance(layer, MoE)}
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    named = ("num_experts_per_tok", "moe_topk", "top_k_experts")
    fallback = next((getattr(text, name) for name in named if hasattr(text, name)), 1)
    for name, module in found.items():
        stacks = _stacks(module).values()
        expert = sum(stack[0].numel() * stack.element_size() for stack in stacks)
        k = taken.get(name, fallback)
        k = min(k if isinstance(k, int) and k > 0 else 1, next(iter(stacks)).shape[0])
        if memory < k * expert:
            raise UserError(
                f"offload: memory of {memory:,} bytes holds {memory // expert} experts of {name}, {expert:,} bytes "
                f"each; a token takes {k}: give at least {k * expert:,}"
            )


def _from_folder(folder: Path, memory: int, prefetch: bool, options: dict[str, Any]) -> PreTrainedModel:
    """The model of a folder, its experts in the folder's files."""
    checkpoint = Checkpoint(folder)
    config = read_config(folder, checkpoint.tensors)
    kind = sparse_class(config, str(folder)) if made_here(config) else model_class(config, str(folder))
    skeleton = on_meta(kind, config, folder)
    found = _expert_modules(skeleton)
    _check_room(skeleton, found, memory)
    wanted = {f"{name}.{key}": stack for name, module in found.items() for key, stack in _stacks(module).items()}
    stored = _in_files(skeleton, checkpoint, wanted)
    for name in wanted:
        if name not in stored:
            raise UserError(
                f"offload: {folder} does not store {name} as the model has it in memory; load the model with "
                "from_pretrained, and give that to offload, which writes the experts to a temporary file"
            )
    model = load_without(kind, str(folder), wanted, {"config": config, **options})
    if model.device.type != "cpu":
        raise UserError(f"offload: the model is on {model.device}; experts are offloaded to the CPU's memory alone")
    residency = Residency(memory, _foresight(model, found) if prefetch else None)
    for name, module in _modules(model, found).items():
        sources, shapes = {}, {}
        for key, stack in _stacks(found[name]).items():
            sources[key], dtype = stored[f"{name}.{key}"]
            if dtype != model.dtype:
                raise UserError(
                    f"offload: {folder} stores {name}.{key} in {dtype}, and the model is loaded in {model.dtype}; "
                    f"give dtype={dtype}, or save_pretrained the model in the dtype that it is to run in"
                )
            shapes[key] = torch.empty(stack.shape, dtype=dtype, device="meta")
        _install(residency, name, module, sources, shapes)
    return _ready(model, residency)


def _modules(model: nn.Module, found: dict[str, nn.Module]) -> dict[str, nn.Module]:
    return {name: model.get_submodule(name) for name in found}


def _in_files(
    model: nn.Module, checkpoint: Checkpoint, wanted: Mapping[str, Tensor]
) -> dict[str, tuple[Sources, torch.dtype]]:
    """Where each expert of the wanted stacks lies in a folder's files, and in which dtype.

    A stack is stored as it is in memory, or as a tensor for each expert, or for each half of one, the gate's first;
    what is stored otherwise is left out.
    """
    transforms = get_model_conversion_mapping(model) if isinstance(model, PreTrainedModel) else []
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    patterns = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix, state = getattr(model, "base_model_prefix", None), model.state_dict()
    files: dict[Path, HeldFile] = {}
    whole: dict[str, str] = {}
    parts: dict[str, dict[str, list[str]]] = {}
    for disk in sorted(checkpoint.tensors, key=dot_natural_key):
        name, pattern = rename_source_key(disk, renamings, converters, prefix, state)
        if name not in state and disk in state:
            name, pattern = disk, None
        if name not in wanted:
            continue
        if pattern is None:
            whole[name] = disk
        else:
            parts.setdefault(name, {}).setdefault(pattern, []).append(disk)

    def extent(stored: Stored, start: int, nbytes: int) -> Extent:
        assert stored.file is not None
        if stored.file not in files:
            files[stored.file] = HeldFile(stored.file)
        return Extent(files[stored.file], stored.start + start, nbytes)

    found: dict[str, tuple[Sources, torch.dtype]] = {}
    for name, disk in whole.items():
        stored, experts = checkpoint.tensors[disk], wanted[name].shape[0]
        if stored.shape == tuple(wanted[name].shape):
            size = stored.nbytes // experts
            found[name] = [[extent(stored, e * size, size)] for e in range(experts)], stored.dtype
    for name, by_pattern in parts.items():
        experts, rows, columns = wanted[name].shape
        converter = patterns[next(iter(by_pattern))]
        order = [by_pattern.get(pattern, []) for pattern in converter.source_patterns]
        tensors = [[checkpoint.tensors[disk] for disk in disks] for disks in order]
        dtypes = {stored.dtype for each in tensors for stored in each}
        fit = all(len(each) == experts for each in tensors) and len(dtypes) == 1 and name not in whole
        fit = fit and all(stored.shape == (rows // len(order), columns) for each in tensors for stored in each)
        if fit and _stacks_in_order(converter, len(order)):
            found[name] = [[extent(s, 0, s.nbytes) for s in each] for each in zip(*tensors, strict=True)], dtypes.pop()
    return found


def _stacks_in_order(converter: WeightConverter, halves: int) -> bool:
    """Whether a conversion puts experts one after the other, each the rows of its halves in order, and no more."""
    operations = converter.operations
    if len(converter.target_patterns) != 1 or not operations or len(operations) != (2 if halves > 1 else 1):
        return False
    merges = type(operations[0]) is MergeModulelist and operations[0].dim == 0
    return merges and (halves == 1 or (type(operations[1]) is Concatenate and operations[1].dim == 1))


def _same_bits(model: nn.Module, found: dict[str, nn.Module]) -> dict[str, Sources]:
    """The stacks of a model in memory that the folder it was loaded from holds bit for bit, and where."""
    name = getattr(model, "name_or_path", "") or ""
    if not name or not Path(name).is_dir():
        return {}
    wanted = {f"{path}.{key}": stack for path, module in found.items() for key, stack in _stacks(module).items()}
    try:
        stored = _in_files(model, Checkpoint(Path(name)), wanted)
    except (UserError, OSError):  # no longer the folder of this model: its memory is what counts
        return {}
    return {
        name: sources
        for name, (sources, dtype) in stored.items()
        if dtype == wanted[name].dtype and all(_equal(wanted[name][e], each) for e, each in enumerate(sources))
    }


def _equal(matrix: Tensor, extents: Any) -> bool:
    own = matrix.detach().reshape(-1).view(torch.uint8).numpy().data
    read, done = bytearray(len(own)), 0
    for extent in extents:
        extent.file.read(extent.start, memoryview(read)[done : done + extent.nbytes])
        done += extent.nbytes
    return done == len(own) and memoryview(read) == own


def _install(residency: Residency, name: str, module: Any, sources: dict[str, Sources], like: dict[str, Any]) -> None:
    """Give a module stacks that are in memory for the experts alone that its forward is about to use."""
    shapes = {key: (t.shape, t.dtype, 0 if t.is_meta else t.data_ptr()) for key, t in like.items()}
    like.clear()  # the memory of what is replaced
    layer = residency.add(Stacks(module, sources, shapes))
    before = module.__dict__.get("forward")  # of who wrapped it before; else that of the class which it has then
    chosen: Callable[..., tuple[list[int], Tensor | None, int]] = partial(_chosen, module)

    @wraps(module.forward)
    @torch.compiler.disable
    def forward(*args: Any, **kwargs: Any) -> Any:
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        given += [value.weight for value in (*args, *kwargs.values()) if isinstance(value, Routing)]
        learns = torch.is_grad_enabled() and any(value.requires_grad for value in given)
        if module.training or learns:
            raise UserError(
                f"offload: {name} is asked for a forward in training; offloaded experts are for inference: call "
                "model.eval() and torch.no_grad(), and train without offload"
            )
        with residency.holding(layer, *chosen(*args, **kwargs)):
            return type(module).forward(module, *args, **kwargs) if before is None else before(*args, **kwargs)

    module.forward = forward
    module._apply = partial(_stay, module)
    module.register_state_dict_pre_hook(_refuse_saving)
    module.register_load_state_dict_pre_hook(_refuse_loading)


def _chosen(module: Any, *args: Any, **kwargs: Any) -> tuple[list[int], Tensor | None, int]:
    """The experts that a forward of a module with these arguments computes with, its hidden states, experts a token.

    No hidden states where they are not those that a router is given.
    """
    given = [*args, *kwargs.values()]
    if isinstance(module, Experts):
        (routing,) = (value for value in given if isinstance(value, Routing))
        x = next(value for value in given if isinstance(value, Tensor))
        each = -(-routing.token.numel() // max(1, routing.num_tokens))
        return list(routing.counts.nonzero().flatten().tolist()), x, each
    if isinstance(module, Llama4TextExperts):  # a copy of the tokens for each expert, zeros where it has none
        rows = given[0].reshape(module.num_experts, -1)
        return list((rows != 0).any(1).nonzero().flatten().tolist()), None, 1
    index = kwargs["top_k_index"] if "top_k_index" in kwargs else args[1]
    experts = set(index.flatten().tolist()) if index.numel() <= _FEW else index.unique().tolist()
    here = sorted(e for e in experts if 0 <= e < module.num_experts)
    return here, kwargs["hidden_states"] if "hidden_states" in kwargs else args[0], index.shape[-1]


def _foresight(model: nn.Module, found: Mapping[str, nn.Module]) -> Foresight:
    """Foresight by the routers of the modules with experts."""
    return Foresight([_linear_router(model, name, module) for name, module in found.items()])


def _linear_router(model: nn.Module, name: str, experts: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """The matrix (E, d) and bias (E,) by which the layer around experts chooses; None unless it has just one."""
    around, _, own = name.rpartition(".")
    count = next(iter(_stacks(experts).values())).shape[0]
    maps = [
        module
        for path, module in model.get_submodule(around).named_modules()
        if path.split(".")[0] != own and _shape(module._parameters.get("weight"))[:-1] == (count,)
    ]
    if len(maps) != 1:
        return None
    weight, bias = maps[0]._parameters["weight"], maps[0]._parameters.get("bias")
    assert weight is not None
    return weight, bias if _shape(bias) == (count,) else None


def _shape(tensor: Tensor | None) -> tuple[int, ...]:
    return () if tensor is None or not tensor.is_floating_point() else tuple(tensor.shape)


def _refuse_saving(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    raise UserError(
        f"offload: {prefix}down_proj and its like are in a file, and only some experts in memory; save the model "
        "before it is offloaded"
    )


def _refuse_loading(module: nn.Module, state: Any, prefix: str, *_: Any) -> None:
    raise UserError(
        f"offload: {prefix}down_proj and its like are read from a file, which nothing can be loaded into; load the "
        "model before it is offloaded"
    )


def _stay(module: nn.Module, function: Any, recurse: bool = True) -> nn.Module:
    """`Module._apply` of a module whose parameters cannot be converted or moved."""
    for parameter in module.parameters():
        probe = torch.empty(0, dtype=parameter.dtype)
        moved = function(probe)
        if moved.dtype != probe.dtype or moved.device != probe.device:
            raise UserError(
                f"offload: offloaded experts stay in {parameter.dtype} on the CPU; convert the model before, or save "
                "it in the dtype that it is to run in"
            )
    return module


def _ready(model: Any, residency: Residency) -> Any:
    model.requires_grad_(False)
    model.eval()
    model.expert_memory = residency
    return model
