"""What experts of an encoder and of a decoder go by: what the kind of a token tells about its expert, beyond chance."""

from __future__ import annotations

import math
from statistics import fmean
from typing import Any

from ..exhibits import Table
from ..information import Information, information
from .material import Material
from .recording import Recording
from .tokens import KINDS

__all__ = ["clearer", "stack_information", "stack_table"]

WITHOUT = "kind, no special token"
SHUFFLES = 8


def stack_information(recording: Recording, material: Material) -> dict[str, dict[str, Information]]:
    """By layer and label of the tokens, what the label tells about the expert.

    The labels are "kind" (`KINDS`), the same for tokens that are not special, "token" and "domain". The kind of a
    special token (a mask, a sentinel) is known to any router that has seen a few: hence both.
    """
    found = {}
    for name, layer in recording.layers.items():
        stream = material.stream(name, len(layer.index), recording.batches)
        if stream is None:
            continue
        kind = stream.labels["kind"]
        labels = {
            "kind": kind,
            WITHOUT: kind.masked_fill(kind == KINDS.index("special"), -1),
            "token": stream.labels["token"],
            "domain": stream.labels["domain"],
        }
        found[name] = {
            what: information(layer.index, label, layer.num_experts, shuffles=SHUFFLES)
            for what, label in labels.items()
        }
    return found


def clearer(found: dict[str, dict[str, Information]], what: str = WITHOUT) -> tuple[float, float, float] | None:
    """The part of the expert that a label decides, in the mean over the layers of encoder and of decoder.

    And what chance alone may make of it: the farthest that a shuffle came from the mean of the shuffles, in any layer.
    None where a model has not both, or some layer's experts carry no entropy.
    """
    parts: dict[bool, list[float]] = {True: [], False: []}
    chance = 0.0
    for name, labels in found.items():
        one = labels[what]
        if one.adjusted is None:
            return None
        parts["decoder" in name.split(".")].append(one.adjusted)
        chance = max(chance, (one.null_max - one.null) / (one.entropy - one.null))
    return (fmean(parts[False]), fmean(parts[True]), chance) if parts[False] and parts[True] else None


def stack_table(found: dict[str, dict[str, Information]]) -> Table:
    """A row of each layer, and in words whether experts specialise more clearly in the encoder than in the decoder."""
    rows: list[list[Any]] = []
    for name, labels in found.items():
        cells = [_percent(one.adjusted) for one in labels.values()]
        rows.append([name, f"{labels['kind'].tokens:,}", f"{labels['kind'].entropy:.2f}", *cells])
    what = "kind, special tokens left out"
    says = (
        "How much of the choice among experts a label of the token decides: the mutual information of label and expert "
        "over the entropy of the expert, both less what shuffled labels have (0: chance, 100 %: the label tells the "
        f"expert). Kinds are {', '.join(KINDS)}, by the token’s text alone. "
    )
    if both := clearer(found):
        encoder, decoder, chance = both
        numbers = f"{_percent(encoder)} in the encoder, {_percent(decoder)} in the decoder"
        verdict = (
            "experts specialise more clearly in the encoder than in the decoder"
            if encoder - decoder > chance
            else "experts do not specialise more clearly in the encoder than in the decoder"
        )
        says += f"By the {what}: {numbers}, in the mean over layers: here {verdict}. One run, one seed."
    heads = ["layer", "tokens", "entropy of the expert (bits)", "kind", WITHOUT, "token", "domain"]
    return Table("What decides the expert", says, heads, rows)


def _percent(part: float | None) -> str:
    return "–" if part is None or not math.isfinite(part) else f"{100 * part:.1f} %"
