"""The sections that the configuration of every recipe has: experts, training."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PydanticUserError,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from .. import experts, routers
from ..errors import UserError
from ..routers import Router
from ..routers.registry import option_types

__all__ = [
    "ANY_LABELS",
    "LayerConfig",
    "ParallelConfig",
    "RunConfig",
    "Section",
    "SparseConfig",
    "TrainingConfig",
    "Value",
    "nearest",
]


class Section(BaseModel):
    """A part of a configuration: no key but those it names, no infinity, and true is no number."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        wanted = str(cls.model_fields[str(info.field_name)].annotation)
        if isinstance(value, bool) and "bool" not in wanted:
            raise ValueError("must not be true or false")
        return value


ANY_LABELS = {"token_ids": 257, "task": 2, "embedding": 8}
"""Where a router is built before data are read: what it cannot do without, a vocabulary, tasks, a width."""

Value = bool | int | float | str | None


class LayerConfig(Section):
    """What becomes sparse, and what a layer has besides experts that are alike: arguments of `shunter.sparsify`."""

    where: list[Literal["feed_forward", "attention", "heads"]] = Field(
        ["feed_forward"], min_length=1, description="what becomes sparse; the first alone or beside one of the others"
    )
    pyramid: bool = Field(False, description="twice as many experts in the last two sparse blocks")
    init: Literal["scratch", "copy"] = Field("scratch", description="copy: experts begin as the dense block, as wide")
    expert_weights: Literal["separate", "residual"] = Field(
        "separate", description="residual: a core, and what differs"
    )
    num_shared_experts: int = Field(0, ge=0, le=64, description="that every token takes besides")
    residual: bool = Field(False, description="a dense branch, mixed with the experts by a learned softmax")
    extra_mlp: bool = Field(False, description="a dense network behind the experts")
    operations: list[str] | None = Field(None, min_length=1, description="of the experts, which take them in turn")
    cost_loss: float = Field(0.0, ge=0, description="coefficient of what a token is expected to spend")

    @field_validator("where", mode="before")
    @classmethod
    def _is_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    def options(self, num_experts: int) -> dict[str, Any]:
        """Those of `shunter.sparsify`."""
        options = self.model_dump(exclude={"pyramid"})
        options |= {"where": ", ".join(self.where), "placement": "pyramid" if self.pyramid else ""}
        if self.operations is not None:
            options["operations"] = [self.operations[i % len(self.operations)] for i in range(num_experts)]
        return options

    @property
    def has_width(self) -> bool:
        """Whether the width of an expert can be chosen."""
        return "feed_forward" in self.where and self.init != "copy"


