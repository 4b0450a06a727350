"""Between Shunter's own format and the sparse families that transformers itself loads, bit for bit, both ways.

Tensors pass one by one. Where each expert's matrices lie is named by a layout, which the receipt tags; nothing is
guessed from shapes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ...environment import VERSION, Memory
from ...experts.weights import STACKED
from ...moe import MoE, RoutedLayer, moe_layers
from ..rules import TRAINING_ONLY, router_of
from ..sparsifying import sparsify
from .check import compare_logits
from .converting import Transfer, describe_check, megabytes
from .folders import local_folder, match_names, model_class, on_meta, read_config
from .layouts import SPLIT, Key, Piece, Sizes, split_pieces, stacked_pieces
from .loading import make_dense, skeleton, split_layers
from .native import FAMILIES, Family, family_for
from .reading import Checkpoint, Stored
from .writing import copy_companions, new_folder

__all__ = ["describe", "export"]

Pieces = list[dict[Key, Piece]]
"""Of each sparse layer, where its matrices and vectors lie."""


@dataclass(frozen=True)
class _Plan:
    """What is to be written.

    Args:
        model: the model in Shunter's form, without memory.
        format: of the result, and with it `layout`.
        source_format: likewise of the source.
        config: of the result.
        source, target: where the pieces lie, layer by layer.
        left_behind: options of the router that the result has no field for; none of them changes the function.
    """

    model: PreTrainedModel
    source_format: str
    source_layout: str
    format: str
    layout: str
    config: PreTrainedConfig
    source: Pieces
    target: Pieces
    left_behind: list[str]


def export(
    model: str | Path,
    out: str | Path,
    to: str = "auto",
    *,
    check: bool = True,
    max_shard_bytes: int = 5_000_000_000,
) -> dict[str, Any]:
    """Write a sparse model of Shunter's as one of a family of transformers, or the other way round, bit for bit.

    Mixtral, Qwen3-MoE, OLMoE, FlexOlmo and DeepSeek-V3 are the families: plain transformers loads them with no Shunter
    installed.

    Args:
        model: the folder of a model that `sparsify` made and `save_pretrained` wrote (or `upcycle`), or of one of the
            families.
        out: the folder to make; it appears when it is whole.
        to: "shunter", or the family's name; "auto" is the family for a model of Shunter's, and "shunter" for others.
        check: load both models in float32 (float64 for float64) and compare their logits; a difference beyond rounding
            is an error.
        max_shard_bytes: of a file.

    Returns:
        What receipt.json in the new folder holds: what became of each tensor, both layouts, the peak of memory, the
        measured difference.

    Raises:
        ValueError: where the family cannot express the routing or the experts (saying why and what to change), for
            damaged folders and an `out` that exists; nothing is left behind.
    """
    memory = Memory()
    folder = local_folder(model)
    checkpoint = Checkpoint(folder)
    config = read_config(folder, len(checkpoint.tensors))
    if to not in ("auto", "shunter", *FAMILIES):
        raise ValueError(f"export: to={to!r} is unknown; choose from auto, shunter, {', '.join(FAMILIES)}")
    made_here = getattr(config, "shunter", None) is not None
    plan = (_to_family if made_here else _to_shunter)(folder, checkpoint, config, to)
    names, unused = _match(folder, checkpoint, plan)
    specs = {name: checkpoint.tensors[disk] for disk, name in names.items()} | _specs(checkpoint, plan)
    with new_folder(Path(out)) as partial:
        transfer = Transfer(checkpoint, unused, partial, specs, max_shard_bytes, memory)
        for disk, name in names.items():
            transfer.write(name, checkpoint.read(disk))
            transfer.account(disk, "copied", [name])
        for source, target in zip(plan.source, plan.target, strict=True):
            _move(checkpoint, transfer, source, target)
        transfer.finish()
        plan.config.save_pretrained(partial)
        copy_companions(folder, partial)
        receipt: dict[str, Any] = {
            "made_by": f"shunter {VERSION} export",
            "from": plan.source_format,
            "from_layout": plan.source_layout,
            "format": plan.format,
            "layout": plan.layout,
            "left_behind": plan.left_behind,
            "bytes": sum(stored.nbytes for stored in specs.values()),
            "peak_bytes": memory.peak,
            "check": None,
            "tensors": transfer.became,
            "new": transfer.new,
        }
        if check:
            widest = max((s.dtype for s in specs.values() if s.dtype.is_floating_point), key=lambda d: d.itemsize)
            dtype = torch.promote_types(widest, torch.float32)
            receipt["check"] = compare_logits(folder, partial, dtype, exact=True)
        (partial / "receipt.json").write_text(json.dumps(receipt, indent=1) + "\n", encoding="utf-8")
    return receipt


def describe(receipt: dict[str, Any]) -> str:
    """A receipt of `export` in words."""
    loader = "shunter.from_pretrained" if receipt["format"] == "shunter" else "plain transformers"
    lines = [
        f"{receipt['from']} as {receipt['format']}; {loader} loads it.",
        f"Tensors: {len(receipt['tensors'])} accounted for, bit for bit (receipt.json); {megabytes(receipt['bytes'])}, "
        f"peak memory of the conversion {megabytes(receipt['peak_bytes'])}.",
    ]
    if receipt["left_behind"]:
        lines.append(f"Of training alone, and without a field there: {', '.join(receipt['left_behind'])}.")
    if receipt["check"]:
        lines.append(f"Logits against the first model: {describe_check(receipt['check'])}")
    return "\n".join(lines)


def _to_family(folder: Path, checkpoint: Checkpoint, config: PreTrainedConfig, to: str) -> _Plan:
    if to == "shunter":
        raise ValueError(f"export: {folder} is in Shunter's format already; leave `to` out, or name a family")
    model = skeleton(config, folder)
    try:
        family = family_for(config, type(model).__name__)
    except ValueError as error:
        raise ValueError(f"export: {folder} stays in Shunter's format: {error}") from None
    if to not in ("auto", family.name):
        raise ValueError(f"export: a {config.model_type} model continues as {family.name}, not as {to}")
    layers = moe_layers(model)
    numbers, first = [int(path.split(".")[-2]) for path in layers], next(iter(layers.values()))
    sizes = _sizes(first)
    try:
        if sizes.bias:
            raise ValueError(f"{family.name} has experts without biases; this model's have them: keep Shunter's format")
        if any(_sizes(layer) != sizes for layer in layers.values()):
            raise ValueError(f"{family.name} has layers of one size; give every layer the same hidden=")
        shared = sizes.shared // sizes.hidden
        target = family.sparse_config(config, sizes.experts, sizes.hidden, numbers, first.router, shared)
    except ValueError as error:
        raise ValueError(f"export: cannot write {family.name}: {error}") from None
    target.architectures = [family.architecture]
    target.dtype = config.dtype
    target.shunter_dense = config.model_type
    split, _ = split_layers(model, checkpoint)
    lie = split_pieces if split else stacked_pieces
    given = {**config.shunter, "jitter": config.shunter.get("jitter", 0)}
    lost = TRAINING_ONLY | ({"jitter"} if family.name != "mixtral" else set())
    lost |= {"load_balancing_loss"} if family.sigmoid else set()
    return _Plan(
        model,
        "shunter",
        SPLIT if split else STACKED,
        family.name,
        family.layout,
        target,
        [lie(path, sizes) for path in layers],
        [family.pieces(number, sizes) for number in numbers],
        [f"{name}={given[name]}" for name in sorted(lost & set(given)) if given[name]],
    )


def _to_shunter(folder: Path, checkpoint: Checkpoint, config: PreTrainedConfig, to: str) -> _Plan:
    family = FAMILIES.get(config.model_type)
    if family is None or model_class(config, str(folder)).__name__ != family.architecture:
        known = ", ".join(f.architecture for f in FAMILIES.values())
        raise ValueError(
            f"export: {folder} holds {(config.architectures or ['?'])[0]}, which is neither of shunter.sparsify nor of "
            f"{known}; a dense model becomes sparse with shunter upcycle"
        )
    if to not in ("auto", "shunter"):
        raise ValueError(f"export: {folder} is {family.name} already and goes to shunter, not to {to}")
    layers = family.sparse_layers(config)
    if not layers:
        raise ValueError(f"export: {folder}: config.json leaves no layer with experts")
    sizes = family.sizes(config)
    try:
        router, options = router_of(family, config)
        dense = family.dense_config(config)
        kind = model_class(_with_architecture(dense, family), str(folder))
        model = on_meta(kind, dense, folder)
        make_dense(model)
        some = None if len(layers) == config.num_hidden_layers else layers
        shared = sizes.shared // sizes.hidden
        # On the meta device: nothing is drawn.
        with torch.device("meta"):
            sparsify(
                model,
                sizes.experts,
                router,
                layers=some,
                hidden=sizes.hidden,
                num_shared_experts=shared,
                **options,
            )
    except (ValueError, TypeError) as error:
        raise ValueError(f"export: {folder} cannot be brought into Shunter's format: {error}") from None
    model.config.architectures = [kind.__name__]
    model.config.dtype = config.dtype
    pieces = [stacked_pieces(path, sizes) for path in moe_layers(model)]
    theirs = [family.pieces(number, sizes) for number in layers]
    return _Plan(model, family.name, family.layout, "shunter", STACKED, model.config, theirs, pieces, [])


def _with_architecture(dense: PreTrainedConfig, family: Family) -> PreTrainedConfig:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    dense.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[dense.model_type]]
    return dense


def _sizes(layer: RoutedLayer) -> Sizes:
    assert isinstance(layer, MoE)
    experts, shared = layer.experts, layer.shared_experts
    return Sizes.of(
        layer.num_experts,
        layer.dim,
        experts.hidden,
        experts.activation,
        bias=experts.weights.up_bias is not None or experts.weights.down_bias is not None,
        shared=0 if shared is None else shared.hidden,
        selection_bias=getattr(layer.router, "selection_bias", None) is not None,
    )


def _match(folder: Path, checkpoint: Checkpoint, plan: _Plan) -> tuple[dict[str, str], list[str]]:
    """The tensors outside the sparse layers: name on disk -> name in the model; and what the model has no use for."""
    lying = {piece.name: piece.tensor for pieces in plan.source for piece in pieces.values()}
    for name, shape in lying.items():
        checkpoint.must_hold(name, shape)
    placed = {
        name
        for path, layer in moe_layers(plan.model).items()
        for name in (f"{path}.{inner}" for inner in layer.state_dict())
    }
    rest = {name: stored for name, stored in checkpoint.tensors.items() if name not in lying}
    return match_names(folder, plan.model, rest, placed)


def _specs(checkpoint: Checkpoint, plan: _Plan) -> dict[str, Stored]:
    """What the sparse layers' tensors will be."""
    found: dict[str, Stored] = {}
    for source, target in zip(plan.source, plan.target, strict=True):
        for key, piece in target.items():
            # A width of 0 is a tensor without elements in one format and no tensor in the other.
            dtype = checkpoint.tensors[source.get(key, source["up", 0]).name].dtype
            spec = Stored(dtype, piece.tensor)
            if found.setdefault(piece.name, spec) != spec:
                raise ValueError(
                    f"export: {piece.name} would be made of tensors of different dtypes; save the model in one"
                )
    return found


def _move(checkpoint: Checkpoint, transfer: Transfer, source: dict[Key, Piece], target: dict[Key, Piece]) -> None:
    """One layer's pieces, each read by itself."""
    to: dict[str, list[str]] = {}
    for key, piece in source.items():
        names = to.setdefault(piece.name, [])
        if key not in target:
            continue
        there = target[key]
        assert there.shape == piece.shape
        transfer.write(there.name, checkpoint.read(piece.name, piece.offset, piece.shape), there.offset)
        names.append(there.name)
    for name, names in to.items():
        transfer.account(name, "moved" if names else "empty: there is no shared expert", names)
    for key, piece in target.items():
        if key not in source:
            empty = torch.zeros(piece.shape, dtype=checkpoint.tensors[source["up", 0].name].dtype)
            assert not empty.numel()
            transfer.write_new(piece.name, empty, "empty: there is no shared expert")
