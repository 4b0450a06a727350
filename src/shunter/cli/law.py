"""The verb of scaling laws: law fit."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..durable import make_folder, write, writing
from ..errors import UserError, escaped

__all__ = ["add_verbs"]

_ANY_SIZE = 20  # log10 of parameters


def add_verbs(verbs: Any) -> None:
    """Add the verbs to the parser of the command line."""
    law = verbs.add_parser("law", help="scaling laws of runs that are finished")
    laws = law.add_subparsers(dest="what", required=True, metavar="what")
    fit = laws.add_parser(
        "fit",
        help="the unified scaling law of routed models, fitted to a table of parameters, experts and loss",
        epilog="Leaves law.json and law.png. Parameters are those of the dense model; the dense runs have 1 expert.",
    )
    fit.add_argument("table", type=Path, metavar="RUNS.csv", help="a line of headings, a row a run; .gz too")
    fit.add_argument(
        "--columns",
        nargs="+",
        default=[],
        metavar="NAME=HEADING",
        help="where the table calls parameters, experts or loss otherwise: --columns loss=loss_validation",
    )
    fit.add_argument("--by", metavar="HEADING", help="fit a law to the runs of each value, a router's name perhaps")
    fit.add_argument(
        "--hold", nargs="+", default=[], metavar="HEADING=VALUE", help="keep these rows alone: --hold k=1 seed=42"
    )
    fit.add_argument("--run", metavar="HEADING", help="what names a run of several rows, whose last step counts")
    fit.add_argument("--step", default="step", metavar="HEADING", help="the steps of such runs (default: step)")
    fit.add_argument("--resamples", type=int, default=500, help="of the bootstrap; 0: no intervals (default: 500)")
    fit.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    fit.add_argument("--out", type=Path, default=Path("runs/law"), help="the folder (default: runs/law)")
    fit.add_argument("--json", action="store_true", help="law.json to standard output instead of the tables")
    fit.set_defaults(verb=_fit)


def _fit(args: argparse.Namespace) -> int:
    from ..analysis.pages.law_figures import law_figure
    from ..analysis.pages.style import PAPER, style
    from ..analysis.run_table import COLUMNS, read_groups
    from ..analysis.scaling_law import INSIDE, account
    from ..environment import machine, versions

    for name, value in (("--resamples", args.resamples), ("--seed", args.seed)):
        if value < 0:
            raise UserError(f"{name} {value} must not be negative")
    columns = _pairs("--columns", args.columns)
    if unknown := [name for name in columns if name not in COLUMNS]:
        raise UserError(f"--columns: {unknown[0]!r} is none of {', '.join(COLUMNS)}")
    hold = _pairs("--hold", args.hold)
    runs, notices = read_groups(args.table, columns, args.by, hold, args.run, args.step)
    groups = {}
    for name, some in runs.items():
        try:
            groups[name] = account(some, args.resamples, args.seed)
        except UserError as error:
            of = f", {args.by}={name}" if args.by else ""
            raise UserError(f"{args.table}{of}: {error}") from None
    found = {
        "table": args.table.name,
        "columns": {name: columns.get(name, name) for name in COLUMNS},
        "by": args.by,
        "hold": hold,
        "inside": INSIDE,
        "seed": args.seed,
        "groups": groups,
        "notices": notices,
        "machine": machine(),
        "versions": versions("numpy", "scipy"),
    }
    make_folder(args.out)
    write(args.out / "law.json", json.dumps(found, indent=1, allow_nan=False) + "\n")
    with style(PAPER), writing(args.out / "law.png") as part:
        law_figure(groups).savefig(part, format="png", metadata={"Software": None})
    for notice in notices:
        print(f"{args.table}: {escaped(notice)}", file=sys.stderr)
    if args.json:
        print(json.dumps(found, allow_nan=False))
    else:
        for name, group in groups.items():
            print(_table(name, group, INSIDE))
        print(f"All of it: {args.out / 'law.json'}\nPicture: {args.out / 'law.png'}")
    return 0


def _pairs(option: str, given: Sequence[str]) -> dict[str, str]:
    found = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name or not value:
            raise UserError(f"{option}: {text!r} must be a name, = and a value")
        if name in found:
            raise UserError(f"{option}: {name!r} is given twice")
        found[name] = value
    return found


def _table(name: str, group: dict[str, Any], inside: float) -> str:
    """The law of a group for a terminal."""
    law = group["law"]
    values = {key: law[key] for key in ("a", "b", "c", "d", "e_start", "e_max")}
    lines = [f"{escaped(name)}: {len(group['runs'])} runs, residual {law['residual']:.4f} in log10 of the loss"]
    for key, value in (values | {"log10_cutoff": group["log10_cutoff"]}).items():
        lines.append(f"  {key:13} {_shown(value):>10}{_interval(group['intervals'].get(key), inside)}")
    lines.append(f"  {_where_experts_help(group)}")
    if group["edge"]:
        lines.append(f"  At the edge of what is searched is {group['edge']}. The coefficients mean little.")
    sizes = sorted({row["parameters"] for row in group["effective_parameters"]})
    counts = sorted({row["experts"] for row in group["effective_parameters"]})
    cells = {(row["parameters"], row["experts"]): row["effective"] for row in group["effective_parameters"]}
    lines += ["", "  Effective parameters, by parameters (down) and experts (across):"]
    lines.append("  " + " " * 10 + "".join(f"{count:>10g}" for count in counts))
    lines += [f"  {size:>10.3g}" + "".join(_cell(cells[size, count]) for count in counts) for size in sizes]
    return "\n".join(lines) + "\n"


def _where_experts_help(group: dict[str, Any]) -> str:
    from ..analysis.scaling_law import UnifiedLaw

    law, cutoff = UnifiedLaw(**group["law"]), group["log10_cutoff"]
    sizes = [run["parameters"] for run in group["runs"]]
    if not law.helps(min(sizes)) and not law.helps(max(sizes)):
        return "Experts do not help at the sizes of these runs."
    if cutoff is not None and cutoff < _ANY_SIZE:
        return f"Experts help below {10.0**cutoff:.3g} parameters of the dense model."
    if law.helps(min(sizes)):
        return "Experts help at every size of these runs, and at larger ones."
    return f"Experts help above {10.0 ** (-law.b / law.c):.3g} parameters of the dense model."


def _cell(value: float | None) -> str:
    return f"{'no end':>10}" if value is None else f"{value:>10.3g}"


def _shown(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}" if abs(value) < 100 else f"{value:.4g}"


def _interval(ends: Sequence[float | None] | None, inside: float) -> str:
    if ends is None:
        return ""
    low, high = ("no end" if end is None else _shown(end) for end in ends)
    return f"   {inside:.0%} between {low} and {high}"