class SparseConfig(Section):
    """The experts that take the place of the dense blocks."""

    num_experts: int = Field(24, ge=1, le=4096, description="of each sparse layer")
    router: str = Field("topk", description="shunter routers lists them")
    top_k: int | None = Field(None, ge=1, description="experts of a token; none: the router's own default")
    every: int = Field(1, ge=1, description="sparsify every n-th block, the n-th first")
    last: int | None = Field(None, ge=1, description="of the blocks that every n-th leaves, the last n; none: all")
    hidden: int | None = Field(None, ge=1, description="width of one expert; none: equal FLOPs, the router's included")
    backend: str = Field("auto", description="what computes the experts; auto chooses by device, dtype and shape")
    options: dict[str, Value | list[Value]] = Field({}, description="further options of the router")
    allow_leak: bool = Field(False, description="insist on a router that lets later tokens change earlier ones")

    @field_validator("router")
    @classmethod
    def _known_router(cls, name: Any) -> Any:
        if name == []:
            raise ValueError("name at least one")
        for each in name if isinstance(name, list) else [name]:
            if isinstance(each, dict) and len(each) != 1:
                raise ValueError(f"{each} must be a router and its options, as in {{topk: {{top_k: 1}}}}")
            _one_of(each if isinstance(each, str) else next(iter(each)), routers.names())
        return name

    @field_validator("backend")
    @classmethod
    def _known_backend(cls, name: str) -> str:
        return _one_of(name, ["auto", *experts.backend_names()])

    def in_turn(self) -> list[SparseConfig]:
        """The settings with one router each, which the sparse blocks take in turn."""
        return [self]

    @model_validator(mode="after")
    def _fits(self) -> SparseConfig:
        for one in self.in_turn():
            one._options_fit()
        return self

    def _options_fit(self) -> None:
        known = option_types(self.router)
        for key in self.options:
            if key not in known:
                raise ValueError(f"router {self.router!r} has no option {key!r}; {nearest(key, known)}")
            if wrong := _wrong_type(known[key], self.options[key]):
                raise ValueError(
                    f"router {self.router!r}: an option cannot be used: {key}={self.options[key]!r}: {wrong}"
                )
        if "vocab_size" in self.options:
            raise ValueError(f"router {self.router!r}: vocab_size is that of the data; leave it out")
        try:
            self.build_router(8, ANY_LABELS)
        except TypeError as error:  # an option of another type
            raise ValueError(f"router {self.router!r}: an option cannot be used: {error}") from None

    def leave_room(self, matrices: int, hidden: int, name: str = "model.hidden") -> None:
        """See that a router costs a token less than the dense block does, so that experts at equal FLOPs have a width.

        Args:
            matrices: how many the dense block has.
            hidden: its width.
            name: what the setting of it is called.

        Raises:
            ValueError: where the router alone costs more, and no width of the experts is set.
        """
        if self.hidden is None and matrices * hidden <= self.num_experts:
            raise ValueError(
                f"sparse.num_experts {self.num_experts}: the router alone costs more than the dense block of "
                f"{name} {hidden}; set sparse.hidden or fewer experts"
            )

    def leak(self, evaluation: bool = False) -> str | None:
        """How a router lets later tokens change earlier ones, in training or evaluation; None where none does."""
        built = (one.build_router(8, ANY_LABELS).train(not evaluation) for one in self.in_turn())
        return next((router.leak for router in built if router.leak), None)

    def blocks(self, layers: int) -> list[int]:
        """Which of so many feed-forward blocks are sparse, from 0: every n-th, and of these the last.

        Raises:
            UserError: where that is none.

        Source: Riquelme et al. 2021, section 2.3 ("every n", "last n").
        """
        chosen = list(range(layers))[self.every - 1 :: self.every]
        if not chosen:
            raise UserError(f"sparse.every={self.every} leaves no block of {layers} to replace")
        return chosen if self.last is None else chosen[-self.last :]

    def router_options(self, labels: Mapping[str, int] = MappingProxyType({})) -> dict[str, Any]:
        """What the router is created with, for so many values of each label of the tokens: token_ids, domain, ….

        Where there are more values than experts, these take turns.
        """
        options: dict[str, Any] = dict(self.options)
        known = routers.options(self.router)
        if self.top_k is not None:
            options["num_hashes" if "num_hashes" in known else "top_k"] = self.top_k
        if "vocab_size" in known:
            options["vocab_size"] = labels.get("token_ids")
        if "num_tasks" in known:
            options.setdefault("num_tasks", labels.get("task"))
        if "embedding_dim" in known:
            options.setdefault("embedding_dim", labels.get("embedding"))
        if "num_domains" in known and "domain" in labels:
            options.setdefault("num_domains", labels["domain"])
        values = max((labels.get(need, 0) for need in routers.find(self.router).needs), default=0)
        if "experts" in known and values > self.num_experts:
            options.setdefault("experts", [value % self.num_experts for value in range(values)])
        return options

    def build_router(self, dim: int, labels: Mapping[str, int] = MappingProxyType({})) -> Router:
        """The router of one layer, as the sparse model will have it."""
        return routers.create(self.router, dim, self.num_experts, **self.router_options(labels))


