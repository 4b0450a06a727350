"""Text: a language model and its sparse twin: a decoder of the next token, an encoder of hidden ones, or both (T5)."""

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
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PretrainedConfig,
    PreTrainedModel,
    set_seed,
)

from .. import routers
from ..analysis.exhibits import Exhibit, Table
from ..analysis.inspect.inspecting import specialisation
from ..analysis.inspect.material import Material, Window, window_material
from ..analysis.inspect.recording import record
from ..analysis.inspect.stacks import stack_information, stack_table
from ..analysis.ledger import Ledger, ledger
from ..analysis.runs import TEXT, Words
from ..data.corruption import MASK, PAD, Corruption, corrupt, sentinels, span_counts
from ..data.documents import MAX_BYTES, built_in_domains, read_domains
from ..data.windows import EvalDomain, TextData, prepare
from ..errors import UserError
from ..hf import sparsify
from ..hf.checkpoints.folders import load_tokenizer
from ..hf.checkpoints.reading import read_json
from ..hf.tokens import takes_cache
from ..layers.domain_mixture import DomainMixture, by_domain
from ..moe import moe_layers, tell
from . import mixing, run
from .recipe import Recipe
from .sections import LayerConfig, RunConfig, RunName, Section, SparseConfig, Value, nearest

__all__ = [
    "RECIPE",
    "Stacks",
    "TextConfig",
    "TextRecipe",
    "check_sampling",
    "continued",
    "encode",
    "evaluate",
    "evaluate_mixing",
    "generate",
    "t5_shape",
]

EVAL_BATCH = 32  # windows of a forward

Kind = Literal["decoder", "encoder", "encoder-decoder"]
Stacks = Literal["both", "encoder", "decoder"]

# The families of each kind of model, the default first.
_FAMILIES = {"decoder": ("llama", "qwen3"), "encoder": ("modernbert", "bert"), "encoder-decoder": ("t5",)}

_WORDS = {
    "decoder": TEXT,
    "encoder": replace(
        TEXT,
        intro="Two encoders read the same text in the same order, three tokens in twenty of it hidden, learning to "
        "guess these from what stands before and behind (masked language modelling).",
        loss="nats/hidden token",
        right="the right hidden token",
    ),
    "encoder-decoder": replace(
        TEXT,
        intro="Two encoder-decoders read the same text in the same order, spans of it replaced by sentinel tokens, "
        "learning to write these spans down (T5’s span corruption).",
        loss="nats/written token",
        right="the right token to write",
    ),
}


class DataConfig(Section):
    """What to read and how to cut it."""

    source: list[Annotated[str, Field(min_length=1)]] | None = Field(
        None, min_length=1, description="files, folders or one datasets name; none: the built-in text"
    )
    domains: list[Annotated[str, Field(min_length=1)]] | None = Field(
        None, min_length=1, description="of the source, these alone; none: all"
    )
    tokenizer: Literal["bpe", "bytes"] = Field("bpe", description="one that is trained on the text, or its bytes")
    vocab_size: int = Field(1024, ge=257, le=65536, description="of the BPE")
    sequence_length: int = Field(128, ge=8, le=8192, description="tokens of a window")
    eval_share: float = Field(0.05, gt=0, lt=0.5, description="of each domain's documents, held out")
    eval_windows: int = Field(48, ge=1, description="held-out windows of each domain")
    max_bytes: int = Field(MAX_BYTES, ge=1000, description="that are read of each domain")


class ModelConfig(Section):
    """The dense model; the sparse twin differs in its feed-forward blocks alone."""

    kind: Kind = Field("decoder", description="what is learned: the next token, hidden tokens, spans left out")
    family: Literal["llama", "qwen3", "modernbert", "bert", "t5"] | None = Field(
        None, description="architecture of transformers; none: by kind"
    )
    dim: int = Field(128, ge=8, le=16384, description="d, width of the hidden states")
    layers: int = Field(3, ge=1, le=256, description="blocks of each stack")
    heads: int = Field(4, ge=1, description="of attention")
    kv_heads: int | None = Field(None, ge=1, description="of keys and values; none: as many as heads")
    hidden: int = Field(264, ge=8, description="width of the dense feed-forward block")

    sparse_stacks: Stacks = Field("both", description="of an encoder-decoder: where the experts are")

    @property
    def architecture(self) -> str:
        """The family, or the default one of the kind."""
        return self.family or _FAMILIES[self.kind][0]

    @property
    def gated(self) -> bool:
        """Whether the feed-forward block has a gate."""
        return self.architecture != "bert"


