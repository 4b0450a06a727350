"""Tables 2 and 3: which tokens come before those that an expert takes, and what kinds of tokens experts take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..analysis.information import information
from ..analysis.inspect.findings import tokens_served
from ..analysis.inspect.material import Material
from ..analysis.inspect.recording import Recording, record
from ..analysis.inspect.stacks import clearer, stack_information
from ..analysis.specialisation import label_counts
from ..durable import sealed
from ..recipes.recipe import Recipe
from ..recipes.run import account, begin, load_model, train_one
from ..recipes.text import RECIPE, TextConfig
from .results import NOT_RUN, Result, Row, judge

__all__ = ["kind_lifts", "recorded", "shuffles", "spans", "table_2", "table_3"]

EXPERTS = 16
SHUFFLES = 20
_ABOUT = (
    "The model has two layers of width 64 in a stack with sixteen experts each and reads half a million tokens of the "
    "built-in text; what its experts take is read off held-out text."
)


def _config(name: str, kind: str, router: str, options: dict[str, Any]) -> TextConfig:
    steps = 250
    return TextConfig.model_validate(
        {
            "name": name,
            "data": {"eval_windows": 96},
            "model": {"kind": kind, "dim": 64, "layers": 2, "heads": 2, "hidden": 256},
            "training": {"steps": steps, "warmup": 40, "learning_rate": 1e-2, "save_every": steps, "eval_every": steps},
            "sparse": {"router": router, "num_experts": EXPERTS, "options": options, "allow_leak": True},
        }
    )


def recorded(
    recipe: Recipe[Any, Any], runs: Path, config: Any, tokens: int = 1 << 20
) -> tuple[Recording, Material, float, float]:
    """What a trained sparse model decides on held-out data, what is known of their tokens, its loss, and the seconds.

    Args:
        recipe: of the run.
        runs: the folder of training runs, where a model that is there is not trained again.
        config: of the run.
        tokens: held-out ones that are looked at, at most.

    Raises:
        Interrupted, KeyboardInterrupt: after Ctrl-C.
    """
    run = runs / "tables" / config.name
    with begin(recipe, config, run, {"sparse": config}, resume=sealed(run), as_json=False) as begun:
        found = account(begun, "sparse", train_one(begun, "sparse"))
        data = begun.data
    model = load_model(run, "sparse")
    material = recipe.material(model, data, tokens)
    assert material is not None
    recording = record(model, material, lambda steps, what, total: steps)
    if recording.batches < len(material.batches):
        raise KeyboardInterrupt
    return recording, material, found.eval_loss, found.seconds


def spans() -> TextConfig:
    """The encoder-decoder of table 3, and of text in table 1."""
    return _config("spans", "encoder-decoder", "topk", {"top_k": 2, "load_balancing_loss": 0.01})


def _listed(rows: list[list[Any]]) -> str:
    return ", ".join(f"“{text.strip() or text!r}” ({lift:.1f})" for text, _, lift in rows[:6]) or "none of its own"


def table_2(runs: Path) -> Result:
    """The tokens before those that experts of BASE take."""
    recording, material, loss, seconds = recorded(RECIPE, runs, _config("base", "decoder", "base", {}))
    [stream] = material.streams.values()
    claims, notes, layers = [], [_ABOUT], dict[str, Any]()
    for name, layer in recording.layers.items():
        told = information(layer.index, stream.labels["previous"], layer.num_experts)
        own = information(layer.index, stream.labels["token"], layer.num_experts)
        claims.append(
            Row(
                f"{name}: the preceding token tells the expert",
                "it does: experts of numbers, of “to, will, should”, of possession",
                f"{told.bits:.3f} bits of {told.entropy:.3f}; shuffled {told.null:.3f}, at most {told.null_max:.3f}; "
                f"the token itself {own.bits:.3f}",
                judge(told.beyond_chance),
            )
        )
        experts = tokens_served(layer, stream, "previous")
        layers[name] = experts
        best = sorted(range(layer.num_experts), key=lambda e: -max((row[2] for row in experts[e]), default=0.0))[:4]
        notes += [
            f"{name}, expert {e}: preceding tokens, with their lift: {_listed(experts[e])}." for e in sorted(best)
        ]
    return Result("table-2", claims, {"loss": loss, "layers": layers}, seconds, notes)


def shuffles(label: Tensor, item: Tensor | None = None, seed: int = 0) -> list[Tensor]:
    """Labels (T,) over other tokens, `SHUFFLES` times; with the item (T,) of each token, those of whole items.

    Tokens of an item that have its label are no draws of their own: shuffled one by one they would make chance look
    smaller than it is. An item's label is the largest of its tokens'.
    """
    generator = torch.Generator().manual_seed(seed)
    if item is None:
        return [label[torch.randperm(len(label), generator=generator)] for _ in range(SHUFFLES)]
    whole = label.new_full((int(item.max()) + 1,), -1).scatter_reduce(0, item, label, "amax")
    found = [whole[torch.randperm(len(whole), generator=generator)][item] for _ in range(SHUFFLES)]
    return [torch.where(label < 0, label, one) for one in found]


def kind_lifts(
    index: Tensor, label: Tensor, experts: int, kinds: int, item: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """How much more often than in the text each kind is among an expert's tokens, at most over the experts.

    Args:
        index: (T, k) experts of each token, -1 for none.
        label: (T,) the kind of each, -1 where it is not known.
        experts: E.
        kinds: K.
        item: of `shuffles`.

    Returns:
        The largest lift of each kind (K,), and the largest of `SHUFFLES` shuffles of the labels (K,). Experts with less
        than a quarter of an even share of the assignments do not count.
    """

    def largest(labels: Tensor) -> Tensor:
        counts = label_counts(index, labels, experts, kinds).double()
        total = counts.sum(0)
        share = counts / total.clamp_min(1)
        text = counts.sum(1) / total.sum().clamp_min(1)
        lift = share / text.clamp_min(1e-12)[:, None]
        return lift.masked_fill((total < total.sum() / experts / 4)[None], 0).max(1).values

    return largest(label), torch.stack([largest(one) for one in shuffles(label, item)]).max(0).values


_KINDS = {
    "special": ("sentinel tokens", "“<extra_id_4>, <extra_id_7>”"),
    "punctuation": ("punctuation", "“, . - ( )”"),
    "number": ("counting and numbers", "“one, two, 7, 2014”"),
    "function word": ("conjunctions and articles", "“the, and, or, a”"),
    "verb": ("verbs", "“died, falling, identified”"),
    "name": ("proper names", "“Mart, Gr, Mart, Kent”"),
}


def table_3(runs: Path) -> Result:
    """The kinds of tokens that experts of an encoder take, and of the decoder behind it."""
    recording, material, loss, seconds = recorded(RECIPE, runs, spans())
    claims, layers = [], dict[str, Any]()
    for name, layer in recording.layers.items():
        stream = material.stream(name, len(layer.index), recording.batches)
        assert stream is not None
        names = stream.names["kind"]
        found, chance = kind_lifts(layer.index, stream.labels["kind"], layer.num_experts, len(names))
        layers[name] = {kind: {"lift": float(found[i]), "shuffled": float(chance[i])} for i, kind in enumerate(names)}
        if not name.startswith("encoder"):
            continue
        for kind, (said, example) in _KINDS.items():
            lift, by_chance = (layers[name][kind][what] for what in ("lift", "shuffled"))
            claims.append(
                Row(
                    f"{name}: an expert of {said}",
                    f"there is one: {example}",
                    f"{lift:.1f} times as often as in the text; {by_chance:.1f} by chance",
                    judge(lift > 2 * by_chance, direction=lift > by_chance),
                )
            )
    told = stack_information(recording, material)
    if both := clearer(told):
        encoder, decoder, by_chance = both
        claims.append(
            Row(
                "experts specialise more clearly in the encoder than in the decoder",
                "they do",
                f"the kind of a token decides {100 * encoder:.1f} % of the expert in the encoder, {100 * decoder:.1f} "
                f"% in the decoder, sentinels left out; {100 * by_chance:.1f} by chance",
                judge(False, direction=encoder - decoder > by_chance),
                "one run of one seed, and runs differ by more than chance within one",
            )
        )
    claims.append(Row("experts of visual descriptions", "there are some", "", NOT_RUN, "tokens are not tagged so"))
    notes = [_ABOUT, "The model is a T5 that writes down spans of the text which sentinel tokens stand for."]
    notes.append("Verbs are a list of frequent ones, names begin with a capital: kinds go by a token’s text alone.")
    adjusted = {name: {what: one.adjusted for what, one in labels.items()} for name, labels in told.items()}
    return Result("table-3", claims, {"loss": loss, "layers": layers, "decided": adjusted}, seconds, notes)
