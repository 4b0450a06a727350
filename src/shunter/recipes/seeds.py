"""A comparison of routers repeated with several seeds: rows of means, and how far the seeds lie apart."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from ..analysis.runs import Words
from ..durable import make_folder, sealed, write
from ..environment import run_versions
from ..errors import UserError
from ..untrusted import parse_json, read_file
from .compare import compare, draw, table, with_router
from .config import dump_config
from .recipe import Recipe
from .sections import RunConfig

__all__ = ["compare_seeds", "merged", "parse_seeds", "seeds_of"]

_MOST = 1000


def parse_seeds(text: str, first: int) -> list[int]:
    """The seeds of `3`, so many from the configuration's on, or of a list as `0,7,9`.

    Raises:
        UserError: for what is neither, and for less than two.
    """
    try:
        given = [int(part) for part in text.split(",")]
        if "," not in text and given[0] > _MOST:
            raise ValueError
    except ValueError:
        raise UserError(f"--seeds {text}: give a number of seeds (at most {_MOST}), or a list as 0,7,9") from None
    seeds = list(range(first, first + given[0])) if "," not in text else given
    if len(seeds) < 2 or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise UserError(f"--seeds {text}: give at least two different seeds, from 0 on")
    return seeds


def seeds_of(run: Path) -> list[int] | None:
    """The seeds of a comparison that was begun in a folder; None where it has one alone.

    Raises:
        UserError: where seeds.json is damaged.
    """
    path = run / "seeds.json"
    if not path.exists():
        return None
    try:
        seeds = parse_json(read_file(path))
        return parse_seeds(",".join(str(int(seed)) for seed in seeds), 0)
    except (ValueError, TypeError, OverflowError):
        raise UserError(f"{path} must hold a list of seeds") from None


def compare_seeds(
    recipe: Recipe[Any, Any],
    config: RunConfig,
    specs: list[str],
    run: Path,
    seeds: list[int],
    *,
    resume: bool = False,
    as_json: bool = False,
) -> dict[str, Any]:
    """`compare` once with each seed, which gives the initial weights and the order of the data, and their means.

    Args:
        recipe, config, specs, resume, as_json: of `compare`.
        run: the folder; a folder `seed-N` for each comparison, and compare.json, compare.md and compare.png of all.
        seeds: at least two.

    Returns:
        What compare.json holds: "models", a row of means for each, with the standard deviations over the seeds in
        "spread"; tokens, seeds, versions.

    Raises:
        UserError: see `compare`; where the folder holds a comparison already.
        Interrupted: after Ctrl-C, when the checkpoint is written.
    """
    for spec in specs:
        with_router(recipe, config, spec)
    if not resume:
        if (run / "seeds.json").exists() or (run / "metrics.jsonl").exists():
            raise UserError(f"{run} holds a run already; go on with --resume --run {run}, or choose another folder")
        make_folder(run)
        write(run / "config.yaml", dump_config(config))
        write(run / "routers.json", json.dumps(specs))
        recipe.words_of(config).save(run)
        write(run / "seeds.json", json.dumps(seeds))
    results = []
    for seed in seeds:
        own, folder = config.model_copy(update={"seed": seed}), run / f"seed-{seed}"
        results.append(compare(recipe, own, specs, folder, resume=resume and sealed(folder), as_json=as_json))
        write_merged(run, results, seeds[: len(results)], recipe.words_of(config))
    return merged(results, seeds)


def write_merged(run: Path, results: list[dict[str, Any]], seeds: list[int], words: Words) -> None:
    """Write compare.json, compare.md and compare.png of the comparisons so far."""
    result = merged(results, seeds)
    write(run / "compare.json", json.dumps(result, indent=2))
    write(run / "compare.md", table(result, words))
    draw(result, words, run / "compare.png")


def merged(results: list[dict[str, Any]], seeds: list[int]) -> dict[str, Any]:
    """One comparison of several of the same routers: means, and in "spread" their standard deviations over seeds.

    That of the gain is over the differences to the dense model of the same seed.
    """
    rows = []
    dense = [result["models"][0]["eval_loss"] for result in results]
    for parts in zip(*(result["models"] for result in results), strict=True):
        row = _mean(parts)
        gains = [loss - part["eval_loss"] for loss, part in zip(dense, parts, strict=True)]
        numbers = {key: [part[key] for part in parts] for key, value in row.items() if isinstance(value, float)}
        row["spread"] = {key: _deviation(values) for key, values in numbers.items()} | {"gain": _deviation(gains)}
        rows.append(row)
    return {"models": rows, "tokens": results[0]["tokens"], "seeds": seeds, "versions": run_versions()}


def _mean(parts: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    """The means of numbers by key, within dictionaries too; of anything else the first."""
    row: dict[str, Any] = {}
    for key, value in parts[0].items():
        values = [part[key] for part in parts]
        if isinstance(value, dict):
            row[key] = _mean(tuple(values))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            row[key] = value if all(each == value for each in values) else statistics.fmean(values)
        else:
            row[key] = value
    return row


def _deviation(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0
