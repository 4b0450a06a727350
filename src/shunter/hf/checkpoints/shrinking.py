"""A folder of a sparse model to one of the same kind with fewer experts, which are a (keep, E) matrix times the old.

A row of the matrix with a single one keeps an expert bit for bit; other rows are weighted means of experts. The matrix
multiplies each tensor of a layer that has experts along an axis: matrices, biases, rows and scales of the router. No
table of families says which these are: the modules are built with E and with `keep` experts, without memory, and what
differs is along the experts. Tensors pass one by one.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from ...errors import UserError
from ...experts import MixedExperts
from ...moe import MoE
from ..observe.taps import Tap, taps
from ..rules import topk_options
from ..sparsifying import router_name
from .converting import Plan
from .folders import COMPUTED, model_class, on_meta, read_config
from .formats import OWN, made_here, sparse_class
from .reading import Checkpoint, Stored

__all__ = ["Shrinking"]

_EXPERT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
_NUMBERED = re.compile(r"(.*\bexperts\.(?:expert_)?)(\d+)(\..*)")

_IN_ONE_PIECE = {
    "bernoulli": "its units are one policy",
    "hierarchical_noisy_topk": "its experts are in groups with a gate each",
    "hme": "its experts are the leaves of a tree",
    "null_experts": "it scores experts without weights too",
    "prototypes": "each of its groups of experts has a router",
    "soft_moe": "every expert has slots, of which all tokens are mixed",
}


@dataclass(frozen=True)
class Shrinking:
    """A sparse model in a folder that is to have fewer experts.

    Attributes:
        folder: where it is.
        keep: how many experts each layer is to have.
        checkpoint: its tensors.
        config: of the new model.
        layers: the layers with experts, by qualified name.
        groups: in how many equal groups the router sees the experts; as many of each stay.
        axes: of each tensor of the model that has experts, the layer and the axis.
        model: the modules, without memory.
        own: whether Shunter made it.
    """

    folder: Path
    keep: int
    checkpoint: Checkpoint
    config: PreTrainedConfig
    layers: dict[str, Tap]
    groups: int
    axes: dict[str, tuple[str, int]]
    numbered: set[str]
    model: PreTrainedModel
    own: bool

    @classmethod
    def open(cls, folder: Path, keep: int) -> Shrinking:
        """Read everything but the weights, and check that the model can have so few experts.

        Raises:
            UserError: where it cannot, or has none, or the folder is damaged.
        """
        checkpoint = Checkpoint(folder)
        config = read_config(folder, checkpoint.tensors)
        own = made_here(config)
        if getattr(config, "shunter_quantised", None) is not None:
            raise UserError(f"{folder}: its experts are quantised; prune the model first, then quantise it")
        model = _modules(config, folder, own)
        layers = taps(model)
        if not layers:
            raise UserError(f"{folder}: {type(model).__name__} has no experts that could be pruned")
        for name, tap in layers.items():
            _check_kind(name, tap)
        sizes = {name: tap.num_weights for name, tap in layers.items()}
        grouping = max(_grouping(config, tap) for tap in layers.values())
        _check(config, keep, layers, sizes, grouping)
        smaller = _with(config, max(sizes.values()), keep, own)
        small = _modules(smaller, folder, own)
        left = {name: tap.num_weights for name, tap in taps(small).items()}
        if left != dict.fromkeys(sizes, keep):
            raise UserError(
                f"{folder}: no field of config.json makes every layer of {config.model_type} have {keep} experts"
            )
        axes, numbered = _axes(folder, model.state_dict(), small.state_dict(), sizes, keep)
        for name, tap in layers.items():
            _check_router(name, tap, axes)
        return cls(folder, keep, checkpoint, smaller, layers, grouping.groups, axes, numbered, model, own)

    def plan(self, mixes: Mapping[str, Tensor], facts: dict[str, Any], measure: Any) -> Plan:
        """How the new folder comes about.

        Args:
            mixes: of each layer, (keep, E) float64: how much of each old expert is in each new one; rows sum to 1.
            facts: entries of the receipt.
            measure: see `Plan`.
        """
        tensors: dict[str, Stored] = {}
        became: dict[str, dict[str, Any]] = {}
        for disk, stored in self.checkpoint.tensors.items():
            place = self.places[disk]
            if place is None:
                tensors[disk] = stored
                became[disk] = {"how": "copied", "to": [disk]}
            elif place.number is None:
                shape = list(stored.shape)
                shape[place.axis] = shape[place.axis] // self.layers[place.layer].num_weights * self.keep
                tensors[disk] = Stored(stored.dtype, tuple(shape))
                became[disk] = {"how": f"along axis {place.axis} with the experts of {place.layer}", "to": [disk]}
            else:
                new = mixes[place.layer][:, place.number].nonzero().flatten().tolist()
                names = [place.name(number) for number in new]
                tensors |= {name: Stored(stored.dtype, stored.shape) for name in names}
                became[disk] = {"how": f"of expert {place.number} of {place.layer}" if new else "left out", "to": names}
        if self.own:
            self.config.architectures = [type(self.model).__name__]
        facts |= {
            "format": OWN.name if self.own else self.config.model_type,
            "bytes_before": self.checkpoint.nbytes,
            "bytes": sum(stored.nbytes for stored in tensors.values()),
        }
        values = self._values(mixes)
        return Plan(
            self.checkpoint,
            self.config,
            tensors,
            became,
            {},
            values,
            facts,
            torch.float32,
            exact=False,
            measure=measure,
        )

    def _values(self, mixes: Mapping[str, Tensor]) -> Iterator[tuple[str, int, Tensor]]:
        for disk, place in self.places.items():
            if place is None:
                yield disk, 0, self.checkpoint.read(disk)
            elif place.number is None:
                yield disk, 0, _mixed(self.checkpoint.read(disk), mixes[place.layer], place.axis)
            else:
                # A new expert is written with the first old one that is in it, so that each is read but few times.
                for new in mixes[place.layer][:, place.number].nonzero().flatten().tolist():
                    shares = mixes[place.layer][new]
                    parts = shares.nonzero().flatten().tolist()
                    if parts[0] == place.number:
                        read = [self.checkpoint.read(place.name(part)) for part in parts]
                        yield place.name(new), 0, _mean(read, shares[parts])

    @cached_property
    def places(self) -> dict[str, _Place | None]:
        """Where each tensor on disk has experts; None where it has none."""
        transforms = get_model_conversion_mapping(self.model)
        renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, WeightConverter)]
        state, prefix = self.model.state_dict(), self.model.base_model_prefix
        return {
            disk: self._place(disk, stored, state, *rename_source_key(disk, renamings, converters, prefix, state))
            for disk, stored in self.checkpoint.tensors.items()
        }

    def _place(
        self, disk: str, stored: Stored, state: Mapping[str, Tensor], name: str, converted: str | None
    ) -> _Place | None:
        if name not in state:
            ignored = [*COMPUTED, *(self.model._keys_to_ignore_on_load_unexpected or ())]
            if converted is None and not any(re.search(pattern, name) for pattern in ignored):
                raise UserError(f"{self.folder}: {type(self.model).__name__} has no place for the tensor {disk!r}")
            return None
        match = _NUMBERED.fullmatch(disk)
        if name in self.numbered or (name in self.axes and converted is not None and match is not None):
            layer = _layer_of(name, self.layers)
            assert match is not None and layer is not None
            return _Place(layer, number=int(match[2]), around=(match[1], match[3]))
        if name not in self.axes:
            return None
        layer, axis = self.axes[name]
        size = self.layers[layer].num_weights
        if converted is None:
            return _Place(layer, axis=axis)
        if list(stored.shape).count(size) != 1:
            raise UserError(
                f"{self.folder}: {disk!r} is stored in a layout that transformers converts; load the model with "
                "transformers 5, save_pretrained it and take that folder"
            )
        return _Place(layer, axis=stored.shape.index(size))


@dataclass(frozen=True)
class _Place:
    """Where a tensor on disk has experts: along an axis, or it is one of them.

    Args:
        layer: the layer's name.
        axis: the axis, of a tensor of all experts.
        number: the expert, of a tensor of one.
        around: what its name on disk is before and after the number.
    """

    layer: str
    axis: int = 0
    number: int | None = None
    around: tuple[str, str] = ("", "")

    def name(self, number: int) -> str:
        """The same tensor of another expert, on disk."""
        return f"{self.around[0]}{number}{self.around[1]}"


def _modules(config: PreTrainedConfig, folder: Path, own: bool) -> PreTrainedModel:
    return on_meta(sparse_class(config, str(folder)) if own else model_class(config, str(folder)), config, folder)


def _with(config: PreTrainedConfig, num_experts: int, keep: int, own: bool) -> PreTrainedConfig:
    """A configuration with `keep` experts in each layer."""
    config = copy.deepcopy(config)
    if own:
        for entry in config.shunter["layers"]:
            entry["num_experts"] = keep
            entry["options"].pop("capacity_shares", None)  # of experts that are gone
    else:
        text = config.get_text_config()
        inner = [part for part in vars(text).values() if isinstance(part, PreTrainedConfig)]
        for holder, field in itertools.product([text, *inner], _EXPERT_FIELDS):
            if getattr(holder, field, None) == num_experts:
                setattr(holder, field, keep)
    return config


class _Grouping(NamedTuple):
    """How a layer's router sees its experts: equal groups of successive ones.

    Args:
        groups: how many.
        top: in how many of them a token may have experts.
        least: how many experts a group must have.
    """

    groups: int
    top: int
    least: int


def _grouping(config: PreTrainedConfig, tap: Tap) -> _Grouping:
    """By the options of Shunter's routers, by the rule of a family, or by the fields of one that has no rule here."""
    text = config.get_text_config()
    if tap.own is not None:
        groups, top = (getattr(tap.own.decider, name, 1) for name in ("expert_groups", "top_groups"))
        return _Grouping(groups, top, 1)
    try:
        options = topk_options(text)
    except UserError:
        groups = getattr(text, "n_group", None) or 1
        return _Grouping(groups, getattr(text, "topk_group", None) or groups, 1)
    groups = options.get("expert_groups", 1)
    # transformers ranks the groups by their best two even where a token may have experts of all.
    return _Grouping(groups, options.get("top_groups", groups), 2 if options.get("group_score") == "top2_sum" else 1)


