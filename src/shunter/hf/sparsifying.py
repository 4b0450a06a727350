"""A dense Hugging Face model made sparse: its feed-forward blocks replaced by `MoE` layers, which its config names."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from .. import routers
from ..durable import MANIFEST
from ..errors import UserError
from ..experts import Experts
from ..experts.weights import STACKED
from ..moe import MoE, moe_layers
from ..routers import Router
from .blocks import FeedForward, find_feed_forwards, survey
from .config_file import name_layers
from .hooks import check_batch, install

__all__ = ["choose_blocks", "describe_layers", "make_layers", "router_name", "save_sparse", "sparsify"]

Model = TypeVar("Model", bound=PreTrainedModel)

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")  # of torch.nn.Module


def sparsify(
    model: Model,
    num_experts: int,
    router: str | type[Router] = "switch",
    *,
    every: int = 1,
    layers: Sequence[int] | None = None,
    within: str = "",
    hidden: int | None = None,
    init: str = "scratch",
    backend: str = "auto",
    num_shared_experts: int = 0,
    allow_leak: bool = False,
    batch: Mapping[str, str] | None = None,
    **options: Any,
) -> Model:
    """Replace the feed-forward blocks of a dense Hugging Face model by `MoE` layers, in place.

    Padding (attention_mask) and token ids (input_ids) reach the routers, and in training the auxiliary losses are part
    of `output.loss`, right under gradient accumulation. (A Trainer with label smoothing or a compute_loss_func makes
    its own loss: add `shunter.aux_loss(model)` there.) `save_pretrained` works as before, with each layer as it
    then is named in the configuration; `shunter.from_pretrained` loads, and so do transformers' Auto classes after
    `import shunter.hf`; without it they refuse the folder.

    Args:
        model: any model with feed-forward blocks act(up(x)) or act(gate(x)) * up(x) before a map down, which
            `shunter.hf.blocks` finds by what the model computes, be they modules or spread over a layer (docs:
            architectures). Dropout between the maps is not kept; at the block's end it is.
        num_experts: E.
        router: a registered name, or a registered class.
        every: sparsify every n-th block, the n-th first (2: the second, fourth, …).
        layers: sparsify these blocks of each stack instead, counted from 0.
        within: the name of a module of the model, whose blocks alone are counted and replaced, as "vision_model" of
            CLIP's two towers; default: all.
        hidden: f of one expert; default: the dense block's.
        init: "scratch" draws each expert from a normal distribution with the dense weights' standard deviation; "copy"
            makes each expert a copy of the dense block; "paper" begins as scratch, and goes on as the router's paper
            does (switch: its scale; vmoe: all experts equal; base: the block is zero).
        backend: of the experts.
        num_shared_experts: see `MoE`.
        allow_leak: insist on a router that lets later tokens change earlier ones, in a causal model.
        batch: what a batch knows of its tokens besides, by which the routers may go: {"task": "task_ids"} takes the
            keyword `task_ids` of the model's forward, (B,) or (B, S), for the `task` of `shunter.routers.Context`.
        **options: of the router. A hash router's vocab_size is the model's unless given.

    Returns:
        The same model.

    Raises:
        UserError: for models without a block that is known (with what was looked at), that are sparse already or
            offloaded, impossible values, and a leaking router in a causal model.
        ValueError: for impossible options of the router.

    Warns:
        UserWarning: where some of a model's blocks are known and others, which stay dense, are not.

    Source: Fedus et al. 2022, section 2.1 and figure 1; `every`: section 3.3.
    """
    if not isinstance(model, PreTrainedModel):
        raise UserError(
            f"sparsify: {type(model).__name__} is no model of transformers; put shunter.MoE into it yourself"
        )
    name, told = router if isinstance(router, str) else router_name(router), check_batch(batch)
    if init not in ("scratch", "copy", "paper"):
        raise UserError(f"sparsify: init {init!r} is unknown; choose scratch, copy or paper")
    if init == "copy" and num_shared_experts:
        raise UserError("sparsify: copies beside a shared expert would not compute what the dense block does")
    known = routers.options(name)
    if "vocab_size" in known and options.get("vocab_size") is None:
        options["vocab_size"] = getattr(model.config.get_text_config(), "vocab_size", None)
        if options["vocab_size"] is None:
            raise UserError(f"sparsify: {type(model).__name__} has no token ids, by which router {name!r} goes")
    made = []
    stacks, left = survey(model)
    if within:
        stacks = _stacks_within(stacks, within, model)
    elif left:
        more = f", and {len(left) - 1} more" if left[1:] else ""
        warnings.warn(f"sparsify: no known feed-forward block, left dense: {left[0]}{more}", stacklevel=2)
    for block in choose_blocks(stacks, every, layers):
        _must_be_here(block)
        _must_call_none(model, block)
        width = block.hidden if hidden is None else hidden
        if init == "copy" and width != block.hidden:
            raise UserError(f"sparsify: init='copy' keeps the dense width {block.hidden}; leave hidden out")
        moe = _make(
            block,
            hidden=width,
            num_experts=num_experts,
            router=name,
            backend=backend,
            activation=block.activation,
            bias=block.bias,
            num_shared_experts=num_shared_experts,
            dropout=block.dropout,
            causal=_is_causal(model, block) and not allow_leak,
            options=options,
        )
        _initialise(moe, block, init)
        made.append((block, moe))
    _put(model, made, told)
    return model


def make_layers(
    model: PreTrainedModel, layers: Iterable[dict[str, Any]], batch: Mapping[str, str] | None = None
) -> None:
    """Replace blocks of a dense model as `describe_layers` said that its sparse form is, in place; nothing is drawn.

    `batch` is as of `sparsify`.

    Raises:
        UserError: where an entry names no block of the model.
        KeyError, TypeError, ValueError: where it describes no layer.
    """
    blocks = {block.path: block for stack in find_feed_forwards(model) for block in stack}
    inner = f"{model.base_model_prefix}."
    made = []
    for entry in layers:
        name = entry["name"]
        # A model without its head has shorter names, one with another head the same.
        block = next((blocks.pop(n) for n in (name, name.removeprefix(inner), inner + name) if n in blocks), None)
        if block is None:
            raise UserError(f"{type(model).__name__} has no feed-forward block {name!r}")
        made.append((block, _make(block, **{key: value for key, value in entry.items() if key != "name"})))
    _put(model, made, check_batch(batch))


def _stacks_within(stacks: list[list[FeedForward]], within: str, model: PreTrainedModel) -> list[list[FeedForward]]:
    """The blocks of a module alone, by its name, in their stacks.

    Raises:
        UserError: where it has none.
    """
    found = [[block for block in stack if f"{block.path}.".startswith(f"{within}.")] for stack in stacks]
    if not any(found):
        kind, names = type(model).__name__, ", ".join(dict.fromkeys(stack[0].path for stack in stacks))
        raise UserError(f"sparsify: within={within!r} has no feed-forward block of {kind}; the first ones are {names}")
    return [stack for stack in found if stack]


def _must_be_here(block: FeedForward) -> None:
    for rows in block.maps.values():
        if rows.weight.is_meta and hasattr(rows.linear, "_hf_hook"):
            raise UserError(f"sparsify: the weights of {rows.path} are offloaded; sparsify the model, then offload it")


def _must_call_none(model: nn.Module, block: FeedForward) -> None:
    """Raises UserError where somebody has registered hooks within a block, which what replaces it would not call."""
    modules = dict(model.named_modules())
    for path in (block.path, *block.superfluous, *(rows.path for rows in block.maps.values())):
        if path not in modules:  # a plain function
            continue
        for name, module in modules[path].named_modules(prefix=path):
            if any(vars(module).get(hooks) for hooks in _HOOKS):
                raise UserError(
                    f"sparsify: {name} has hooks, which its replacement would not call; remove them, and register what "
                    "you need on the sparse layer"
                )


def _make(block: FeedForward, *, options: dict[str, Any], **sizes: Any) -> MoE:
    return MoE(block.dim, **sizes, device=block.down.device, dtype=block.down.dtype, **options)


def _put(model: PreTrainedModel, made: list[tuple[FeedForward, MoE]], batch: dict[str, str]) -> None:
    places: dict[int, list[tuple[nn.Module, str]]] = {}  # a block that layers share is in several
    for parent in model.modules():
        for name, child in parent.named_children():
            places.setdefault(id(child), []).append((parent, name))
    for block, moe in made:
        for parent, name in places[id(model.get_submodule(block.path))]:
            setattr(parent, name, moe.train(model.training))
        for path in block.superfluous:
            around, _, name = path.rpartition(".")
            setattr(model.get_submodule(around), name, nn.Identity())
        for path, name in block.undropped:
            setattr(model.get_submodule(path), name, 0.0)
        _give_whole_rows(model, block)
    name_layers(model.config, describe_layers(model) | {"batch": batch})
    vars(model)["save_pretrained"] = partial(save_sparse, model)  # of the instance: what is copied or pickled keeps it
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and part.config is not model.config and moe_layers(part):
            vars(part)["save_pretrained"] = partial(_refuse_part, part, model)
    install(model, batch)


def _give_whole_rows(model: PreTrainedModel, block: FeedForward) -> None:
    """Let the layer around a block hand it all tokens at once: a router that sees some has other places and capacity.

    Cutting them (`chunk_size_feed_forward`) saves memory of a dense block, and changes no result of one.
    """
    parts = block.path.split(".")
    around: Any
    for around in (model.get_submodule(".".join(parts[:n])) for n in range(len(parts))):
        if hasattr(around, "chunk_size_feed_forward"):
            around.chunk_size_feed_forward = 0


def save_sparse(model: PreTrainedModel, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
    """Save a sparse or quantised model as transformers does, with the layers as they are now in the configuration."""
    if getattr(model.config, "shunter", None) is not None:
        model.config.shunter |= describe_layers(model)
    (Path(save_directory) / MANIFEST).unlink(missing_ok=True)  # of the model that is replaced
    if len(args) < 2 and kwargs.get("state_dict") is None and (state := _state_of_wrapped(model)):
        kwargs["state_dict"] = state
    type(model).save_pretrained(model, save_directory, *args, **kwargs)


def _state_of_wrapped(model: nn.Module) -> dict[str, Any] | None:
    """A model's state dict as of plain routers, where some are compiled, parametrized or sharded; None where none is.

    A parametrized weight is what the parametrization makes of it, that of a router sharded by itself (FSDP2) is whole.
    """
    state: dict[str, Any] = {}
    for path, layer in moe_layers(model).items():
        changed = [(at, part) for at, part in layer.router.named_modules() if parametrize.is_parametrized(part)]
        if not changed and "_orig_mod" not in layer.router._modules and not isinstance(layer.router, FSDPModule):
            continue
        state = state or model.state_dict()
        for at, part in changed:
            place = f"{path}.router.{at}." if at else f"{path}.router."
            state = {name: value for name, value in state.items() if not name.startswith(f"{place}parametrizations.")}
            state |= {f"{place}{name}": getattr(part, name).detach() for name in part.parametrizations}
        compiled = f"{path}.router._orig_mod."
        state = {name.replace(compiled, f"{path}.router."): value for name, value in state.items()}
        for name, value in state.items():
            if name.startswith(f"{path}.router.") and hasattr(value, "full_tensor"):
                state[name] = value.full_tensor()
    return state or None


def _refuse_part(part: PreTrainedModel, whole: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
    """Refuse to save a model inside of a sparse one whose configuration does not know of its sparse layers.

    Raises:
        UserError: always.
    """
    raise UserError(
        f"save_pretrained: this {type(part).__name__} is part of a sparse {type(whole).__name__}, which knows its "
        "sparse layers; save that one"
    )


def describe_layers(model: nn.Module) -> dict[str, Any]:
    """What config.json says of a model's sparse layers, as they are: the layout, and a layer's sizes and router each.

    Raises:
        UserError: for a layer that these words do not describe.
    """
    entries = []
    for name, layer in moe_layers(model).items():
        if not isinstance(layer, MoE):
            raise UserError(f"{name} is a {type(layer).__name__}; only layers of MoE can be saved within a model")
        experts, shared = layer.experts, layer.shared_experts
        entry = {
            "name": name,
            "num_experts": layer.num_experts,
            "hidden": experts.hidden,
            "activation": experts.activation,
            "bias": experts.bias,
            "num_shared_experts": 0 if shared is None else shared.hidden // experts.hidden,
            "dropout": layer.dropout.p,
            "expert_dropout": experts.dropout,
            "backend": experts.backend,
            "recompute": experts.recompute,
            "router": router_name(type(layer.decider)),
            "options": layer.decider.options,
        }
        entries.append(entry)
    return {"layout": STACKED, "layers": entries}


def router_name(router: type) -> str:
    """The registered name of a router's class, or of the one that a wrapper (FSDP2, a parametrization) made it of.

    Raises:
        UserError: where neither is registered: another class would not decide as it does.
    """
    for kind in router.__mro__:
        if found := next((name for name in routers.names() if routers.find(name) is kind), None):
            return found
        wrappers = {prefix + base.__name__ for base in kind.__bases__ for prefix in ("FSDP", "Parametrized")}
        if issubclass(kind, Router) and kind.__name__ not in wrappers:
            break
    raise UserError(f"sparsify: register {router!r} with shunter.routers.register first, so that it can be loaded")


def choose_blocks(
    stacks: list[list[FeedForward]], every: int = 1, layers: Sequence[int] | None = None
) -> list[FeedForward]:
    """Every n-th block of each stack, or those that `layers` counts from 0.

    Raises:
        UserError: where that leaves none, or a stack has no such block.
    """
    if every < 1:
        raise UserError(f"sparsify: every={every} must be at least 1")
    if layers is None:
        chosen = [block for stack in stacks for block in stack[every - 1 :: every]]
        if not chosen:
            raise UserError(f"sparsify: every={every} leaves no block to replace")
        return chosen
    shortest = min(map(len, stacks))
    if every != 1:
        raise UserError("sparsify: layers and every both say which blocks are replaced; give one")
    if not layers or sorted(set(layers)) != list(layers) or layers[0] < 0 or layers[-1] >= shortest:
        raise UserError(f"sparsify: layers={list(layers)} must be increasing numbers from 0 to {shortest - 1}")
    return [stack[i] for stack in stacks for i in layers]


def _is_causal(model: PreTrainedModel, block: FeedForward) -> bool:
    """Whether the layer around a block attends causally: its attention says so, or the model generates with it."""
    parts = block.path.split(".")
    # The outermost number is the layer's: T5 numbers the parts of a layer too.
    number = next(i for i, part in enumerate(parts) if part.isdigit())
    layer = model.get_submodule(".".join(parts[: number + 1]))
    if any(getattr(module, "is_causal", False) is True for module in layer.modules()):
        return True
    decoder = model.get_decoder() if model.can_generate() else None  # whose attention need not say so
    return decoder is not None and decoder is not model and any(module is layer for module in decoder.modules())


@torch.no_grad()
def _initialise(moe: MoE, block: FeedForward, init: str) -> None:
    assert isinstance(moe.experts, Experts)
    weights = moe.experts.weights
    if weights.up.is_meta or block.down.is_meta:
        return  # about to be loaded
    if init != "copy":
        for experts in (moe.experts, moe.shared_experts):
            if experts is not None:
                experts.reset_parameters(float(block.up.float().std()), float(block.down.float().std()))
        if init == "paper":
            moe.init_as_in_paper()
        return
    for ours, dense in (
        (weights.up, block.up),
        (weights.down, block.down),
        (weights.up_bias, block.up_bias),
        (weights.down_bias, block.down_bias),
    ):
        if ours is not None:
            ours.copy_(torch.zeros_like(ours[0]) if dense is None else dense)
