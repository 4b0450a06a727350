"""What a recipe has to show besides losses: curves, tables, maps and pictures, each with a title and what it says."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from ..durable import write

__all__ = ["EXHIBITS", "Curves", "Exhibit", "HeatMap", "Pictures", "Table", "read_exhibits", "save_exhibits"]

EXHIBITS = "exhibits.json"


@dataclass(frozen=True)
class Exhibit:
    """Something that a run's page shows in a section of its own.

    Args:
        title: the section's.
        says: what it shows, and what was found, in a few sentences.
    """

    kind: ClassVar[str]
    title: str
    says: str


@dataclass(frozen=True)
class Curves(Exhibit):
    """Lines over a common axis.

    Args:
        x, y: what the axes are called.
        lines: points (x, y) by the name of each line.
        levels: horizontal lines, by name.
        logarithmic: whether x is drawn in powers of two.
    """

    kind = "curves"
    x: str
    y: str
    lines: dict[str, list[tuple[float, float]]]
    levels: dict[str, float] = field(default_factory=dict)
    logarithmic: bool = False


@dataclass(frozen=True)
class Table(Exhibit):
    """Rows of texts and numbers; the first column names the row."""

    kind = "table"
    heads: list[str]
    rows: list[list[str | float]]


@dataclass(frozen=True)
class HeatMap(Exhibit):
    """A map of numbers from 0 on for each of several panels.

    Args:
        rows, columns: their labels.
        panels: by name, values (R, C).
        across: what the columns are.
        unit: what the numbers are.
    """

    kind = "heat map"
    rows: list[str]
    columns: list[str]
    panels: dict[str, list[list[float]]]
    across: str
    unit: str


@dataclass(frozen=True)
class Pictures(Exhibit):
    """Pictures with a caption each, by the group that they are shown in.

    Args:
        groups: by name, (caption, PNG in a data URI), the latter empty where there is nothing to see.
    """

    kind = "pictures"
    groups: dict[str, list[tuple[str, str]]]


_KINDS: dict[str, type[Exhibit]] = {cls.kind: cls for cls in (Curves, Table, HeatMap, Pictures)}
_PNG = re.compile(r"data:image/png;base64,[A-Za-z0-9+/]+=*")


def save_exhibits(run: Path, exhibits: list[Exhibit]) -> None:
    """Write exhibits.json of a run folder."""
    write(run / EXHIBITS, json.dumps([{"kind": one.kind, **asdict(one)} for one in exhibits]))


def read_exhibits(content: Any) -> list[Exhibit]:
    """What exhibits.json holds.

    Raises:
        KeyError, TypeError, ValueError: where it does not follow the schema.
    """
    found = []
    for row in content:
        one = _KINDS[row["kind"]](**{key: value for key, value in row.items() if key != "kind"})
        match one:
            case Curves():
                for points in one.lines.values():
                    for point in points:
                        _numbers(point, 2)
                _numbers(list(one.levels.values()), len(one.levels))
            case Table():
                if any(len(row) != len(one.heads) for row in one.rows):
                    raise ValueError(f"{one.title}: a row has not the {len(one.heads)} columns of the heads")
            case HeatMap():
                for values in one.panels.values():
                    if len(values) != len(one.rows):
                        raise ValueError(f"{one.title}: {len(values)} rows of values for {len(one.rows)} labels")
                    for line in values:
                        _numbers(line, len(one.columns))
            case Pictures():
                for shown in one.groups.values():
                    if any(picture and not _PNG.fullmatch(picture) for _, picture in shown):
                        raise ValueError(f"{one.title}: a picture is no PNG in a data URI")
        found.append(one)
    return found


def _numbers(values: Any, count: int) -> None:
    if len(values) != count or not all(isinstance(v, int | float) and math.isfinite(v) for v in values):
        raise ValueError(f"expected {count} numbers, found {values!r:.60}")