class TrainingConfig(Section):
    """How long and how to train; the same for both models."""

    steps: int = Field(700, ge=1, description="of the optimizer")
    batch_tokens: int = Field(2048, ge=8, description="tokens of one optimizer step")
    learning_rate: float = Field(3e-3, gt=0, le=1, description="at its highest")
    warmup: int = Field(100, ge=0, description="steps in which the learning rate rises")
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = Field(
        "cosine", description="of the learning rate after the warm-up"
    )
    weight_decay: float = Field(0.1, ge=0, le=1, description="of AdamW")
    beta2: float = Field(0.95, gt=0, lt=1, description="of AdamW")
    max_grad_norm: float = Field(1.0, gt=0, description="to which gradients are clipped")
    eval_every: int = Field(100, ge=1, description="steps from one evaluation to the next")
    log_every: int = Field(10, ge=1, description="steps from one line of metrics to the next")
    save_every: int = Field(200, ge=1, description="steps from one checkpoint to the next")
    threads: int | None = Field(None, ge=1, le=1024, description="of torch; none: as many as torch takes")

    @model_validator(mode="after")
    def _ends(self) -> TrainingConfig:
        if self.steps * self.batch_tokens >= 2**50:
            raise ValueError(f"steps {self.steps} of batch_tokens {self.batch_tokens} each would never end")
        return self


class ParallelConfig(Section):
    """How many processes train, and how the experts are among them."""

    processes: int | None = Field(None, ge=1, le=1024, description="started here; none: one, or what torchrun started")
    expert_parallel: int = Field(1, ge=1, le=1024, description="processes that share the experts among them")
    overlap_degree: int = Field(1, ge=1, le=64, description="in how many pieces rows travel to their experts")
    timeout: float = Field(600.0, gt=0, le=10_000_000, description="seconds that a process waits for the others")
    restarts: int = Field(0, ge=0, le=1000, description="how often to go on from a checkpoint when a process is lost")


RunName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="the run's folder in `out`")]


class RunConfig(Section):
    """What every recipe's configuration has; the others add `data`, `model` and what else they need."""

    name: RunName = "run"
    out: str = Field("runs", description="the folder of runs")
    seed: int = Field(0, ge=0, lt=2**31, description="of initial weights and of the order of the data")
    sparse: SparseConfig = SparseConfig()
    training: TrainingConfig = TrainingConfig()
    parallel: ParallelConfig = ParallelConfig()

    @property
    def causal(self) -> bool:
        """Whether later tokens must not change earlier ones."""
        return True

    @model_validator(mode="after")
    def _divides(self) -> RunConfig:
        share, processes = self.parallel.expert_parallel, self.parallel.processes
        if self.sparse.num_experts % share:
            raise ValueError(
                f"parallel.expert_parallel {share} must divide sparse.num_experts {self.sparse.num_experts}"
            )
        if processes is not None and processes % share:
            raise ValueError(f"parallel.expert_parallel {share} must divide parallel.processes {processes}")
        return self

    @model_validator(mode="after")
    def _keeps_order(self) -> RunConfig:
        if self.causal and not self.sparse.allow_leak and (leak := self.sparse.leak()):
            raise ValueError(f"sparse: router {self.sparse.router!r}: {leak}; set sparse.allow_leak=true if you insist")
        return self


def _wrong_type(kind: Any, value: Any) -> str:
    """What is wrong with a value of an option of this type, in words; empty where nothing is."""
    try:
        TypeAdapter(kind, config=ConfigDict(strict=True, arbitrary_types_allowed=True)).validate_python(value)
    except ValidationError as error:
        return "; or ".join(dict.fromkeys(each["msg"] for each in error.errors()))
    except PydanticUserError:  # a type that pydantic does not know
        return ""
    return ""


def _one_of(name: str, known: list[str]) -> str:
    if name not in known:
        raise ValueError(f"unknown; {nearest(name, known)}")
    return name


def nearest(given: str, known: Any, section: str = "") -> str:
    """What was meant by a name that is unknown, in words: the nearest known one, or all."""
    near = difflib.get_close_matches(given, list(known), n=1)
    prefix = f"{section}." if section else ""
    return f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(sorted(known))}"
