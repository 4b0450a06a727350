"""Several tasks: a multi-gate mixture of experts (MMoE), against a bottom that tasks share, and a model for each."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import safetensors.torch
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PretrainedConfig, PreTrainedModel, set_seed
from transformers.modeling_outputs import ModelOutput

from ..analysis.exhibits import Curves, Exhibit, HeatMap
from ..analysis.exhibits import Table as TableExhibit
from ..analysis.inspect.material import Batch, Material, Stream
from ..analysis.ledger import Ledger
from ..analysis.runs import Words
from ..data.orders import passes
from ..data.tables import Table, digits, read_table, related_tasks
from ..errors import one_line
from ..moe import MoE, aux_loss, moe_layers
from . import run
from .recipe import Recipe
from .sections import RunConfig, RunName, Section, SparseConfig, TrainingConfig

__all__ = ["RECIPE", "TasksConfig", "TasksRecipe"]

EVAL_BATCH = 1024  # rows of a forward
SINGLE = "single"
NAMES = {"sparse": "experts with a gate of each task", "dense": "shared bottom", SINGLE: "a model of each task"}


class DataConfig(Section):
    """Which tables, and what is asked of them."""

    source: list[Annotated[str, Field(min_length=1)]] | None = Field(
        None, min_length=1, max_length=1, description="a table (csv, tsv, parquet, jsonl); none: generator and digits"
    )
    targets: list[str] = Field([], description="the columns of your table that are asked for")
    correlations: list[Annotated[float, Field(ge=0, le=1)]] = Field(
        [0.0, 0.25, 0.5, 0.75, 1.0], max_length=20, description="of the two tasks of a problem of the generator"
    )
    digits: bool = Field(True, description="scikit-learn's digits beside the generator")
    rows: int = Field(20_000, ge=20, le=2_000_000, description="of the generator")
    features: int = Field(100, ge=2, le=10_000, description="of the generator")
    eval_share: float = Field(0.2, gt=0, lt=0.9, description="of the rows, held out")


class ModelConfig(Section):
    """A map to `dim`, a block that the tasks share, and a tower for each task."""

    dim: int = Field(32, ge=2, le=16384, description="d, width of the hidden states")
    hidden: int = Field(64, ge=4, description="width of the block that the tasks share")
    tower: int = Field(8, ge=1, description="width of the network of a task")


class TasksSparse(SparseConfig):
    """All experts, mixed by a gate of each task."""

    num_experts: int = Field(8, ge=1, le=4096)
    router: str = "mmoe"


class TasksTraining(TrainingConfig):
    """Six times through the rows of the generator."""

    steps: int = Field(1500, ge=1)
    batch_tokens: int = Field(128, ge=2, description="questions of one optimizer step to each problem")
    learning_rate: float = Field(3e-3, gt=0, le=1)
    weight_decay: float = Field(0.01, ge=0, le=1)
    eval_every: int = Field(250, ge=1)


class TasksConfig(RunConfig):
    """The configuration of `shunter train tasks`."""

    causal: ClassVar[bool] = False
    name: RunName = "tasks"
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    sparse: TasksSparse = TasksSparse()
    training: TasksTraining = TasksTraining()

    @model_validator(mode="after")
    def _fits(self) -> TasksConfig:
        d, s = self.data, self.sparse
        if d.source is None and not d.correlations and not d.digits:
            raise ValueError("data: neither a correlation nor the digits nor a table of your own is left")
        if d.source is None and d.targets:
            raise ValueError("data.targets are columns of data.source, which is not given")
        if len(set(d.correlations)) < len(d.correlations):
            raise ValueError("data.correlations: each may come once")
        if s.every != 1 or s.last is not None:
            raise ValueError("sparse.every and sparse.last choose among blocks; these models have one")
        if s.hidden is None and 2 * self.model.hidden < 2 * s.num_experts:
            raise ValueError(
                f"sparse.num_experts {s.num_experts}: there is less than a unit for each in model.hidden "
                f"{self.model.hidden}; set sparse.hidden or fewer experts"
            )
        return self


@dataclass(frozen=True)
class TasksData:
    """The tables, and how many rows of each are trained on.

    Args:
        tables: the problems.
        count: rows of training, with those that come again.
        seed: of their order.
    """

    tables: list[Table]
    count: int
    seed: int

    @property
    def train(self) -> Dataset[dict[str, Tensor]]:
        """A row of each table at a time."""
        return _Rows(self)

    def batches(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The held-out features (B, D) and targets (B, K) of a table."""
        table = self.tables[number]
        yield from zip(
            table.features[table.held_out].split(EVAL_BATCH),
            table.targets[table.held_out].split(EVAL_BATCH),
            strict=True,
        )

    @property
    def domains(self) -> list[dict[str, Any]]:
        """A record of each table."""
        return [
            {"name": t.name, "license": t.license, "source": t.source}
            | {
                f"{part}_{unit}": count
                for part, chosen in (("train", ~t.held_out), ("eval", t.held_out))
                for unit, count in (
                    ("rows", int(chosen.sum())),
                    ("answers", int((~t.targets[chosen].isnan()).sum())),
                )
            }
            for t in self.tables
        ]

    @property
    def fingerprint(self) -> str:
        """Of all tables."""
        return hashlib.sha256("".join(table.fingerprint() for table in self.tables).encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """What data.json holds."""
        notes = [f"{t.name}: {t.features.shape[1]} features; {', '.join(t.tasks)} are asked for." for t in self.tables]
        notes += [f"{t.name}: {note}" for t in self.tables for note in t.notes]
        return {"domains": self.domains, "fingerprint": self.fingerprint, "notes": notes}

    def save_pretrained(self, folder: Path) -> None:
        """Nothing: rows are read as they are."""


class _Rows(Dataset[dict[str, Tensor]]):
    """Item i has the i-th row of each table, a function of the seed and i, with zeros and NaN up to a common width."""

    def __init__(self, data: TasksData) -> None:
        self.data = data
        generator = torch.Generator().manual_seed(data.seed)
        self.width = max(t.features.shape[1] for t in data.tables)
        self.tasks = max(len(t.tasks) for t in data.tables)
        self.orders = []
        for table in data.tables:
            rows = (~table.held_out).nonzero().flatten()
            self.orders.append(rows[passes(len(rows), data.count, generator)])

    def __len__(self) -> int:
        return self.data.count

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        if not 0 <= i < self.data.count:
            raise IndexError(i)
        features = torch.zeros(len(self.orders), self.width)
        labels = torch.full((len(self.orders), self.tasks), math.nan)
        for number, (table, order) in enumerate(zip(self.data.tables, self.orders, strict=True)):
            x, y = table.features[order[i]], table.targets[order[i]]
            features[number, : len(x)], labels[number, : len(y)] = x, y
        return {"features": features, "labels": labels}


class TasksModelConfig(PretrainedConfig):
    """The sizes of a `TasksModel`.

    Args:
        problems: [features, tasks] of each.
        dim, hidden, tower: of the model.
        kind: "dense" (a bottom that tasks share), "single" (a model of each task) or "sparse".
        moe: what a layer of experts is made with, for "sparse".
    """

    model_type = "shunter_tasks"

    def __init__(
        self,
        problems: list[list[int]] | None = None,
        dim: int = 32,
        hidden: int = 64,
        tower: int = 8,
        kind: str = "dense",
        moe: dict[str, Any] | None = None,
        **rest: Any,
    ) -> None:
        super().__init__(**rest)
        self.problems, self.dim, self.hidden, self.tower = problems or [[2, 2]], dim, hidden, tower
        self.kind, self.moe = kind, moe or {}


class _Network(nn.Module):
    """One problem's: features (B, D) to answers (B, K)."""

    def __init__(self, config: TasksModelConfig, features: int, tasks: int) -> None:
        super().__init__()
        d, copies = config.dim, tasks if config.kind == SINGLE else 1
        self.kind, self.tasks = config.kind, tasks
        self.embed = nn.ModuleList(nn.Linear(features, d) for _ in range(copies))
        self.towers = nn.ModuleList(
            nn.Sequential(nn.Linear(d, config.tower), nn.ReLU(), nn.Linear(config.tower, 1)) for _ in range(tasks)
        )
        if config.kind == "sparse":
            self.moe = MoE(d, bias=True, activation="relu", **config.moe)
        else:
            blocks = [(nn.Linear(d, config.hidden), nn.ReLU(), nn.Linear(config.hidden, d)) for _ in range(copies)]
            self.block = nn.ModuleList(nn.Sequential(*parts) for parts in blocks)

    def forward(self, x: Tensor) -> Tensor:
        shared: tuple[Any, ...]
        if self.kind == "sparse":
            h = self.embed[0](x)[:, None].expand(-1, self.tasks, -1)
            h = h + self.moe(h, task=torch.arange(self.tasks, device=x.device).expand(len(x), -1))
            shared = h.unbind(1)
        else:
            found = [embed(x) for embed in self.embed]
            shared = tuple(h + block(h) for h, block in zip(found, self.block, strict=True))
            shared = shared if self.kind == SINGLE else shared * self.tasks
        return torch.cat([tower(h) for tower, h in zip(self.towers, shared, strict=True)], -1)

    def flops(self) -> dict[str, float]:
        """Of one question."""
        passed = [self.embed[0], self.towers[0], *([] if self.kind == "sparse" else [self.block[0]])]
        maps = sum(p.numel() for module in passed for p in module.parameters() if p.dim() == 2)
        experts = self.moe.flops_per_token(1) if self.kind == "sparse" else {"routers": 0.0, "experts": 0.0}
        return {"projections": 2.0 * maps} | experts


class TasksModel(PreTrainedModel):
    """A network for each problem, trained side by side; the loss is the mean squared error of all that is asked."""

    config_class = TasksModelConfig
    main_input_name = "features"

    def __init__(self, config: TasksModelConfig) -> None:
        super().__init__(config)
        self.networks = nn.ModuleList(_Network(config, *sizes) for sizes in config.problems)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Leave what the modules have drawn."""

    def forward(self, features: Tensor, labels: Tensor | None = None) -> ModelOutput:
        """Features (B, problems, D) to answers (B, problems, K); labels likewise, NaN where nothing is asked."""
        answers = features.new_zeros(len(features), len(self.networks), max(tasks for _, tasks in self.config.problems))
        for number, (network, (width, tasks)) in enumerate(zip(self.networks, self.config.problems, strict=True)):
            answers[:, number, :tasks] = network(features[:, number, :width])
        loss = None
        if labels is not None:
            asked = ~labels.isnan()
            error = (answers - labels.nan_to_num(0.0))[asked].square()
            loss = error.sum() / asked.sum().clamp_min(1) + aux_loss(self)
        return ModelOutput(loss=loss, logits=answers)


class TasksRecipe(Recipe[TasksConfig, TasksData]):
    """Regression of several targets: the loss is the squared error over the variance of the target, 1 - R^2."""

    name = "tasks"
    config = TasksConfig
    words = Words(
        "tasks",
        "Two models learn to answer several questions on each row of a table; each problem has networks of its own. "
        "The dense one is a shared bottom: all questions pass through one block.",
        "parts of the variance",
        data="rows",
        domain="problem",
        token="question",
        routing="each question has a gate that mixes what all of them give. They are as wide together as the block is",
    )
    knows = ("mask", "task")
    others = (SINGLE,)

    def prepare(self, config: TasksConfig) -> TasksData:
        """The tables of the configuration."""
        d = config.data
        if d.source is not None:
            tables = [read_table(Path(d.source[0]), d.targets, d.eval_share)]
        else:
            held_out = max(2, round(d.eval_share * d.rows))
            tables = [related_tasks(p, d.rows, held_out, dim=d.features, seed=config.seed) for p in d.correlations]
            tables += [digits(d.eval_share)] if d.digits else []
        tasks = max(len(table.tasks) for table in tables)
        return TasksData(tables, config.training.steps * self._rows(config, tasks), config.seed)

    def _rows(self, config: TasksConfig, tasks: int = 2) -> int:
        return max(1, config.training.batch_tokens // tasks)

    def _tasks(self, config: TasksConfig) -> int:
        return 2 if config.data.source is None else len(config.data.targets)

    def build(self, config: TasksConfig, data: TasksData, sparse: bool) -> PreTrainedModel:
        """The shared bottom, or experts with gates."""
        return self._build(config, data, "sparse" if sparse else "dense")

    def build_other(self, config: TasksConfig, data: TasksData, name: str) -> PreTrainedModel:
        """A model of each task, whose operations for a question are the shared bottom's."""
        return self._build(config, data, name)

    def _build(self, config: TasksConfig, data: TasksData, kind: str) -> PreTrainedModel:
        m, s = config.model, config.sparse
        problems = [[t.features.shape[1], len(t.tasks)] for t in data.tables]
        labels = {"task": max(tasks for _, tasks in problems)}
        moe: dict[str, Any] = {}
        if kind == "sparse":
            hidden = s.hidden or run.expert_width(m.hidden, s.build_router(m.dim, labels), 1, gated=False)
            moe = {"hidden": hidden, "num_experts": s.num_experts, "router": s.router, "backend": s.backend}
            moe |= s.router_options(labels)
        set_seed(config.seed)
        return TasksModel(TasksModelConfig(problems, m.dim, m.hidden, m.tower, kind, moe))

    def load(self, folder: Path) -> PreTrainedModel:
        """A model of a run, in evaluation mode.

        Raises:
            ValueError: where the folder is damaged.
        """
        try:
            model = TasksModel(TasksModelConfig.from_pretrained(folder))
            safetensors.torch.load_model(model, folder / "model.safetensors")
        except Exception as error:  # damaged in as many ways as there are bytes
            raise ValueError(f"{folder}: cannot be loaded ({one_line(error)})") from None
        return model.eval()

    def evaluate(self, model: PreTrainedModel, data: TasksData) -> dict[str, Any]:
        """The squared error over the variance, of all problems alike."""
        errors = _errors(model, data)
        found = {t.name: {"loss": _mean(e)} for t, e in zip(data.tables, errors, strict=True)}
        return {"loss": sum(row["loss"] for row in found.values()) / len(found), "domains": found}

    def ledger(self, model: PreTrainedModel, config: TasksConfig) -> Ledger:
        """Of a question, on average over the problems; it passes one problem's network and one task's tower."""
        networks: list[Any] = _networks(model)
        flops = {key: sum(n.flops()[key] for n in networks) / len(networks) for key in networks[0].flops()}
        total = sum(p.numel() for p in model.parameters())
        inactive = sum(layer.inactive_parameters(1) for layer in moe_layers(model).values())
        return Ledger(total, total - inactive, flops)

    def items_per_step(self, config: TasksConfig) -> int:
        """Rows of each table."""
        return self._rows(config, self._tasks(config))

    def tokens_per_step(self, config: TasksConfig) -> int:
        """Questions to all problems."""
        d = config.data
        problems = 1 if d.source is not None else len(d.correlations) + d.digits
        return self.items_per_step(config) * self._tasks(config) * problems

    def material(self, model: PreTrainedModel, data: TasksData, tokens: int) -> Material:
        """Held-out rows of each problem with so many questions at most; the domain of a question is its task."""
        tasks = max(len(table.tasks) for table in data.tables)
        held_out = [table.features[table.held_out] for table in data.tables]
        count = max(1, min(tokens // tasks, *(len(x) for x in held_out)))
        width = max(x.shape[1] for x in held_out)
        rows = torch.stack([nn.functional.pad(x[:count], (0, width - x.shape[1])) for x in held_out], 1)
        batches = [
            Batch({"features": some}, torch.full((len(some), len(held_out), tasks), -100), {}, len(some) * tasks)
            for some in rows.split(EVAL_BATCH)
        ]
        names = data.tables[0].tasks if len(data.tables) == 1 else [f"task {k + 1}" for k in range(tasks)]
        asked = torch.arange(tasks).repeat(count)
        stream = Stream({"domain": asked}, {"domain": names})
        groups = torch.full((count * len(held_out) * tasks,), -1)
        return Material(batches, {"": stream}, groups, names, count * tasks, tasks)

    def exhibits(self, models: dict[str, PreTrainedModel], config: TasksConfig, data: TasksData) -> list[Exhibit]:
        """The three models by correlation and by task, and the gates of each task."""
        errors = {which: _errors(models[which], data) for which in NAMES}
        shown: list[Exhibit] = []
        drawn = {p: n for n, p in enumerate(config.data.correlations)} if config.data.source is None else {}
        best = [min(NAMES, key=lambda which: _mean(errors[which][n])) for n in range(len(data.tables))]
        counts = "; ".join(f"{name}: {best.count(which)}" for which, name in NAMES.items())
        said = (
            f"On how many of {len(best)} problems each has the lowest loss: {counts}. All three compute as much for an "
            "answer; a model of each task stores as many networks as there are tasks. It is one seed; another gives "
            "other numbers."
        )
        if len(drawn) > 1:
            lines = {name: [(p, _mean(errors[which][n])) for p, n in drawn.items()] for which, name in NAMES.items()}
            x = "cosine of the tasks’ weights"
            shown.append(Curves("Loss by how related the tasks are", said, x, "1 − R² held out", lines))
        rows: list[list[str | float]] = [
            [f"{table.name}: {task}", *(float(errors[which][n][:, k].nanmean()) for which in NAMES)]
            for n, table in enumerate(data.tables)
            for k, task in enumerate(table.tasks)
        ]
        scale = "1 − R² of each task on held-out rows: 0 is right, 1 is the mean for an answer."
        says = scale if len(drawn) > 1 else f"{scale} {said}"
        shown.append(TableExhibit("Loss by task", says, ["task", *NAMES.values()], rows))
        return [*shown, _gates(models["sparse"], data)]


RECIPE = TasksRecipe()


def _networks(model: nn.Module) -> list[Any]:
    assert isinstance(model, TasksModel)
    return list(model.networks)


@torch.no_grad()
def _answers(model: PreTrainedModel, data: TasksData) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The answers (rows, K) and targets (rows, K) of each table's held-out rows."""
    was_training = model.training
    model.eval()
    for number, network in enumerate(_networks(model)):
        parts = [(network(x.to(model.device)).cpu(), y) for x, y in data.batches(number)]
        yield number, torch.cat([found for found, _ in parts]), torch.cat([y for _, y in parts])
    model.train(was_training)


def _errors(model: PreTrainedModel, data: TasksData) -> list[Tensor]:
    """The squared errors (rows, K) float64 of each table, over the variance of the targets that are held out.

    NaN where nothing is asked.
    """
    found = []
    for _, answers, targets in _answers(model, data):
        mean = targets.nanmean(0)
        variance = (targets - mean).square().nanmean(0).clamp_min(1e-12)
        found.append(((answers - targets).square() / variance).double())
    return found


def _mean(errors: Tensor) -> float:
    """Over rows, then over tasks, which count alike however often they are asked."""
    return float(errors.nanmean(0).mean())


@torch.no_grad()
def _gates(model: PreTrainedModel, data: TasksData) -> HeatMap:
    """The mean weight that each task of each problem gives each expert."""
    panels: dict[str, list[list[float]]] = {}
    names = [f"task {k + 1}" for k in range(max(len(table.tasks) for table in data.tables))]
    experts = 0
    model.eval()
    for (number, _, _), network in zip(_answers(model, data), _networks(model), strict=True):
        table = data.tables[number]
        x, _ = next(data.batches(number))
        network(x.to(model.device))
        routing = network.moe.routing
        task = torch.arange(len(table.tasks)).repeat(len(x))
        experts = routing.num_experts
        weight = torch.zeros(len(table.tasks), experts, dtype=torch.float64)
        cells = (task[routing.token.cpu()], routing.expert.cpu())
        weight.index_put_(cells, routing.weight.cpu().double(), accumulate=True)
        rows = (weight / len(x)).tolist()
        panels[table.name] = rows + [[0.0] * experts] * (len(names) - len(rows))
    return HeatMap(
        "The gates of each task",
        "How much weight each task gives each expert, on average over held-out rows. Rows alike are tasks that use the "
        "experts alike; tasks that have less in common should differ more.",
        names,
        [str(e) for e in range(experts)],
        panels,
        "expert",
        "mean weight of the gate",
    )
