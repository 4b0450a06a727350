"""Figures 3 to 5: loss by experts, quality and calibration by compute, of dense and sparse runs on text and facts."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..analysis.calibration import Calibration, calibrations
from ..recipes.run import configuration_of, load_model
from .results import Result, Row, judge
from .scaling import LAW_ROUTERS, NAMES, TASK, TEXT, against_dense, at_least, seconds_of, short, times, told
from .sweep import COUNTS, FACT_SWEEP, ROUTERS, TEXT_SWEEP, Sweep

__all__ = [
    "FACTS_STUDY",
    "TEXT_STUDY",
    "Study",
    "by_experts",
    "calibration",
    "facts_figure_3",
    "facts_figure_4",
    "facts_figure_5",
    "figure_3",
    "figure_4",
    "figure_5",
    "quality",
]


@dataclass(frozen=True)
class Study:
    """What of a sweep the figures show.

    Args:
        ending: of the names of the figures.
        sweep: the runs.
        sizes: of figure 3; figures 4 and 5 have all of the sweep.
        counts: of the experts in figure 3.
        experts: of the sparse models in figures 4 and 5.
        judged: the domains whose held-out predictions count; None for all.
        unit: of the loss.
        quality: what is right of the predictions, for people.
        compute: what the compute is of.
        notes: what a reader should know of all its figures.
        of_routers: and of figure 3; `of_quality`: and of figure 4.
        leaks: by router, what its losses are not, if later tokens change earlier ones in evaluation.
    """

    ending: str
    sweep: Sweep
    sizes: tuple[int, ...]
    counts: tuple[int, ...]
    experts: int
    judged: tuple[str, ...] | None
    unit: str
    quality: str
    compute: str
    notes: tuple[str, ...]
    of_routers: tuple[str, ...]
    of_quality: str
    leaks: dict[str, str]


TEXT_STUDY = Study(
    ending="",
    sweep=TEXT_SWEEP,
    sizes=(16, 32, 64),
    counts=(2, 8, 64),
    experts=8,
    judged=None,
    unit="nats/token",
    quality="next tokens guessed right",
    compute="a token",
    notes=(
        TEXT,
        "Every router has its own defaults and sees the same tokens in the same order, 250 steps of them, at one "
        "learning rate for all widths.",
    ),
    of_routers=(),
    of_quality="Held-out text stands for TriviaQA and BIG-bench: no model here answers questions.",
    leaks={"expert_choice": "no language model's: its experts choose among later tokens too, in evaluation as well"},
)
FACTS_STUDY = Study(
    ending="-facts",
    sweep=FACT_SWEEP,
    sizes=(8, 16, 32),
    counts=COUNTS,
    experts=16,
    judged=("drawn",),
    unit="nats/fact",
    quality="facts recalled",
    compute="a fact",
    notes=(TASK,),
    of_routers=(
        "A hash of the key is the best router of such a task, whose token is all that there is to know. Sinkhorn "
        "balances a batch in training and not in evaluation: keys that come many times in a batch are spread over "
        "experts, of which one is asked in evaluation.",
    ),
    of_quality="What is recalled of held-out draws stands for TriviaQA, a test of knowledge.",
    leaks={},
)


def figure_3(runs: Path) -> Result:
    """Loss against experts at three sizes, for five routers, on text."""
    return by_experts(TEXT_STUDY, _all_routers(TEXT_STUDY, runs))


def facts_figure_3(runs: Path) -> Result:
    """The same on facts."""
    return by_experts(FACTS_STUDY, _all_routers(FACTS_STUDY, runs))


def figure_4(runs: Path) -> Result:
    """How many next tokens are guessed right, against compute, dense and sparse."""
    return quality(TEXT_STUDY, _measured(TEXT_STUDY, runs))


def facts_figure_4(runs: Path) -> Result:
    """How many facts are recalled, against compute, dense and sparse."""
    return quality(FACTS_STUDY, _measured(FACTS_STUDY, runs))


def figure_5(runs: Path) -> Result:
    """Calibration error of the next token against compute, dense and sparse."""
    return calibration(TEXT_STUDY, _measured(TEXT_STUDY, runs))


def facts_figure_5(runs: Path) -> Result:
    """The same of the values of facts."""
    return calibration(FACTS_STUDY, _measured(FACTS_STUDY, runs))


def _all_routers(study: Study, runs: Path) -> list[dict[str, Any]]:
    return list(study.sweep.run(runs, tuple(ROUTERS), study.sizes, study.counts))


def by_experts(study: Study, rows: list[dict[str, Any]]) -> Result:
    """Figure 3 of runs that are there."""
    loss = {(row["router"], row["size"], row["experts"]): row["loss"] for row in rows}
    counts, middle = (1, *study.counts), study.counts.index(8) + 1
    claims = []
    for router in ROUTERS:
        curves = [[loss["dense", s, 1], *(loss[router, s, e] for e in study.counts)] for s in study.sizes]
        gains = [(curve[0] - min(curve[1:])) / curve[0] for curve in curves]
        falling = [all(b < a for a, b in zip(curve, curve[1:], strict=False)) for curve in curves]
        best = [counts[int(np.argmin(curve))] for curve in curves]
        leak = study.leaks.get(router, "")
        claims.append(
            Row(
                f"{NAMES[router]}: the loss falls with more experts, each time",
                "it does" if router != "expert_choice" else "not in the figure",
                f"{_below(gains)} at best; lowest at {', '.join(map(str, best))} experts, by size",
                judge(all(falling), direction=all(gain > 0 for gain in gains)),
                leak and f"the loss is {leak}",
            )
        )
        early = [math.log(curve[0] / curve[middle]) for curve in curves]
        late = [math.log(curve[middle] / curve[-1]) for curve in curves]
        gained = all(gain > 0 for gain in early)
        shrinking = gained and all(b < a for a, b in zip(early, late, strict=True))
        claims.append(
            Row(
                f"{NAMES[router]}: gains diminish",
                "they do",
                "from 8 to 64 experts "
                + ", ".join(f"{b / a:.2f}" for a, b in zip(early, late, strict=True))
                + " times the gain from 1 to 8 (in the logarithm), by size"
                if gained
                else "from 1 to 8 experts there is no gain at every size, which could diminish",
                judge(shrinking and min(late) >= 0, direction=shrinking),
            )
        )
    two = [loss[router, size, 2] / loss["dense", size, 1] for router in ROUTERS for size in study.sizes]
    claims.append(
        Row(
            "as few as two experts help (section 6)",
            "they do",
            f"{sum(ratio < 1 for ratio in two)} of {len(two)} pairs of router and size; loss {min(two):.2f} to "
            f"{max(two):.2f} times the dense one",
            judge(all(ratio < 1 for ratio in two), direction=sum(ratio < 1 for ratio in two) > len(two) / 2),
        )
    )
    cost = {(row["router"], row["size"], row["experts"]): row["flops_per_token"] for row in rows}
    matched = [cost[router, s, 2] / cost["dense", s, 1] for router in ROUTERS for s in study.sizes]
    claims.append(
        Row(
            "the first point is the dense model of the same compute",
            "it is",
            f"two experts compute {min(matched):.3f} to {max(matched):.3f} times as much, by the router",
            judge(max(matched) < 1.05),
        )
    )
    data = {"runs": short(rows), "unit": study.unit}
    return Result(f"figure-3{study.ending}", claims, data, seconds_of(rows), [*study.notes, *study.of_routers])


def _below(gains: Iterable[float]) -> str:
    """By how much losses are below the dense one, or above it, in words."""
    low, high = (100 * end(gains) for end in (min, max))
    if low >= 0:
        return f"{low:.1f} to {high:.1f} % below dense"
    return f"between {-low:.1f} % above dense and {abs(high):.1f} % {'below' if high >= 0 else 'above'} it"


def _measured(study: Study, runs: Path) -> list[dict[str, Any]]:
    """Rows of the dense and the sparse models of every size, with how many predictions are right and how calibrated."""
    rows = list(study.sweep.run(runs, LAW_ROUTERS, None, (study.experts,)))
    found = []
    for size in study.sweep.sizes:
        run = study.sweep.place(runs, size)
        recipe, config = configuration_of(run)
        data = recipe.prepare(config)
        for row in rows:
            if row["size"] == size:
                name = "dense" if row["router"] == "dense" else f"{row['router']}-{study.experts}"
                parts = calibrations(recipe.predictions(load_model(run, name), data))
                whole = _sum(part for domain, part in parts.items() if not study.judged or domain in study.judged)
                right = 100 * whole.as_json()["accuracy"]
                found.append(row | {"right": right, "error": whole.error, "noise": whole.noise})
    return found


def _sum(parts: Iterable[Calibration]) -> Calibration:
    first, *others = parts
    for other in others:
        first = first + other
    return first


def quality(study: Study, rows: list[dict[str, Any]]) -> Result:
    """Figure 4 of runs that are there, with how many predictions are right."""
    rows = [row | {"wrong": 100 - row["right"]} for row in rows if row["experts"] in (1, study.experts)]
    dense = {row["size"]: row for row in rows if row["router"] == "dense"}
    claims = []
    for router in LAW_ROUTERS:
        mine = [row for row in rows if row["router"] == router]
        better = [row["right"] > dense[row["size"]]["right"] for row in mine]
        ends = [
            f"{row['right']:.1f} % against {dense[row['size']]['right']:.1f} % at the {which}"
            for row, which in ((mine[0], "smallest"), (mine[-1], "largest"))
        ]
        claims.append(
            Row(
                f"{NAMES[router]}, {study.experts} experts: better than dense of the same size at every scale",
                "GLaM above dense (TriviaQA), and above GPT-3 with 49 % less computing for a token",
                f"{sum(better)} of {len(better)} sizes; {', '.join(ends)}",
                judge(all(better), direction=sum(better) > len(better) / 2),
            )
        )
        factors = against_dense(rows, "wrong", router, study.experts)
        claims.append(
            Row(
                f"{NAMES[router]}: dense computing for as much that is right, over its own",
                "about 2 (BIG-bench)",
                times(factors) + ", by size",
                judge(at_least(factors, 2), direction=at_least(factors, 1)),
                told(factors, 2),
            )
        )
    keys = ("right",)
    data = {"runs": short(rows, keys), "experts": study.experts, "quality": study.quality, "compute": study.compute}
    return Result(f"figure-4{study.ending}", claims, data, seconds_of(rows), [*study.notes, study.of_quality])


def calibration(study: Study, rows: list[dict[str, Any]]) -> Result:
    """Figure 5 of runs that are there, with the error of their calibration."""
    by_size = {row["size"]: row for row in rows if row["router"] == "dense"}
    dense = list(by_size.values())
    falls = all(b["error"] < a["error"] for a, b in zip(dense, dense[1:], strict=False))
    claims = [
        Row(
            "dense models are calibrated better the larger they are",
            "they are",
            ", ".join(f"{100 * row['error']:.1f} %" for row in dense)
            + f", by size; {100 * max(row['noise'] for row in rows):.1f} % would be chance",
            judge(falls, direction=dense[-1]["error"] < dense[0]["error"]),
        )
    ]
    for router in LAW_ROUTERS:
        mine = [row for row in rows if row["router"] == router]
        better = [row["error"] < by_size[row["size"]]["error"] for row in mine]
        said = ", ".join(f"{100 * row['error']:.1f} %" for row in mine)
        factors = against_dense(rows, "error", router, study.experts)
        claims.append(
            Row(
                f"{NAMES[router]}, {study.experts} experts: calibrated as a dense model of ten times the computing",
                "about 10",
                f"errors {said}, below the dense one in {sum(better)} of {len(better)}; {times(factors)} times the "
                "computing, by size",
                judge(at_least(factors, 10), direction=all(better)),
                told(factors, 10),
            )
        )
    notes = [*study.notes, "Expected calibration error, fifteen bins (Naeini et al. 2015)."]
    data = {"runs": short(rows, ("error", "noise")), "experts": study.experts, "compute": study.compute}
    return Result(f"figure-5{study.ending}", claims, data, seconds_of(rows), notes)
