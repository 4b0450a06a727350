"""The sections of a recipe's configuration: data, model, experts, training."""

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
from ..data.documents import MAX_BYTES
from ..routers import Router
from ..routers.registry import option_types

__all__ = [
    "DataConfig",
    "ModelConfig",
    "ParallelConfig",
    "RunConfig",
    "SparseConfig",
    "TextConfig",
    "TrainingConfig",
    "nearest",
]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        wanted = str(cls.model_fields[str(info.field_name)].annotation)
        if isinstance(value, bool) and "bool" not in wanted:
            raise ValueError("must not be true or false")
        return value


class DataConfig(_Section):
    """What to read and how to cut it."""

    source: list[Annotated[str, Field(min_length=1)]] | None = Field(
        None, min_length=1, description="files, folders or one datasets name; none: the built-in text"
    )
    tokenizer: Literal["bpe", "bytes"] = "bpe"
    vocab_size: int = Field(1024, ge=257, le=65536, description="of the BPE")
    sequence_length: int = Field(128, ge=8, le=8192, description="tokens")
    eval_share: float = Field(0.05, gt=0, lt=0.5, description="of each domain's documents, held out")
    eval_windows: int = Field(48, ge=1, description="held-out windows of each domain")
    max_bytes: int = Field(MAX_BYTES, ge=1000, description="of each domain")


class ModelConfig(_Section):
    """The dense model; the sparse twin differs in its feed-forward blocks alone."""

    family: Literal["llama", "qwen3"] = "llama"
    dim: int = Field(128, ge=8, le=16384)
    layers: int = Field(3, ge=1, le=256)
    heads: int = Field(4, ge=1)
    kv_heads: int | None = Field(None, ge=1)
    hidden: int = Field(264, ge=8, description="width of the dense feed-forward block")


Value = bool | int | float | str | None


class SparseConfig(_Section):
    """The experts that take the place of the dense blocks."""

    num_experts: int = Field(24, ge=1, le=4096)
    router: str = "topk"
    top_k: int | None = Field(None, ge=1, description="experts of a token; none: the router's own default")
    every: int = Field(1, ge=1)
    hidden: int | None = Field(None, ge=1, description="width of one expert; none: equal FLOPs, the router's included")
    backend: str = "auto"
    options: dict[str, Value | list[Value]] = Field({}, description="further options of the router")
    allow_leak: bool = Field(False, description="insist on a router that lets later tokens change earlier ones")

    @field_validator("router")
    @classmethod
    def _known_router(cls, name: str) -> str:
        return _one_of(name, routers.names())

    @field_validator("backend")
    @classmethod
    def _known_backend(cls, name: str) -> str:
        return _one_of(name, ["auto", *experts.backend_names()])

    @model_validator(mode="after")
    def _fits(self) -> SparseConfig:
        known = option_types(self.router)
        for key in self.options:
            if key not in known:
                raise ValueError(f"router {self.router!r} has no option {key!r}; {nearest(key, known)}")
            if wrong := _wrong_type(known[key], self.options[key]):
                raise ValueError(
                    f"router {self.router!r}: an option cannot be used: {key}={self.options[key]!r}: {wrong}"
                )
        if "vocab_size" in self.options:
            raise ValueError(f"router {self.router!r}: vocab_size is that of the data's tokenizer; leave it out")
        try:
            router = self.build_router(8, 257)
        except TypeError as error:  # an option of another type
            raise ValueError(f"router {self.router!r}: an option cannot be used: {error}") from None
        if router.leak and not self.allow_leak:
            raise ValueError(f"router {self.router!r}: {router.leak}; set sparse.allow_leak=true if you insist")
        return self

    def router_options(self, vocab_size: int, labels: Mapping[str, int] = MappingProxyType({})) -> dict[str, Any]:
        """What the router is created with, for so many token ids and so many values of each label of the tokens.

        Where there are more values than experts, these take turns.
        """
        options: dict[str, Any] = dict(self.options)
        if self.top_k is not None:
            options["top_k"] = self.top_k
        known = routers.options(self.router)
        if "vocab_size" in known:
            options["vocab_size"] = vocab_size
        values = max((labels.get(need, 0) for need in routers.find(self.router).needs), default=0)
        if "experts" in known and values > self.num_experts:
            options.setdefault("experts", [value % self.num_experts for value in range(values)])
        return options

    def build_router(self, dim: int, vocab_size: int, labels: Mapping[str, int] = MappingProxyType({})) -> Router:
        """The router of one layer, as the sparse model will have it."""
        return routers.create(self.router, dim, self.num_experts, **self.router_options(vocab_size, labels))


class TrainingConfig(_Section):
    """How long and how to train; the same for both models."""

    steps: int = Field(700, ge=1)
    batch_tokens: int = Field(2048, ge=8, description="tokens of one optimizer step")
    learning_rate: float = Field(3e-3, gt=0, le=1)
    warmup: int = Field(100, ge=0, description="steps")
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    weight_decay: float = Field(0.1, ge=0, le=1)
    beta2: float = Field(0.95, gt=0, lt=1)
    max_grad_norm: float = Field(1.0, gt=0)
    eval_every: int = Field(100, ge=1, description="steps")
    log_every: int = Field(10, ge=1, description="steps")
    save_every: int = Field(200, ge=1, description="steps")
    threads: int | None = Field(None, ge=1, le=1024)


class ParallelConfig(_Section):
    """How many processes train, and how the experts are among them."""

    processes: int | None = Field(None, ge=1, le=1024, description="started here; none: one, or what torchrun started")
    expert_parallel: int = Field(1, ge=1, le=1024, description="processes that share the experts among them")
    timeout: float = Field(600.0, gt=0, description="seconds that a process waits for the others")


class RunConfig(_Section):
    """What every recipe's configuration has; the others add `data`, `model` and what else they need."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="the run's folder in `out`")
    out: str = "runs"
    seed: int = Field(0, ge=0, lt=2**31)
    sparse: SparseConfig = SparseConfig()
    training: TrainingConfig = TrainingConfig()
    parallel: ParallelConfig = ParallelConfig()

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


class TextConfig(RunConfig):
    """The configuration of `shunter train text`."""

    name: str = Field("text", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="the run's folder in `out`")
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()

    @model_validator(mode="after")
    def _fits(self) -> TextConfig:
        m, t, d = self.model, self.training, self.data
        if m.dim % (2 * m.heads):
            raise ValueError(f"model.dim {m.dim} must be a multiple of 2 * model.heads ({2 * m.heads})")
        if m.kv_heads is not None and m.heads % m.kv_heads:
            raise ValueError(f"model.heads {m.heads} must be a multiple of model.kv_heads {m.kv_heads}")
        if t.batch_tokens % d.sequence_length:
            raise ValueError(
                f"training.batch_tokens {t.batch_tokens} must be a multiple of data.sequence_length {d.sequence_length}"
            )
        if self.sparse.hidden is None and 3 * m.hidden <= self.sparse.num_experts:
            raise ValueError(
                f"sparse.num_experts {self.sparse.num_experts}: the router alone costs more than the dense block of "
                f"model.hidden {m.hidden}; set sparse.hidden or fewer experts"
            )
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
