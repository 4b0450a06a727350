"""The verb that computes the review: reproduce."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..durable import make_folder
from ..errors import Diverged, UserError, escaped
from .packages import not_installed

if TYPE_CHECKING:
    from ..reproduce.results import Result

__all__ = ["add_verbs"]


def add_verbs(verbs: Any) -> None:
    """Add the verbs to the parser of the command line."""
    reproduce = verbs.add_parser(
        "reproduce",
        help="compute a figure, a table or the numbers of the review; without a name, the list",
        epilog="`all` runs everything that has no result yet, or a damaged one, the cheapest first. Stopped, the same "
        "command goes on.",
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
    from ..reproduce.results import summary

    if not args.what:
        kept, damaged = _kept(args.out)
        name, title, source = (max(len(getattr(one, of)) for one in ALL) for of in ("name", "title", "source"))
        for one in ALL:
            result = kept[one.name]
            verdict = summary(result.rows) if result else "damaged" if one.name in damaged else "not run"
            minutes = f"{one.minutes:g} min"
            print(f"{one.name:{name}}  {one.title:{title}}  {one.source:{source}}  {minutes:>7}  {verdict}")
        return 1 if damaged else 0
    if "all" in args.what:
        if args.what != ["all"]:
            raise UserError("all is everything; name nothing besides")
        kept, _ = _kept(args.out)
        chosen = [one for one in sorted(ALL, key=lambda one: one.minutes) if kept[one.name] is None]
    else:
        chosen = [find(name) for name in dict.fromkeys(args.what)]
    args.again = shlex.join(["reproduce", *args.what, "--out", str(args.out), "--runs", str(args.runs)])
    failed = 0
    for one in chosen:
        print(f"{one.title}, about {one.minutes:g} min", file=sys.stderr)
        try:
            result = reproduce(one, args.out, args.runs)
        except (UserError, Diverged, ModuleNotFoundError) as error:
            why = not_installed(error.name or "") if isinstance(error, ModuleNotFoundError) else str(error)
            if isinstance(error, UserError) and str(args.runs) in why:
                error = UserError(f"{why}. To train it anew, remove it or give another folder as --runs")
                why = str(error)
            if args.what != ["all"] or not why:
                raise error
            print(f"shunter reproduce: {one.name} was not run: {escaped(why)}", file=sys.stderr)
            failed += 1
            continue
        write_pages(args.out, ALL)
        for row in result.rows:
            why = f" ({row.why})" if row.why else ""
            print(f"{row.what}: {row.paper or '–'} in the paper, {row.ours or '–'} here: {row.verdict}{why}")
    if not chosen:
        print("Everything has a result.", file=sys.stderr)
    make_folder(args.out)
    write_pages(args.out, ALL)
    print(f"Page: {args.out / 'index.md'}")
    return 1 if failed else 0


def _kept(out: Path) -> tuple[dict[str, Result | None], set[str]]:
    """The kept results by name, None for what has none, and which are damaged; these are said."""
    from ..reproduce.registry import ALL
    from ..reproduce.results import read

    kept: dict[str, Result | None] = {}
    damaged = set()
    for one in ALL:
        try:
            kept[one.name] = read(out, one.name)
        except UserError as error:
            print(f"shunter reproduce: {escaped(str(error))}", file=sys.stderr)
            kept[one.name] = None
            damaged.add(one.name)
    return kept, damaged
