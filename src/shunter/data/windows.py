"""Documents to tokens: a held-out split, a tokenizer, windows of equal length in a fixed order."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..errors import UserError
from .documents import MAX_BYTES, Domain, built_in_domains, read_domains

__all__ = ["EvalDomain", "TextData", "predicted_bytes", "prepare", "train_tokenizer"]

END = "<|end|>"


@dataclass(frozen=True)
class EvalDomain:
    """The held-out windows of a domain.

    Args:
        name: the domain.
        input_ids: (windows, sequence length) int64.
        predicted_bytes: the UTF-8 bytes that the predicted tokens stand for.
        labels: what is known of the tokens: "domain" (windows,) int64, the domain's place among all, and, where some
            language is known, "language" (windows, sequence length) int64, numbers of `TextData.languages`.
        targets: (windows, target length) int64, what the logits should give, -100 for nothing; None: the next token.
    """

    name: str
    input_ids: Tensor
    predicted_bytes: int
    labels: dict[str, Tensor] = field(default_factory=dict)
    targets: Tensor | None = None


@dataclass(frozen=True)
class TextData:
    """What a recipe trains and evaluates on.

    Args:
        train: windows in training order.
        eval: held-out windows by domain.
        tokenizer: saved with the models.
        domains: a record of each domain for people: name, license, source, bytes and tokens of both splits, repeats.
        fingerprint: SHA-256 over all windows and the tokenizer.
        kind: of the tokenizer.
        languages: the names of the languages, in the order of their labels; the last is "unknown" where some document's
            is. Empty where none is known.
    """

    train: Dataset[dict[str, Tensor]]
    eval: list[EvalDomain]
    tokenizer: PreTrainedTokenizerBase
    domains: list[dict[str, Any]]
    fingerprint: str
    kind: str = field(default="bpe")
    languages: list[str] = field(default_factory=list)

    @property
    def label_counts(self) -> dict[str, int]:
        """How many values each label of the tokens has."""
        counts = {"domain": len(self.domains), "language": len(self.languages)}
        return {name: count for name, count in counts.items() if count}

    def save_pretrained(self, folder: Path) -> None:
        """Write the tokenizer."""
        self.tokenizer.save_pretrained(folder)

    def describe(self) -> dict[str, Any]:
        """What data.json holds."""
        return {
            "domains": self.domains,
            "fingerprint": self.fingerprint,
            "vocab_size": len(self.tokenizer),
            "tokenizer": self.kind,
            "languages": self.languages,
            "notes": [f"Tokens: {self.kind}, {len(self.tokenizer)} of them."],
        }


class _Windows(Dataset[dict[str, Tensor]]):
    """Item i is the i-th window of training, a function of the seed and i: domains in turn, each in its own order.

    Its domain, and its tokens' languages where some are known, come with it.
    """

    def __init__(self, domains: list[Tensor], languages: list[Tensor], length: int, seed: int) -> None:
        self.domains, self.languages, self.length = domains, languages, length
        generator = torch.Generator().manual_seed(seed)
        rounds = -(-length // len(domains))
        self.orders = []
        for windows in domains:
            passes = -(-rounds // len(windows))
            self.orders.append(torch.cat([torch.randperm(len(windows), generator=generator) for _ in range(passes)]))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        if not 0 <= i < self.length:
            raise IndexError(i)
        turn, which = divmod(i, len(self.domains))
        row = self.orders[which][turn]
        ids = self.domains[which][row]
        item = {"input_ids": ids, "labels": ids, "domain": torch.tensor(which)}
        return item | ({"language": self.languages[which][row]} if self.languages else {})


def prepare(
    sources: Sequence[str] | None,
    *,
    sequence_length: int,
    num_windows: int,
    tokenizer: PreTrainedTokenizerFast | Literal["bpe", "bytes"] = "bpe",
    vocab_size: int = 1024,
    special: Mapping[str, str] = MappingProxyType({}),
    eval_share: float = 0.05,
    eval_windows: int = 48,
    max_bytes: int = MAX_BYTES,
    only: Sequence[str] | None = None,
    seed: int = 0,
) -> TextData:
    """Read, split, tokenize and cut text; the same arguments give the same windows.

    Args:
        sources: as `shunter.data.documents.read_domains` takes them; None takes the built-in text.
        sequence_length: tokens of a window.
        num_windows: to train on; a domain with fewer comes again.
        tokenizer: "bpe" trains one on the text, "bytes" has no merges; or that of a model that there is already,
            byte-level BPE.
        vocab_size: of a trained BPE.
        special: further tokens that no text has, of a tokenizer that is trained here: see `train_tokenizer`.
        eval_share: of each domain's documents, held out.
        eval_windows: held-out windows of each domain at most.
        max_bytes: of each domain.
        only: the domains of the sources that are taken; None takes all.
        seed: of the order of the windows.

    Raises:
        UserError: for text that cannot be read or is too little, a domain that is not there, and for a package that is
            missing.
    """
    domains = built_in_domains(max_bytes) if sources is None else read_domains(sources, max_bytes)
    if only is not None:
        if missing := [name for name in only if name not in {domain.name for domain in domains}]:
            raise UserError(f"the text has no domain {missing[0]!r}; it has {', '.join(d.name for d in domains)}")
        domains = [domain for domain in domains if domain.name in only]
    splits = {domain.name: _split(domain, eval_share) for domain in domains}
    kind = "bpe" if isinstance(tokenizer, PreTrainedTokenizerFast) else tokenizer
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        texts = (document for train, _ in splits.values() for document in train)
        tokenizer = train_tokenizer(texts, vocab_size if tokenizer == "bpe" else None, special)
    digest = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode())
    length = sequence_length
    known = sorted({language for domain in domains for language in domain.languages if language is not None})
    spoken = {domain.name: _languages(domain, eval_share) for domain in domains}
    unknown = any(None in part for parts in spoken.values() for part in parts)
    names = [*known, *(["unknown"] if unknown else [])] if known else []
    train_windows, train_languages, held_out, records = [], list[Tensor](), [], []
    needed = -(-num_windows // len(domains))
    for place, domain in enumerate(domains):
        parts = []
        for documents, languages in zip(splits[domain.name], spoken[domain.name], strict=True):
            numbers = [names.index(language or "unknown") for language in languages] if names else [0] * len(documents)
            parts.append(_window(documents, numbers, tokenizer, length, domain.name))
        (train, train_language), (evaluation, eval_language) = parts[0], [part[:eval_windows] for part in parts[1]]
        for part in (train, evaluation):
            digest.update(np.ascontiguousarray(part.numpy()).tobytes())
        train_windows.append(train)
        if names:
            train_languages.append(train_language)
        labels = {"domain": torch.full((len(evaluation),), place)} | ({"language": eval_language} if names else {})
        held_out.append(EvalDomain(domain.name, evaluation, predicted_bytes(evaluation[:, 1:], tokenizer), labels))
        sizes = [sum(len(document.encode()) for document in documents) for documents in splits[domain.name]]
        records.append(
            {
                "name": domain.name,
                "license": domain.license,
                "source": domain.source,
                "train_bytes": sizes[0],
                "eval_bytes": sizes[1],
                "train_tokens": train.numel(),
                "eval_tokens": evaluation.numel(),
                "passes": round(needed / len(train), 2),
            }
        )
    windows = _Windows(train_windows, train_languages, num_windows, seed)
    return TextData(windows, held_out, tokenizer, records, digest.hexdigest(), kind, names)


def _split(domain: Domain, share: float) -> tuple[list[str], list[str]]:
    """Whole documents to train on and held out, chosen by a fixed shuffle; a single document is cut in two."""
    documents = list(domain.documents)
    if len(documents) == 1:
        cut = int(len(documents[0]) * (1 - share))
        return [documents[0][:cut]], [documents[0][cut:]]
    random.Random(0).shuffle(documents)
    total = sum(map(len, documents))
    held_out: list[str] = []
    while documents and sum(map(len, held_out)) < share * total and len(documents) > 1:
        held_out.append(documents.pop())
    return documents, held_out


def _languages(domain: Domain, share: float) -> tuple[list[str | None], list[str | None]]:
    """The languages of the documents that `_split` trains on and holds out, in its order."""
    languages = list(domain.languages) or [None] * len(domain.documents)
    train, held_out = _split(domain, share)
    if len(domain.documents) == 1:
        return languages, languages
    random.Random(0).shuffle(languages)
    return languages[: len(train)], languages[: len(train) - 1 : -1][: len(held_out)]


def train_tokenizer(
    texts: Iterable[str], vocab_size: int | None, special: Mapping[str, str] = MappingProxyType({})
) -> PreTrainedTokenizerFast:
    """Byte-level BPE of so many tokens, trained on texts; None has no merges: a token is a byte.

    Args:
        texts: in any order.
        vocab_size: with the special tokens.
        special: tokens that no text has, by what they are ("mask_token", "pad_token"); other names are theirs alone.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size or len(alphabet) + 1 + len(special),
        special_tokens=[END, *special.values()],
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts if vocab_size else [], trainer)
    roles = {role: token for role, token in special.items() if role.endswith("_token")}
    more = [token for role, token in special.items() if role not in roles]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        clean_up_tokenization_spaces=False,
        **roles,
        **({"extra_special_tokens": more} if more else {}),
    )


