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

from ..analysis.exhibits import Exhibit, Table
from ..analysis.inspect.inspecting import specialisation
from ..analysis.inspect.material import Material, Window, window_material
from ..analysis.ledger import Ledger, ledger
from ..analysis.runs import TEXT
from ..data.documents import MAX_BYTES, built_in_domains, read_domains
from ..data.windows import EvalDomain, TextData, prepare
from ..errors import UserError
from ..hf import sparsify
from ..hf.checkpoints.folders import load_tokenizer
from ..hf.checkpoints.reading import read_json
from ..layers.domain_mixture import DomainMixture, by_domain
from ..moe import moe_layers, tell
from . import mixing, run
from .recipe import Recipe
from .sections import RunConfig, Section

__all__ = [
    "RECIPE",
    "TextConfig",
    "TextRecipe",
    "check_sampling",
    "continued",
    "encode",
    "evaluate",
    "evaluate_mixing",
    "generate",
]

EVAL_BATCH = 32  # windows of a forward


class DataConfig(Section):
    """What to read and how to cut it."""

    source: list[Annotated[str, Field(min_length=1)]] | None = Field(
        None, min_length=1, description="files, folders or one datasets name; none: the built-in text"
    )
    domains: list[Annotated[str, Field(min_length=1)]] | None = Field(
        None, min_length=1, description="of the source, these alone; none: all"
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
        return self.windows(config)

    def windows(self, config: TextConfig, tokenizer: Any = None, more: int = 0) -> TextData:
        """The same in the tokens of a model that there is already, and with so many more held-out windows."""
        d = config.data
        return prepare(
            d.source,
            sequence_length=d.sequence_length,
            num_windows=config.training.steps * self.items_per_step(config),
            tokenizer=tokenizer or d.tokenizer,
            vocab_size=d.vocab_size,
            eval_share=d.eval_share,
            eval_windows=d.eval_windows + more,
            max_bytes=d.max_bytes,
            only=d.domains,
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

    def exhibits(self, models: dict[str, PreTrainedModel], config: TextConfig, data: TextData) -> list[Exhibit]:
        """Where the experts are domains' own (DEMix), the loss under each way of mixing them."""
        return [_mixing_table(self.mixing(models["sparse"], config, data))] if _goes_by_domain(models["sparse"]) else []

    def mixing(self, model: PreTrainedModel, config: TextConfig, data: TextData) -> dict[str, dict[str, float]]:
        """The loss in nats per token of a DEMix model by way of mixing and domain, as `mixing.losses` has it."""
        longer = self.windows(config, data.tokenizer, more=mixing.CACHED)
        first, rest = mixing.set_apart(longer, config.data.eval_windows)
        names = [domain.name for domain in first]
        predict, shown = by_domain(model), {domain.name: domain.input_ids for domain in first}
        each, cache = (mixing.likelihoods(predict, len(names), windows, EVAL_BATCH) for windows in (shown, rest))
        return mixing.losses(each, cache, {name: place for place, name in enumerate(names)})


RECIPE = TextRecipe()


def _goes_by_domain(model: PreTrainedModel) -> bool:
    return any("domain" in layer.decider.required for layer in moe_layers(model).values())


def _mixing_table(found: dict[str, dict[str, float]]) -> Table:
    names = list(found[mixing.OWN])
    rows: list[list[str | float]] = [
        [way, *(f"{by_domain[name]:.4f}" for name in names), f"{sum(by_domain.values()) / len(by_domain):.4f}"]
        for way, by_domain in found.items()
    ]
    return Table(
        "Mixing the experts of the domains",
        "Held-out loss in nats per token by domain, and its plain mean. With the label each text goes to its own "
        "domain’s experts; without, all domains’ experts predict and are weighed by how well each explained the text "
        "before (Gururangan et al. 2021, section 5). A window begins with equal weights, with what the windows before "
        f"it led to, or with what up to {mixing.CACHED} other held-out windows of the domain led to.",
        ["experts", *names, "mean"],
        rows,
    )


def evaluate_mixing(folder: Path) -> dict[str, dict[str, float]]:
    """The loss of a run's sparse model by way of mixing its domains' experts and by domain, in nats per token.

    Raises:
        UserError: where its experts are no domains', and as `run.evaluate_run`.
    """
    recipe, config = run.configuration_of(folder)
    model = run.load_model(folder, "sparse")
    if recipe is not RECIPE or not _goes_by_domain(model):
        raise UserError(f"{folder}: its experts are not of domains; train with sparse.router=domain")
    return RECIPE.mixing(model, config, run.data_of(folder))


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
    domain: str | None = None,
) -> str:
    """Continue a prompt with one of a run's models; temperature 0 takes the likeliest token each time.

    `memory` is what the sparse model's experts may take of it, as "8GiB"; the others are read from its file. Where its
    experts are of domains, those of `domain` continue, or all mixed by what the text so far tells of its domain.

    Raises:
        UserError: for a prompt that is empty or no text, a temperature out of range, a run of another recipe, a domain
            that it has not, and a tokenizer that cannot be loaded.
    """
    if (recipe := run.recipe_of(folder)) is not RECIPE:
        raise UserError(f"{folder} is a run of {recipe.name}, which does not continue text")
    check_sampling(prompt, temperature)
    model: Any = run.load_model(folder, which, memory)
    tokenizer = load_tokenizer(folder / which)
    set_seed(seed)
    ids = encode(tokenizer, prompt, model, folder / which)
    if (labelled := _goes_by_domain(model)) or domain is not None:
        names = [str(one["name"]) for one in read_json(folder / "data.json")["domains"]]
        if not labelled:
            raise UserError(f"{folder / which}: its experts are not of domains; leave --domain out")
        if domain is None:
            found = mixing.continue_ids(DomainMixture(by_domain(model), len(names)), ids, max_new_tokens, temperature)
            return str(tokenizer.decode(found[0], skip_special_tokens=True))
        if domain not in names:
            raise UserError(f"{folder} has no domain {domain!r}; it has {', '.join(names)}")
    with tell(model, **({} if domain is None else {"domain": torch.tensor(names.index(domain))})):
        return continued(model, tokenizer, ids, max_new_tokens, temperature)


def check_sampling(prompt: str, temperature: float) -> None:
    """See that a prompt is text, and a temperature in its range.

    Raises:
        UserError: where not.
    """
    if temperature and not 1e-3 <= temperature <= 1e3:
        raise UserError(f"temperature {temperature} must be 0, or between 0.001 and 1000")
    if any("\ud800" <= letter <= "\udfff" for letter in prompt):
        raise UserError("the prompt is not UTF-8 text")


def encode(tokenizer: Any, prompt: str, model: Any, folder: Path) -> Tensor:
    """The token ids (1, L) int64 of a prompt.

    Raises:
        UserError: where there are none, or the model of the folder does not know them.
    """
    ids: Tensor = tokenizer(prompt, return_tensors="pt").input_ids
    if ids.numel() == 0:
        raise UserError("the prompt is empty; give at least one character")
    if int(ids.max()) >= model.get_input_embeddings().num_embeddings:
        raise UserError(f"{folder}: the tokenizer gives token {int(ids.max())}, which the model does not have")
    return ids.long()


def continued(model: Any, tokenizer: Any, ids: Tensor, max_new_tokens: int, temperature: float) -> str:
    """The text of token ids (1, L) and of those by which a model continues them."""
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    out = model.generate(ids, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.eos_token_id, **sampling)
    return str(tokenizer.decode(out[0], skip_special_tokens=True))
