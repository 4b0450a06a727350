"""A run: a recipe and its configuration in, a folder with both models, every metric, a summary and a report out."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, default_data_collator
from transformers.utils import logging as hf_logging

from .. import routers
from ..analysis import runs
from ..analysis.pages.run_page import write_picture, write_report
from ..analysis.runs import MODELS, Metrics, ModelSummary
from ..environment import run_versions
from ..errors import UserError
from ..hf.checkpoints.reading import read_json
from ..training.loop import train_model
from .config import load_config, save_config
from .recipe import Prepared, Recipe
from .registry import find
from .sections import RunConfig

__all__ = [
    "account",
    "begin",
    "check_router",
    "configuration_of",
    "evaluate_run",
    "expert_width",
    "load_model",
    "recipe_of",
    "rehearse",
    "train",
    "train_one",
]


def expert_width(hidden: int, router: routers.Router, sequence_length: int) -> int:
    """The width f of one expert at which k experts and the router cost what one dense gated block does.

    6 d f k + router FLOPs = 6 d hidden, rounded to the nearest whole unit; k is the mean number of experts a token
    asks for.
    """
    unit = 6 * router.dim
    return max(1, round((unit * hidden - router.flops_per_token) / (unit * router.experts_for(sequence_length))))


def train(
    recipe: Recipe[Any, Any], config: RunConfig, run: Path, *, resume: bool = False, as_json: bool = False
) -> dict[str, Any]:
    """Train both models and leave the run folder complete: models, metrics, summary, report.

    Args:
        recipe: what the data, the models and the metric are.
        config: what to train.
        run: the folder; created.
        resume: go on with a run that was stopped; finished models are not trained again.
        as_json: metrics go to standard output, a JSON object a line, in place of the progress line.

    Returns:
        The summary.

    Raises:
        UserError: before anything is trained, for models that cannot run, and for a run to resume whose data changed.
        Interrupted: after Ctrl-C, when the checkpoint is written.
    """
    if (run / "routers.json").exists():
        raise UserError(f"{run} holds a comparison; go on with shunter compare {recipe.name} --resume --run {run}")
    check_router(recipe, config.sparse.router)
    data, metrics = begin(recipe, config, run, as_json, resume=resume)
    for which in MODELS:
        rehearse(recipe, which, config, data)
    costs = {which: train_one(recipe, which, config, run, data, metrics, resume=resume) for which in MODELS}
    accounts = {which: account(recipe, which, config, run, metrics, costs[which]) for which in MODELS}
    summary = runs.summarise(accounts, metrics, config.training.steps, config.seed, data.domains, run_versions())
    (run / "summary.json").write_text(json.dumps(summary, indent=2), encoding="utf-8")
    found = recipe.specialisation(load_model(run, "sparse"), data)
    if found is not None:
        (run / "specialisation.json").write_text(json.dumps(found), encoding="utf-8")
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    write_report(run)
    write_picture(run, run / "picture.png")
    return summary


def check_router(recipe: Recipe[Any, Any], router: str) -> None:
    """See that the recipe's batches tell what the router needs.

    Raises:
        UserError: naming what they lack.
    """
    if lacking := [need for need in routers.find(router).needs if need not in recipe.knows]:
        raise UserError(
            f"router {router!r} needs {', '.join(lacking)} of each token, which plain {recipe.name} has not"
        )


def rehearse(recipe: Recipe[Any, Any], name: str, config: RunConfig, data: Any) -> None:
    """Show an item, twice in a batch, to a model that is then dropped: what cannot run fails before any training."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = recipe.build(config, data, sparse=name != "dense")
    batch = default_data_collator([data.train[0]] * 2)
    model.to(device)(**{key: value.to(device) for key, value in batch.items()})


def begin(
    recipe: Recipe[Any, Any], config: RunConfig, run: Path, as_json: bool, *, resume: bool
) -> tuple[Any, Metrics]:
    """Make the run folder, or find it again: recipe, configuration, data and its licences, metrics.

    Raises:
        UserError: where a run to resume was begun with other data.
    """
    hf_logging.disable_progress_bar()
    if config.training.threads:
        torch.set_num_threads(config.training.threads)
    run.mkdir(parents=True, exist_ok=True)
    save_config(config, run / "config.yaml")
    recipe.words.save(run)
    data: Prepared = recipe.prepare(config)
    if resume and (run / "metrics.jsonl").exists():
        _check_data(recipe, data, run)
    if not as_json:
        for d in data.domains:
            line = f"{d['name']}: {d['train_bytes']:,} bytes to train on, {d['source']}; {d['license']}"
            print(line, file=sys.stderr)
    (run / "data.json").write_text(json.dumps(data.describe(), indent=2), encoding="utf-8")
    data.save_pretrained(run / "tokenizer")
    return data, Metrics(run / "metrics.jsonl", sys.stdout if as_json else None)


