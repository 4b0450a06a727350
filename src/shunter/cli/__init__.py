"""The command line: a file for each group of verbs, and the one place that turns an error or a warning into a line."""

from __future__ import annotations

import argparse
import shlex
import sys
import warnings
from collections.abc import Callable
from typing import Any

from ..errors import Diverged, Interrupted, NotWritten, escaped, one_line
from . import bench, convert, law, look, plan, train

__all__ = ["main"]


def main(argv: list[str] | None = None) -> int:
    """Run `shunter` with arguments; the exit code: 0 done, 1 failed, 2 bad input, 130 stopped with Ctrl-C."""
    args, rest = _parser().parse_known_args(argv)
    if rest and args.name not in ("train", "compare"):
        print(f"shunter: unknown argument {rest[0]!r}; see shunter {args.name} --help", file=sys.stderr)
        return 2
    args.overrides = rest
    verb: Callable[[argparse.Namespace], int] = args.verb
    before, warnings.formatwarning = warnings.formatwarning, _warning
    try:
        return verb(args)
    except Interrupted as where:
        print(
            f"\nStopped at the {where}. "
            f"Go on with: shunter {args.name} {args.recipe} --resume --run {shlex.quote(str(args.run))}",
            file=sys.stderr,
        )
        return 130
    except BrokenPipeError:
        return 1
    except (Diverged, NotWritten) as error:
        print(f"shunter {args.name}: {escaped(str(error))}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"shunter {args.name}: {escaped(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 130
    finally:
        warnings.formatwarning = before


def _warning(message: Warning | str, *_: Any, **__: Any) -> str:
    return f"shunter: {one_line(message)}\n"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="shunter", description="Sparse expert models: train, look, continue.")
    verbs = parser.add_subparsers(dest="name", required=True, metavar="verb")
    for group in (train, convert, look, law, bench, plan):
        group.add_verbs(verbs)
    return parser
