"""The folder that a training run leaves, read back and checked, whether the run is finished, running or killed."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from numpy.typing import NDArray

from .. import metrics
from ..durable import write
from ..errors import NotWritten, UserError
from ..untrusted import inside, parse_json, read_file
from .exhibits import EXHIBITS, Exhibit, read_exhibits
from .ledger import TRAINING_FLOPS

__all__ = ["Metrics"]

MODELS = ("dense", "sparse")
_LARGEST = 2**32  # bytes of the metrics


@dataclass(frozen=True)
class Curve:
    """One model's losses over training: arrays of length N; `loss` in nats/token, `seconds` of training so far."""

    step: NDArray[np.float64]
    tokens: NDArray[np.float64]
    seconds: NDArray[np.float64]
    loss: NDArray[np.float64]


@dataclass(frozen=True)
class Words:
    """What the numbers of a run are called, as recipe.json keeps it.

    Args:
        recipe: the name of the recipe that made the run.
        intro: a sentence on what both models learn.
        loss: the unit of the loss.
        right: what a model is right about, where the loss is minus the logarithm of a probability; else empty.
        shown: further numbers of an evaluation, by key, and their units.
        higher: the keys of those of which more is better.
        data: what is learned from, and held out.
        domain: what kinds of data are called: domains, classes, ….
        token: what passes through the layers and is sent to experts, by which training is counted.
        routing: what decides among the experts of a layer, where the routers of the layers do not say it all.
    """

    recipe: str
    intro: str
    loss: str
    right: str = ""
    shown: dict[str, str] = field(default_factory=dict)
    higher: list[str] = field(default_factory=list)
    data: str = "data"
    domain: str = "domain"
    token: str = "token"
    routing: str = ""

    @property
    def tokens(self) -> str:
        """Several of them."""
        return self.token + ("es" if self.token.endswith("ch") else "s")

    @property
    def domains(self) -> str:
        """Several of them."""
        return self.domain + ("es" if self.domain.endswith("s") else "s")

    def save(self, run: Path) -> None:
        """Write recipe.json."""
        write(run / "recipe.json", json.dumps(asdict(self), indent=2))


TEXT = Words(
    "text",
    "Two language models read the same text in the same order, learning to guess the next token (a piece of a word).",
    "nats/token",
    "the right next token",
    {"bits_per_byte": "bits per byte"},
    data="text",
)
"""Of text, and of folders from before there were other recipes."""


def read_words(run: Path) -> Words:
    """What the numbers of a run folder are called.

    Raises:
        UserError: where recipe.json is damaged.
    """
    path = run / "recipe.json"
    content = _load_json(path)
    if content is None:
        return TEXT
    with _schema(path):
        words = Words(**content)
        for name, known in vars(TEXT).items():
            if not isinstance(given := getattr(words, name), type(known)):
                raise TypeError(f"{name} is {given!r:.60}")
        if not all(isinstance(text, str) for text in (*words.shown, *words.shown.values(), *words.higher)):
            raise TypeError("shown and higher must hold texts")
        return words


@dataclass(frozen=True)
class Score:
    """Held-out loss of one model on one domain, and the other numbers that are shown, by key."""

    loss: float
    shown: dict[str, float]


@dataclass(frozen=True)
class ModelSummary:
    """What one finished model reached and cost.

    `flops_per_token` and `params_active` are of a forward pass in evaluation, `training_flops` of the whole training;
    `shown` as `Words.shown`.
    """

    eval_loss: float
    shown: dict[str, float]
    flops_per_token: float
    params_total: float
    params_active: float
    seconds: float
    tokens: float
    peak_rss_bytes: float
    domains: dict[str, Any] = field(default_factory=dict)
    training_flops: float = math.nan

    def as_json(self) -> dict[str, Any]:
        """As summary.json and compare.json have it."""
        values = asdict(self)
        return {"eval_loss": values.pop("eval_loss"), **values.pop("shown"), **values}

    @property
    def tokens_per_second(self) -> float:
        """Training tokens per second; NaN where no time was recorded."""
        return self.tokens / self.seconds if self.seconds else math.nan


@dataclass(frozen=True)
class Decider:
    """Who decides in a sparse layer: the registered name of its router, and its `Router.chooses`."""

    router: str
    chooses: str


@dataclass(frozen=True)
class Summary:
    """The result of a finished run; `gain` is dense minus sparse evaluation loss in nats/token.

    `routers` are those of the sparse layers by name, none in runs from before they were recorded.
    """

    dense: ModelSummary
    sparse: ModelSummary
    gain: float
    steps_to_dense_loss: float | None
    tokens: float
    seed: int | None
    versions: dict[str, Any]
    routers: dict[str, Decider] = field(default_factory=dict)