_Routers = str | list[str | dict[str, dict[str, Value | list[Value]]]]


class TextSparse(SparseConfig):
    """Experts in any kind of layer, and another router in each block."""

    num_experts: int = Field(64, ge=1, le=4096)
    router: _Routers = Field(  # type: ignore[assignment]  # wider, and read by `in_turn` alone
        [{"bigram_hash": {"num_hashes": 2}}, {"hash": {"num_hashes": 2}}, "topk"],
        description="of all sparse blocks; or several, with options of their own, which the blocks take in turn",
    )
    layer: LayerConfig = LayerConfig()

    def in_turn(self) -> list[SparseConfig]:
        """Each router's settings, with those of the options that it knows."""
        if isinstance(self.router, str):
            return [self]
        turns: list[SparseConfig] = []
        for one in self.router:
            name, of_its_own = (one, {}) if isinstance(one, str) else next(iter(one.items()))
            known = routers.options(name)
            own = {key: value for key, value in self.options.items() if key in known} | of_its_own
            top_k = self.top_k if {"top_k", "num_hashes"} & set(known) else None
            turns.append(self.model_copy(update={"router": name, "options": own, "top_k": top_k}))
        return turns

    @model_validator(mode="after")
    def _some_router_knows(self) -> TextSparse:
        turns = self.in_turn()
        known = {key for one in turns for key in routers.options(one.router)}
        if unknown := [key for key in self.options if key not in known]:
            names = " nor ".join(repr(one.router) for one in turns)
            raise ValueError(f"router {names} has no option {unknown[0]!r}; {nearest(unknown[0], known)}")
        return self

    @model_validator(mode="after")
    def _has_width(self) -> TextSparse:
        if self.hidden is not None and not self.layer.has_width:
            raise ValueError(
                f"sparse.hidden is the width of an expert, which sparse.layer.where={', '.join(self.layer.where)} with "
                f"init={self.layer.init} does not leave to choose; leave it out"
            )
        return self


class TextConfig(RunConfig):
    """The configuration of `shunter train text`."""

    name: RunName = "text"
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    sparse: TextSparse = TextSparse()

    @property
    def causal(self) -> bool:
        """Of an encoder not; of an encoder-decoder its decoder is."""
        m = self.model
        return m.kind != "encoder" and not (m.kind == "encoder-decoder" and m.sparse_stacks == "encoder")

    @property
    def lengths(self) -> tuple[int, int]:
        """The tokens that a window has in the first stack, and in the decoder behind an encoder."""
        length = self.data.sequence_length
        if self.model.kind != "encoder-decoder":
            return length, 0
        hidden, spans = span_counts(length)
        return length - hidden + spans, hidden + spans + 1

    @model_validator(mode="after")
    def _fits(self) -> TextConfig:
        m, t, d = self.model, self.training, self.data
        if m.architecture not in _FAMILIES[m.kind]:
            raise ValueError(
                f"model.family {m.family} is no {m.kind}; model.kind={m.kind} has {', '.join(_FAMILIES[m.kind])}"
            )
        if m.sparse_stacks != "both" and m.kind != "encoder-decoder":
            raise ValueError(f"model.sparse_stacks is for an encoder-decoder; model.kind is {m.kind}")
        if m.kv_heads is not None and m.kind != "decoder":
            raise ValueError(f"model.kv_heads is for a decoder; model.kind is {m.kind}")
        if m.dim % (2 * m.heads):
            raise ValueError(f"model.dim {m.dim} must be a multiple of 2 * model.heads ({2 * m.heads})")
        if m.kv_heads is not None and m.heads % m.kv_heads:
            raise ValueError(f"model.heads {m.heads} must be a multiple of model.kv_heads {m.kv_heads}")
        if t.batch_tokens % d.sequence_length:
            raise ValueError(
                f"training.batch_tokens {t.batch_tokens} must be a multiple of data.sequence_length {d.sequence_length}"
            )
        self.sparse.leave_room(3 if m.gated else 2, m.hidden)
        return self


