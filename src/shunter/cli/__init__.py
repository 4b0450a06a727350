"""The command line: a file for each group of verbs, and the one place that turns an error or a warning into a line."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from ..durable import NO_ROOM, why_not_written
from ..errors import Diverged, Elsewhere, Interrupted, LostRank, NotWritten, escaped, one_line, said
from . import bench, convert, domains, law, look, plan, reproduce, train
from .packages import not_installed

__all__ = ["main"]


def main(argv: list[str] | None = None) -> int:
    """Run `shunter` with arguments; the exit code: 0 done, 1 failed, 2 bad input, 130 stopped with Ctrl-C."""
    _have_streams()
    args, rest = _parser().parse_known_args(argv)
    if rest and args.name not in ("train", "compare", "branch"):
        print(f"shunter: unknown argument {rest[0]!r}; see shunter {args.name} --help", file=sys.stderr)
        return 2
    args.overrides = rest
    verb: Callable[[argparse.Namespace], int] = args.verb
    before, warnings.formatwarning = warnings.formatwarning, _warning
    try:
        code = verb(args)
        sys.stdout.flush()
        return code
    except Interrupted as where:
        again = getattr(args, "again", None) or f"{args.name} {args.recipe} --resume --run {shlex.quote(str(args.run))}"
        if _speaks():
            print(f"\nStopped at the {where}. Go on with: shunter {again}", file=sys.stderr)
        return 130
    except Elsewhere:
        return 2
    except BrokenPipeError:
        _silence()
        return 1
    except (Diverged, LostRank, NotWritten) as error:
        print(f"shunter {args.name}: {_said(error, args.name)}", file=sys.stderr)
        return error.status if isinstance(error, LostRank) and "RANK" in os.environ else 1
    except (ValueError, OSError) as error:
        print(f"shunter {args.name}: {_said(error, args.name)}", file=sys.stderr)
        if isinstance(error, OSError) and why_not_written(error, NO_ROOM):
            _silence()
            return 1
        return 2
    except KeyboardInterrupt:
        if _speaks():
            print("Stopped.", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        if not (needed := not_installed(error.name or "")):
            raise
        print(f"shunter {args.name}: {needed}", file=sys.stderr)
        return 2
    except Exception as error:  # libraries in other languages have no OSError
        if not (reason := why_not_written(error, NO_ROOM)):
            raise
        print(f"shunter {args.name}: a file cannot be written: {reason}", file=sys.stderr)
        return 1
    finally:
        warnings.formatwarning = before


def _have_streams() -> None:
    """Take the null device for each standard stream that is closed: the next file opened would be in its place."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            try:
                os.fstat(descriptor)
            except OSError:
                os.open(os.devnull, os.O_RDWR)  # the lowest that is free, which is this one
            setattr(sys, name, open(os.devnull, "w" if descriptor else "r"))


def _speaks() -> bool:
    """Whether this process says what all have come to: it is the first that torchrun started, or alone."""
    return os.environ.get("RANK", "0") == "0"


def _said(error: Exception, verb: str) -> str:
    """What an error says, without the name of the verb where it begins with that."""
    return escaped(said(error)).removeprefix(f"{verb}: ")


def _silence() -> None:
    """Drop what standard output did not take: Python would try again at its end, and fail with a traceback."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _warning(message: Warning | str, *_: Any, **__: Any) -> str:
    return f"shunter: {one_line(message)}\n"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="shunter", description="Sparse expert models: train, look, continue.")
    verbs = parser.add_subparsers(dest="name", required=True, metavar="verb")
    for group in (train, domains, convert, look, law, reproduce, bench, plan):
        group.add_verbs(verbs)
    return parser