@dataclass(frozen=True)
class Load:
    """One layer's load over training: `share` (N, E) of the assignments since the previous `step` (N,)."""

    step: NDArray[np.float64]
    share: NDArray[np.float64]

    @property
    def relative(self) -> NDArray[np.float64]:
        """Load in units of an even share, (N, E): 1 is 1/E of the assignments."""
        return self.share * self.share.shape[1]

    @property
    def balance(self) -> NDArray[np.float64]:
        """Load of the busiest expert over the mean load, (N,): 1 is perfect balance, E is collapse."""
        return metrics.balance(torch.from_numpy(self.share)).numpy()

    @property
    def dead(self) -> list[int]:
        """Experts that took less than `shunter.metrics.DEAD_BELOW` of an even share at the last record."""
        return metrics.dead(torch.from_numpy(self.share[-1])).nonzero().flatten().tolist()


@dataclass(frozen=True)
class Specialisation:
    """One layer's division of labour: `load` (E,), `share` (D, E) of each domain's tokens that each expert takes,
    and per expert its typical tokens as (token, share of the expert's tokens, lift)."""

    load: NDArray[np.float64]
    share: NDArray[np.float64]
    tokens: list[list[tuple[str, float, float]]]


@dataclass
class Run:
    """A run folder in memory. What the run has not written yet is empty or None; `notices` says what was mended, and
    `alarms` what went wrong in training.

    `scores` by model and domain are the final ones; until these are there, those of `scored_step`, the last step at
    which both models were evaluated.
    """

    path: Path
    train: dict[str, Curve] = field(default_factory=dict)
    evals: dict[str, Curve] = field(default_factory=dict)
    scores: dict[str, dict[str, Score]] = field(default_factory=dict)
    scored_step: int | None = None
    loads: dict[str, Load] = field(default_factory=dict)
    summary: Summary | None = None
    domains: list[str] = field(default_factory=list)
    layers: dict[str, Specialisation] = field(default_factory=dict)
    data: dict[str, Any] | None = None
    exhibits: list[Exhibit] = field(default_factory=list)
    config: str = ""
    words: Words = TEXT
    notices: list[str] = field(default_factory=list)
    alarms: list[str] = field(default_factory=list)

    @property
    def scored_domains(self) -> list[str]:
        """Domains on which both models were evaluated."""
        dense, sparse = (self.scores.get(model, {}) for model in MODELS)
        return [name for name in dense if name in sparse]


