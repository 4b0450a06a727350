"""A dense Hugging Face model made sparse: its feed-forward blocks replaced by `MoE` layers, which its config names."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
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
from ..experts import Experts, MixedExperts, ResidualExperts
from ..experts.weights import STACKED
from ..moe import MoE, RoutedLayer, moe_layers
from ..routers import Router
from ..routers.split import Split
from .attention import KINDS, Attention, find_attentions, initialise, must_give_sequences, put, routed_in
from .blocks import FeedForward, find_feed_forwards, survey
from .config_file import name_layers
from .hooks import check_batch, install

__all__ = ["Placement", "describe_layers", "make_layers", "router_name", "save_sparse", "sparsify"]

Model = TypeVar("Model", bound=PreTrainedModel)
Block = TypeVar("Block")

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")  # of torch.nn.Module


def sparsify(
    model: Model,
    num_experts: int,
    router: str | type[Router] = "switch",
    *,
    where: str = "feed_forward",
    every: int = 1,
    layers: Sequence[int] | None = None,
    within: str = "",
    placement: str = "",
    hidden: int | None = None,
    init: str = "scratch",
    backend: str = "auto",
    num_shared_experts: int = 0,
    expert_weights: str = "separate",
    residual: bool = False,
    extra_mlp: bool = False,
    operations: Sequence[str] | None = None,
    cost_loss: float = 0.0,
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
        where: what becomes sparse: "feed_forward", the blocks; "attention", the maps to queries, and by one layer to
            keys and values, of self-attention (Fedus et al. 2021, Switch, appendix A); "heads", a mixture of attention
            heads in its place, of which a token takes top_k (Zhang et al. 2022), where heads may share keys, as in
            Llama; or two of them with a comma between, as "feed_forward, attention".
        every: sparsify every n-th block, the n-th first (2: the second, fourth, …).
        layers: sparsify these blocks of each stack instead, counted from 0.
        within: the name of a module of the model, whose blocks alone are counted and replaced, as "vision_model" of
            CLIP's two towers; default: all.
        placement: the same in words, with commas between: "every 2", then of these "last 2" alone (Riquelme et al.
            2021, section 2.3), and "pyramid": the last two of these in each stack, or the last of two or three, have
            twice as many experts (Rajbhandari et al. 2022, DeepSpeed-MoE, section 4.1: PR-MoE-32/64 is "every 2,
            pyramid" of 24 blocks with 32).
        hidden: f of one expert; default: the dense block's.
        init: "scratch" draws each expert from a normal distribution with the dense weights' standard deviation; "copy"
            makes each expert a copy of the dense block; "paper" begins as scratch, and goes on as the router's paper
            does (switch: its scale; vmoe: all experts equal; base: the block is zero). Of residual experts it is the
            core that begins so.
        backend: of the experts.
        num_shared_experts, expert_weights, residual, extra_mlp, operations, cost_loss: see `MoE`. With init="copy", the
            dense branch of a residual layer is the dense block too, so that both branches are it; experts of other
            `operations`, and shared ones that add to them, would not be.
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
    if init == "copy" and ((num_shared_experts and not residual) or num_shared_experts > 1):
        raise UserError("sparsify: copies beside a shared expert would not compute what the dense block does")
    if init == "copy" and (operations is not None or extra_mlp):
        raise UserError("sparsify: with operations= or extra_mlp= copies would not compute what the dense block does")
    if init == "paper" and operations is not None:
        raise UserError("sparsify: no paper of a router begins experts of other operations; choose init='scratch'")
    known = routers.options(name)
    if "vocab_size" in known and options.get("vocab_size") is None:
        options["vocab_size"] = getattr(model.config.get_text_config(), "vocab_size", None)
        if options["vocab_size"] is None:
            raise UserError(f"sparsify: {type(model).__name__} has no token ids, by which router {name!r} goes")
    kinds = _kinds(where)
    if "feed_forward" not in kinds:
        for option, value in {
            "hidden": hidden, "num_shared_experts": num_shared_experts, "residual": residual, "extra_mlp": extra_mlp,
            "operations": operations, "cost_loss": cost_loss,
        }.items():  # fmt: skip
            if value:
                raise UserError(f"sparsify: {option} is of feed-forward blocks; where={where!r} leaves them dense")
    if init == "paper" and kinds != ["feed_forward"]:
        raise UserError(
            f"sparsify: init='paper' is of feed-forward blocks; with where={where!r} choose scratch or copy"
        )
    if init == "copy" and "heads" in kinds:
        raise UserError("sparsify: a mixture of heads is no copy of a dense attention; choose init='scratch'")
    made = []
    attentions = [] if kinds == ["feed_forward"] else find_attentions(model)
    stacks, left = survey(model) if "feed_forward" in kinds else ([], [])
    if within:
        stacks = stacks and _stacks_within(stacks, within, model)
        attentions = attentions and _stacks_within(attentions, within, model)
    elif left:
        more = f", and {len(left) - 1} more" if left[1:] else ""
        warnings.warn(f"sparsify: no known feed-forward block, left dense: {left[0]}{more}", stacklevel=2)
    place = Placement.parse(placement, every, layers)
    if place.pyramid and operations is not None:
        raise UserError("sparsify: a pyramid has more experts in later blocks; operations= names a fixed number")
    for block, times in place.choose(stacks) if stacks else ():
        _must_be_here(block)
        _must_call_none(model, block)
        width = block.hidden if hidden is None else hidden
        if init == "copy" and width != block.hidden:
            raise UserError(f"sparsify: init='copy' keeps the dense width {block.hidden}; leave hidden out")
        moe = _make(
            block,
            hidden=width,
            num_experts=times * num_experts,
            router=name,
            backend=backend,
            activation=block.activation,
            bias=block.bias,
            num_shared_experts=num_shared_experts,
            expert_weights=expert_weights,
            dropout=block.dropout,
            causal=_is_causal(model, block) and not allow_leak,
            residual=residual,
            extra_mlp=extra_mlp,
            operations=operations,
            cost_loss=cost_loss,
            options=options,
        )
        _initialise(moe, block, init)
        made.append((block, moe))
    chosen = place.choose(attentions) if attentions else []
    kind = next((kind for kind in kinds if kind != "feed_forward"), "attention")
    if chosen:
        must_give_sequences(model, [attention for attention, _ in chosen])
    for attention, _ in chosen:
        if kind == "heads" and attention.head is None:
            put(attention, kind, {}, None, False)  # says why not
        _must_call_none(model, attention)
    for attention, times in chosen:
        matrix, bias = attention.matrix, attention.bias
        one = {"num_experts": times * num_experts, "router": name, "options": options}
        put(attention, kind, one, one, _is_causal(model, attention) and not allow_leak)
        initialise(attention.module, matrix, bias, attention.widths, init)
    _put(model, made, told)
    return model


def _kinds(where: str) -> list[str]:
    known = ("feed_forward", *KINDS)
    kinds = [part.strip() for part in where.split(",")]
    if any(kind not in known for kind in kinds) or len(set(kinds)) != len(kinds) or len(set(kinds) & set(KINDS)) > 1:
        raise UserError(
            f"sparsify: where={where!r} is unknown; choose {', '.join(known)}, or feed_forward and one of the others "
            "with a comma between"
        )
    return kinds


def make_layers(
    model: PreTrainedModel,
    layers: Iterable[dict[str, Any]],
    batch: Mapping[str, str] | None = None,
    attention: Iterable[dict[str, Any]] = (),
) -> None:
    """Replace blocks of a dense model as `describe_layers` said that its sparse form is, in place; nothing is drawn.

    `batch` is as of `sparsify`.

    Raises:
        UserError: where an entry names no block of the model.
        KeyError, TypeError, ValueError: where it describes no layer.
    """
    layers, attention = list(layers), list(attention)
    places = {at.path: at for stack in (find_attentions(model) if attention else []) for at in stack}
    blocks = {block.path: block for stack in (find_feed_forwards(model) if layers else []) for block in stack}
    inner = f"{model.base_model_prefix}."
    made = []
    for entry in layers:
        name = entry["name"]
        # A model without its head has shorter names, one with another head the same.
        block = next((blocks.pop(n) for n in (name, name.removeprefix(inner), inner + name) if n in blocks), None)
        if block is None:
            raise UserError(f"{type(model).__name__} has no feed-forward block {name!r}")
        made.append((block, _make(block, **{key: value for key, value in entry.items() if key != "name"})))
    for entry in attention:
        name = entry["name"]
        at = next((places.pop(n) for n in (name, name.removeprefix(inner), inner + name) if n in places), None)
        if at is None:
            raise UserError(f"{type(model).__name__} has no attention {name!r}")
        if entry["kind"] not in KINDS:
            raise UserError(f"{name}: attention of kind {entry['kind']!r} is unknown; this version knows {KINDS}")
        put(at, entry["kind"], entry["queries"], entry.get("keys_values"), False)
    _put(model, made, check_batch(batch))


Part = TypeVar("Part", FeedForward, Attention)


def _stacks_within(stacks: list[list[Part]], within: str, model: PreTrainedModel) -> list[list[Part]]:
    """The blocks or attentions of a module alone, by its name, in their stacks.

    Raises:
        UserError: where it has none.
    """
    found = [[part for part in stack if f"{part.path}.".startswith(f"{within}.")] for stack in stacks]
    if not any(found):
        kind, names = type(model).__name__, ", ".join(dict.fromkeys(stack[0].path for stack in stacks))
        raise UserError(
            f"sparsify: within={within!r} has no block of {kind} to make sparse; the first ones are {names}"
        )
    return [stack for stack in found if stack]


def _must_be_here(block: FeedForward) -> None:
    for rows in block.maps.values():
        if rows.weight.is_meta and hasattr(rows.linear, "_hf_hook"):
            raise UserError(f"sparsify: the weights of {rows.path} are offloaded; sparsify the model, then offload it")


def _must_call_none(model: nn.Module, block: FeedForward | Attention) -> None:
    """Raises UserError where somebody has registered hooks within a block, which what replaces it would not call."""
    modules = dict(model.named_modules())
    if isinstance(block, Attention):
        paths = [f"{block.path}.{name}" for name in block.names]
    else:
        paths = [block.path, *block.superfluous, *(rows.path for rows in block.maps.values())]
    for path in paths:
        if path not in modules:  # a plain function
            continue
        for name, module in modules[path].named_modules(prefix=path):
            if any(vars(module).get(hooks) for hooks in _HOOKS):
                raise UserError(
                    f"sparsify: {name} has hooks, which its replacement would not call; remove them, and register what "
                    "you need on the sparse layer"
                )


def _make(
    block: FeedForward,
    *,
    num_experts: int,
    router: str,
    options: dict[str, Any],
    splits: Sequence[int] = (),
    **sizes: Any,
) -> MoE:
    place: dict[str, Any] = {"device": block.down.device, "dtype": block.down.dtype}
    if not splits:
        return MoE(block.dim, num_experts=num_experts, router=router, **sizes, **place, **options)
    inner = routers.create(router, block.dim, num_experts - len(splits), **place, **options)
    return MoE(block.dim, num_experts=num_experts, router=Split(inner, list(splits)), **sizes, **place)


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
    attention, known = [], set()
    for name, module in model.named_modules():
        if (found := routed_in(module)) is not None:
            parts = {part: _describe_router(layer) for part, layer in found[1].items()}
            attention.append({"name": name, "kind": found[0], **parts})
            known |= set(found[1].values())
    for name, layer in moe_layers(model).items():
        if layer in known:
            continue
        if not isinstance(layer, MoE):
            raise UserError(f"{name} is a {type(layer).__name__}; only layers of MoE can be saved within a model")
        experts, shared = layer.experts, layer.shared_experts
        entry = {
            "name": name,
            "hidden": experts.hidden,
            "activation": experts.activation,
            "bias": experts.bias,
            "num_shared_experts": 0 if shared is None else shared.hidden // experts.hidden,
            "dropout": layer.dropout.p,
            "expert_dropout": experts.dropout,
            "backend": experts.backend,
            "recompute": experts.recompute,
            **_describe_router(layer),
        }
        if isinstance(experts, ResidualExperts):
            entry["expert_weights"] = "residual"
        if isinstance(experts, MixedExperts):
            entry |= {"operations": [str(op) for op in experts.operations]}
        extras = {"residual": layer.shared_gate is not None, "extra_mlp": layer.extra_mlp is not None}
        entry |= {name: value for name, value in {**extras, "cost_loss": layer.cost_loss}.items() if value}
        entries.append(entry)
    described: dict[str, Any] = {"layout": STACKED, "layers": entries}
    return described | ({"attention": attention} if attention else {})


def _describe_router(layer: RoutedLayer) -> dict[str, Any]:
    inner = layer.decider.innermost
    splits = {"splits": layer.decider.parents} if isinstance(layer.decider, Split) else {}
    return {
        "num_experts": layer.num_experts,
        "router": router_name(type(inner)),
        "options": inner.options,
        **splits,
    }


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
    if issubclass(router, Split):
        raise UserError("the model has split experts, which nothing but training can change; keep it as it is")
    raise UserError(f"sparsify: register {router!r} with shunter.routers.register first, so that it can be loaded")


@dataclass(frozen=True)
class Placement:
    """Which blocks of each stack become sparse, and which of them have twice as many experts.

    Args:
        every: every n-th, the n-th first.
        last: of these the last n alone; None for all.
        pyramid: whether the last two of these, or the last of two or three, have twice as many experts.
        layers: these instead, counted from 0.
    """

    every: int = 1
    last: int | None = None
    pyramid: bool = False
    layers: tuple[int, ...] | None = None

    @classmethod
    def parse(cls, words: str = "", every: int = 1, layers: Sequence[int] | None = None) -> Placement:
        """A placement in words, as "every 2, last 3, pyramid", or by the arguments `every` and `layers`.

        Raises:
            UserError: for other words, and where two of them say the same.
        """
        found: dict[str, Any] = {}
        for part in filter(None, (part.strip() for part in words.split(","))):
            match = re.fullmatch(r"(every|last) ([1-9]\d*)|(pyramid)", part)
            if match is None:
                raise UserError(
                    f'sparsify: placement {words!r}: {part!r} is unknown; say "every N", "last N" or "pyramid", or '
                    'several with commas: "every 2, last 3, pyramid"'
                )
            name, value = match[1] or match[3], int(match[2]) if match[2] else True
            if name in found:
                raise UserError(f"sparsify: placement {words!r} says {name} twice")
            found[name] = value
        if every < 1:
            raise UserError(f"sparsify: every={every} must be at least 1")
        if every != 1 and layers is not None:
            raise UserError("sparsify: layers and every both say which blocks are replaced; give one")
        if (every != 1 or layers is not None) and found.keys() - {"pyramid"}:
            raise UserError("sparsify: placement and every or layers both say which blocks are replaced; give one")
        if every != 1:
            found["every"] = every
        return cls(**found, layers=None if layers is None else tuple(layers))

    def __str__(self) -> str:
        """In words, without `layers`."""
        parts = [f"every {self.every}", *([] if self.last is None else [f"last {self.last}"])]
        return ", ".join([*parts, "pyramid"] if self.pyramid else parts)

    def blocks(self, stacks: list[list[Block]]) -> list[Block]:
        """The blocks of `choose`, without how many times."""
        return [block for block, _ in self.choose(stacks)]

    def choose(self, stacks: list[list[Block]]) -> list[tuple[Block, int]]:
        """The blocks, and how many times as many experts each has.

        Raises:
            UserError: where that leaves none, or a stack has too few.
        """
        numbers, shortest = self.layers, min(map(len, stacks))
        if numbers is not None and (
            not numbers or sorted(set(numbers)) != list(numbers) or numbers[0] < 0 or numbers[-1] >= shortest
        ):
            raise UserError(f"sparsify: layers={list(numbers)} must be increasing numbers from 0 to {shortest - 1}")
        found = []
        for stack in stacks:
            chosen = stack[self.every - 1 :: self.every] if numbers is None else [stack[i] for i in numbers]
            chosen = chosen if self.last is None else chosen[-self.last :]
            wide = min(2, len(chosen) // 2) if self.pyramid else 0
            if self.pyramid and chosen and not wide:
                raise UserError("sparsify: a pyramid needs two sparse blocks at least in each stack; here one is left")
            found += [(block, 1 + (i >= len(chosen) - wide)) for i, block in enumerate(chosen)]
        if not found:
            raise UserError(f"sparsify: every={self.every} leaves no block to replace")
        return found


def _is_causal(model: PreTrainedModel, block: FeedForward | Attention) -> bool:
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
    if block.down.is_meta or any(p.is_meta for p in moe.parameters()):
        return  # about to be loaded
    if init != "copy":
        for experts in (moe.experts, moe.shared_experts, moe.extra_mlp):
            if isinstance(experts, Experts | MixedExperts | ResidualExperts):
                experts.reset_parameters(float(block.up.float().std()), float(block.down.float().std()))
        if init == "paper":
            moe.init_as_in_paper()
        return
    for experts in (moe.experts, moe.shared_experts):
        if experts is None:
            continue
        assert isinstance(experts, Experts | ResidualExperts)
        weights = experts.core_weights if isinstance(experts, ResidualExperts) else experts.weights
        for ours, dense in (
            (weights.up, block.up),
            (weights.down, block.down),
            (weights.up_bias, block.up_bias),
            (weights.down_bias, block.down_bias),
        ):
            if ours is not None:
                ours.copy_(torch.zeros_like(ours[0]) if dense is None else dense)
