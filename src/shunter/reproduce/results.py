"""What a reproduction found: rows of the paper's value, ours and a verdict, kept as JSON with machine and versions."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..durable import write
from ..environment import described, machine, versions
from ..errors import UserError
from ..untrusted import parse_json, read_file

__all__ = ["DIRECTION", "IMPOSSIBLE", "NOT", "NOT_RUN", "REPRODUCED", "Result", "Row", "judge", "read", "summary"]

REPRODUCED = "reproduced"
DIRECTION = "same direction"
NOT = "not reproduced"
IMPOSSIBLE = "not possible at this size"
NOT_RUN = "not run"
VERDICTS = (REPRODUCED, DIRECTION, NOT, IMPOSSIBLE, NOT_RUN)


@dataclass(frozen=True)
class Row:
    """One claim: what it is of, what the paper says, what we found (empty where nothing was), the verdict, and why."""

    what: str
    paper: str
    ours: str
    verdict: str
    why: str = ""

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise ValueError(f"verdict {self.verdict!r} is none of {', '.join(VERDICTS)}")
        if self.verdict == NOT_RUN and self.ours:
            raise ValueError(f"{self.what}: what was not run has nothing of ours, not {self.ours!r}")


def judge(reproduced: bool, direction: bool = False) -> str:
    """The verdict of a claim that holds as the paper has it, or in direction alone, or not."""
    return REPRODUCED if reproduced else DIRECTION if direction else NOT


@dataclass(frozen=True)
class Result:
    """What NAME.json holds.

    Args:
        name: of the reproduction.
        rows: its claims.
        data: what its picture is drawn from, as JSON.
        seconds: that it took, in all.
        notes: what a reader should know, a sentence each.
        machine, versions: where and with what.
    """

    name: str
    rows: list[Row]
    data: dict[str, Any]
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=machine)
    versions: dict[str, str] = field(default_factory=lambda: versions("transformers", "numpy", "scipy"))

    def save(self, folder: Path) -> None:
        """Write NAME.json."""
        write(folder / f"{self.name}.json", json.dumps(asdict(self), indent=1, allow_nan=False) + "\n")


def read(folder: Path, name: str) -> Result | None:
    """The kept result of a reproduction; None where there is none.

    Raises:
        UserError: where the file is damaged.
    """
    path = folder / f"{name}.json"
    if not path.is_file():
        return None
    try:
        content = parse_json(read_file(path))
        if lacking := [one.name for one in fields(Result) if one.name not in content]:
            raise ValueError(f"it lacks {lacking[0]}")  # whose default is this machine's
        result = Result(**content | {"rows": [Row(**row) for row in content["rows"]]})
        described({"machine": result.machine, "versions": result.versions})
        texts = [result.name, *result.notes, *(text for row in result.rows for text in asdict(row).values())]
        if result.name != name or not all(isinstance(text, str) for text in texts) or not 0 <= result.seconds < 1e9:
            raise ValueError("a value is not of its kind")
        return result
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise UserError(f"{path}: is no result of shunter reproduce ({error}); remove it and run it again") from None


def summary(rows: Sequence[Row]) -> str:
    """How many claims have which verdict, in words."""
    counts = Counter(row.verdict for row in rows)
    return ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict])
