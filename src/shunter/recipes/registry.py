"""The recipes by name: found when they are needed, since each imports what it trains with."""

from __future__ import annotations

import difflib
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..errors import UserError

if TYPE_CHECKING:
    from .recipe import Recipe

__all__ = ["find", "names", "register"]

_RECIPES: dict[str, str | Recipe[Any, Any]] = {
    "text": "shunter.recipes.text:RECIPE",
    "images": "shunter.recipes.images:RECIPE",
    "speech": "shunter.recipes.speech:RECIPE",
    "multimodal": "shunter.recipes.multimodal:RECIPE",
    "facts": "shunter.recipes.facts:RECIPE",
    "translation": "shunter.recipes.translation:RECIPE",
    "tasks": "shunter.recipes.tasks:RECIPE",
}


def names() -> list[str]:
    """The names that `find` knows."""
    return list(_RECIPES)


def register(recipe: Recipe[Any, Any]) -> None:
    """Make a recipe of your own available under its name.

    Raises:
        ValueError: where the name is taken.
    """
    if _RECIPES.get(recipe.name, recipe) is not recipe:
        raise ValueError(f"register: the recipe {recipe.name!r} is there already; choose another name")
    _RECIPES[recipe.name] = recipe


def find(name: str) -> Recipe[Any, Any]:
    """The recipe of a name.

    Raises:
        UserError: for an unknown name.
    """
    found = _RECIPES.get(name) if isinstance(name, str) else None  # a run folder may say anything
    if found is None:
        near = difflib.get_close_matches(str(name), _RECIPES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(_RECIPES)}"
        raise UserError(f"recipe {name!r} is unknown; {hint}")
    if isinstance(found, str):
        module, _, attribute = found.partition(":")
        found = _RECIPES[name] = getattr(import_module(module), attribute)
    return found
