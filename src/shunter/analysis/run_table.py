"""A CSV table of finished runs to what a scaling law is fitted to: parameters, experts and loss, by group."""

from __future__ import annotations

import csv
import gzip
import io
import math
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..untrusted import open_file
from .scaling_law import Runs

__all__ = ["COLUMNS", "ONE", "read_groups"]

COLUMNS = ("parameters", "experts", "loss")
ONE = "all runs"
"""The name of the group where the table has one."""

_MAX_BYTES = 100_000_000
_MANY = 20  # values: a column of more is a measurement, not a setting


def read_groups(
    path: Path,
    columns: Mapping[str, str],
    by: str | None = None,
    hold: Mapping[str, str] | None = None,
    run: str | None = None,
    step: str = "step",
) -> tuple[dict[str, Runs], list[str]]:
    """The runs of a table, by group.

    Args:
        path: CSV with a line of headings, plain or gzipped; tabs and semicolons separate too.
        columns: the heading of each of `COLUMNS`, where it is another.
        by: the heading of the column whose values are the groups, a router's name for example. Dense runs (of one
            expert) whose value no other run has belong to every group; None for one group.
        hold: values by heading; other rows are left out. Numbers are compared as numbers.
        run: the heading of the column that names runs of several rows each; the row of the greatest step counts.
        step: the heading of the steps of such runs.

    Returns:
        The runs by group, in the table's order; and notices: settings that differ among runs of one size, expert count
        and group, which the law does not know of; rows that are there twice; groups without dense runs.

    Raises:
        UserError: in one line, for a table that cannot be read, has no such column, no row that is kept, or a cell that
            is no such number.
    """
    names = {name: columns.get(name, name) for name in COLUMNS}
    rows = _rows(path)
    for heading in [*names.values(), *filter(None, [by, run, run and step]), *(hold or {})]:
        if heading not in rows[0]:
            hint = f"; say which it is, as in --columns {heading}=NAME" if heading in COLUMNS else ""
            raise UserError(
                f"{path}: has no column {heading!r}; it has {', '.join(map(repr, list(rows[0])[1:]))}{hint}"
            )
    for heading, value in (hold or {}).items():
        kept = [row for row in rows if _same(row[heading], value)]
        if not kept:
            found = ", ".join(sorted({row[heading] for row in rows})[:8])
            raise UserError(f"{path}: no row is left with {heading}={value}; there is {found}")
        rows = kept
    if run:
        latest: dict[str, dict[str, str]] = {}
        for row in rows:
            if not math.isfinite(at := _number(path, row, step)):
                raise UserError(f"{path}, line {row['']}: {step} is {at:g}; it must be a number")
            before = latest.get(row[run])
            if before is None or at >= _number(path, before, step):
                latest[row[run]] = row
        rows = list(latest.values())
    numbers = [[_number(path, row, heading) for heading in names.values()] for row in rows]
    for row, (parameters, experts, loss) in zip(rows, numbers, strict=True):
        for heading, number, allowed, wanted in (
            (names["parameters"], parameters, parameters > 0, "above 0"),
            (names["experts"], experts, experts >= 1, "at least 1"),
            (names["loss"], loss, loss > 0, "above 0"),
        ):
            if not (allowed and math.isfinite(number)):
                raise UserError(f"{path}, line {row['']}: {heading} is {number:g}; it must be a number {wanted}")
    members = _members(rows, [experts for _, experts, _ in numbers], by)
    table = np.array(numbers)
    groups = {name: Runs(*table[chosen].T) for name, chosen in members.items()}
    settled = {*names.values(), by, run, run and step, "", "seed"}
    notices = _loose(rows, members, numbers, [name for name in rows[0] if name not in settled])
    if again := len(rows) - len({tuple(row[name] for name in row if name) for row in rows}):
        notices.append(
            f"{again} of {len(rows)} rows repeat another cell by cell; runs that count twice make intervals too narrow"
        )
    if without := [name for name, some in groups.items() if (some.experts > 1).all()]:
        where = f" with {by}={without[0]}" if by else ""
        notices.append(
            f"no run{where} is dense (of 1 expert), so that what experts are worth is extrapolated: give dense runs too"
        )
    sizes = defaultdict(set)
    for parameters, experts, _ in numbers:
        sizes[parameters].add(experts)
    if all(len(counts) == 1 for counts in sizes.values()):
        notices.append(
            f"no two expert counts have {names['parameters']} in common: these must be the parameters of the dense "
            "model that a routed one was made of, not all of its own"
        )
    return groups, notices


