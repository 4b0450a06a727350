"""Routers compared: the main job's sparse model with one router after another, on the same tokens in the same order."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from .. import routers
from ..analysis.pages.compare_figures import comparison
from ..analysis.pages.style import PAPER, style
from ..analysis.runs import Metrics, Words
from ..durable import write, writing
from ..environment import run_versions
from ..errors import UserError, one_line
from ..hf.checkpoints.reading import read_json
from ..plain_yaml import parse_yaml
from ..untrusted import parse_json, read_file
from .recipe import Recipe
from .run import account, begin, check_router, configuration_of, train_one
from .sections import ANY_LABELS, LayerConfig, RunConfig, SparseConfig

__all__ = ["compare", "compared", "draw", "folder_of", "parse_routers", "resumed", "table", "with_router"]

LAST = 0.1
"""The balance of a router is that of this last part of its training."""

EQUAL = 0.03
"""Costs that differ by less, relatively, count as equal: widths are whole numbers."""


_COMMA = re.compile(r",(?![^\[]*\])")  # outside of a list


def parse_routers(text: str) -> list[str]:
    """The routers of `switch,topk:top_k=1,hme:branching=[2,4]`, each a name with options after colons.

    Raises:
        UserError: where there is none, or one comes twice.
    """
    specs = [part.strip() for part in _COMMA.split(text) if part.strip()]
    if not specs:
        raise UserError(f"--routers: name at least one of {', '.join(routers.names())}")
    folders = [folder_of(spec) for spec in specs]
    for spec, folder in zip(specs, folders, strict=True):
        if folder == "dense":
            raise UserError("--routers: the dense model is there anyway; leave 'dense' out")
        if folders.count(folder) > 1:
            raise UserError(f"--routers: {spec!r} is there more than once; each router has one row")
    return specs


def folder_of(spec: str) -> str:
    """The folder, and the name in the metrics, of a router with options."""
    return re.sub(r"[^A-Za-z0-9._=-]+", "-", spec)


def with_router(recipe: Recipe[Any, Any], config: RunConfig, spec: str) -> Any:
    """The configuration with a router `name:option=value:…` in place of its own, or several with a + between.

    Options are of the router, or, where the recipe has several kinds of layers, of the layer (`LayerConfig`). Of
    several routers, which the sparse blocks take in turn, each has its own.

    Options that the configuration sets for its own router are left out, but for those that every router of the
    comparison shares: experts, width, backend. A router that leaks in training alone is let through, because its
    evaluation is causal.

    Raises:
        UserError: for an unknown router or option, for one that needs what the recipe's data do not have, and for one
            whose evaluation leaks where the configuration does not insist (sparse.allow_leak).
    """
    turns = [_named(part, spec) for part in spec.split("+")]
    for name, _ in turns:
        if name in routers.names():
            check_router(recipe, config, name)
    name, options = turns[0]
    sparse = config.sparse.model_dump() | {"router": name, "options": options, "top_k": None}
    if turns[1:]:
        sparse |= {"router": [dict([turn]) for turn in turns], "options": {}}
    else:
        sparse["top_k"] = options.pop("top_k", None)
        if "layer" in sparse:
            sparse["layer"] |= {key: options.pop(key) for key in LayerConfig.model_fields if key in options}
    try:
        insisting = type(config).model_validate(config.model_dump() | {"sparse": sparse | {"allow_leak": True}})
    except ValueError as error:
        first, where = str(error), []
        if isinstance(error, ValidationError):
            first = error.errors()[0]["msg"]
            where = [".".join(part for part in error.errors()[0]["loc"][1:] if isinstance(part, str))]
        said = ": ".join([*filter(None, where), " ".join(first.removeprefix("Value error, ").split())])
        raise UserError(f"router {spec!r}: {said}") from None
    leak = insisting.sparse.leak(evaluation=True) if config.causal else None
    if leak and not config.sparse.allow_leak:
        cure = ", evaluate it by :eval_capacity_factor=dropless" if _leaks_by_capacity(insisting.sparse) else ""
        raise UserError(
            f"router {spec!r}: {leak}, in evaluation too, so its loss would be no causal model's; leave it out{cure}, "
            "or set sparse.allow_leak=true"
        )
    return insisting


def _named(part: str, spec: str) -> tuple[str, dict[str, Any]]:
    """The router's name and the options of `name:option=value:…`."""
    name, *settings = part.split(":")
    options: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not value.strip():
            raise UserError(f"router {spec!r}: {setting!r} must be option=value, as in topk:top_k=1")
        try:
            options[key] = parse_yaml(value)
        except ValueError as error:
            raise UserError(f"router {spec!r}: {setting} is not a YAML value ({one_line(error)})") from None
    return name, options


