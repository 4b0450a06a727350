"""Text: a decoder-only language model and its sparse twin, trained to predict the next token of documents."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, set_seed

from ..analysis.inspect.inspecting import specialisation
from ..analysis.inspect.material import Material, Window, window_material
from ..analysis.ledger import Ledger, ledger
from ..analysis.runs import TEXT
from ..data.documents import MAX_BYTES, built_in_domains, read_domains
from ..data.windows import EvalDomain, TextData, prepare
from ..errors import UserError
from ..hf import sparsify
from ..hf.checkpoints.folders import load_tokenizer
from ..moe import tell
from . import run
from .recipe import Recipe
from .sections import RunConfig, Section

__all__ = ["RECIPE", "TextConfig", "TextRecipe", "evaluate", "generate"]

EVAL_BATCH = 32  # windows of a forward


class DataConfig(Section):
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


class ModelConfig(Section):
    """The dense model; the sparse twin differs in its feed-forward blocks alone."""

    family: Literal["llama", "qwen3"] = "llama"
    dim: int = Field(128, ge=8, le=16384)
    layers: int = Field(3, ge=1, le=256)
    heads: int = Field(4, ge=1)
    kv_heads: int | None = Field(None, ge=1)
    hidden: int = Field(264, ge=8, description="width of the dense feed-forward block")


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


class TextRecipe(Recipe[TextConfig, TextData]):
    """Causal language modelling: the loss is the cross-entropy of the next token in nats."""

    name = "text"
    config = TextConfig
    words = TEXT
    reader = "tokenizer"
    knows = ("mask", "token_ids", "sequence", "position", "domain")

    def tells(self, name: str, config: TextConfig) -> bool:
        """What `knows` says, and the language where some document's is known."""
        if name != "language":
            return super().tells(name, config)
        source, most = config.data.source, config.data.max_bytes
        domains = built_in_domains(most) if source is None else read_domains(source, most)
        return any(language is not None for domain in domains for language in domain.languages)

    def prepare(self, config: TextConfig) -> TextData:
        """Windows of the configuration's text."""
        d = config.data
        return prepare(
            d.source,
            sequence_length=d.sequence_length,
            num_windows=config.training.steps * self.items_per_step(config),
            tokenizer=d.tokenizer,
            vocab_size=d.vocab_size,
            eval_share=d.eval_share,
            eval_windows=d.eval_windows,
            max_bytes=d.max_bytes,
            seed=config.seed,
        )

    def build(self, config: TextConfig, data: TextData, sparse: bool) -> PreTrainedModel:
        """A Llama or Qwen3 of the data's vocabulary."""
        return self.build_model(config, len(data.tokenizer), sparse, data.label_counts)

    def build_model(
        self, config: TextConfig, vocab_size: int, sparse: bool, labels: Mapping[str, int] = MappingProxyType({})
    ) -> PreTrainedModel:
        """The dense model, or its sparse twin: the same initial weights outside the feed-forward blocks."""
        m, s = config.model, config.sparse
        shape = AutoConfig.for_model(
            m.family,
            vocab_size=vocab_size,
            hidden_size=m.dim,
            intermediate_size=m.hidden,
            num_hidden_layers=m.layers,
            num_attention_heads=m.heads,
            num_key_value_heads=m.kv_heads or m.heads,
            head_dim=m.dim // m.heads,
            max_position_embeddings=config.data.sequence_length,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
        )
        labels = {"token_ids": vocab_size, **labels}
        router = s.build_router(m.dim, labels)
        hidden = s.hidden or run.expert_width(m.hidden, router, config.data.sequence_length)
        set_seed(config.seed)
        model = AutoModelForCausalLM.from_config(shape)
        if not sparse:
            return model
        options: dict[str, Any] = s.router_options(labels) | {
            "allow_leak": s.allow_leak,
            "backend": s.backend,
        }
        return sparsify(model, s.num_experts, s.router, layers=s.blocks(m.layers), hidden=hidden, **options)

    def evaluate(self, model: PreTrainedModel, data: TextData) -> dict[str, Any]:
        """Nats per token and bits per byte of the held-out windows."""
        return evaluate(model, data.eval)

    def predictions(self, model: PreTrainedModel, data: TextData) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Of the next token."""
        return _predictions(model, data.eval)

    def ledger(self, model: PreTrainedModel, config: TextConfig) -> Ledger:
        """Of windows of the configuration's length."""
        return ledger(model, config.data.sequence_length)

    def items_per_step(self, config: TextConfig) -> int:
        """Windows."""
        return config.training.batch_tokens // config.data.sequence_length

    def tokens_per_step(self, config: TextConfig) -> int:
        """As configured."""
        return config.training.batch_tokens

    def specialisation(self, model: PreTrainedModel, data: TextData) -> dict[str, Any]:
        """Which domains and tokens each expert took of the held-out windows."""
        return specialisation(model, self.material(model, data))

    def material(self, model: PreTrainedModel, data: TextData, tokens: int | None = None) -> Material:
        """Held-out windows, and what is told of them: equal parts of each domain, of so many tokens in all, or all."""
        most = None if tokens is None else max(1, tokens // len(data.eval) // data.eval[0].input_ids.shape[1])
        windows = [Window(ids, domain.name) for domain in data.eval for ids in domain.input_ids[:most].tolist()]
        domains = [domain.name for domain in data.eval]
        material = window_material(model, data.tokenizer, windows, domains, batch_size=EVAL_BATCH)
        told = {
            name: torch.cat([domain.labels[name][:most] for domain in data.eval]).split(EVAL_BATCH)
            for name in data.label_counts
        }
        batches = [
            replace(batch, told={name: parts[i] for name, parts in told.items()})
            for i, batch in enumerate(material.batches)
        ]
        return replace(material, batches=batches)


RECIPE = TextRecipe()


def evaluate(model: PreTrainedModel, domains: list[EvalDomain], batch_size: int = EVAL_BATCH) -> dict[str, Any]:
    """The held-out loss (nats per token) and bits per byte, in all and by domain.

    All domains count by their tokens. The mode of the model is restored.
    """
    was_training = model.training
    model.eval()
    sums = {domain.name: [0.0, 0] for domain in domains}
    for name, logits, labels in _predictions(model, domains, batch_size):
        sums[name][0] += float(torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum"))
        sums[name][1] += labels.numel()
    model.train(was_training)
    found = {
        domain.name: {"loss": total / count, "bits_per_byte": total / math.log(2) / domain.predicted_bytes}
        for domain in domains
        for total, count in [sums[domain.name]]
    }
    nats, tokens = (sum(column) for column in zip(*sums.values(), strict=True))
    size = sum(domain.predicted_bytes for domain in domains)
    return {"loss": nats / tokens, "bits_per_byte": nats / math.log(2) / size, "domains": found}


@torch.no_grad()
def _predictions(
    model: PreTrainedModel, domains: list[EvalDomain], batch_size: int = 32
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Of the next token in the windows of each domain, a batch at a time: its name, logits and the right tokens."""
    for domain in domains:
        for start in range(0, len(domain.input_ids), batch_size):
            some = slice(start, start + batch_size)
            ids = domain.input_ids[some].to(model.device)
            with tell(model, **{name: label[some].to(model.device) for name, label in domain.labels.items()}):
                logits = model(input_ids=ids).logits[:, :-1]
            yield domain.name, logits.flatten(0, 1), ids[:, 1:].flatten()


def generate(
    folder: Path,
    which: str,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    memory: str | None = None,
) -> str:
    """Continue a prompt with one of a run's models; temperature 0 takes the likeliest token each time.

    `memory` is what the sparse model's experts may take of it, as "8GiB"; the others are read from its file.

    Raises:
        UserError: for a prompt that is empty or no text, a temperature out of range, a run of another recipe, and a
            tokenizer that cannot be loaded.
    """
    if temperature and not 1e-3 <= temperature <= 1e3:
        raise UserError(f"temperature {temperature} must be 0, or between 0.001 and 1000")
    if any("\ud800" <= letter <= "\udfff" for letter in prompt):
        raise UserError("the prompt is not UTF-8 text")
    if (recipe := run.recipe_of(folder)) is not RECIPE:
        raise UserError(f"{folder} is a run of {recipe.name}, which does not continue text")
    model: Any = run.load_model(folder, which, memory)
    tokenizer = load_tokenizer(folder / which)
    set_seed(seed)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    if ids.numel() == 0:
        raise UserError("the prompt is empty; give at least one character")
    if int(ids.max()) >= model.get_input_embeddings().num_embeddings:
        raise UserError(f"{folder / which}: the tokenizer gives token {int(ids.max())}, which the model does not have")
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    out = model.generate(ids.long(), max_new_tokens=max_new_tokens, pad_token_id=tokenizer.eos_token_id, **sampling)
    return str(tokenizer.decode(out[0], skip_special_tokens=True))
