"""Translation: one T5 for many target languages, its sparse twin, and bilingual models of languages with few data."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel, PreTrainedTokenizerFast, set_seed

from ..analysis.exhibits import Exhibit, Table
from ..analysis.inspect.inspecting import specialisation
from ..analysis.inspect.material import Material, Window, window_material
from ..analysis.ledger import Ledger, ledger
from ..analysis.runs import Words
from ..data.aligned import LANGUAGES, Pair, built_in_pairs, read_pairs, split_pairs
from ..data.corruption import PAD
from ..data.orders import passes
from ..data.windows import sample, train_tokenizer
from ..errors import UserError
from ..hf import sparsify
from ..hf.checkpoints.folders import load_tokenizer
from ..hf.tokens import takes_cache
from ..moe import tell
from . import run
from .recipe import Recipe
from .sections import RunConfig, RunName, Section, SparseConfig, TrainingConfig, Value
from .text import Stacks, t5_shape

__all__ = ["RECIPE", "TranslationConfig", "TranslationRecipe", "translate"]

EVAL_BATCH = 64  # pairs of a forward
GREEDY_BATCH = 256  # sentences that are translated side by side
BILINGUAL = "bilingual-"
SHOWN = 12  # translations in the report
WITHOUT_SPACES = ("zh", "ja", "th", "lo", "km", "my", "bo")  # BLEU counts their characters


class DataConfig(Section):
    """Which sentences, and how long they may be."""

    source: list[Annotated[str, Field(min_length=1)]] | None = Field(
        None,
        min_length=1,
        max_length=1,
        description="a table (csv, tsv, parquet, jsonl) or a datasets name; none: Django's messages",
    )
    source_language: str = Field("en", description="of your table with a column for each language")
    languages: list[str] = Field([], description="to translate into; none: all of your table, or eleven of Django's")
    bilingual: list[str] | None = Field(
        None, description="languages that a model of their own is trained for, too; none: of Django's the two smallest"
    )
    vocab_size: int = Field(2048, ge=300, le=65536, description="of the BPE that all languages share")
    source_length: int = Field(24, ge=4, le=4096, description="tokens of a sentence at most, with its two marks")
    target_length: int = Field(32, ge=4, le=4096, description="tokens of a translation at most, with its end")
    eval_share: float = Field(0.15, gt=0, lt=0.9, description="of the sources, held out in all languages")
    eval_sentences: int = Field(60, ge=1, description="held-out pairs of each language at most")
    beams: int = Field(1, ge=1, le=32, description="of the search for a translation; 1 is greedy")


class ModelConfig(Section):
    """The dense model; the sparse twin differs in its feed-forward blocks alone."""

    dim: int = Field(128, ge=8, le=16384, description="d, width of the hidden states")
    layers: int = Field(2, ge=1, le=256, description="blocks of each stack")
    heads: int = Field(4, ge=1, description="of attention")
    hidden: int = Field(256, ge=8, description="width of the dense feed-forward block")
    sparse_stacks: Stacks = Field("both", description="where the experts are")


class TranslationSparse(SparseConfig):
    """GShard's experts; in evaluation none is ever full, so that a translation hangs on no other."""

    num_experts: int = Field(8, ge=1, le=4096)
    router: str = "gshard"
    options: dict[str, Value | list[Value]] = Field(
        {"eval_capacity_factor": "dropless"}, description="further options of the router"
    )


class TranslationTraining(TrainingConfig):
    """Some seven times through the pairs of a language."""

    steps: int = Field(600, ge=1)
    batch_tokens: int = Field(2688, ge=8, description="tokens of one optimizer step, with padding")
    eval_every: int = Field(300, ge=1, description="steps; each translates what is held out")


