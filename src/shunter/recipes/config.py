"""One typed configuration for a recipe, from a YAML or TOML file and dotted overrides; every mistake is one line."""

from __future__ import annotations

import tomllib
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from ..errors import UserError, one_line
from ..plain_yaml import MAX_BYTES, as_yaml, parse_yaml
from ..untrusted import read_file
from .sections import nearest

__all__ = ["dump_config", "load_config"]

C = TypeVar("C", bound=BaseModel)


def load_config(cls: type[C], file: Path | None, overrides: list[str]) -> C:
    """The configuration of a YAML or TOML file (by its ending), changed by overrides `section.key=value` in order.

    Args:
        cls: the configuration's class.
        file: None starts from the defaults.
        overrides: `key=value`, with or without leading dashes; values are read as YAML.

    Raises:
        UserError: for whatever is wrong, in one line.
    """
    tree = {} if file is None else _read(file)
    for text in overrides:
        key, equals, value = text.lstrip("-").partition("=")
        if not equals or not all(key.split(".")):
            raise UserError(one_line(f"override {text!r} must be key=value, as in training.steps=500"))
        if not value.strip():  # as of a variable of the shell that is not set
            raise UserError(one_line(f"{key}= has no value; write {key}=null for none"))
        try:
            parsed = parse_yaml(value)
        except ValueError as error:
            raise UserError(one_line(f"{key}={value}: not a YAML value ({error})")) from None
        node = tree
        *sections, last = key.split(".")
        for section in sections:
            below = node.setdefault(section, {})
            if not isinstance(below, dict):
                raise UserError(one_line(f"{key}={value}: {section} is a value, not a section"))
            node = below
        node[last] = parsed
    _check_integers(tree)
    try:
        return cls.model_validate(tree)
    except ValidationError as error:
        raise UserError(_explain(cls, error)) from None


def dump_config(config: BaseModel) -> str:
    """A configuration as YAML that `load_config` reads back equal: values, then the sections by name."""
    values = config.model_dump()
    sections = sorted(name for name, value in values.items() if isinstance(value, dict))
    ordered = {name: value for name, value in values.items() if name not in sections}
    ordered |= {name: values[name] for name in sections}
    return as_yaml(ordered, sort_keys=False)


def _read(file: Path) -> dict[str, Any]:
    try:
        text = read_file(file, MAX_BYTES).decode("utf-8")
        tree = tomllib.loads(text) if file.suffix == ".toml" else parse_yaml(text)
    except OSError as error:
        raise UserError(one_line(f"{file}: {error.strerror or error}")) from None
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        kind = "TOML" if file.suffix == ".toml" else "YAML"
        raise UserError(one_line(f"{file}: not readable as {kind}: {error}")) from None
    if tree is None:
        return {}
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        raise UserError(one_line(f"{file}: must hold sections and keys, not {type(tree).__name__}"))
    return tree


def _check_integers(value: Any, key: str = "") -> None:
    """Refuse what no setting needs, and Python itself may not write out."""
    if isinstance(value, int) and value.bit_length() > 63:
        raise UserError(f"{key} is a number of {value.bit_length():,} bits; whole numbers end at 2**63")
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, part in parts:
        _check_integers(name, f"a key in {key or 'the settings'}")
        _check_integers(part, one_line(f"{key}.{name}") if key else one_line(str(name)))


def _explain(cls: type[BaseModel], error: ValidationError) -> str:
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    key = ".".join(path)
    if first["type"] == "extra_forbidden":
        node: Any = cls
        for part in path[:-1]:
            node = node.model_fields[part].annotation
        return one_line(f"{key} is unknown; {nearest(path[-1], node.model_fields, '.'.join(path[:-1]))}")
    allowed = ""
    if first["type"] == "literal_error":
        allowed = f"; {nearest(str(first['input']), _literals(cls, path))}"
    message = first["msg"].removeprefix("Value error, ")
    given = "" if first["type"] == "value_error" and isinstance(first["input"], dict) else f"={first['input']!r}"
    return one_line(f"{key}{given}: {message}{allowed}" if key else message)


def _literals(cls: Any, path: list[str]) -> list[str]:
    for part in path:
        cls = get_args(cls)[0] if part.isdigit() else cls.model_fields[part].annotation
    kinds = [cls, *get_args(cls)] if get_origin(cls) in (Union, UnionType) else [cls]
    return [str(value) for kind in kinds if get_origin(kind) is Literal for value in get_args(kind)]
