"""Data sets of the `datasets` library, by name or in a folder that its `save_to_disk` wrote, to their splits."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ..errors import UserError, escaped, one_line
from ..untrusted import inside, open_file, parse_json, read_file
from .files import LeftOut

__all__ = ["is_dataset", "load_splits", "say_other_splits", "training_split"]


def is_dataset(source: str, suffixes: Collection[str] = ()) -> bool:
    """Whether a source is a saved data set, or can be but the name of one.

    Args:
        source: as a user gives it.
        suffixes: of the files that are read instead, as ".csv".
    """
    path = Path(source)
    if path.is_dir():
        whole = (path / "dataset_dict.json").is_file()
        return whole or all((path / name).is_file() for name in ("dataset_info.json", "state.json"))
    return not (
        path.exists()
        or path.is_symlink()
        or path.is_absolute()
        or source.startswith(".")
        or path.suffix.lower() in suffixes
    )


def load_splits(source: str) -> dict[str, Any]:
    """The rows of each split, read from the disk as they are asked for; a saved data set without splits is "train".

    Raises:
        UserError: where it cannot be loaded, or the package is missing.
    """
    shown = escaped(source)
    try:
        import datasets
    except ImportError:
        raise UserError(f"{shown}: no such file or folder (for a datasets name: pip install datasets)") from None
    saved = Path(source).is_dir()
    try:
        if saved:
            _check_saved(Path(source))
        found: Any = datasets.load_from_disk(source) if saved else datasets.load_dataset(source)
    except Exception as error:
        what = "a data set that cannot be loaded" if saved else "no such folder, and not a dataset that can be loaded"
        raise UserError(f"{shown}: {what}: {one_line(error)}") from None
    return dict(found) if isinstance(found, dict) else {"train": found}


def _check_saved(folder: Path) -> None:
    """See that a saved data set is of plain files in its folder: the library opens whatever it names, a FIFO too.

    Raises:
        UserError: naming the file that is none.
        Exception: of any kind, where its descriptions are damaged.
    """
    whole = folder / "dataset_dict.json"
    splits = parse_json(read_file(inside(whole)))["splits"] if whole.exists() else ["."]
    for part in (folder / split for split in splits):
        state = part / "state.json"
        named = parse_json(read_file(inside(state, folder)))["_data_files"]
        for file in (part / "dataset_info.json", *(part / one["filename"] for one in named)):
            open_file(inside(file, folder)).close()


def training_split(source: str) -> Any:
    """The rows of the split "train", or of the only one; a warning names the others.

    Raises:
        UserError: as `load_splits`, and where none is called so.
    """
    parts = load_splits(source)
    name = next(iter(parts)) if len(parts) == 1 else "train"
    if name not in parts:
        raise UserError(f"{escaped(source)}: has no split 'train', only {', '.join(map(str, parts))}")
    say_other_splits(source, parts, (name,))
    return parts[name]


def say_other_splits(source: str, parts: Collection[str], read: Collection[str]) -> None:
    """Warn of the splits that are not read."""
    if others := [str(part) for part in parts if part not in read]:
        warnings.warn(
            f"{escaped(source)}: left out the split{'s' * (len(others) > 1)} {', '.join(others)}", LeftOut, stacklevel=3
        )