def _check(
    config: PreTrainedConfig,
    keep: int,
    layers: Mapping[str, Tap],
    sizes: Mapping[str, int],
    grouping: _Grouping,
) -> None:
    groups = grouping.groups
    for name, tap in layers.items():
        size = sizes[name]
        if not 1 <= keep < size:
            raise UserError(f"prune: keep {keep} of the {size} experts of {name}: it must be from 1 to {size - 1}")
        known: tuple[Any, ...] = (getattr(tap.layer, "top_k", None), *_per_token(tap.router), *_per_token(config))
        top_k = tap.top_k or next((k for k in known if isinstance(k, int)), 1)
        if tap.own is not None and tap.own.decider.chooses in ("all", "slots"):
            top_k = 1  # every token takes every expert, however many there are
        if top_k > keep:
            raise UserError(
                f"prune: a token takes {top_k} experts in {name}, and {keep} are to stay; keep at least {top_k}"
            )
        if keep % groups:
            raise UserError(
                f"prune: the router of {name} sees its experts in {groups} equal groups; keep a multiple of {groups}, "
                f"not {keep}"
            )
        if groups > 1 and keep // groups * grouping.top < top_k:
            least = max(-(-top_k // grouping.top), grouping.least) * groups
            raise UserError(
                f"prune: a token takes {top_k} experts of {grouping.top} of the {groups} groups of {name}; keep at "
                f"least {least}"
            )
        if keep // groups < grouping.least:
            raise UserError(
                f"prune: the router of {name} ranks its {'groups' if groups > 1 else 'group'} of experts by the best "
                f"two of each; keep at least {grouping.least * groups}"
            )


def _per_token(part: Any) -> tuple[Any, ...]:
    """How many experts a token has by a configuration, or by that of a module."""
    config = getattr(part, "config", part)
    text = config.get_text_config() if isinstance(config, PreTrainedConfig) else config
    return (getattr(text, "num_experts_per_tok", None),)


def _check_kind(name: str, tap: Tap) -> None:
    """Raises UserError for a layer whose experts belong together."""
    if tap.own is not None:
        if not isinstance(tap.own, MoE):
            raise UserError(f"prune: {name} is a {type(tap.own).__name__}; only layers of MoE can be pruned")
        if isinstance(tap.own.experts, MixedExperts):
            raise UserError(f"prune: the experts of {name} differ, and cannot stand in for each other")
        called = router_name(type(tap.own.decider))
        if called in _IN_ONE_PIECE:
            raise UserError(f"prune: the router {called} of {name} cannot lose experts: {_IN_ONE_PIECE[called]}")
        if tap.own.decider.chooses == "fixed":
            raise UserError(
                f"prune: the router {called} of {name} cannot lose experts: its rule is fixed for as many as there "
                "are; train with one that learns, as by sparse.router=topk"
            )


def _check_router(name: str, tap: Tap, axes: Mapping[str, tuple[str, int]]) -> None:
    """Raises UserError where a layer's router does not have what it knows of each expert in a row of its own."""
    if tap.router is None:
        raise UserError(f"prune: the router of {name} is not known")
    inside = tap.router.state_dict()
    for key, tensor in inside.items():
        if not tensor.is_floating_point() and tensor.numel() > 1:
            raise UserError(
                f"prune: {name} cannot lose experts: its router keeps numbers in {key}, which may be theirs"
            )
    router = {id(t) for t in inside.values()}
    held = [key for key, (layer, _) in axes.items() if layer == name and "experts." not in key.removeprefix(f"{name}.")]
    if not router or not held:
        raise UserError(f"prune: {name} cannot lose experts: its router has no weights for each of them")


def _axes(
    folder: Path, large: Mapping[str, Tensor], small: Mapping[str, Tensor], sizes: Mapping[str, int], keep: int
) -> tuple[dict[str, tuple[str, int]], set[str]]:
    """Of each tensor that has experts along an axis the layer and the axis; and those that are of one expert."""
    axes: dict[str, tuple[str, int]] = {}
    numbered = set()
    for name, tensor in large.items():
        layer = _layer_of(name, sizes)
        if _NUMBERED.fullmatch(name) and layer is not None:
            numbered.add(name)
            continue
        if name in small and small[name].shape == tensor.shape:
            continue
        differ = [i for i, n in enumerate(tensor.shape) if n != small[name].shape[i]] if name in small else []
        if len(differ) != 1 or layer is None:
            raise UserError(f"{folder}: {name} does not have its experts along one axis; such a model cannot be pruned")
        axis = differ[0]
        rows, rest = divmod(tensor.shape[axis], sizes[layer])  # of an expert: in DBRX they lie one below the other
        if rest or small[name].shape[axis] != keep * rows or (rows > 1 and ".experts." not in name):
            raise UserError(
                f"{folder}: {name} goes from {tensor.shape[axis]} to {small[name].shape[axis]} where its experts go "
                f"from {sizes[layer]} to {keep}; such a model cannot be pruned"
            )
        axes[name] = layer, axis
    return axes, numbered


def _layer_of(name: str, layers: Mapping[str, Any]) -> str | None:
    return max((layer for layer in layers if name.startswith(f"{layer}.")), key=len, default=None)


def _mixed(tensor: Tensor, mix: Tensor, axis: int) -> Tensor:
    """The experts along an axis, each of as many rows, mixed: (…, E rows, …) -> (…, keep rows, …)."""
    parts = tensor.unflatten(axis, (mix.shape[1], -1))
    if bool((mix.sum(1) == mix.amax(1)).all()):  # each new one is an old one
        return parts.index_select(axis, mix.argmax(1)).flatten(axis, axis + 1)
    moved = parts.movedim(axis, 0)
    rows = [_mean(list(moved[row.nonzero().flatten()]), row[row.nonzero().flatten()]) for row in mix]
    return torch.stack(rows).movedim(0, axis).flatten(axis, axis + 1).contiguous()


def _mean(parts: list[Tensor], shares: Tensor) -> Tensor:
    """A weighted mean, in float64; one part is itself."""
    if len(parts) == 1:
        return parts[0]
    total = torch.zeros(parts[0].shape, dtype=torch.float64)
    for part, share in zip(parts, shares.tolist(), strict=True):
        total += share * part.double()
    return total.to(parts[0].dtype)