def _leaks_by_capacity(sparse: SparseConfig) -> bool:
    """Whether the router's evaluation is causal once it drops nothing."""
    try:
        for one in sparse.in_turn():
            options = one.router_options(ANY_LABELS) | {"eval_capacity_factor": "dropless"}
            if routers.create(one.router, 8, one.num_experts, **options).eval().leak is not None:
                return False
    except ValueError:  # experts that choose have to have a capacity
        return False
    return True


def compare(
    recipe: Recipe[Any, Any],
    config: RunConfig,
    specs: list[str],
    run: Path,
    *,
    resume: bool = False,
    as_json: bool = False,
) -> dict[str, Any]:
    """Train the dense model, then its sparse twin once with each router, and leave one table and one picture.

    All have the same seed, the same tokens in the same order, the same initial weights outside the feed-forward blocks
    and, as far as can be known before, the same FLOPs per token: an expert is as wide as the number of experts allows
    that the router will take for a token. What a token took indeed is counted, in training and in evaluation, and the
    table says where a model's cost was not the dense one's.

    Args:
        recipe: what the data, the models and the metric are.
        config: the main job's; its own router is not used.
        specs: of `parse_routers`.
        run: the folder; compare.json, compare.md, compare.png and a folder for each model.
        resume: go on with a comparison that was stopped; finished models are not trained again.
        as_json: metrics go to standard output, a JSON object a line, in place of progress lines.

    Returns:
        What compare.json holds: "models", a row for each; tokens, seed, versions.

    Raises:
        UserError: see `with_router`; before anything is trained.
        Interrupted: after Ctrl-C, when the checkpoint is written.
    """
    configs = {"dense": config} | {spec: with_router(recipe, config, spec) for spec in specs}
    by_folder = {folder_of(spec): own for spec, own in configs.items()}
    decided = {"routers.json": json.dumps(specs)}
    with begin(recipe, config, run, by_folder, resume=resume, as_json=as_json, decided=decided) as begun:
        rows = []
        for spec, own in configs.items():
            name = folder_of(spec)
            row = {"router": spec} | account(begun, name, train_one(begun, name)).as_json()
            rows.append(row if spec == "dense" else row | _routing(begun.metrics, name) | {"leak": _leak(own)})
            result = {
                "models": rows,
                "tokens": config.training.steps * recipe.tokens_per_step(config),
                "seed": config.seed,
                "versions": run_versions(),
            }
            write(run / "compare.json", json.dumps(result, indent=2))
            write(run / "compare.md", table(result, recipe.words_of(config)))
        draw(result, recipe.words_of(config), run / "compare.png")
        shutil.rmtree(run / "checkpoints", ignore_errors=True)
    return result


def draw(result: dict[str, Any], words: Words, path: Path) -> None:
    """Draw the picture of what compare.json holds."""
    with style(PAPER), writing(path) as part:
        comparison(result, words).savefig(part, format="png", metadata={"Software": None})


def resumed(run: Path) -> tuple[Recipe[Any, Any], Any, list[str]]:
    """The recipe, the configuration and the routers of a comparison that was begun in a folder.

    Raises:
        UserError: where there is none.
    """
    try:
        specs = parse_json(read_file(run / "routers.json"))
    except (OSError, ValueError):
        raise UserError(f"{run} holds no comparison to resume") from None
    if not isinstance(specs, list) or not all(isinstance(spec, str) for spec in specs):
        raise UserError(f"{run / 'routers.json'} must hold a list of routers")
    return (*configuration_of(run), parse_routers(",".join(specs)))


