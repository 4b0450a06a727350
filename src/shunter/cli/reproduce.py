"""The verb that computes the review: reproduce."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from ..errors import UserError
from .packages import not_installed

__all__ = ["add_verbs"]


def add_verbs(verbs: Any) -> None:
    """Add the verbs to the parser of the command line."""
    reproduce = verbs.add_parser(
        "reproduce",
        help="compute a figure, a table or the numbers of the review; without a name, the list",
        epilog="`all` runs everything that has no result yet, the cheapest first. Stopped, the same command goes on.",
    )
    reproduce.add_argument("what", nargs="*", metavar="NAME", help="as in figure-3; all; none: the list")
    reproduce.add_argument("--out", type=Path, default=Path("runs/reproduce"), help="results (default: runs/reproduce)")
    reproduce.add_argument(
        "--runs", type=Path, default=Path("runs/reproduce-runs"), help="what is trained (default: runs/reproduce-runs)"
    )
    reproduce.set_defaults(verb=_reproduce)


def _reproduce(args: argparse.Namespace) -> int:
    from ..reproduce.page import write_pages
    from ..reproduce.registry import ALL, find, reproduce
    from ..reproduce.results import read, summary

    if not args.what:
        for one in ALL:
            result = read(args.out, one.name)
            verdict = "not run" if result is None else summary(result.rows)
            minutes = f"{one.minutes:g} min"
            print(f"{one.name:16} {one.title:46} {one.source:34} {minutes:14} {verdict}")
        return 0
    if "all" in args.what:
        if args.what != ["all"]:
            raise UserError("all is everything; name nothing besides")
        chosen = sorted(ALL, key=lambda one: one.minutes)
        chosen = [one for one in chosen if read(args.out, one.name) is None]
    else:
        chosen = [find(name) for name in dict.fromkeys(args.what)]
    args.again = shlex.join(["reproduce", *args.what, "--out", str(args.out), "--runs", str(args.runs)])
    failed = 0
    for one in chosen:
        print(f"{one.title}, about {one.minutes:g} min", file=sys.stderr)
        try:
            result = reproduce(one, args.out, args.runs)
        except (UserError, ModuleNotFoundError) as error:
            why = not_installed(error.name or "") if isinstance(error, ModuleNotFoundError) else str(error)
            if args.what != ["all"] or not why:
                raise
            print(f"shunter reproduce: {one.name} was not run: {why}", file=sys.stderr)
            failed += 1
            continue
        write_pages(args.out, ALL)
        for row in result.rows:
            why = f" ({row.why})" if row.why else ""
            print(f"{row.what}: {row.paper or '–'} in the paper, {row.ours or '–'} here: {row.verdict}{why}")
    print(f"Page: {args.out / 'index.md'}")
    return 1 if failed else 0
