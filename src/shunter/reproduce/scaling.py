"""Section 3: the law through losses of small runs and through the released ones, and in and out of the domain."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ..analysis.dense_equivalent import dense_equivalent
from ..analysis.run_table import read_groups
from ..analysis.scaling_law import COEFFICIENTS, Runs, account
from ..errors import UserError
from .results import IMPOSSIBLE, Result, Row, judge
from .sweep import FACT_SWEEP, TEXT_SWEEP, Sweep

__all__ = [
    "LAW_ROUTERS",
    "NAMES",
    "TASK",
    "TEXT",
    "against_dense",
    "domains",
    "law",
    "released_law",
    "seconds_of",
    "short",
    "text_law",
    "times",
]

LAW_ROUTERS = ("switch", "hash")
NAMES = {
    "switch": "Switch",
    "hash": "Hash",
    "sinkhorn": "S-BASE",
    "reinforce": "RL-R",
    "expert_choice": "expert choice",
    "dense": "dense",
}
TASK = (
    "The runs learn facts (`shunter train facts`): 32,768 keys by Zipf's law, 64 values, a million draws, one block; "
    "an expert is as wide as the dense block and a token takes one, so that all compute the same but for the router."
)
TEXT = (
    "The runs read half a million tokens of the built-in text (`shunter train text`), with two layers of width 16 to "
    "64; an expert is as wide as the dense block and a token takes one."
)
CURVES = "SHUNTER_ROUTING_CURVES"
"""The environment variable that names the released runs of Clark et al. 2022."""


def seconds_of(rows: Iterable[dict[str, Any]]) -> float:
    """What the runs took, in all."""
    return math.fsum(row["seconds"] for row in rows)


def short(rows: Iterable[dict[str, Any]], more: tuple[str, ...] = ("recalled", "even_loss")) -> list[dict[str, Any]]:
    """Of each run which it is, its loss and cost, and what else is there of `more`."""
    keys = ("router", "size", "parameters", "experts", "loss", "flops_per_token", *more)
    return [{key: row[key] for key in keys if key in row} for row in rows]


def _facts(runs: Path) -> list[dict[str, Any]]:
    """The rows of two routers at every size, with their loss out of the domain of training."""
    return [row | {"even_loss": row["domains"]["even"]["loss"]} for row in FACT_SWEEP.run(runs, LAW_ROUTERS)]


def law(runs: Path) -> Result:
    """The unified law through our own runs of two routers, on facts."""
    note = (
        "A loss that falls to nothing, as that of facts which are all known, is no power law: the law has no floor. "
        "And the larger model gains more here, since what it lacks is room: no size is near its cut-off."
    )
    return _law("scaling-law", FACT_SWEEP, runs, [TASK, note])


def text_law(runs: Path) -> Result:
    """The same on text."""
    return _law("scaling-law-text", TEXT_SWEEP, runs, [TEXT])


def _law(name: str, runs_of: Sweep, runs: Path, notes: list[str]) -> Result:
    rows = list(runs_of.run(runs, LAW_ROUTERS))
    claims, groups = [], {}
    for router in LAW_ROUTERS:
        mine = [row for row in rows if row["router"] in (router, "dense")]
        columns = ("parameters", "experts", "loss")
        found = account(Runs(*(np.array([row[key] for row in mine], dtype=np.float64) for key in columns)))
        groups[NAMES[router]] = found
        residual, separable = found["law"]["residual"], found["separable_residual"]
        dense = {row["size"]: row["loss"] for row in rows if row["router"] == "dense"}
        better = [row["loss"] < dense[row["size"]] for row in mine if row["router"] == router]
        claims += [
            Row(
                f"{NAMES[router]}: experts lower the loss",
                "they do",
                f"{sum(better)} of {len(better)} runs are below the dense model of their size",
                judge(all(better), direction=sum(better) > len(better) / 2),
            ),
            Row(
                f"{NAMES[router]}: the law fits, and better than one without the product of size and experts",
                "residual 0.0030 to 0.0034 in log10 of the loss, 0.0056 to 0.0061 without the product",
                f"{residual:.4f}, and {separable:.4f} without, over {len(mine)} runs",
                judge(residual < 0.0061 and separable > 1.5 * residual, direction=separable > 1.5 * residual),
                f"at the edge of the search is {found['edge']}" if found["edge"] else "",
            ),
            _sign(NAMES[router], found),
        ]
    notes = [*notes, "The coefficients are of this task and this size, and not to be compared with those of the paper."]
    return Result(name, claims, {"groups": groups, "runs": short(rows)}, seconds_of(rows), notes)


def _sign(name: str, found: dict[str, Any]) -> Row:
    c, (low, high) = found["law"]["c"], found["intervals"]["c"]
    cutoff = found["log10_cutoff"]
    said = "no cut-off" if cutoff is None else f"cut-off {10.0**cutoff:.2g} parameters"
    return Row(
        f"{name}: experts gain less the larger the model is (c above 0)",
        "c between 0.009 and 0.012",
        f"c = {c:.4f}, 90 % between {low:.4f} and {high:.4f}; {said}",
        judge(low > 0, direction=c > 0),
        "here larger models gain more" if high < 0 else "" if low > 0 else "c is not told from 0",
    )


PUBLISHED = {
    "S-Base": ((-0.082, -0.108, 0.009, 1.104, 1.847, 314.478), 937e9),
    "RL-R": ((-0.083, -0.126, 0.012, 1.111, 1.880, 469.982), 85e9),
    "Hash": ((-0.087, -0.136, 0.012, 1.157, 4.175, 477.741), 83e9),
}


def released_law() -> Result:
    """The unified law through the released runs of its paper."""
    path = os.environ.get(CURVES)
    if not path:
        raise UserError(
            f"set {CURVES} to the file data/curves.csv.gz of github.com/deepmind/scaling_laws_for_routing (CC BY 4.0)"
        )
    columns = {"parameters": "dense_parameter_count", "experts": "num_experts", "loss": "loss_validation"}
    hold = {"k": "1", "routing_frequency": "0.5", "flop_increase": "1"}
    groups, _ = read_groups(Path(path), columns, "router_type", hold, run="hyper_id")
    claims, data = [], {}
    for router, (published, cutoff) in PUBLISHED.items():
        if router not in groups:
            raise UserError(f"{path}: has no runs of {router}; is it the released file?")
        found = account(groups[router])
        for name, value in zip((*COEFFICIENTS, "log10_cutoff"), (*published, math.log10(cutoff)), strict=True):
            low, high = found["intervals"][name]
            ours = found["log10_cutoff"] if name == "log10_cutoff" else found["law"][name]
            inside = (low is None or low <= value) and (high is None or value <= high)
            ends = ["no end" if end is None else f"{end:.4g}" for end in (low, high)]
            paper = f"{value:.4g}" if name != "log10_cutoff" else f"{value:.4g} ({cutoff / 1e9:.0f} B parameters)"
            claims.append(
                Row(f"{router}: {name}", paper, f"{ours:.4g}, 90 % between {ends[0]} and {ends[1]}", judge(inside))
            )
        residual, separable = found["law"]["residual"], found["separable_residual"]
        claims.append(
            Row(
                f"{router}: better than without the product of size and experts",
                "it is",
                f"residual {residual:.4f}, and {separable:.4f} without, over {len(groups[router])} runs",
                judge(separable > 1.5 * residual, direction=separable > residual),
            )
        )
        data[router] = {
            key: found[key] for key in ("law", "log10_cutoff", "intervals", "separable_residual", "left_out")
        }
    notes = [
        "The runs are those that Clark et al. 2022 released (github.com/deepmind/scaling_laws_for_routing, CC BY "
        "4.0); the figures here are derived from them.",
        "The review's “900 B” is the cut-off of S-BASE alone, and its interval spans a factor of a hundred.",
    ]
    return Result("released-law", claims, {"groups": data}, notes=notes)


def against_dense(rows: list[dict[str, Any]], key: str, routers: Iterable[str], count: int) -> dict[str, list[Any]]:
    """By router, for each size: the dense compute of the same score over the compute of the sparse model, or None."""
    dense = sorted((row for row in rows if row["router"] == "dense"), key=lambda row: float(row["flops_per_token"]))
    cost, score = [row["flops_per_token"] for row in dense], [row[key] for row in dense]
    found: dict[str, list[Any]] = {}
    for router in routers:
        mine = sorted(
            (row for row in rows if row["router"] == router and row["experts"] == count),
            key=lambda row: int(row["size"]),
        )
        equal = [dense_equivalent(cost, score, row[key]) for row in mine]
        found[router] = [
            None if at is None else at / row["flops_per_token"] for at, row in zip(equal, mine, strict=True)
        ]
    return found


def times(values: list[Any]) -> str:
    """Factors of `against_dense` for people."""
    return ", ".join("beyond the largest dense model" if value is None else f"{value:.2f}" for value in values)


_MORE = 1.05  # times: what is no difference


def domains(runs: Path) -> Result:
    """What experts are worth in dense compute, on draws as in training and on draws that are not."""
    rows, count, claims, data = _facts(runs), 16, [], dict[str, Any]()
    for router in LAW_ROUTERS:
        try:
            inside = against_dense(rows, "loss", [router], count)[router]
            outside = against_dense(rows, "even_loss", [router], count)[router]
        except ValueError:
            gain = {key: _mean_gain(rows, router, count, key) for key in ("loss", "even_loss")}
            data[router] = gain
            claims.append(
                Row(
                    f"{NAMES[router]}: the gain is larger in the domain of training than out of it",
                    "much larger",
                    f"the loss is {gain['loss']:.2f} times the dense one's in it, {gain['even_loss']:.2f} out of it "
                    f"(means over the sizes, geometric)",
                    judge(_MORE * gain["loss"] < gain["even_loss"]),
                    "the dense losses out of the domain do not fall all the way, so that losses are compared, not "
                    "computing",
                )
            )
            continue
        data[router] = {"inside": inside, "outside": outside}
        pairs = [(a, b) for a, b in zip(inside, outside, strict=True) if a is not None and b is not None]
        claims.append(
            Row(
                f"{NAMES[router]}: dense computing for the same loss, over its own, is larger in the domain of "
                f"training",
                "much larger",
                f"{times(inside)} in it, {times(outside)} out of it, by size",
                judge(all(a > _MORE * b for a, b in pairs)) if pairs else IMPOSSIBLE,
                "" if pairs else "no size has both",
            )
        )
    notes = [
        TASK,
        "In the domain are held-out draws by the law of training; out of it draws of all keys alike, which are "
        "mostly rare.",
    ]
    return Result("domains", claims, {"gains": data, "runs": short(rows), "experts": count}, seconds_of(rows), notes)


def _mean_gain(rows: list[dict[str, Any]], router: str, count: int, key: str) -> float:
    dense = {row["size"]: row[key] for row in rows if row["router"] == "dense"}
    ratios = [row[key] / dense[row["size"]] for row in rows if row["router"] == router and row["experts"] == count]
    return math.exp(math.fsum(map(math.log, ratios)) / len(ratios))
