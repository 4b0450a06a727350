"""The checkpoints of one model's training: folders that a Trainer wrote aside in, the newest whole one out."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from ..durable import MANIFEST, discard, make_folder, publish, sealed, verify, write
from ..errors import Diverged, UserError, escaped
from .sharded import SHARDED

__all__ = ["MEMORY", "Checkpoints"]

KEPT = 2
MEMORY = "watch.json"
"""What the loop itself goes on with: times, what the metrics add up, the lines that they have."""
_PARTS = (MEMORY, "scheduler.pt", "trainer_state.json")
"""What no checkpoint may lack besides the weights: a Trainer starts them anew in silence."""
_OF_ONE = ("optimizer.pt", "rng_state.pth")
_OF_MANY = (f"{SHARDED}/{MANIFEST}", "rng_state_0.pth", "rng_state_1.pth")
"""Further parts, of the checkpoints of one process and of several."""


class Checkpoints:
    """The checkpoints of one model: the newest `KEPT`, each whole or absent.

    Args:
        folder: holds them as checkpoint-STEP.
        identity: what the manifest of each says of the run that it is of.

    Attributes:
        partial: the folder for a Trainer to write in.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder, self.identity = folder, identity
        self.partial = folder / "partial"
        self._proven: list[Path] = []

    def go_back(self, error: Diverged) -> bool:
        """Leave the checkpoints since a training failed, where there are earlier ones.

        Returns:
            Whether it may go on from there: once, resumptions included.
        """
        if any(_step(path) < error.since for path in self._proven):
            for path in self._proven:
                if _step(path) >= error.since:
                    discard(path)
        mark = self.folder / "went-back.json"
        first = not mark.exists()
        make_folder(self.folder)
        write(mark, json.dumps({"why": str(error)}))
        return first

    def newest(self) -> Path | None:
        """The newest whole one of this run, every byte of it compared; says which newer ones are not, and why.

        Raises:
            UserError: where they are of another run.
        """
        shutil.rmtree(self.partial, ignore_errors=True)
        self._proven = []
        for path in sorted(self._found(), key=_step, reverse=True):
            if not sealed(path):
                self._pass_over(path, "it is none, or was not removed to its end")
                discard(path)
                continue
            try:
                facts = verify(path)
                if any(facts.get(key) != value for key, value in self.identity.items()):
                    raise UserError(f"{path}: is of another run")
                _must_hold(path, {file.relative_to(path).as_posix() for file in path.rglob("*")})
            except UserError as error:
                self._pass_over(path, str(error))
            else:
                self._proven = [path]
                return path
        return None

    def add(self, part: Path) -> None:
        """Put a checkpoint that was written aside in its place; then all but the newest proven ones go.

        Raises:
            NotWritten: where the disk does not take it; the older ones are still there.
        """
        _must_hold(part, {file.relative_to(part).as_posix() for file in part.rglob("*")})
        path = self.folder / part.name
        publish(part, path, **self.identity)
        self._proven = [*self._proven, path][-KEPT:]
        for other in self._found():
            if other not in self._proven:
                discard(other)

    @staticmethod
    def _pass_over(path: Path, why: str) -> None:
        print(escaped(f"{path} is passed over: {why}"), file=sys.stderr)

    def _found(self) -> list[Path]:
        """What is called a checkpoint, whole or not."""
        return [path for path in self.folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]


def _step(path: Path) -> int:
    return int(path.name.split("-")[-1])


def _must_hold(folder: Path, names: Any) -> None:
    own = _OF_MANY if any(name.startswith(f"{SHARDED}/") for name in names) else _OF_ONE
    if lacking := [name for name in (*_PARTS, *own) if name not in names]:
        raise UserError(f"{folder}: lacks {', '.join(lacking)}")
