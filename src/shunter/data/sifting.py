"""Records of a data set to those that can be read, and one sentence that counts and names the others."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

from tqdm import tqdm

from ..errors import UserError, escaped, one_line
from .files import LeftOut

__all__ = ["at_most", "left_out", "say_beyond", "sift"]

_NAMED = 5  # of the records that are left out
_SHOW_PROGRESS = 2000  # records, whose decoding takes seconds


def at_most(groups: list[list[int]], most: int, setting: str) -> list[int]:
    """The records of all groups; where they are too many, the same part of each, one at least, and a warning.

    Args:
        groups: their numbers.
        most: how many in all.
        setting: what that is called.
    """
    total = sum(map(len, groups))
    part = min(1.0, most / max(total, 1))
    found = [i for group in groups for i in group[: max(1, int(part * len(group)))]]
    say_beyond(total - len(found), total, most, setting)
    return found


def say_beyond(beyond: int, total: int, most: int, setting: str) -> None:
    """Warn of so many records of all that are left out because a setting takes no more."""
    if beyond:
        warnings.warn(f"Left out {beyond:,} of {total:,} records, more than {setting}={most:,}", LeftOut, stacklevel=3)


def sift(records: Sequence[int], read: Callable[[int], None], where: Callable[[int], str], what: str) -> dict[int, str]:
    """Read each record once; the ones that cannot be read, each with the reason.

    Args:
        records: their numbers.
        read: raises for a record that cannot be read.
        where: what names one for people.
        what: what they are, as in "images".

    Raises:
        UserError: where more than half cannot be read.
    """
    bad: dict[int, str] = {}
    for i in tqdm(records, desc=what, leave=False, disable=None if len(records) > _SHOW_PROGRESS else True):
        try:
            read(i)
        except ModuleNotFoundError:
            raise
        except Exception as error:  # a damaged file fails in as many ways as there are readers
            bad[i] = escaped(str(error)) if isinstance(error, UserError) else f"{where(i)}: {one_line(error)}"
    if 2 * len(bad) > len(records):
        raise UserError(
            f"{len(bad):,} of {len(records):,} {what} cannot be read, the first: {next(iter(bad.values()))}"
        )
    return bad


def left_out(bad: dict[int, str], total: int, what: str) -> str:
    """A sentence on what was left out; empty where nothing was."""
    if not bad:
        return ""
    named = "; ".join(list(bad.values())[:_NAMED])
    more = f"; and {len(bad) - _NAMED:,} more" if len(bad) > _NAMED else ""
    return f"Left out {len(bad):,} of {total:,} {what}: {named}{more}."
