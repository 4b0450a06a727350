"""Descriptions of models and clusters: a name of the package's own, or a YAML file, to fields that are checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from ..errors import UserError, one_line
from ..untrusted import parse_json, read_file

__all__ = ["described", "names", "read"]

_HERE = Path(__file__).parent

Described = TypeVar("Described")


def names(kind: str) -> list[str]:
    """The descriptions in the package, of "models" or "clusters"."""
    return sorted(path.stem for path in (_HERE / kind).glob("*.yaml"))


def read(kind: str, name: str) -> tuple[Path, dict[str, Any]]:
    """The fields of a description, by its name in the package or as a YAML (or JSON) file; and the file.

    Raises:
        UserError: where there is none, or it is no YAML of names and values.
    """
    from ..plain_yaml import MAX_BYTES, parse_yaml

    path = _HERE / kind / f"{name.removesuffix('.yaml')}.yaml" if not Path(name).exists() else Path(name)
    if path.is_dir() and (path / "config.json").is_file():
        path = path / "config.json"
    if not path.is_file():
        raise UserError(f"{name}: no such file, and not one of the {kind} described here: {', '.join(names(kind))}")
    try:
        if path.suffix == ".json":
            found = parse_json(read_file(path))
        else:
            found = parse_yaml(read_file(path, MAX_BYTES).decode())
    except UserError:
        raise
    except ValueError as error:
        kind = "JSON" if path.suffix == ".json" else "YAML"
        raise UserError(f"{path}: cannot be read as {kind}: {one_line(error)}") from None
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise UserError(f"{path}: must hold names and their values")
    return path, found


def described(kind: type[Described], values: Mapping[str, Any], path: Path) -> Described:
    """A dataclass of a description's values; numbers above zero where the field is a number, ranges where it is three.

    Raises:
        UserError: for a name that is no field, one that is missing, and a value that is no such number.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for name in values:
        if name not in fields:
            raise UserError(f"{path}: {name!r} is unknown; the names are {', '.join(fields)}")
    made = {}
    for name, field in fields.items():
        if name not in values:
            if field.default is dataclasses.MISSING:
                raise UserError(f"{path}: lacks {name!r}")
            continue
        value, wanted = values[name], str(field.type)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if "Range" in wanted:
            three = [value] * 3 if number else value
            numbers = isinstance(three, list) and len(three) == 3
            if not numbers or not all(isinstance(v, int | float) and v >= 0 for v in three) or three != sorted(three):
                raise UserError(f"{path}: {name} must be a number, or [low, likely, high]; it is {value!r}")
            value = tuple(float(v) for v in three)
        elif "bool" in wanted and not isinstance(value, bool):
            raise UserError(f"{path}: {name} must be true or false; it is {value!r}")
        elif wanted in ("int", "float") and not (number and 0 <= value < 1e30):
            raise UserError(f"{path}: {name} must be a number of at least 0; it is {value!r}")
        elif wanted == "int":
            if value != int(value):
                raise UserError(f"{path}: {name} must be a whole number; it is {value!r}")
            value = int(value)
        elif wanted == "str" and not isinstance(value, str):
            raise UserError(f"{path}: {name} must be a text; it is {value!r}")
        made[name] = value
    return kind(**made)