def _window(
    documents: Sequence[str], languages: Sequence[int], tokenizer: PreTrainedTokenizerFast, length: int, domain: str
) -> tuple[Tensor, Tensor]:
    """The documents as windows (n, length), an end token after each document; the last short piece is left out.

    And the language of each token (n, length), by the numbers of the documents' languages.
    """
    end = tokenizer.eos_token_id
    encoded = tokenizer.backend_tokenizer.encode_batch_fast(list(documents), add_special_tokens=False)
    ids = [i for document in encoded for i in (*document.ids, end)]
    spoken = [number for document, number in zip(encoded, languages, strict=True) for _ in range(len(document.ids) + 1)]
    count = len(ids) // length
    if count == 0:
        raise UserError(
            f"domain {domain!r} is too small: a split of it has {len(ids)} tokens, and a window takes {length}; "
            "give more text or a shorter data.sequence_length"
        )
    rows, numbers = (torch.tensor(part[: count * length], dtype=torch.int64) for part in (ids, spoken))
    return rows.reshape(count, length), numbers.reshape(count, length)


def predicted_bytes(ids: Tensor, tokenizer: PreTrainedTokenizerBase) -> int:
    """The UTF-8 bytes that tokens stand for; special ones stand for none. In byte-level BPE a letter is a byte."""
    special = set(tokenizer.all_special_ids)
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    sizes = torch.tensor([0 if i in special else len(token) for i, token in enumerate(tokens)])
    return int(sizes[ids].sum())