class TextRecipe(Recipe[TextConfig, TextData]):
    """Language modelling: the loss is the cross-entropy of what is to be guessed, in nats."""

    name = "text"
    config = TextConfig
    words = TEXT
    reader = "tokenizer"
    knows = ("mask", "token_ids", "sequence", "position", "domain")

    def words_of(self, config: TextConfig) -> Words:
        """By the kind of model."""
        return _WORDS[config.model.kind]

    def tells(self, name: str, config: TextConfig) -> bool:
        """What `knows` says, and the language where some document's is known."""
        if name != "language" or config.model.kind == "encoder-decoder":  # whose stacks see other tokens
            return super().tells(name, config)
        source, most = config.data.source, config.data.max_bytes
        domains = built_in_domains(most) if source is None else read_domains(source, most)
        return any(language is not None for domain in domains for language in domain.languages)

    def prepare(self, config: TextConfig) -> TextData:
        """Windows of the configuration's text, as the kind of model sees them."""
        found, kind = self.windows(config), config.model.kind
        if kind == "decoder":
            return found
        way = Corruption("hidden" if kind == "encoder" else "spans", found.tokenizer, config.data.sequence_length)
        return corrupt(found, way, config.seed)

    def windows(self, config: TextConfig, tokenizer: Any = None, more: int = 0) -> TextData:
        """Windows of the text, in the tokens of a model that there is already, and with so many more held-out ones."""
        d = config.data
        return prepare(
            d.source,
            sequence_length=d.sequence_length,
            num_windows=config.training.steps * self.items_per_step(config),
            tokenizer=tokenizer or d.tokenizer,
            vocab_size=d.vocab_size,
            special=_special(config),
            eval_share=d.eval_share,
            eval_windows=d.eval_windows + more,
            max_bytes=d.max_bytes,
            only=d.domains,
            seed=config.seed,
        )

    def build(self, config: TextConfig, data: TextData, sparse: bool) -> PreTrainedModel:
        """A model of the data's vocabulary."""
        return self.build_model(config, len(data.tokenizer), sparse, data.label_counts)

    def build_model(
        self, config: TextConfig, vocab_size: int, sparse: bool, labels: Mapping[str, int] = MappingProxyType({})
    ) -> PreTrainedModel:
        """The dense model, or its sparse twin: the same initial weights outside the feed-forward blocks."""
        m, s = config.model, config.sparse
        shape = _shape(config, vocab_size)
        labels = {"token_ids": vocab_size, **labels}
        hidden: int | list[int] | None = s.hidden
        if sparse and hidden is None and s.layer.has_width:
            hidden = self._widths(config, vocab_size, labels)
        set_seed(config.seed)
        model = _AUTO[m.kind].from_config(shape)
        if not sparse:
            return model
        turns = s.in_turn()
        options: dict[str, Any] = s.layer.options(s.num_experts)
        options |= {
            "options": [one.router_options(labels) for one in turns],
            "allow_leak": s.allow_leak,
            "backend": s.backend,
            "within": "" if m.sparse_stacks == "both" else m.sparse_stacks,
        }
        names = [one.router for one in turns]
        return sparsify(model, s.num_experts, names, layers=s.blocks(m.layers), hidden=hidden, **options)

    def _widths(self, config: TextConfig, vocab_size: int, labels: Mapping[str, int]) -> int | list[int] | None:
        """The width of an expert at which both twins cost the same; of each router, where the layers are plain."""
        m, s = config.model, config.sparse
        if s.layer == LayerConfig():
            made = [one.build_router(m.dim, labels) for one in s.in_turn()]
            return [run.expert_width(m.hidden, router, config.lengths[0], gated=m.gated) for router in made]

        def flops(hidden: int, sparse: bool = True) -> float:
            own = config.model_copy(update={"sparse": s.model_copy(update={"hidden": hidden})})
            with torch.device("meta"):
                model = self.build_model(own, vocab_size, sparse, labels)
            return self.ledger(model, config).flops_per_token

        return run.width_at(flops, flops(1, sparse=False))

    def evaluate(self, model: PreTrainedModel, data: TextData) -> dict[str, Any]:
        """Nats per token and bits per byte of the held-out windows."""
        return evaluate(model, data.eval)

    def predictions(self, model: PreTrainedModel, data: TextData) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Of each token that is to be predicted."""
        return _predictions(model, data.eval)

    def ledger(self, model: PreTrainedModel, config: TextConfig) -> Ledger:
        """Of windows of the configuration's length."""
        length, target_length = config.lengths
        return ledger(model, length, target_length=target_length or None)

    def items_per_step(self, config: TextConfig) -> int:
        """Windows."""
        return config.training.batch_tokens // config.data.sequence_length

    def tokens_per_step(self, config: TextConfig) -> int:
        """As configured; of an encoder-decoder those of both stacks, which have the sentinels besides."""
        return self.items_per_step(config) * sum(config.lengths)

    def specialisation(self, model: PreTrainedModel, data: TextData) -> dict[str, Any]:
        """Which domains and tokens each expert took of the held-out windows."""
        return specialisation(model, self.material(model, data))

    def material(self, model: PreTrainedModel, data: TextData, tokens: int | None = None) -> Material:
        """Held-out windows, and what is told of them: equal parts of each domain, of so many tokens in all, or all."""
        first = data.eval[0]
        seen = None if first.targets is None else first.input_ids.shape[1]
        most = None if tokens is None else max(1, tokens // len(data.eval) // first.input_ids.shape[1])
        windows = [
            Window(ids, domain.name)
            for domain in data.eval
            for ids in torch.cat([domain.input_ids, *([] if domain.targets is None else [domain.targets])], 1)[
                :most
            ].tolist()
        ]
        domains = [domain.name for domain in data.eval]
        material = window_material(model, data.tokenizer, windows, domains, batch_size=EVAL_BATCH, seen=seen)
        told = {
            name: torch.cat([domain.labels[name][:most] for domain in data.eval]).split(EVAL_BATCH)
            for name in first.labels
        }
        batches = [
            replace(batch, told={name: parts[i] for name, parts in told.items()})
            for i, batch in enumerate(material.batches)
        ]
        return replace(material, batches=batches)

    def exhibits(self, models: dict[str, PreTrainedModel], config: TextConfig, data: TextData) -> list[Exhibit]:
        """What decides a token's expert, where there is an encoder; the loss by way of mixing experts of domains."""
        if config.model.kind != "decoder":
            material = self.material(models["sparse"], data)
            recording = record(models["sparse"], material, lambda batches, what, total: batches)
            return [stack_table(stack_information(recording, material))]
        return [_mixing_table(self.mixing(models["sparse"], config, data))] if _goes_by_domain(models["sparse"]) else []

    def mixing(self, model: PreTrainedModel, config: TextConfig, data: TextData) -> dict[str, dict[str, float]]:
        """The loss in nats per token of a DEMix model by way of mixing and domain, as `mixing.losses` has it."""
        longer = self.windows(config, data.tokenizer, more=mixing.CACHED)
        first, rest = mixing.set_apart(longer, config.data.eval_windows)
        names = [domain.name for domain in first]
        predict, shown = by_domain(model), {domain.name: domain.input_ids for domain in first}
        each, cache = (mixing.likelihoods(predict, len(names), windows, EVAL_BATCH) for windows in (shown, rest))
        return mixing.losses(each, cache, {name: place for place, name in enumerate(names)})


_AUTO: dict[str, Any] = {
    "decoder": AutoModelForCausalLM,
    "encoder": AutoModelForMaskedLM,
    "encoder-decoder": AutoModelForSeq2SeqLM,
}


def _special(config: TextConfig) -> dict[str, str]:
    """The tokens that no text has, but for the end of a document, which is the first."""
    match config.model.kind:
        case "encoder":
            return {"mask_token": MASK}
        case "encoder-decoder":
            return {"pad_token": PAD} | {token: token for token in sentinels(config.data.sequence_length)}
    return {}


def t5_shape(vocab_size: int, dim: int, layers: int, heads: int, hidden: int) -> PretrainedConfig:
    """The configuration of a dense T5 with gated blocks, whose tokens begin with the end and the padding."""
    own: dict[str, Any] = {
        "vocab_size": vocab_size,
        "d_model": dim,
        "d_kv": dim // heads,
        "d_ff": hidden,
        "num_layers": layers,
        "num_heads": heads,
        "feed_forward_proj": "gated-gelu",
        "dropout_rate": 0.0,
        "pad_token_id": 1,
        "decoder_start_token_id": 1,
        "eos_token_id": 0,
        "tie_word_embeddings": True,
    }
    return AutoConfig.for_model("t5", **own)


def _shape(config: TextConfig, vocab_size: int) -> PretrainedConfig:
    """The configuration of the dense model; without dropout, which neither twin has."""
    m = config.model
    sizes: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": m.dim,
        "intermediate_size": m.hidden,
        "num_hidden_layers": m.layers,
        "num_attention_heads": m.heads,
        "max_position_embeddings": config.data.sequence_length,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    match m.architecture:
        case "t5":
            return t5_shape(vocab_size, m.dim, m.layers, m.heads, m.hidden)
        case "bert":
            sizes |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": None}
            sizes |= {"initializer_range": m.dim**-0.5}  # the default 0.02 is that of 768 and more
        case "modernbert":
            sizes |= {"pad_token_id": None, "global_attn_every_n_layers": 1, "sep_token_id": None, "cls_token_id": None}
        case _:
            sizes |= {"num_key_value_heads": m.kv_heads or m.heads, "head_dim": m.dim // m.heads}
    return AutoConfig.for_model(m.architecture, **sizes)


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
    if recipe is not RECIPE or config.model.kind != "decoder" or not _goes_by_domain(model):
        raise UserError(f"{folder}: it is no decoder with experts of domains; train text with sparse.router=domain")
    return RECIPE.mixing(model, config, run.data_of(folder))


def evaluate(model: PreTrainedModel, domains: list[EvalDomain], batch_size: int = EVAL_BATCH) -> dict[str, Any]:
    """The held-out loss (nats per predicted token) and bits per byte of these, in all and by domain.

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
def _predictions(model: Any, domains: list[EvalDomain], batch_size: int = 32) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Of what is to be predicted in the windows of each domain, a batch at a time: name, logits and right tokens."""
    for domain in domains:
        for start in range(0, len(domain.input_ids), batch_size):
            some = slice(start, start + batch_size)
            ids = domain.input_ids[some].to(model.device)
            given, targets = {"input_ids": ids}, domain.targets
            if targets is not None:
                targets = targets[some].to(model.device)
                if model.config.is_encoder_decoder:
                    given["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(targets)
            with tell(model, **{name: label[some].to(model.device) for name, label in domain.labels.items()}):
                logits = model(**given).logits
            if targets is None:
                logits, targets = logits[:, :-1], ids[:, 1:]
            wanted = targets != -100
            yield domain.name, logits[wanted], targets[wanted]


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
    if (kind := run.configuration_of(folder)[1].model.kind) != "decoder":
        raise UserError(f"{folder} has an {kind}, which does not continue text; a decoder does")
    tokenizer = load_tokenizer(folder / which)
    set_seed(seed)
    ids = encode(tokenizer, prompt, model, folder / which)
    if (labelled := _goes_by_domain(model)) or domain is not None:
        names = [str(one["name"]) for one in read_json(folder / "data.json")["domains"]]
        if not labelled:
            raise UserError(f"{folder / which}: its experts are not of domains; leave --domain out")
        if domain is None:
            mixture, caches = DomainMixture(by_domain(model), len(names)), mixing.caches([model] * len(names))
            found = mixing.continue_ids(mixture, ids, max_new_tokens, temperature, caches)
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
    sampling["use_cache"] = takes_cache(model)
    out = model.generate(ids, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.eos_token_id, **sampling)
    return str(tokenizer.decode(out[0], skip_special_tokens=True))
