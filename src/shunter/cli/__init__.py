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
from ..environment import VERSION
from ..errors import Diverged, Elsewhere, Interrupted, LostRank, NotWritten, escaped, one_line, said
from . import bench, convert, domains, law, look, plan, reproduce, train
from .packages import not_installed

__all__ = ["main"]

_LONGEST = 4000  # characters of a line; lists of what is known are long


def main(argv: list[str] | None = None) -> int:
    """Run `shunter` with arguments; the exit code: 0 done, 1 failed, 2 bad input, 130 stopped with Ctrl-C."""
    _have_streams()
    parser = _parser()
    if not (sys.argv[1:] if argv is None else argv):
        parser.print_help(sys.stderr)
        return 2
    args, rest = parser.parse_known_args(argv)
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
            print("\n" + escaped(f"Stopped at the {where}. Go on with: shunter {again}"), file=sys.stderr)
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
        if _lacks_memory(error):
            why = f": {one_line(error)}" if str(error) else ""
            print(
                f"shunter {args.name}: memory does not suffice; give fewer data or a smaller model{why}",
                file=sys.stderr,
            )
            return 1
        if not (reason := why_not_written(error, NO_ROOM)):
            raise
        print(f"shunter {args.name}: a file cannot be written: {reason}", file=sys.stderr)
        return 1
    finally:
        warnings.formatwarning = before


def _lacks_memory(error: Exception) -> bool:
    """Whether an error says so: Python's or numpy's, torch's of a GPU, or torch's of the CPU, which has no own kind."""
    gpu, cpu = type(error).__name__ == "OutOfMemoryError", "can't allocate memory" in str(error)
    return isinstance(error, MemoryError) or gpu or cpu


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
    """What an error says, without the name of the verb where it begins with that, and not at any length."""
    text = escaped(said(error)).removeprefix(f"{verb}: ")
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def _silence() -> None:
    """Drop what standard output did not take: Python would try again at its end, and fail with a traceback."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _warning(message: Warning | str, *_: Any, **__: Any) -> str:
    return f"shunter: {one_line(message)}\n"


class _Help(argparse.HelpFormatter):
    """Help that says the default of each option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default, text = action.default, action.help
        silent = default is None or default is False or default in ([], "", argparse.SUPPRESS)
        if text is None or silent or "default" in text or not action.option_strings:
            return text
        shown = " ".join(map(str, default)) if isinstance(default, list) else str(default)
        return f"{text} (default: {shown.replace('%', '%%')})"


class _Parser(argparse.ArgumentParser):
    """The parser of the program and of each verb."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=_Help, **options)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="shunter",
        description="Sparse expert models: train, compare and inspect them, convert and shrink them, plan and measure.",
        epilog="Begin with: shunter train text. What a verb takes: shunter VERB --help",
    )
    parser.add_argument("--version", action="version", version=f"shunter {VERSION}")
    verbs = parser.add_subparsers(dest="name", required=True, metavar="verb")
    for group in (train, domains, convert, look, law, reproduce, bench, plan):
        group.add_verbs(verbs)
    return parser
