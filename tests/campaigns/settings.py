"""Campaign P: wrong settings, each a configuration or one line."""

from shunter.errors import UserError
from shunter.recipes.config import load_config
from shunter.recipes.text import TextConfig
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
]


def settings(result, folder, cases, seed):
    """P: wrong settings, one to three at a time: a configuration, or one line."""
    keys = ["nothing", "training", "sparse.options.jitter", "sparse.options.nothing"]
    for name, section in TextConfig.model_fields.items():
        inner = getattr(section.annotation, "model_fields", None)
        keys += [f"{name}.{key}" for key in inner] if inner else [name]
    for case in cases:
        draw = drawn(seed, case)
        given = [f"{draw.choice(keys)}={draw.choice(VALUES)}" for _ in range(draw.randrange(1, 4))]
        try:
            load_config(TextConfig, None, given)
            result.count(case, "")
        except UserError as error:
            result.count(case, "several lines" if "\n" in str(error) else "", detected=True)
        except Exception as error:
            result.count(case, f"{given}: {error!r}")