def read_run(path: Path) -> Run:
    """Reads the run folder at `path`.

    A line of metrics.jsonl that is not JSON (a killed run's last) is left out with a notice. Steps that a resumed run
    went through again replace the earlier record. Raises `UserError` where nothing can be shown or a file does not
    follow its schema.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"There is no run folder at {path}. Give the folder that `shunter train` wrote.")
    run = Run(path, words=read_words(path))
    _read_metrics(run)
    _read_summary(run)
    if not run.train and not run.evals and run.summary is None:
        raise UserError(
            f"{path} holds no loss yet (no summary.json, and no train or eval line in metrics.jsonl). "
            "Let the run log its first step, then ask again."
        )
    _read_specialisation(run)
    run.data = _read_data(path / "data.json")
    run.exhibits = _read_exhibits(path / EXHIBITS)
    config = path / "config.yaml"
    run.config = _text(config) if config.exists() else ""
    return run


@contextmanager
def _schema(path: Path, where: str = "") -> Iterator[None]:
    try:
        yield
    except KeyError as error:
        raise UserError(f"{path}{where} lacks the key {error}. Was it written by another version?") from error
    except (TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserError(f"{path}{where} does not follow the run folder's schema: {error}") from error


def _load_json(path: Path) -> Any:
    if not path.exists():
        return None
    raw = read_file(inside(path))
    try:
        return parse_json(raw)
    except ValueError as error:
        raise UserError(
            f"{path} is not complete JSON ({error}). Write it again, or remove it to report without it."
        ) from error


def _text(path: Path) -> str:
    return read_file(inside(path), _LARGEST).decode(errors="replace")


def _number(value: object) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"expected a number, found {value!r:.60}")
    return float(value)


def _array(values: list[Any]) -> NDArray[np.float64]:
    return np.array([_number(value) for value in values], dtype=np.float64)


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part) if part.isdecimal() else -1, part) for part in re.split(r"(\d+)", name)]


def _read_metrics(run: Run) -> None:
    path = run.path / "metrics.jsonl"
    if not path.exists():
        run.notices.append("metrics.jsonl is missing: there are no curves to draw.")
        return
    series: dict[tuple[str, str], list[dict[str, Any]]] = {}
    unreadable = []
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError:
            unreadable.append(number)
            continue
        with _schema(path, f", line {number},"):
            if row["kind"] == "alarm":
                run.alarms.append(f"{row['model']} model, step {row['step']}: {row['what']}.")
                continue
            rows = series.setdefault((row["kind"], row["model"]), [])
            while rows and rows[-1]["step"] >= row["step"]:
                rows.pop()
            rows.append(row)
    if unreadable:
        lines = ", ".join(map(str, unreadable[:5])) + (", …" if len(unreadable) > 5 else "")
        run.notices.append(f"Left out {_plural(len(unreadable), 'unreadable line')} of metrics.jsonl (line {lines}).")
    with _schema(path):
        for model in MODELS:
            for kind, curves in (("train", run.train), ("eval", run.evals)):
                if (kind, model) in series:
                    curves[model] = _curve(run, series[kind, model], f"{model} {kind}")
        evals = {model: {row["step"]: row for row in series.get(("eval", model), [])} for model in MODELS}
        if common := evals["dense"].keys() & evals["sparse"].keys():
            run.scored_step = max(common)
            run.scores = {model: _scores(run, evals[model][run.scored_step]["domains"]) for model in MODELS}
        if ("load", "sparse") in series:
            loads = series["load", "sparse"]
            step = _array([row["step"] for row in loads])
            for layer in sorted(loads[0]["layers"], key=_natural):
                run.loads[layer] = Load(step, np.nan_to_num([_array(row["layers"][layer]) for row in loads]))


def _curve(run: Run, rows: list[dict[str, Any]], name: str) -> Curve:
    curve = Curve(*(_array([row[key] for row in rows]) for key in ("step", "tokens", "seconds", "loss")))
    if bad := int((~np.isfinite(curve.loss)).sum()):
        first = curve.step[~np.isfinite(curve.loss)][0]
        run.notices.append(
            f"{_plural(bad, f'{name} loss', f'{name} losses')} not finite, the first at step {first:.0f}: not drawn."
        )
    return curve


def _plural(count: int, one: str, many: str = "") -> str:
    return f"{count} {one if count == 1 else many or one + 's'}"


def _scores(run: Run, domains: dict[str, Any]) -> dict[str, Score]:
    return {name: Score(_number(row["loss"]), _shown(run, row)) for name, row in domains.items()}


def _shown(run: Run, row: dict[str, Any]) -> dict[str, float]:
    return {key: _number(row[key]) for key in run.words.shown}


_NUMBERS = [name for name in ModelSummary.__dataclass_fields__ if name not in ("shown", "domains", "training_flops")]


def summarise(
    models: dict[str, ModelSummary],
    metrics: Metrics,
    steps: int,
    seed: int,
    domains: list[dict[str, Any]],
    layers: dict[str, dict[str, str]],
    versions: dict[str, str],
) -> dict[str, Any]:
    """What summary.json of a finished run holds.

    Args:
        models: the account of each of `MODELS`.
        metrics: of the run.
        steps: how many the run had.
        seed: its seed.
        domains: the record of its data.
        layers: of each sparse layer what `Decider` has.
        versions: of what it ran on.
    """
    dense, sparse = models["dense"], models["sparse"]
    evals = [line for line in metrics.lines("sparse") if line["kind"] == "eval"]
    return {
        **{which: model.as_json() for which, model in models.items()},
        "gain": dense.eval_loss - sparse.eval_loss,
        "steps_to_dense_loss": _share_of_steps(evals, dense.eval_loss, steps),
        "tokens": sparse.tokens,
        "seed": seed,
        "licenses": [{key: d[key] for key in ("name", "license", "source")} for d in domains],
        "routers": layers,
        "versions": versions,
    }


def _share_of_steps(evals: list[dict[str, Any]], target: float, steps: int) -> float | None:
    """The share of the steps after which the evaluations first reach a loss, linearly between two; None if never."""
    for before, after in zip(evals, evals[1:], strict=False):
        if after["loss"] <= target:
            fall = before["loss"] - after["loss"]
            part = (before["loss"] - target) / fall if fall > 0 else 1.0
            return float((before["step"] + part * (after["step"] - before["step"])) / steps)
    return None


def _model_summary(run: Run, row: dict[str, Any]) -> ModelSummary:
    numbers: dict[str, Any] = {key: _number(row[key]) for key in _NUMBERS}
    spent = TRAINING_FLOPS * numbers["flops_per_token"] * numbers["tokens"]  # as runs before they counted it say
    return ModelSummary(**numbers, shown=_shown(run, row), training_flops=_number(row.get("training_flops", spent)))


def _read_summary(run: Run) -> None:
    path = run.path / "summary.json"
    content = _load_json(path)
    if content is None:
        return
    with _schema(path):
        models = {model: _model_summary(run, content[model]) for model in MODELS}
        share = content["steps_to_dense_loss"]
        run.summary = Summary(
            **models,
            gain=_number(content["gain"]),
            steps_to_dense_loss=None if share is None else _number(share),
            tokens=_number(content["tokens"]),
            seed=content["seed"],
            versions=dict(content["versions"]),
            routers={layer: Decider(**who) for layer, who in content.get("routers", {}).items()},
        )
        run.scores, run.scored_step = {model: _scores(run, content[model]["domains"]) for model in MODELS}, None


def _read_specialisation(run: Run) -> None:
    path = run.path / "specialisation.json"
    content = _load_json(path)
    if content is None:
        return
    with _schema(path):
        run.domains = [str(name) for name in content["domains"]]
        for layer in sorted(content["layers"], key=_natural):
            row = content["layers"][layer]
            load = _array(row["load"])
            share = np.nan_to_num(np.stack([_array(row["domains"][name]) for name in run.domains]))
            if share.shape[1:] != load.shape or len(row["tokens"]) != len(load):
                raise ValueError(
                    f"layer {layer} has {len(load)} loads, {share.shape[1]} domain shares and "
                    f"{len(row['tokens'])} token lists, which should all be the number of experts"
                )
            tokens = [
                [(str(token), _number(part), _number(lift)) for token, part, lift in expert] for expert in row["tokens"]
            ]
            run.layers[layer] = Specialisation(load, share, tokens)


def _read_data(path: Path) -> dict[str, Any] | None:
    content = _load_json(path)
    if content is None:
        return None
    with _schema(path):
        domains = [
            {"name": str(row["name"]), "license": str(row["license"]), "source": str(row["source"])}
            | {part: {unit: _number(row[f"{part}_{unit}"]) for unit in _units(row)} for part in ("train", "eval")}
            for row in content["domains"]
        ]
        notes = [str(note) for note in content.get("notes", [])]
        return {"domains": domains, "notes": notes, "fingerprint": str(content["fingerprint"])}


def _units(row: dict[str, Any]) -> list[str]:
    """What a record of data counts, in its order: bytes, tokens, images, ….

    Raises:
        KeyError: where it counts nothing.
    """
    units = [key.removeprefix("train_") for key in row if key.startswith("train_")]
    if not units:
        raise KeyError("train_bytes")
    return units


def _read_exhibits(path: Path) -> list[Exhibit]:
    content = _load_json(path)
    if content is None:
        return []
    with _schema(path):
        return read_exhibits(content)


class Metrics:
    """metrics.jsonl: one object a line, flushed as it is written; echoed to a stream where asked.

    What a kill or a full disk leaves of it need not be whole: each checkpoint and each finished model has the lines of
    its model, and a run that goes on puts these in their place.
    """

    def __init__(self, path: Path, echo: TextIO | None = None) -> None:
        self.path, self.echo = path, echo

    def write(self, **line: Any) -> None:
        """Append a line.

        Raises:
            NotWritten: where the disk does not take it.
        """
        text = json.dumps(line)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text + "\n")
        except OSError as error:
            raise NotWritten(f"{self.path} cannot be written: {error.strerror}") from error
        if self.echo is not None:
            print(text, file=self.echo, flush=True)

    def lines(self, model: str | None = None) -> list[dict[str, Any]]:
        """What has been written, of one model or of all; lines that are cut short or no objects are left out."""
        if not self.path.exists():
            return []
        found = []
        for text in _text(self.path).split("\n"):
            try:
                line = parse_json(text)
            except ValueError:
                continue
            if isinstance(line, dict) and (model is None or line.get("model") == model):
                found.append(line)
        return found

    def keep(self, models: Collection[str]) -> None:
        """Drop what is of none of these models: lines that were damaged."""
        lines = self.lines()
        kept = [line for line in lines if isinstance(line.get("model"), str) and line["model"] in models]
        if len(kept) < len(lines):
            self._put(kept)

    def replace(self, model: str, lines: list[dict[str, Any]]) -> None:
        """Put these lines of a model in place of all that there are of it."""
        kept = [line for line in self.lines() if line.get("model") != model]
        self._put([*kept, *lines])

    def _put(self, lines: list[dict[str, Any]]) -> None:
        write(self.path, "".join(json.dumps(line) + "\n" for line in lines))