def _rows(path: Path) -> list[dict[str, str]]:
    """The rows by heading, and each one's line of the file under "" (a heading that no column has)."""
    text = _text(path)
    try:
        delimiter = max(",;\t", key=text.partition("\n")[0].count)
        lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        heading = [name.strip() for name in next(lines, [])]
        if not any(heading):
            raise UserError(f"{path}: is empty; a table begins with a line of headings")
        if twice := {name for name in heading if heading.count(name) > 1 or not name}:
            raise UserError(
                f"{path}: its columns must have different names; {sorted(twice)[0]!r} is one of several, or none"
            )
        rows = []
        for cells in lines:
            if len(cells) != len(heading) and any(cells):
                raise UserError(
                    f"{path}, line {lines.line_num}: has {len(cells)} cells, the headings are {len(heading)}"
                )
            if any(cells):
                rows.append({"": str(lines.line_num)} | dict(zip(heading, map(str.strip, cells), strict=True)))
    except csv.Error as error:
        raise UserError(f"{path}: is not CSV: {error}") from None
    if not rows:
        raise UserError(f"{path}: has headings and no rows")
    return rows


def _text(path: Path) -> str:
    try:
        with open_file(path) as raw:
            zipped = raw.peek(2)[:2] == b"\x1f\x8b" if isinstance(raw, io.BufferedReader) else False
            with gzip.open(raw) if zipped else raw as stream:
                content = stream.read(_MAX_BYTES + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: its gzip stream is damaged: {error}") from None
    if len(content) > _MAX_BYTES:
        raise UserError(f"{path}: is larger than {_MAX_BYTES:,} bytes, which no table of runs needs")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not a text in UTF-8, so no CSV table") from None


def _number(path: Path, row: Mapping[str, str], heading: str) -> float:
    text = row[heading]
    try:
        return float(text)
    except ValueError:
        said = f"is {text[:40]!r}" if text else "is empty"
        raise UserError(
            f"{path}, line {row['']}: {heading} {said}; it must be a number. Fill it or leave the row out"
        ) from None


def _same(cell: str, value: str) -> bool:
    try:
        return float(cell) == float(value)
    except ValueError:
        return cell == value


def _members(rows: Sequence[Mapping[str, str]], experts: Sequence[float], by: str | None) -> dict[str, list[int]]:
    """The places of each group's rows."""
    if by is None:
        return {ONE: list(range(len(rows)))}
    routed = dict.fromkeys(row[by] for row, count in zip(rows, experts, strict=True) if count > 1)
    if not routed:
        routed = dict.fromkeys(row[by] for row in rows)
    return {
        name: [place for place, row in enumerate(rows) if row[by] == name or row[by] not in routed] for name in routed
    }


def _loose(
    rows: Sequence[Mapping[str, str]],
    members: Mapping[str, list[int]],
    numbers: Sequence[Sequence[float]],
    headings: Sequence[str],
) -> list[str]:
    """Settings that differ among runs which the law takes for alike, as a notice."""
    found = []
    for heading in headings:
        if len({row[heading] for row in rows}) > min(_MANY, len(rows) / 2):
            continue
        values = defaultdict(set)
        for name, places in members.items():
            for place in places:
                values[name, numbers[place][0], numbers[place][1]].add(rows[place][heading])
        if any(len(different) > 1 for different in values.values()):
            found.append(heading)
    if not found:
        return []
    return [
        f"runs of the same parameters and experts differ in {', '.join(found)}, which the law does not know of; "
        f"keep one value of each that matters, as in --hold {found[0]}={rows[0][found[0]]}"
    ]
