"""Table 1: what comes to a sparse layer (pieces of words, sentences, patches, frames, words), and who takes it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..analysis.information import entropy, mutual_information
from ..analysis.inspect.material import Material, Stream
from ..analysis.inspect.recording import Recording
from ..analysis.specialisation import label_counts
from ..errors import UserError, one_line
from ..hf.observe.listening import Decisions
from ..metrics import expert_load
from ..recipes.recipe import Recipe
from ..recipes.registry import find
from .results import NOT, NOT_RUN, REPRODUCED, Result, Row, judge
from .tables import kind_lifts, recorded, shuffles, spans
from .words import RECIPE_OF_WORDS, words

__all__ = ["INPUTS", "Input", "as_one", "items", "table_1"]

TOKENS = 16384
"""Held-out tokens that are looked at, at most."""


@dataclass(frozen=True)
class Input:
    """A kind of input.

    Args:
        domain: of the table.
        unit: what the table says comes to a layer.
        shown: how many of it there were, as a phrase with {tokens}, {items} and {longer} (%, of more than a character).
        recipe: that has it, or its name.
        label: of the tokens, by which experts may divide them; and what it is for people.
        settings: of the recipe's configuration, a short run.
        config: instead of settings.
        item: what has one label, all tokens of it alike; empty where tokens have their own.
        whole: whether all tokens of an item go the same way.
    """

    domain: str
    unit: str
    shown: str
    recipe: str | Recipe[Any, Any]
    label: tuple[str, str]
    settings: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    config: Callable[[], Any] | None = None
    item: str = ""
    whole: bool = False

    @property
    def claim(self) -> str:
        """What the table says of it, without the unit."""
        return f"{self.domain}: what comes to a sparse layer"


def _training(steps: int, **more: Any) -> dict[str, Any]:
    return {"steps": steps, "warmup": steps // 5, "eval_every": steps, "save_every": steps, **more}


INPUTS = (
    Input(
        "natural language",
        "word",
        "{tokens} tokens, {longer:.0f} % of them whole words and the rest bytes of rarer ones, from {items} windows",
        RECIPE_OF_WORDS,
        ("kind", "what kind of token it is"),
        config=words,
    ),
    Input(
        "natural language",
        "subword",
        "{tokens} tokens of a byte-pair encoding, from {items} windows of text",
        "text",
        ("kind", "what kind of token it is"),
        config=spans,
    ),
    Input(
        "natural language",
        "sentence",
        "{tokens} tokens of {items} sentences, the same experts for all of a sentence",
        "translation",
        ("language", "the language to translate into"),
        {
            "name": "sentences",
            "data": {"languages": ["de", "fr", "es", "sv"], "bilingual": [], "vocab_size": 1024},
            "model": {"dim": 64, "layers": 1, "hidden": 128, "sparse_stacks": "encoder"},
            "sparse": {"router": "sentence", "options": {}},
            "training": _training(150, learning_rate=5e-3),
        },
        item="sentence",
        whole=True,
    ),
    Input(
        "vision",
        "patch",
        "{tokens} patches of {items} images",
        "images",
        ("domain", "what is in the image"),
        {"name": "patches", "model": {"dim": 48, "layers": 2, "hidden": 96}, "training": _training(200)},
        item="image",
    ),
    Input(
        "speech",
        "spectrogram",
        "{tokens} frames of the spectrograms of {items} sounds",
        "speech",
        ("domain", "the language and the voice"),
        {
            "name": "frames",
            "data": {"voices": 12, "takes": 4},
            "model": {"dim": 48, "layers": 1, "hidden": 96},
            "training": _training(100),
        },
        item="sound",
    ),
    Input(
        "multimodal",
        "word or patch",
        "{tokens} words and patches of {items} pairs of image and caption",
        "multimodal",
        ("modality", "whether it is a word or a patch"),
        {"name": "words-and-patches", "data": {"train_pairs": 2000}, "training": _training(150)},
    ),
)


def table_1(runs: Path) -> Result:
    """What comes to the sparse layers of each domain, and by what the experts divide it."""
    claims, data, seconds = [], dict[str, Any](), 0.0
    for one in INPUTS:
        recipe = find(one.recipe) if isinstance(one.recipe, str) else one.recipe
        config = one.config() if one.config else recipe.config.model_validate(one.settings)
        try:
            recording, material, loss, took = recorded(recipe, runs, config, TOKENS)
        except (UserError, ModuleNotFoundError) as error:
            claims.append(Row(one.claim, one.unit, "", NOT_RUN, one_line(error)))
            continue
        seconds += took
        found = _layers(one, recording, material)
        claims += [_unit_row(one, found, recording, material), _takes_row(one, found)]
        data[f"{one.domain}, {one.unit}"] = {"loss": loss, "layers": found}
    return Result("table-1", claims, data, seconds, [_ABOUT])


_ABOUT = (
    "Each is a run of minutes or less of the recipe named after the domain, on its built-in data; what experts take is "
    "read off held-out data. “Times as often” is the largest lift of a value over the experts, against the largest of "
    "twenty shuffles of the values over the tokens, or over sentences, images and sounds where all tokens of one have "
    "the same. Routers that were not trained divide their input too, wherever it differs."
)


def _layers(one: Input, recording: Recording, material: Material) -> dict[str, Any]:
    """What each layer of which the tokens are known was sent, and how much of it its experts divide by the label."""
    found = {}
    for name, layer in recording.layers.items():
        stream = material.stream(name, len(layer.index), recording.batches)
        if stream is None:
            continue
        label, names = stream.labels[one.label[0]], stream.names[one.label[0]]
        item = items(stream) if one.item else None
        bits, *null = (
            mutual_information(label_counts(layer.index, each, layer.num_experts, len(names)))
            for each in (label, *shuffles(label, item))
        )
        lifts, chance = kind_lifts(layer.index, label, layer.num_experts, len(names), item)
        found[name] = {
            "tokens": int((label >= 0).sum()),
            "bits": bits,
            "entropy": entropy(expert_load(layer.index, layer.num_experts)),
            "shuffled": math.fsum(null) / len(null),
            "shuffled_most": max(null),
            "lifts": {
                text: {"lift": float(lifts[i]), "shuffled": float(chance[i])}
                for i, text in enumerate(names)
                if bool((label == i).any())
            },
        }
        if "token" in stream.labels:
            longer = torch.tensor([len(text) > 1 for text in stream.names["token"]])
            found[name]["longer"] = 100 * float(longer[stream.labels["token"]].double().mean())
        if one.whole:
            found[name]["as_one"] = as_one(layer, stream)
    return found


def items(stream: Stream) -> Tensor:
    """The number (T,) of the sequence, image or sound of each token, which begins where the position is 0 again."""
    first = stream.labels["position"] == 0
    begins = first & ~torch.cat([first.new_zeros(1), first[:-1]])
    return (begins.cumsum(0) - 1).clamp_min(0)


def as_one(layer: Decisions, stream: Stream) -> float:
    """Of the sequences of a layer the share whose tokens all have the same experts."""
    number, index = items(stream), layer.index.sort(1).values
    first = torch.cat([number.new_full((1,), -1), number[:-1]]) != number
    differs = (index != index[first][number]).any(1)
    return 1 - len(number[differs].unique()) / int(first.sum())


def _items(material: Material) -> int:
    return sum(len(next(iter(batch.inputs.values()))) for batch in material.batches)


def _unit_row(one: Input, found: dict[str, Any], recording: Recording, material: Material) -> Row:
    if len(found) < len(recording.layers):
        return Row(one.claim, one.unit, "other tokens came to a layer than the model was shown", NOT)
    name, layer = next(iter(found.items()))
    said = one.shown.format(
        tokens=f"{layer['tokens']:,}", items=f"{_items(material):,}", longer=layer.get("longer", 100)
    )
    if not one.whole:
        return Row(one.claim, one.unit, f"{said} ({name})", REPRODUCED)
    together = min(each["as_one"] for each in found.values())
    return Row(one.claim, one.unit, f"{said}: {100 * together:.0f} % ({name})", judge(together == 1))


def _takes_row(one: Input, found: dict[str, Any]) -> Row:
    what = f"{one.domain}, {one.unit}: experts divide their input by {one.label[1]}"
    beyond = [layer["bits"] > layer["shuffled_most"] for layer in found.values()]
    if not found:
        return Row(what, _SECTION_8, "", NOT_RUN, "which tokens came to its layers is not known")
    name, most = max(found.items(), key=lambda item: item[1]["bits"] - item[1]["shuffled"])
    ranked = sorted(most["lifts"].items(), key=lambda item: item[1]["shuffled"] - item[1]["lift"])
    shown = ", ".join(
        f"“{text}” {lift['lift']:.1f} times as often as in all ({lift['shuffled']:.1f} by chance)"
        for text, lift in ranked[:3]
    )
    return Row(
        what,
        _SECTION_8,
        f"{sum(beyond)} of {len(beyond)} layers do; most {name}: {most['bits']:.3f} bits of {most['entropy']:.3f}, "
        f"shuffled {most['shuffled']:.3f}, at most {most['shuffled_most']:.3f}; {shown}",
        judge(all(beyond), direction=any(beyond)),
    )


_SECTION_8 = "not in the table; experts specialise (section 8)"