def compared(run: Path) -> dict[str, float]:
    """The held-out losses that a comparison's compare.json says, by the folders of its models; none without it.

    Raises:
        UserError: where it says none.
    """
    path = run / "compare.json"
    if not path.exists():
        return {}
    said = read_json(path)
    try:
        return {folder_of(row["router"]): float(row["eval_loss"]) for row in said["models"]}
    except (LookupError, TypeError, ValueError):
        raise UserError(f"{path}: has no models with their eval_loss") from None


def _routing(metrics: Metrics, name: str) -> dict[str, float]:
    """Balance, drops and experts of a token, each a mean over the last part of training."""
    lines = [line for line in metrics.lines(name) if line["kind"] == "train" and "balance" in line]
    last = [line for line in lines if line["step"] > (1 - LAST) * lines[-1]["step"]]
    return {
        key: math.fsum(line[key] for line in last) / len(last) for key in ("balance", "dropped", "experts_per_token")
    }


def _leak(config: RunConfig) -> str | None:
    """Where a later token can change an earlier one: "training", "training and evaluation", or nowhere.

    None too where that does no harm.
    """
    if not config.causal:
        return None
    training, evaluation = config.sparse.leak(), config.sparse.leak(evaluation=True)
    return "training and evaluation" if evaluation else "training" if training else None


def table(result: dict[str, Any], words: Words) -> str:
    """The comparison as a table in Markdown, the best loss first, and what its columns are."""
    dense = result["models"][0]
    heads = ["router", "loss", "gain", *(unit.replace(" per ", "/") for unit in words.shown.values())]
    heads += ["balance", "dropped", "experts/token", "MFLOP/token", "training FLOP"]
    heads += ["seconds", "peak MiB", "parameters", "leaks in"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in sorted(result["models"], key=lambda row: row["eval_loss"]):
        sparse = "balance" in row
        cells = [
            f"`{row['router']}`" if sparse else "(dense)",
            f"{row['eval_loss']:.4f}" + _spread(row, "eval_loss"),
            f"{dense['eval_loss'] - row['eval_loss']:+.4f}" + _spread(row, "gain") if sparse else "",
            *(f"{row[key]:.4f}" + _spread(row, key) for key in words.shown),
            f"{row['balance']:.2f}" if sparse else "",
            f"{row['dropped']:.1%}" if sparse else "",
            f"{row['experts_per_token']:.2f}" if sparse else "",
            f"{row['flops_per_token'] / 1e6:.3f}" + _times(row, dense, "flops_per_token"),
            f"{row['training_flops']:.2e}" + _times(row, dense, "training_flops"),
            f"{row['seconds']:.0f} ({row['seconds'] / dense['seconds']:.2f}×)",
            f"{row['peak_rss_bytes'] / 2**20:,.0f}",
            f"{row['params_total']:,}",
            row.get("leak") or "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        f"Loss: held-out, in {words.loss}; gain: how much lower it is than the dense model's. Balance: the busiest "
        "expert's load over the mean in the last tenth of training, 1 where even. Dropped: assignments beyond the "
        "capacity. Seconds: of training. Leaks in: where a later token can change what an earlier one gets.",
    ]
    if "seeds" in result:
        seeds = ", ".join(map(str, result["seeds"]))
        lines += ["", f"Means over the seeds {seeds}; ± is the standard deviation over them, of the gain over pairs."]
    return "\n".join(lines) + "\n"


def _spread(row: dict[str, Any], key: str) -> str:
    return f" ± {row['spread'][key]:.4f}" if key in row.get("spread", {}) else ""


def _times(row: dict[str, Any], dense: dict[str, Any], key: str) -> str:
    """How many times the dense model's cost a model's is, where they differ by more than rounding a width does."""
    ratio = row[key] / dense[key]
    return "" if abs(ratio - 1) <= EQUAL else f" **({ratio:.2f}×)**"
