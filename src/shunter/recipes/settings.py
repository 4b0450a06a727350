"""The settings of recipes, from their configurations' classes to tables: dotted names, defaults, what is allowed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

__all__ = ["Setting", "markdown", "plain", "settings"]

_TITLE = """# Settings

Each setting of the recipes by its dotted name, as `shunter settings --format markdown` prints them; `shunter settings
text` lists those of one recipe. On the command line it is `training.steps=500`; values are YAML, so that `null` is none
and a list is `'sparse.router=[hash, topk]'`. In a file for `--config` what is before a dot is a section."""


class Setting(NamedTuple):
    """One setting: its dotted name, its default as YAML, what it may be, and what it is."""

    name: str
    default: str
    allowed: str
    about: str


def settings(config: BaseModel, prefix: str = "") -> Iterator[Setting]:
    """Those of a configuration that has its defaults, section by section."""
    kind = type(config)
    for name, field in kind.model_fields.items():
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            yield from settings(value, f"{prefix}{name}.")
        else:
            value = list(value) if isinstance(value, tuple) else value
            default = yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()
            allowed = ", ".join(_literals(field.annotation)) or _bounds(field.metadata)
            yield Setting(prefix + name, default, allowed, _about(kind, name))


def _about(kind: type[BaseModel], name: str) -> str:
    """What the nearest class says of a field; a recipe's own may give it another default alone."""
    fields = (cls.model_fields.get(name) for cls in kind.__mro__ if issubclass(cls, BaseModel))
    return next((field.description for field in fields if field and field.description), "")


def _bounds(metadata: list[Any]) -> str:
    """The range of a number in words."""
    found = {key: getattr(one, key) for one in metadata for key in ("ge", "gt", "le", "lt") if hasattr(one, key)}
    words = {"ge": "from {:,}", "gt": "above {:,}", "le": "to {:,}", "lt": "below {:,}"}
    return " ".join(text.format(found[key]) for key, text in words.items() if key in found)


def _literals(kind: Any) -> list[str]:
    """The words that a type leaves to choose from, alone, in a list, or beside none."""
    if get_origin(kind) is Literal:
        return [str(value) for value in get_args(kind)]
    if get_origin(kind) in (Union, UnionType, list):
        return [word for one in get_args(kind) for word in _literals(one)]
    return []


def plain(rows: list[Setting]) -> str:
    """A table for a terminal, columns aligned."""
    lines = [Setting("setting", "default", "allowed", "what it is"), *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines) + "\n"


def markdown(recipes: Mapping[str, list[Setting]]) -> str:
    """A page: what all recipes have with the same default, then the others of each."""
    shared = [row for row in next(iter(recipes.values())) if all(row in rows for rows in recipes.values())]
    parts = [_TITLE, f"## All recipes\n\n{_table(shared)}"]
    for name, rows in recipes.items():
        parts.append(f"## {name}\n\n{_table([row for row in rows if row not in shared])}")
    return "\n\n".join(parts) + "\n"


def _table(rows: list[Setting]) -> str:
    lines = [f"| `{row.name}` | `{row.default}` | {row.allowed} | {row.about.replace('|', '&#124;')} |" for row in rows]
    return "\n".join(["| setting | default | allowed | what it is |", "|---|---|---|---|", *lines])