class TranslationConfig(RunConfig):
    """The configuration of `shunter train translation`."""

    name: RunName = "translation"
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    sparse: TranslationSparse = TranslationSparse()
    training: TranslationTraining = TranslationTraining()

    @property
    def causal(self) -> bool:
        """Of the decoder."""
        return self.model.sparse_stacks != "encoder"

    @property
    def pair_tokens(self) -> int:
        """The tokens of a pair, with padding."""
        return self.data.source_length + self.data.target_length

    @property
    def bilingual(self) -> list[str]:
        """The languages that a model of their own is trained for."""
        d = self.data
        if d.bilingual is not None:
            return d.bilingual
        return ["ast", "lb"] if d.source is None and not d.languages else []

    @model_validator(mode="after")
    def _keeps_order(self) -> TranslationConfig:
        leak = self.sparse.leak(evaluation=True) if self.causal and not self.sparse.allow_leak else None
        if leak:
            raise ValueError(
                f"sparse: router {self.sparse.router!r}: {leak}, so that a decoder would know what it has not written; "
                "set model.sparse_stacks=encoder, or sparse.allow_leak=true if you insist"
            )
        return self

    @model_validator(mode="after")
    def _fits(self) -> TranslationConfig:
        m, d, s = self.model, self.data, self.sparse
        if m.dim % m.heads:
            raise ValueError(f"model.dim {m.dim} must be a multiple of model.heads {m.heads}")
        if self.training.batch_tokens < self.pair_tokens:
            raise ValueError(
                f"training.batch_tokens {self.training.batch_tokens} is less than a pair takes, {self.pair_tokens} "
                "(data.source_length and data.target_length)"
            )
        for name, given in (("languages", d.languages), ("bilingual", d.bilingual or [])):
            if len(set(given)) < len(given):
                raise ValueError(f"data.{name}: each may come once")
        if d.bilingual and d.source is not None and not d.languages:
            raise ValueError(
                "data.bilingual needs data.languages with your own sentences: a share of the steps is theirs"
            )
        known = d.languages or (LANGUAGES if d.source is None else [])
        if other := [one for one in self.bilingual if one not in known]:
            raise ValueError(f"data.bilingual: {other[0]!r} is not among the languages, {', '.join(known)}")
        s.leave_room(3, m.hidden)
        return self


@dataclass(frozen=True)
class Pairs:
    """The pairs of a language as a model takes them.

    Args:
        language: its name.
        number: its label.
        input_ids: (N, source length) int64, the language's mark, the sentence, the end, padding.
        labels: (N, target length) int64, the translation and the end, -100 behind it.
        texts: sentence and translation.
    """

    language: str
    number: int
    input_ids: Tensor
    labels: Tensor
    texts: list[Pair]

    def batches(self, size: int = EVAL_BATCH) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """What the encoder takes, and the labels."""
        for ids, labels in zip(self.input_ids.split(size), self.labels.split(size), strict=True):
            yield {"input_ids": ids, "attention_mask": (ids != PAD_ID).long()}, labels

    def told(self) -> dict[str, Tensor]:
        """What is told of all tokens of all pairs."""
        return {"language": torch.tensor(self.number), "task": torch.tensor(self.number)}


PAD_ID = 1


@dataclass(frozen=True)
class TranslationData:
    """What is trained and evaluated on.

    Args:
        pairs: to train on, by language.
        eval: held out, by language.
        count: pairs of training, with those that come again.
        seed: of their order.
        tokenizer: of all languages.
        languages: their names in the order of their labels.
        domains: a record of each language.
        notes: what was left out.
        beams: of the search for a translation.
    """

    pairs: list[Pairs]
    eval: list[Pairs]
    count: int
    seed: int
    tokenizer: PreTrainedTokenizerFast
    languages: list[str]
    domains: list[dict[str, Any]]
    notes: list[str]
    beams: int

    @property
    def train(self) -> Dataset[dict[str, Tensor]]:
        """Pairs of all languages in turn."""
        return _InTurn(self.pairs, self.count, self.seed)

    @property
    def label_counts(self) -> dict[str, int]:
        """How many values each label of the tokens has."""
        return {"token_ids": len(self.tokenizer), "language": len(self.languages), "task": len(self.languages)}

    @property
    def fingerprint(self) -> str:
        """Of tokenizer and pairs."""
        digest = hashlib.sha256(self.tokenizer.backend_tokenizer.to_str().encode())
        for part in (*self.pairs, *self.eval):
            digest.update(part.language.encode() + part.input_ids.numpy().tobytes() + part.labels.numpy().tobytes())
        return digest.hexdigest()

    def only(self, language: str) -> TranslationData:
        """The pairs of one language alone."""
        mine = [[part for part in parts if part.language == language] for parts in (self.pairs, self.eval)]
        return replace(self, pairs=mine[0], eval=mine[1])

    def describe(self) -> dict[str, Any]:
        """What data.json holds."""
        return {
            "domains": self.domains,
            "fingerprint": self.fingerprint,
            "vocab_size": len(self.tokenizer),
            "tokenizer": "bpe",
            "languages": self.languages,
            "notes": self.notes,
        }

    def save_pretrained(self, folder: Path) -> None:
        """Write the tokenizer."""
        self.tokenizer.save_pretrained(folder)


