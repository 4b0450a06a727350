"""Campaign P: wrong settings, each a configuration or one line."""

import functools

from shunter.errors import UserError
from shunter.recipes.config import load_config
from shunter.recipes.registry import find, names
from tests.campaigns.campaign import drawn

VALUES = [
    "1",
    "-1",
    "0",
    "1e400",
    ".nan",
    "true",
    "null",
    "[]",
    "{}",
    "'x'",
    "[1,2]",
    "{a: 1}",
    "1e-3",
    "-",
    "9" * 30,
    "ü",
    "!!x 1",
    "2026-01-01",
    "12:30:45",
    "!!binary aGk=",
    "!!set {a}",
    "{1: 2}",
    "[null]",
    "9" * 5000,
]


@functools.cache
def _keys(config):
    """The names of all settings of a recipe, and some that are none."""
    keys = ["nothing", "training", "sparse.options.jitter", "sparse.options.nothing", "sparse.options.capacity_factor"]
    for name, section in config.model_fields.items():
        inner = getattr(section.annotation, "model_fields", None)
        keys += [f"{name}.{key}" for key in inner] if inner else [name]
    return keys


def settings(result, folder, cases, seed):
    """P: wrong settings, one to three at a time: a configuration, or one line."""
    configs = [find(name).config for name in names()]
    for case in cases:
        draw = drawn(seed, case)
        config = draw.choice(configs)
        keys = _keys(config)
        given = [f"{draw.choice(keys)}={draw.choice(VALUES)}" for _ in range(draw.randrange(1, 4))]
        try:
            load_config(config, None, given)
            result.count(case, "")
        except UserError as error:
            result.count(case, "several lines" if "\n" in str(error) else "", detected=True)
        except Exception as error:
            result.count(case, f"{given}: {error!r}")
