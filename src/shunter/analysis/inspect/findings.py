"""Findings: from a layer's recorded decisions and the labels of its tokens to numbers by name."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from ...hf.observe.listening import Decisions
from ...metrics import QUANTILES, balance, dead, expert_load, normalised_entropy, summarise
from ..coactivation import affinity, coactivation
from ..expert_weights import cosine_similarity, expert_parameters, gram_similarity
from ..information import information
from ..specialisation import MIN_COUNT, characteristic, label_counts, label_shares
from .material import Material, Stream

__all__ = [
    "FEATURES",
    "describe_data",
    "describe_usage",
    "describe_weights",
    "patches_served",
    "specialisation_of",
    "tokens_served",
]

FEATURES = ("domain", "modality", "language", "position", "kind", "previous", "token")
GIVEN_TOKEN = ("domain", "position", "previous")  # asked for once more among tokens that are the same
FOLLOWS_FROM = 0.05  # of the routing: a label that decides less is not said to be followed
SAME = 0.005  # two labels that decide as much as each other
RANGES = 8  # of positions
PATCHES = 16  # of an expert
PAIRS = 8  # of a layer
LATER = (  # what is None until it is measured
    *("together", "information", "follows", "serves", "tokens_served", "tokens_before", "patches", "similarity"),
    "ablation",
)


def describe_data(material: Material) -> dict[str, Any]:
    """How much text or how many images, by domain and language in tokens."""
    stream = next(iter(material.streams.values()))
    counted = {
        what: {name: int((stream.labels[what] == i).sum()) for i, name in enumerate(stream.names[what])}
        for what in ("domain", "language")
        if what in stream.labels
    }
    return {
        "kind": "sounds" if material.sound else "text" if material.images is None else "images",
        "tokens": material.tokens,
        "window": material.window,
        "domains": counted["domain"],
        "languages": counted.get("language", {}),
    }


def describe_usage(layer: Decisions) -> dict[str, Any]:
    """Load, balance, entropy, dead experts, drops and margins of a layer; what is measured later as None."""
    load = expert_load(layer.index, layer.num_experts)
    asked, tokens = int(load.sum()), max(1, len(layer.index))
    margin = summarise(layer.margin, layer.margin_size)
    found: dict[str, Any] = {
        "experts": layer.num_experts,
        "tokens": len(layer.index),
        "experts_per_token": asked / tokens,
        "load": (load / max(1, asked)).tolist(),
        "balance": float(balance(load)),
        "load_entropy": float(normalised_entropy(load)),
        "dead": dead(load).nonzero().flatten().tolist(),
        "unserved": int((layer.index < 0).all(1).sum()) / tokens,
        "dropped": layer.dropped / max(1, asked),
        "router_entropy": layer.entropy,
        "margins": None if margin is None else {"at": list(QUANTILES)} | asdict(margin),
    }
    return found | dict.fromkeys(LATER)


def specialisation_of(layer: Decisions, stream: Stream | None, material: Material) -> dict[str, Any]:
    """What decides the routing of a layer, what each expert serves, and which experts work together.

    Args:
        layer: its decisions.
        stream: what is known of its tokens; without it only the last is measured.
        material: what the tokens are of.
    """
    together = coactivation(layer.index, layer.num_experts)
    found: dict[str, Any] = {"together": _together(together) if layer.index.shape[1] > 1 else None}
    if stream is None:
        return found
    told, size = {}, {}
    for what in FEATURES:
        if what in stream.labels and len(present := stream.labels[what].unique()) - int(present[0] < 0) > 1:
            size[what] = len(present)
            told[what] = information(layer.index, stream.labels[what], layer.num_experts)
            if what in GIVEN_TOKEN and "token" in stream.labels:
                given = information(layer.index, stream.labels[what], layer.num_experts, given=stream.labels["token"])
                told[f"{what}, given the token"] = given
    found["information"] = {
        what: asdict(value) | {"adjusted": value.adjusted, "beyond_chance": value.beyond_chance}
        for what, value in told.items()
    }
    found["follows"] = _follows({what: found["information"][what] for what in size}, size)
    found["serves"] = {
        what: _served(layer, stream, what)
        for what in ("domain", "modality", "language", "kind", "position")
        if what in size
    }
    for what, key in (("token", "tokens_served"), ("previous", "tokens_before")):
        if what in size:
            found[key] = tokens_served(layer, stream, what)
    if material.images is not None:
        found["patches"] = patches_served(layer, stream, material.window)
    return found


def _follows(told: dict[str, dict[str, Any]], size: dict[str, int]) -> dict[str, Any] | None:
    """The label that decides most of the routing; of those that decide as much the one with the fewest values."""
    known = {w: t["adjusted"] for w, t in told.items() if t["adjusted"] is not None and t["beyond_chance"]}
    best = max(known.values(), default=0.0)
    if best < FOLLOWS_FROM:
        return None
    what = min((w for w, part in known.items() if part >= best - SAME), key=lambda w: size[w])
    return {"label": what, "part": known[what]}


def _served(layer: Decisions, stream: Stream, what: str) -> dict[str, list[float]]:
    """Of the assignments of each label's tokens the share of each expert; positions in a few ranges."""
    label, names = stream.labels[what], stream.names[what]
    if what == "position" and len(names) > RANGES:
        run = -(-len(names) // RANGES)
        label = torch.where(label >= 0, label // run, -1)
        names = [
            f"{names[i].split('–')[0]}–{names[min(i + run, len(names)) - 1].split('–')[-1]}"
            for i in range(0, len(names), run)
        ]
    shares = label_shares(label_counts(layer.index, label, layer.num_experts, len(names)))
    return {name: row.tolist() for name, row in zip(names, shares, strict=True) if bool(row.any())}


def tokens_served(layer: Decisions, stream: Stream, what: str = "token") -> list[list[list[Any]]]:
    """For each expert its most characteristic tokens ("previous": tokens before), of `characteristic`, as text."""
    label, names = stream.labels[what], stream.names[what]
    counts = label_counts(layer.index, label, layer.num_experts, len(names))
    rows = characteristic(counts, torch.bincount(label[label >= 0], minlength=len(names)))
    return [[[names[i], share, lift] for i, share, lift in row] for row in rows]


def patches_served(layer: Decisions, stream: Stream, per_image: int) -> list[list[list[Any]]]:
    """For each expert its patches of largest weight, as [image, patch, weight]."""
    number = torch.full_like(stream.labels["position"], -1)
    known = stream.labels["position"] >= 0
    number[known] = torch.arange(int(known.sum()))
    found = []
    assert layer.weight is not None
    for expert in range(layer.num_experts):
        token, choice = ((layer.index == expert) & known[:, None]).nonzero(as_tuple=True)
        weight = layer.weight[token, choice]
        best = weight.argsort(descending=True, stable=True)[:PATCHES]
        places = [divmod(int(number[token[i]]), per_image) for i in best]
        found.append([[*place, float(weight[i])] for place, i in zip(places, best, strict=True)])
    return found


def _together(together: Tensor) -> dict[str, Any]:
    ratio = affinity(together)
    often = together >= MIN_COUNT
    score = torch.where(often.triu(1), ratio, -1.0).nan_to_num(-1.0).flatten()
    experts = len(ratio)
    best = [int(i) for i in score.argsort(descending=True, stable=True)[:PAIRS] if score[i] > 1]
    return {
        "affinity": _rounded(ratio),
        "pairs": [[i // experts, i % experts, int(together.flatten()[i]), float(score[i])] for i in best],
    }


def describe_weights(layer: nn.Module, experts: int, config: Any) -> dict[str, Any] | None:
    """How alike the experts of a layer are by their weights; None where they are not found.

    Args:
        layer: the module.
        experts: E.
        config: of the model; it knows the width.
    """
    parameters = expert_parameters(layer, experts)
    if experts < 2 or not parameters[0]:
        return None
    transposed = any(getattr(module, "is_transposed", False) is True for module in layer.modules())
    dim = _width(parameters[0], config)
    kinds = {"cosine": cosine_similarity(parameters)}
    if dim is not None:
        kinds["gram"] = gram_similarity(parameters, dim, transposed)
    off = ~torch.eye(experts, dtype=torch.bool)
    summary: dict[str, Any] = {}
    for kind, matrix in kinds.items():
        i, j = divmod(int(torch.where(off.triu(), matrix, -2.0).argmax()), experts)
        closest = [i, j, float(matrix[i, j])]
        summary[kind] = {
            "matrix": _rounded(matrix),
            "mean": float(matrix[off].mean()),
            "closest": closest,
        }
    return summary


def _width(parameters: dict[str, Tensor], config: Any) -> int | None:
    dim = getattr(config, "hidden_size", None) or getattr(config, "d_model", None) or getattr(config, "n_embd", None)
    return dim if isinstance(dim, int) and any(dim in p.shape for p in parameters.values() if p.dim() == 2) else None


def _rounded(matrix: Tensor) -> list[list[float | None]]:
    """Four decimals, enough to draw a matrix; NaN as None."""
    return [[None if math.isnan(value) else round(value, 4) for value in row] for row in matrix.tolist()]