class _InTurn(Dataset[dict[str, Tensor]]):
    """Item i is the i-th pair of training, a function of the seed and i: languages in turn, each in its own order."""

    def __init__(self, pairs: list[Pairs], count: int, seed: int) -> None:
        self.pairs, self.count = pairs, count
        self.orders = []
        for part in pairs:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + part.number)
            self.orders.append(passes(len(part.input_ids), math.ceil(count / len(pairs)), generator))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        if not 0 <= i < self.count:
            raise IndexError(i)
        turn, which = divmod(i, len(self.pairs))
        part, row = self.pairs[which], self.orders[which][turn]
        ids = part.input_ids[row]
        return {"input_ids": ids, "attention_mask": (ids != PAD_ID).long(), "labels": part.labels[row], **part.told()}


class TranslationRecipe(Recipe[TranslationConfig, TranslationData]):
    """Translation: the loss is the cross-entropy of the translation's next token in nats."""

    name = "translation"
    config = TranslationConfig
    words = Words(
        "translation",
        "Two encoder-decoders (T5) read the same sentences in the same order, each with a mark of the language to "
        "translate it into, learning to guess the next token (a piece of a word) of the translation.",
        "nats/token",
        "the right next token",
        {"chrf": "chrF", "bleu": "BLEU"},
        ["chrf", "bleu"],
        data="sentences",
        domain="language",
    )
    reader = "tokenizer"
    knows = ("mask", "token_ids", "sequence", "position", "language", "task")

    def others_of(self, config: TranslationConfig) -> tuple[str, ...]:
        """A dense model of each of the bilingual languages."""
        return tuple(BILINGUAL + language for language in config.bilingual)

    def config_of(self, config: TranslationConfig, name: str) -> TranslationConfig:
        """As many pairs of its language as the others see of it."""
        t = config.training
        steps = max(1, round(t.steps / len(config.data.languages or LANGUAGES)))
        shorter = {"steps": steps, "warmup": min(t.warmup, steps // 4), "eval_every": min(t.eval_every, steps)}
        return config.model_copy(update={"training": t.model_copy(update=shorter)})

    def data_of(self, data: TranslationData, name: str) -> TranslationData:
        """Its language alone."""
        return data.only(name.removeprefix(BILINGUAL)) if name.startswith(BILINGUAL) else data

    def prepare(self, config: TranslationConfig) -> TranslationData:
        """The pairs of the configuration, cut into tokens."""
        d = config.data
        if d.source is None:
            aligned = built_in_pairs(d.languages)
        else:
            aligned = read_pairs(d.source[0], d.source_language, d.languages)
        split = split_pairs(aligned, d.eval_share)
        notes = list(aligned.notes)
        special = {"pad_token": PAD} | {_mark(language): _mark(language) for language in split}
        texts = [text for train, _ in split.values() for pair in train for text in pair]
        tokenizer = train_tokenizer(sample(texts), d.vocab_size, special)
        kept: dict[str, list[tuple[Tensor, Tensor, list[Pair]]]] = {}
        for language, parts in split.items():
            cut = [_encoded(tokenizer, language, part, d.source_length, d.target_length) for part in parts]
            total = sum(map(len, parts))
            if left_out := total - sum(len(texts) for *_, texts in cut):
                notes.append(
                    f"{language}: left out {left_out:,} of {total:,} pairs that are longer than {d.source_length} and "
                    f"{d.target_length} tokens (data.source_length, data.target_length)."
                )
            if all(texts for *_, texts in cut):
                kept[language] = cut
            elif language in config.bilingual:
                raise UserError(f"data.bilingual: {language!r} has too few pairs, {total}; leave it out")
            else:
                notes.append(f"{language} is left out: of {total:,} pairs none is left to train on, or none held out.")
        if not kept:
            raise UserError(
                f"{aligned.source}: has no language with pairs to train on and to hold out; give more, or raise "
                "data.source_length and data.target_length"
            )
        most = d.eval_sentences
        if beyond := sum(max(0, len(cut[1][2]) - most) for cut in kept.values()):
            notes.append(
                f"Not evaluated: {beyond:,} held-out pairs, those behind data.eval_sentences={most} a language."
            )
        train = [Pairs(name, i, *cut[0]) for i, (name, cut) in enumerate(kept.items())]
        held_out = [
            Pairs(name, i, ids[:most], labels[:most], texts[:most])
            for i, (name, (_, (ids, labels, texts))) in enumerate(kept.items())
        ]
        domains = [
            {
                "name": part.language,
                "license": aligned.license,
                "source": aligned.source,
                "train_pairs": len(part.texts),
                "eval_pairs": len(out.texts),
                "train_tokens": int((part.labels != -100).sum()),
                "eval_tokens": int((out.labels != -100).sum()),
            }
            for part, out in zip(train, held_out, strict=True)
        ]
        count = config.training.steps * self.items_per_step(config)
        return TranslationData(train, held_out, count, config.seed, tokenizer, list(kept), domains, notes, d.beams)

    def build(self, config: TranslationConfig, data: TranslationData, sparse: bool) -> PreTrainedModel:
        """A T5 of the data's vocabulary, whose configuration names the languages."""
        m, s, labels = config.model, config.sparse, data.label_counts
        shape = t5_shape(labels["token_ids"], m.dim, m.layers, m.heads, m.hidden)
        shape.languages = data.languages
        hidden = s.hidden or run.expert_width(m.hidden, s.build_router(m.dim, labels), config.data.source_length)
        set_seed(config.seed)
        model: PreTrainedModel = AutoModelForSeq2SeqLM.from_config(shape)
        if not sparse:
            return model
        options: dict[str, Any] = s.router_options(labels) | {
            "allow_leak": True,  # in training, by capacity, some routers do
            "backend": s.backend,
            "within": "" if m.sparse_stacks == "both" else m.sparse_stacks,
        }
        return sparsify(model, s.num_experts, s.router, layers=s.blocks(m.layers), hidden=hidden, **options)

    def build_other(self, config: TranslationConfig, data: TranslationData, name: str) -> PreTrainedModel:
        """The dense model."""
        return self.build(config, data, sparse=False)

    def evaluate(self, model: PreTrainedModel, data: TranslationData) -> dict[str, Any]:
        """Nats per token, chrF and BLEU of the held-out pairs: by language, and in the mean over languages.

        The loss in all is over all tokens.
        """
        return self._evaluated(model, data)[0]

    def _evaluated(self, model: PreTrainedModel, data: TranslationData) -> tuple[dict[str, Any], dict[str, list[str]]]:
        """What `evaluate` finds, and the translations by language."""
        was_training = model.training
        model.eval()
        said = _translations(model, data)
        found, nats, tokens = {}, 0.0, 0
        for part in data.eval:
            total = 0.0
            count = int((part.labels != -100).sum())
            for logits, wanted in _logits(model, part):
                total += float(torch.nn.functional.cross_entropy(logits.float(), wanted, reduction="sum"))
            found[part.language] = {"loss": total / count, **_scores(said[part.language], part)}
            nats, tokens = nats + total, tokens + count
        model.train(was_training)
        means = {key: math.fsum(one[key] for one in found.values()) / len(found) for key in ("chrf", "bleu")}
        return {"loss": nats / tokens, **means, "domains": found}, said

    def predictions(self, model: PreTrainedModel, data: TranslationData) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Of each token of a held-out translation."""
        for part in data.eval:
            for logits, wanted in _logits(model, part):
                yield part.language, logits, wanted

    def ledger(self, model: PreTrainedModel, config: TranslationConfig) -> Ledger:
        """Of pairs as long as they may be."""
        return ledger(model, config.data.source_length, target_length=config.data.target_length)

    def items_per_step(self, config: TranslationConfig) -> int:
        """Pairs."""
        return config.training.batch_tokens // config.pair_tokens

    def tokens_per_step(self, config: TranslationConfig) -> int:
        """Those of whole pairs, with padding."""
        return self.items_per_step(config) * config.pair_tokens

    def specialisation(self, model: PreTrainedModel, data: TranslationData) -> dict[str, Any]:
        """Which languages, and which tokens, each expert took of the held-out pairs."""
        return specialisation(model, self.material(model, data))

    def material(self, model: PreTrainedModel, data: TranslationData, tokens: int | None = None) -> Material:
        """Held-out pairs, and their language: equal parts of each, of so many tokens in all, or all."""
        length = data.eval[0].input_ids.shape[1]
        whole = length + data.eval[0].labels.shape[1]
        most = None if tokens is None else max(1, tokens // len(data.eval) // whole)
        chosen = [
            (part, ids) for part in data.eval for ids in torch.cat([part.input_ids, part.labels], 1)[:most].tolist()
        ]
        windows = [Window(ids, part.language, part.language) for part, ids in chosen]
        names = [part.language for part in data.eval]
        found = window_material(model, data.tokenizer, windows, names, batch_size=EVAL_BATCH, seen=length)
        told = torch.tensor([part.number for part, _ in chosen]).split(EVAL_BATCH)
        batches = [
            replace(batch, told={"language": labels, "task": labels})
            for batch, labels in zip(found.batches, told, strict=True)
        ]
        return replace(found, batches=batches)

    def exhibits(
        self, models: dict[str, PreTrainedModel], config: TranslationConfig, data: TranslationData
    ) -> list[Exhibit]:
        """The scores of all models by language, and some translations."""
        both = {name: self._evaluated(model, self.data_of(data, name)) for name, model in models.items()}
        said = {name: translations for name, (_, translations) in both.items()}
        return [_by_language({name: found for name, (found, _) in both.items()}, data), _some_translations(said, data)]


RECIPE = TranslationRecipe()


def _mark(language: str) -> str:
    """The token that a sentence to translate into a language begins with."""
    return f"<|{language}|>"


def _encoded(
    tokenizer: PreTrainedTokenizerFast, language: str, pairs: list[Pair], source_length: int, target_length: int
) -> tuple[Tensor, Tensor, list[Pair]]:
    """Pairs as `Pairs` has them; those that are too long are left out."""
    mark, end = tokenizer.convert_tokens_to_ids(_mark(language)), tokenizer.eos_token_id
    both = [
        tokenizer.backend_tokenizer.encode_batch_fast([pair[side] for pair in pairs], add_special_tokens=False)
        for side in (0, 1)
    ]
    sources, labels, texts = [], [], []
    for pair, source, target in zip(pairs, *both, strict=True):
        ids, wanted = [mark, *source.ids, end], [*target.ids, end]
        if len(ids) <= source_length and len(wanted) <= target_length:
            sources.append(ids + [PAD_ID] * (source_length - len(ids)))
            labels.append(wanted + [-100] * (target_length - len(wanted)))
            texts.append(pair)
    shapes = ((sources, source_length), (labels, target_length))
    tensors = [torch.tensor(rows, dtype=torch.int64).reshape(len(rows), length) for rows, length in shapes]
    return tensors[0], tensors[1], texts


@torch.no_grad()
def _logits(model: Any, part: Pairs) -> Iterator[tuple[Tensor, Tensor]]:
    """The logits (N, V) and the right tokens (N,) of held-out translations, a batch at a time."""
    for given, labels in part.batches():
        given, wanted = {name: value.to(model.device) for name, value in given.items()}, labels.to(model.device)
        with tell(model, **{name: value.to(model.device) for name, value in part.told().items()}):
            # The labels, not a mask, say where the decoder's padding is, as in training.
            logits = model(**given, labels=wanted).logits
        real = wanted != -100
        yield logits[real], wanted[real]


@torch.no_grad()
def _translations(model: Any, data: TranslationData) -> dict[str, list[str]]:
    """What a model translates the held-out sentences to, by language."""
    most = data.eval[0].labels.shape[1]
    if data.beams > 1:  # the encoder has one row of a sentence, the decoder several: only what all have alike fits both
        return {
            part.language: [
                text
                for given, _ in part.batches()
                for text in _written(model, data.tokenizer, given, part.told(), most, data.beams)
            ]
            for part in data.eval
        }
    ids = torch.cat([part.input_ids for part in data.eval])
    numbers = torch.cat([torch.full((len(part.texts),), part.number) for part in data.eval])
    said: list[str] = []
    for rows, number in zip(ids.split(GREEDY_BATCH), numbers.split(GREEDY_BATCH), strict=True):
        given = {"input_ids": rows, "attention_mask": (rows != PAD_ID).long()}
        said += _written(model, data.tokenizer, given, {"language": number, "task": number}, most, 1)
    texts = iter(said)
    return {part.language: list(islice(texts, len(part.texts))) for part in data.eval}


def _written(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    given: dict[str, Tensor],
    told: dict[str, Tensor],
    most: int,
    beams: int,
) -> list[str]:
    with tell(model, **{name: value.to(model.device) for name, value in told.items()}):
        out = model.generate(
            **{name: value.to(model.device) for name, value in given.items()},
            max_new_tokens=most,
            num_beams=beams,
            do_sample=False,
            use_cache=takes_cache(model),
        )
    return [str(text) for text in tokenizer.batch_decode(out, skip_special_tokens=True)]


def _scores(said: list[str], part: Pairs) -> dict[str, float]:
    """chrF and BLEU of translations, by sacrebleu."""
    import sacrebleu

    right = [[target for _, target in part.texts]]
    cut = "char" if part.language.replace("-", "_").split("_")[0] in WITHOUT_SPACES else "13a"
    return {
        "chrf": float(sacrebleu.corpus_chrf(said, right).score),
        "bleu": float(sacrebleu.corpus_bleu(said, right, tokenize=cut, force=True).score),
    }


def _by_language(found: dict[str, dict[str, Any]], data: TranslationData) -> Table:
    alone = {name.removeprefix(BILINGUAL): one for name, one in found.items() if name.startswith(BILINGUAL)}
    rows: list[list[str | float]] = []
    for record in data.domains:
        name = record["name"]
        scores = [found[which]["domains"][name] for which in ("dense", "sparse")]
        scores += [alone[name]["domains"][name]] if name in alone else []
        cells = [f"{one[key]:.{digits}f}" for key, digits in (("chrf", 1), ("bleu", 1), ("loss", 3)) for one in scores]
        if alone and name not in alone:
            cells = [cell for i, cell in enumerate(cells) for cell in ([cell, "–"] if i % 2 else [cell])]
        rows.append([name, f"{record['train_pairs']:,}", f"{record['eval_pairs']:,}", *cells])
    models = ["dense", "sparse", *(["bilingual"] if alone else [])]
    heads = [
        "language",
        "trained on",
        "held out",
        *(f"{what}, {m}" for what in ("chrF", "BLEU", "loss") for m in models),
    ]
    says = (
        "Of held-out sentences, which no model has seen in any language: chrF and BLEU of the translations (sacrebleu, "
        "more is better) and the loss (nats/token, less is better). A few dozen short sentences leave both scores with "
        "a wide margin. "
    )
    for name, one in alone.items():
        own, both = one["domains"][name], [found[which]["domains"][name] for which in ("dense", "sparse")]
        ahead = "better" if min(both[0]["loss"], both[1]["loss"]) < own["loss"] else "no better"
        says += (
            f"A dense model of {name} alone, trained on as many pairs of it as the others, has a loss of "
            f"{own['loss']:.3f} and chrF {own['chrf']:.1f}; with the other languages it is {ahead}: "
            f"{both[0]['loss']:.3f} and {both[0]['chrf']:.1f} dense, {both[1]['loss']:.3f} and {both[1]['chrf']:.1f} "
            "sparse. "
        )
    return Table("Translations by language", says.strip(), heads, rows)


def _some_translations(said: dict[str, dict[str, list[str]]], data: TranslationData) -> Table:
    each = max(1, SHOWN // len(data.eval))
    rows: list[list[str | float]] = [
        [part.language, *part.texts[i], *(said[which][part.language][i] for which in ("dense", "sparse"))]
        for part in data.eval[:SHOWN]
        for i in range(min(each, len(part.texts)))
    ]
    return Table(
        "Some translations",
        "The first held-out sentences of each language, not chosen.",
        ["language", "sentence", "right", "dense", "sparse"],
        rows,
    )


def translate(folder: Path, which: str, sentence: str, language: str, memory: str | None = None) -> str:
    """Translate a sentence with one of a run's models, by the run's own search.

    Raises:
        UserError: for a run of another recipe, a language that it has not, and a sentence that is empty, no text, or
            too long for it.
    """
    recipe, config = run.configuration_of(folder)
    if recipe is not RECIPE:
        raise UserError(f"{folder} is a run of {recipe.name}, which translates nothing; leave --language out")
    model: Any = run.load_model(folder, which, memory)
    languages = list(model.config.languages)
    if language not in languages:
        raise UserError(f"--language {language}: the run has {', '.join(languages)}")
    if not sentence.strip() or any("\ud800" <= letter <= "\udfff" for letter in sentence):
        raise UserError("the sentence is empty, or not UTF-8 text")
    tokenizer: Any = load_tokenizer(folder / which)
    d = config.data
    ids, _, texts = _encoded(tokenizer, language, [(sentence.strip(), "")], d.source_length, d.target_length)
    if not texts:
        raise UserError(f"the sentence is longer than the run's sentences, {d.source_length} tokens with its two marks")
    number = torch.tensor(languages.index(language))
    given = {"input_ids": ids, "attention_mask": (ids != PAD_ID).long()}
    return _written(model, tokenizer, given, {"language": number, "task": number}, d.target_length, d.beams)[0]
