"""Campaign P: wrong settings, each a configuration or one line; and those that only a model shows to be wrong."""

import functools
import shutil
from pathlib import Path
from typing import Literal, get_args, get_origin

from shunter.cli import main
from shunter.errors import UserError
from shunter.recipes import run as engine
from shunter.recipes.config import load_config
from shunter.recipes.registry import find, names
from shunter.routers import names as router_names
from tests.campaigns.campaign import drawn
from tests.campaigns.processes import in_child
from tests.recipes.conftest import SMALL, write_corpus

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


SMALL_RUNS = {
    "text": [*SMALL, "data.source=['{corpus}']"],
    "facts": [
        "data.keys=64", "data.values=4", "data.sequence_length=16", "data.eval_windows=8", "model.dim=8",
        "model.hidden=8", "sparse.num_experts=4", "training.batch_tokens=64",
    ],
    "tasks": [
        "data.rows=60", "data.features=5", "data.correlations=[0.0, 1.0]", "data.digits=false", "model.dim=8",
        "model.hidden=16", "model.tower=3", "sparse.num_experts=3", "training.batch_tokens=8",
    ],
    "images": [
        "data.image_size=8", "data.shift=1", "model.patch_size=2", "model.dim=8", "model.layers=2", "model.heads=2",
        "model.hidden=24", "sparse.num_experts=4", "training.batch_tokens=80",
    ],
}  # fmt: skip
"""Of each recipe the settings of a run of a second."""
STEPS = ["training.steps=2", "training.warmup=1", "training.eval_every=1", "training.log_every=1", "training.threads=1"]
BY_TYPE = {
    "int": [0, 1, 2, 3, 4, 5, 7, 8, 16, 33, 64, 100],
    "float": [0, 1e-9, 0.1, 0.5, 0.99, 1, 1.5, 8, 1e6],
    "bool": ["true", "false"],
}
OPTIONS = [
    "capacity_factor: 1.0", "capacity_factor: 0.01", "jitter: 0.1", "z_loss: 0.001", "load_balancing_loss: 0.01",
    "selection_bias: true", "normalize: true", "score: sigmoid", "num_groups: 2", "num_groups: 3", "top_groups: 1",
    "num_hashes: 2", "num_hashes: 3", "k: 2", "scope: global", "temperature: 0.5", "noise: 1.0", "prototypes: 2",
]  # fmt: skip
ELSEWHERE = ("parallel", "out", "name", "seed", "training.steps", "training.threads", "data.source")  # not tried


def _typed(config):
    """(name, values of its type) of each setting of a recipe."""
    kinds = [(name, kind) for name, kind in _annotations(config.model_fields, "") if not name.startswith(ELSEWHERE)]
    return [(name, values) for name, kind in kinds if (values := _values(name, kind))]


def _annotations(fields, before):
    for key, field in fields.items():
        inner = getattr(field.annotation, "model_fields", None)
        if inner is None:
            yield f"{before}{key}", field.annotation
        else:
            yield from _annotations(inner, f"{before}{key}.")


def _values(name, kind):
    if name == "sparse.router":
        return [*router_names(), "[hash, topk]"]
    if name == "sparse.options":
        return [f"{{{option}}}" for option in OPTIONS]
    if get_origin(kind) is Literal:
        return get_args(kind)
    return [value for word, values in BY_TYPE.items() if word in str(kind) for value in values]


def trials(result, folder, cases, seed):
    """P: one to five settings of the right types, which end in a trained model, or in one line before it is one."""
    corpus = Path(folder) / "corpus"
    if not corpus.exists():
        write_corpus(corpus)
    for case in cases:
        draw = drawn(seed, case)
        recipe = draw.choice(list(SMALL_RUNS))
        keys = _typed(find(recipe).config)
        chosen = draw.sample(keys, draw.randrange(1, 5))
        if draw.random() < 0.5:  # the router decides most of what is possible
            chosen.append(next(pair for pair in keys if pair[0] == "sparse.router"))
        given = [f"{name}={draw.choice(values)}" for name, values in chosen]
        small = [word.replace("{corpus}", str(corpus)) for word in SMALL_RUNS[recipe]]
        run = Path(folder) / "run"
        shutil.rmtree(run, ignore_errors=True)
        words = ["train", recipe, "--run", str(run), *small, *STEPS, *given]
        ended = in_child(functools.partial(_train, words), limit=60)
        metrics = run / "metrics.jsonl"
        begun = metrics.exists() and '"train"' in metrics.read_text()
        fault = ""
        if ended.code == 2 and begun:
            fault = f"{recipe} {given}: refused after it was trained: {ended.line}"
        elif ended.code not in (0, 2):
            fault = f"{recipe} {given}: exit {ended.code}: {ended.line}"
        elif ended.code == 2 and not ended.line.startswith("shunter train: "):
            fault = f"{recipe} {given}: {ended.line}"
        result.count(case, fault, detected=ended.code == 2)


def _train(words):
    engine.write_report = engine.write_picture = lambda *given: None
    return main(words)
