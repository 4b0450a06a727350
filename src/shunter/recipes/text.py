"""Text: a decoder-only language model and its sparse twin, trained to predict the next token of documents."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, set_seed

from ..analysis.inspect.inspecting import specialisation
from ..analysis.ledger import Ledger, ledger
from ..analysis.runs import TEXT
from ..data.documents import built_in_domains, read_domains
from ..data.windows import EvalDomain, TextData, prepare
from ..errors import UserError
from ..hf import sparsify
from ..hf.checkpoints.folders import load_tokenizer
from ..moe import tell
from . import run
from .recipe import Recipe
from .sections import TextConfig

__all__ = ["RECIPE", "TextRecipe", "evaluate", "generate"]


class TextRecipe(Recipe[TextConfig, TextData]):
    """Causal language modelling: the loss is the cross-entropy of the next token in nats."""

    name = "text"
    config = TextConfig
    words = TEXT
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
        router = s.build_router(m.dim, vocab_size, labels)
        hidden = s.hidden or run.expert_width(m.hidden, router, config.data.sequence_length)
        set_seed(config.seed)
        model = AutoModelForCausalLM.from_config(shape)
        if not sparse:
            return model
        options: dict[str, Any] = s.router_options(vocab_size, labels) | {
            "allow_leak": s.allow_leak,
            "backend": s.backend,
        }
        return sparsify(model, s.num_experts, s.router, every=s.every, hidden=hidden, **options)

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
        told = {name: torch.cat([d.labels[name] for d in data.eval]) for name in data.label_counts}
        return specialisation(model, {d.name: d.input_ids for d in data.eval}, data.tokenizer, told=told)


RECIPE = TextRecipe()


def evaluate(model: PreTrainedModel, domains: list[EvalDomain], batch_size: int = 32) -> dict[str, Any]:
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
