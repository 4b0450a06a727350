"""Section 3: the law through losses of small runs and through the released ones, and in and out of the domain."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from ..analysis.dense_equivalent import dense_equivalent
from ..analysis.run_table import read_groups
from ..analysis.scaling_law import COEFFICIENTS, Runs, account, fit
from ..errors import UserError
from ..recipes.run import configuration_of, load_model
from ..recipes.text import RECIPE, evaluate
from .results import IMPOSSIBLE, Result, Row, judge
from .sweep import DOMAIN_SWEEP, FACT_SWEEP, INSIDE, OUTSIDE, TEXT_SWEEP

__all__ = [
    "LAW_ROUTERS",
    "NAMES",
    "TASK",
    "TEXT",
    "Factor",
    "against_dense",
    "at_least",
    "compute_of",
    "domains",
    "domains_of",
    "law",
    "law_claims",
    "released_law",
    "seconds_of",
    "short",
    "text_domains",
    "text_domains_of",
    "text_law",
    "times",
    "told",
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
    """What the runs took, in all; nothing of those of which it is not known any more."""
    return math.fsum(row.get("seconds", 0.0) for row in rows)


def short(
    rows: Iterable[dict[str, Any]], more: tuple[str, ...] = ("recalled", "even_loss", "outside_loss")
) -> list[dict[str, Any]]:
    """Of each run which it is, its loss and cost, and what else is there of `more`."""
    keys = ("router", "size", "parameters", "experts", "loss", "flops_per_token", "longer", *more)
    return [{key: row[key] for key in keys if key in row} for row in rows]


def _facts(runs: Path) -> list[dict[str, Any]]:
    """The rows of two routers at every size and of more dense models, with their loss out of the domain of training."""
    rows = chain(FACT_SWEEP.run(runs, LAW_ROUTERS), FACT_SWEEP.run_more_dense(runs))
    return [row | {"even_loss": row["domains"]["even"]["loss"]} for row in rows]


def law(runs: Path) -> Result:
    """The unified law through our own runs of two routers, on facts."""
    note = (
        "A loss that falls to nothing, as that of facts which are all known, is no power law: the law has no floor. "
        "And the larger model gains more here, since what it lacks is room: no size is near its cut-off."
    )
    return _law("scaling-law", list(FACT_SWEEP.run(runs, LAW_ROUTERS)), [TASK, note])


def text_law(runs: Path) -> Result:
    """The same on text."""
    return _law("scaling-law-text", list(TEXT_SWEEP.run(runs, LAW_ROUTERS)), [TEXT])


def _law(name: str, rows: list[dict[str, Any]], notes: list[str]) -> Result:
    groups = {}
    for router in LAW_ROUTERS:
        mine = [row for row in rows if row["router"] in (router, "dense")]
        columns = ("parameters", "experts", "loss")
        groups[NAMES[router]] = account(
            Runs(*(np.array([row[key] for row in mine], dtype=np.float64) for key in columns))
        )
    notes = [*notes, "The coefficients are of this task and this size, and not to be compared with those of the paper."]
    data = {"groups": groups, "runs": short(rows)}
    return Result(name, law_claims(data), data, seconds_of(rows), notes)


def law_claims(data: dict[str, Any]) -> list[Row]:
    """What the laws of runs say, of the data of the result."""
    claims = []
    dense = {row["size"]: row["loss"] for row in data["runs"] if row["router"] == "dense"}
    for router in LAW_ROUTERS:
        found = data["groups"][NAMES[router]]
        residual, separable = found["law"]["residual"], found["separable_residual"]
        better = [row["loss"] < dense[row["size"]] for row in data["runs"] if row["router"] == router]
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
                f"{residual:.4f}, and {separable:.4f} without, over {len(found['runs'])} runs",
                judge(residual < 0.0061 and separable > 1.5 * residual, direction=separable > 1.5 * residual),
                f"at the edge of the search is {found['edge']}" if found["edge"] else "",
            ),
            _sign(NAMES[router], found),
        ]
    return claims


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


_HELD = {
    "those of the paper": {"k": "1", "routing_frequency": "0.5", "flop_increase": "1"},
    "of one seed": {"k": "1", "routing_frequency": "0.5", "flop_increase": "1", "seed": "42"},
    "any number of experts a token": {"routing_frequency": "0.5", "flop_increase": "1"},
    "any number of sparse layers": {"k": "1", "flop_increase": "1"},
    "all": {},
}
"""Which of the released runs are kept: values by heading."""


def released_law() -> Result:
    """The unified law through the released runs of its paper.

    Raises:
        UserError: where the file of these runs is not given, or another.
    """
    path = os.environ.get(CURVES)
    if not path:
        raise UserError(
            f"set {CURVES} to the file data/curves.csv.gz of github.com/deepmind/scaling_laws_for_routing (CC BY 4.0)"
        )
    columns = {"parameters": "dense_parameter_count", "experts": "num_experts", "loss": "loss_validation"}
    groups, _ = read_groups(Path(path), columns, "router_type", _HELD["those of the paper"], run="hyper_id")
    others = {
        which: read_groups(Path(path), columns, "router_type", hold, run="hyper_id")[0] for which, hold in _HELD.items()
    }
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
        low, high = found["intervals"]["log10_cutoff"]
        cutoffs = {which: fit(runs[router]).log10_cutoff for which, runs in others.items()}
        shown = ", ".join(
            f"{value:.2f} ({which}, {len(others[which][router])} runs)" for which, value in cutoffs.items()
        )
        claims.append(
            Row(
                f"{router}: log10_cutoff whichever runs are kept",
                "those with one expert a token in every second layer",
                shown,
                judge(all(low <= value and (high is None or value <= high) for value in cutoffs.values())),
            )
        )
        data[router] = {"cutoffs": cutoffs} | {
            key: found[key] for key in ("law", "log10_cutoff", "intervals", "separable_residual", "left_out")
        }
    notes = [
        "The runs are those that Clark et al. 2022 released (github.com/deepmind/scaling_laws_for_routing, CC BY "
        "4.0); the figures here are derived from them.",
        "The review's “900 B” is the cut-off of S-BASE alone, and its interval spans a factor of a hundred.",
    ]
    return Result("released-law", claims, {"groups": data}, notes=notes)


Factor = tuple[float, float]
"""How many times as much, from and to: twice the same where it is known."""


def compute_of(row: dict[str, Any]) -> float:
    """FLOPs of a token in a run, times how much longer it trained than the others."""
    return float(row["flops_per_token"] * row.get("longer", 1))


def against_dense(rows: list[dict[str, Any]], key: str, router: str, count: int) -> list[Factor]:
    """For each size the dense compute of the same loss, over that of the sparse model.

    Args:
        rows: dense and sparse runs, with `size`, `router`, `experts`, `flops_per_token`, and dense ones that trained
            some times as long with that as `longer`.
        key: of the loss, or of what else is the better the less there is of it.
        router, count: of the sparse ones.

    Returns:
        Factors in the order of sizes; bounds where dense runs have the loss not between them (`dense_equivalent`).
    """
    dense = [row for row in rows if row["router"] == "dense"]
    cost, loss = [compute_of(row) for row in dense], [row[key] for row in dense]
    mine = sorted(
        (row for row in rows if row["router"] == router and row["experts"] == count), key=lambda row: int(row["size"])
    )
    found = []
    for row in mine:
        low, high = dense_equivalent(cost, loss, row[key])
        found.append((low / row["flops_per_token"], high / row["flops_per_token"]))
    return found


def times(factors: Iterable[Factor]) -> str:
    """Factors for people."""
    said = []
    for low, high in factors:
        said.append(f"less than {high:.2f}" if not low else f"more than {low:.2f}" if high > low else f"{low:.2f}")
    return ", ".join(said)


def at_least(factors: list[Factor], least: float) -> bool:
    """Whether most factors are as large as that, and of none it is known that it is smaller."""
    return sum(low >= least for low, _ in factors) > len(factors) / 2 and all(high >= least for _, high in factors)


def told(factors: list[Factor], least: float) -> str:
    """Of how many factors it is known whether they are as large as that, in words; empty where it is of all."""
    known = sum(low >= least or high < least for low, high in factors)
    return f"whether it is {least:g} is told by {known} of {len(factors)} sizes" if known < len(factors) else ""


_MORE = 1.05  # times: what is no difference


def domains(runs: Path) -> Result:
    """What experts are worth in dense compute, on draws as in training and on draws that are not."""
    return domains_of(_facts(runs))


def domains_of(rows: list[dict[str, Any]]) -> Result:
    """The same of runs that are there."""
    notes = [
        TASK,
        "In the domain are held-out draws by the law of training; out of it draws of all keys alike, which are "
        "mostly rare.",
    ]
    return _domains("domains", rows, "even_loss", notes)


def text_domains(runs: Path) -> Result:
    """The same on text: what was held out of the two domains of training, and a third one."""
    rows = []
    data: dict[Path, Any] = {}
    for row in chain(DOMAIN_SWEEP.run(runs, LAW_ROUTERS, counts=(_FEW,)), DOMAIN_SWEEP.run_more_dense(runs)):
        run = DOMAIN_SWEEP.place(runs, row["size"], row.get("longer", 1))
        if run not in data:
            _, config = configuration_of(run)
            known = RECIPE.windows(config)
            other = config.model_copy(update={"data": config.data.model_copy(update={"domains": [OUTSIDE]})})
            data[run] = RECIPE.windows(other, known.tokenizer).eval
        name = row["router"] if row["router"] == "dense" else f"{row['router']}-{row['experts']}"
        rows.append(row | {"outside_loss": evaluate(load_model(run, name), data[run])["loss"]})
    return text_domains_of(rows)


def text_domains_of(rows: list[dict[str, Any]]) -> Result:
    """The same of runs that are there."""
    notes = [
        f"The runs read half a million tokens of {' and '.join(INSIDE)} (`shunter train text`), with two layers of "
        "width 16 to 64; an expert is as wide as the dense block and a token takes one. In the domain is what was held "
        f"out of these, out of it text of the domain “{OUTSIDE}”, of which training and tokenizer saw nothing.",
    ]
    return _domains("domains-text", rows, "outside_loss", notes)


_FEW = 16


def _domains(name: str, rows: list[dict[str, Any]], outside_key: str, notes: list[str]) -> Result:
    claims, gains = [], dict[str, Any]()
    places = (("loss", "in the domain"), (outside_key, "out of it"))
    for router in LAW_ROUTERS:
        inside, outside = (against_dense(rows, key, router, _FEW) for key, _ in places)
        pairs = list(zip(inside, outside, strict=True))
        larger = [of_in[0] > _MORE * of_out[1] for of_in, of_out in pairs]
        smaller = [of_in[1] <= _MORE * of_out[0] for of_in, of_out in pairs]
        known = sum(larger) + sum(smaller)
        why = [f"which is larger is told by {known} of {len(pairs)} sizes"] if known < len(pairs) else []
        why += [f"{where} no dense model is better than the smallest" for key, where in places if _rises(rows, key)]
        claims.append(
            Row(
                f"{NAMES[router]}: dense computing for the same loss, over its own, is larger in the domain of "
                f"training",
                "much larger",
                f"{times(inside)} in it, {times(outside)} out of it, by size",
                judge(sum(larger) == known > len(pairs) / 2, direction=2 * sum(larger) > known)
                if known
                else IMPOSSIBLE,
                "; ".join(why),
            )
        )
        gains[router] = {"inside": _ends(inside), "outside": _ends(outside)}
    read_off = (
        "Dense computing is read off between the dense runs of the sweep, linear in the logarithms, without those that "
        "a cheaper one equals; “more than” is beyond the largest of them, “less than” below the smallest."
    )
    longer = sorted({row["longer"] for row in rows if row.get("longer", 1) > 1})
    said = [f"Dense runs of {' and '.join(map(str, longer))} times the steps count so many times."] if longer else []
    data = {"gains": gains, "runs": short(rows), "experts": _FEW}
    return Result(name, claims, data, seconds_of(rows), [*notes, " ".join([read_off, *said])])


def _rises(rows: list[dict[str, Any]], key: str) -> bool:
    dense = sorted((compute_of(row), row[key]) for row in rows if row["router"] == "dense")
    return dense[0][1] == min(loss for _, loss in dense)


def _ends(factors: Iterable[Factor]) -> list[list[float | None]]:
    return [[low, high if math.isfinite(high) else None] for low, high in factors]