def train_one(
    recipe: Recipe[Any, Any], name: str, config: RunConfig, run: Path, data: Any, metrics: Metrics, *, resume: bool
) -> dict[str, float]:
    """Train one model of a run into its folder `run / name`, unless it is resumed and finished already.

    Args:
        recipe: what the data, the models and the metric are.
        name: "dense", or whatever the sparse model is called.
        config: what to train.
        run: the run's folder.
        data, metrics: of `begin`.
        resume: go on from the newest checkpoint.

    Returns:
        What `train_model` measured.
    """
    receipt = run / name / "training.json"
    if resume and receipt.exists():
        found: dict[str, float] = read_json(receipt)
        if not {"seconds", "peak_rss_bytes"} <= set(found):
            raise UserError(f"{receipt} lacks what the training cost; remove it to train the last steps again")
        return found
    t = config.training
    model = recipe.build(config, data, sparse=name != "dense")
    costs = train_model(
        name,
        model,
        data.train,
        lambda m: recipe.evaluate(m, data),
        metrics,
        run / "checkpoints" / name,
        tokens_per_step=recipe.tokens_per_step(config),
        eval_every=t.eval_every,
        log_every=t.log_every,
        resume=resume,
        max_steps=t.steps,
        per_device_train_batch_size=recipe.items_per_step(config),
        learning_rate=t.learning_rate,
        warmup_steps=t.warmup,
        lr_scheduler_type=t.schedule,
        weight_decay=t.weight_decay,
        max_grad_norm=t.max_grad_norm,
        adam_beta2=t.beta2,
        save_strategy="steps",
        save_steps=t.save_every,
        seed=config.seed,
        use_cpu=not torch.cuda.is_available(),
    )
    model.save_pretrained(run / name)
    data.save_pretrained(run / name)
    receipt.write_text(json.dumps(costs))  # written last: from here on the model counts as trained
    return costs


def account(
    recipe: Recipe[Any, Any], name: str, config: RunConfig, run: Path, metrics: Metrics, costs: dict[str, float]
) -> ModelSummary:
    """What one trained model of a run reached and cost."""
    found = recipe.ledger(load_model(run, name), config)
    evals = [m for m in metrics.lines() if m["kind"] == "eval" and m["model"] == name]
    if not evals:
        raise UserError(f"{metrics.path} has lost the evaluations of {name}; remove {run / name} to train it again")
    last = evals[-1]
    return ModelSummary(
        eval_loss=last["loss"],
        shown={key: last[key] for key in recipe.words.shown},
        flops_per_token=found.flops_per_token,
        params_total=found.params_total,
        params_active=found.params_active,
        seconds=costs["seconds"],
        tokens=config.training.steps * recipe.tokens_per_step(config),
        peak_rss_bytes=costs["peak_rss_bytes"],
        domains=last["domains"],
    )


def recipe_of(run: Path) -> Recipe[Any, Any]:
    """The recipe that made a run folder."""
    return find(runs.read_words(run).recipe)


def configuration_of(run: Path) -> tuple[Recipe[Any, Any], Any]:
    """The recipe and the configuration of a run folder.

    Raises:
        UserError: where there is none.
    """
    recipe = recipe_of(run)
    return recipe, load_config(recipe.config, run / "config.yaml", [])


def load_model(run: Path, which: str) -> PreTrainedModel:
    """A trained model of a run folder, in evaluation mode.

    Raises:
        UserError: where the run has no such model (yet).
        ValueError: where its folder is damaged.
    """
    hf_logging.disable_progress_bar()
    folder = run / which
    if not folder.is_dir():
        raise UserError(f"{folder} holds no trained model; `shunter train` leaves one in its run folder")
    return recipe_of(run).load(folder)


def evaluate_run(run: Path) -> dict[str, Any]:
    """Evaluate both models of a run folder again, on the run's own held-out data.

    Raises:
        UserError: where the folder holds no finished run, or its data have changed.
    """
    recipe, config = configuration_of(run)
    models = {which: load_model(run, which) for which in MODELS}
    data: Prepared = recipe.prepare(config)
    _check_data(recipe, data, run)
    return {which: recipe.evaluate(model, data) for which, model in models.items()}


def _check_data(recipe: Recipe[Any, Any], data: Prepared, run: Path) -> None:
    recorded = str(read_json(run / "data.json").get("fingerprint"))
    if data.fingerprint != recorded:
        raise UserError(
            f"the {recipe.name} has changed since this run: its fingerprint is {data.fingerprint[:12]}, the run's "
            f"{recorded[:12]}. Bring back the data, and the versions that the run's summary.json names"
        )
