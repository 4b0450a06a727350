"""Documents to tokens: a held-out split, a tokenizer, windows of equal length in a fixed order."""

from __future__ import annotations

import hashlib
import random
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeVar, overload

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..errors import UserError
from .documents import MAX_BYTES, Domain, built_in_domains, read_domains
from .orders import passes
from .spooled import Rows

__all__ = ["TRAINED_ON", "WORDS", "EvalDomain", "TextData", "predicted_bytes", "prepare", "sample", "train_tokenizer"]

END = "<|end|>"

TRAINED_ON = 2**24
"""The bytes of text that a tokenizer is trained on; of more text it is an evenly spread part."""

WORDS = 2**21
"""The bytes that the different words in this part have: training takes a hundred times as much memory."""

PIECE = 2**18  # characters that are encoded at a time

T = TypeVar("T")


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
        notes: on how they were made, sentences for people.
    """

    train: Dataset[dict[str, Tensor]]
    eval: list[EvalDomain]
    tokenizer: PreTrainedTokenizerBase
    domains: list[dict[str, Any]]
    fingerprint: str
    kind: str = field(default="bpe")
    languages: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

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
            "notes": [f"Tokens: {self.kind}, {len(self.tokenizer)} of them.", *self.notes],
        }


class _Windows(Dataset[dict[str, Tensor]]):
    """Item i is the i-th window of training, a function of the seed and i: domains in turn, each in its own order.

    Its domain, and its tokens' languages where some are known, come with it.
    """

    def __init__(self, domains: list[np.ndarray], languages: list[np.ndarray], length: int, seed: int) -> None:
        self.domains, self.languages, self.length = domains, languages, length
        generator = torch.Generator().manual_seed(seed)
        rounds = -(-length // len(domains))
        self.orders = [passes(len(windows), rounds, generator) for windows in domains]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        if not 0 <= i < self.length:
            raise IndexError(i)
        turn, which = divmod(i, len(self.domains))
        row = int(self.orders[which][turn])
        ids = _tensor(self.domains[which][row])
        item = {"input_ids": ids, "labels": ids, "domain": torch.tensor(which)}
        return item | ({"language": _tensor(self.languages[which][row])} if self.languages else {})


def _tensor(numbers: np.ndarray) -> Tensor:
    return torch.from_numpy(numbers.astype(np.int64))


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
    splits = [_split(domain, eval_share) for domain in domains]
    sizes = [[sum(len(text.encode()) for text in part.documents) for part in split] for split in splits]
    kind, notes = "bpe" if isinstance(tokenizer, PreTrainedTokenizerFast) else tokenizer, []
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        texts = sample(_Chain([train.documents for train, _ in splits])) if tokenizer == "bpe" else []
        read, total = sum(len(text.encode()) for text in texts), sum(train for train, _ in sizes)
        if tokenizer == "bpe" and read < total:
            notes.append(f"The tokenizer was trained on {read:,} of the {total:,} bytes, evenly spread.")
        tokenizer = train_tokenizer(texts, vocab_size if tokenizer == "bpe" else None, special)
    digest = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode())
    known = sorted({language for domain in domains for language in domain.languages if language is not None})
    unknown = any(not domain.languages or None in domain.languages for domain in domains)
    names = [*known, *(["unknown"] if unknown else [])] if known else []
    numbers = {name: names.index(name or "unknown") if names else 0 for name in [*known, *([None] if unknown else [])]}
    largest = max(tokenizer.get_vocab().values())
    rows, spoken = Rows(sequence_length, largest), Rows(sequence_length, len(names))
    ends, held_out, records = [0], [], []
    needed = -(-num_windows // len(domains))
    for place, (domain, split) in enumerate(zip(domains, splits, strict=True)):
        train, evaluation = (_windows(part, numbers, tokenizer, sequence_length, domain.name) for part in split)
        for ids, languages in train:
            digest.update(np.ascontiguousarray(ids).tobytes())
            rows.add(ids)
            if names:
                spoken.add(languages)
        ends.append(len(rows))
        kept, eval_languages = _first(evaluation, eval_windows)
        digest.update(kept.numpy().tobytes())
        labels = {"domain": torch.full((len(kept),), place)} | ({"language": eval_languages} if names else {})
        held_out.append(EvalDomain(domain.name, kept, predicted_bytes(kept[:, 1:], tokenizer), labels))
        count = ends[-1] - ends[-2]
        records.append(
            {
                "name": domain.name,
                "license": domain.license,
                "source": domain.source,
                "train_bytes": sizes[place][0],
                "eval_bytes": sizes[place][1],
                "train_tokens": count * sequence_length,
                "eval_tokens": kept.numel(),
                "passes": round(needed / count, 2),
            }
        )
    train_rows, train_languages = (np.split(part.read(), ends[1:-1]) if len(part) else [] for part in (rows, spoken))
    windows = _Windows(train_rows, train_languages, num_windows, seed)
    return TextData(windows, held_out, tokenizer, records, digest.hexdigest(), kind, names, notes)


class _Chosen(Sequence[T]):
    """Some of a sequence, by their places, in that order."""

    def __init__(self, items: Sequence[T], places: Sequence[int]) -> None:
        self._items, self._places = items, places

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, i: int) -> T: ...
    @overload
    def __getitem__(self, i: slice) -> Sequence[T]: ...
    def __getitem__(self, i: int | slice) -> T | Sequence[T]:
        return _Chosen(self._items, self._places[i]) if isinstance(i, slice) else self._items[self._places[i]]


class _Chain(Iterable[T]):
    """The items of several sequences, one sequence after the other, as often as they are asked for."""

    def __init__(self, parts: Sequence[Sequence[T]]) -> None:
        self._parts = parts

    def __iter__(self) -> Iterator[T]:
        return (item for part in self._parts for item in part)


@dataclass(frozen=True)
class _Part:
    """Documents of a domain, and the language of each; none where none is known."""

    documents: Sequence[str]
    languages: Sequence[str | None]


def _split(domain: Domain, share: float) -> tuple[_Part, _Part]:
    """Whole documents to train on and held out, chosen by a fixed shuffle; a single document is cut in two."""
    documents, languages = domain.documents, domain.languages
    if len(documents) == 1:
        text = documents[0]
        cut = int(len(text) * (1 - share))
        return _Part([text[:cut]], languages), _Part([text[cut:]], languages)
    order = array("Q", range(len(documents)))
    random.Random(0).shuffle(order)
    total, size, kept = sum(map(len, documents)), 0, len(order)
    while kept > 1 and size < share * total:
        kept -= 1
        size += len(documents[order[kept]])
    places = order[:kept], order[kept:][::-1]
    train, held_out = (
        _Part(_Chosen(documents, part), _Chosen(languages, part) if languages else ()) for part in places
    )
    return train, held_out


def train_tokenizer(
    texts: Iterable[str], vocab_size: int | None, special: Mapping[str, str] = MappingProxyType({})
) -> PreTrainedTokenizerFast:
    """Byte-level BPE of so many tokens, trained on texts; None has no merges: a token is a byte.

    Args:
        texts: in any order; memory grows with their different words: see `sample`.
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


def sample(texts: Iterable[str]) -> list[str]:
    """What a tokenizer is trained on: all of some texts or, beyond `TRAINED_ON` and `WORDS`, an evenly spread part.

    Args:
        texts: can be gone through several times.
    """
    total = sum(len(text.encode()) for text in texts)
    most = TRAINED_ON
    while True:
        found = list(texts if total <= most else _spread(texts, total, most))
        if _few_words(found):
            return found
        most = min(most, total) // 2


def _spread(texts: Iterable[str], total: int, most: int) -> Iterator[str]:
    """Pieces of texts of `total` bytes, of about `most` bytes together, evenly spread over all."""
    due = 0.0  # bytes: how far what was given lags behind its share
    for text in texts:
        for piece in _pieces(text, max(most // 256, 1)):
            size = len(piece.encode())
            due += size * most / total
            if due > 0:
                due -= size
                yield piece


def _few_words(texts: Iterable[str]) -> bool:
    words, size = set[str](), 0
    for text in texts:
        new = set(re.findall(r"\w+|[^\w\s]+", text)) - words
        size += sum(len(word.encode()) for word in new)
        if size > WORDS:
            return False
        words |= new
    return True


_WORD_END = re.compile(r"[^\W_](?=[\s.,;:!?、。，])")


def _pieces(text: str, size: int) -> Iterator[str]:
    """A text in pieces of at most so many characters, cut behind words, where a byte-level BPE cuts it, too.

    What has no word's end in the second half of a piece is cut anywhere.
    """
    at = 0
    while len(text) - at > size:
        ends = [match.end() for match in _WORD_END.finditer(text, at + size // 2, at + size)]
        cut = ends[-1] if ends else at + size
        yield text[at:cut]
        at = cut
    yield text[at:]


def _batches(documents: Iterable[str]) -> Iterator[list[tuple[int, str, bool]]]:
    """Documents as pieces, about `PIECE` characters at a time: whose it is, the piece, whether it is the last one."""
    batch, size = list[tuple[int, str, bool]](), 0
    for place, document in enumerate(documents):
        at = 0
        for piece in _pieces(document, PIECE):
            at += len(piece)
            size += len(piece)
            batch.append((place, piece, at == len(document)))
            if size >= PIECE:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _windows(
    part: _Part, numbers: Mapping[str | None, int], tokenizer: PreTrainedTokenizerFast, length: int, domain: str
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The documents as windows (k, length) int64, an end token after each document; the last short piece is left out.

    And the language of each token (k, length), by its number.
    """
    end, total = [tokenizer.eos_token_id], 0
    rest: np.ndarray = np.zeros((2, 0), np.int64)
    for batch in _batches(part.documents):
        encoded = tokenizer.backend_tokenizer.encode_batch_fast(
            [text for _, text, _ in batch], add_special_tokens=False
        )
        parts = [rest]
        for (place, _, last), one in zip(batch, encoded, strict=True):
            ids = np.array(one.ids + end * last, np.int64)
            language = numbers[part.languages[place] if part.languages else None]
            parts.append(np.stack([ids, np.full_like(ids, language)]))
        found = np.concatenate(parts, 1)
        total += found.shape[1] - rest.shape[1]
        whole = found.shape[1] // length * length
        rest = found[:, whole:]
        if whole:
            ids, languages = found[:, :whole].reshape(2, -1, length)
            yield ids, languages
    if total < length:
        raise UserError(
            f"domain {domain!r} is too small: a split of it has {total} tokens, and a window takes {length}; "
            "give more text or a shorter data.sequence_length"
        )


def _first(windows: Iterable[tuple[np.ndarray, np.ndarray]], count: int) -> list[Tensor]:
    """The first windows and their languages, each (count, length) int64 or as many as there are."""
    found, have = list[tuple[np.ndarray, np.ndarray]](), 0
    for some in windows:
        found.append(some)
        have += len(some[0])
        if have >= count:
            break
    return [torch.from_numpy(np.concatenate(parts)[:count].copy()) for parts in zip(*found, strict=True)]


def predicted_bytes(ids: Tensor, tokenizer: PreTrainedTokenizerBase) -> int:
    """The UTF-8 bytes that tokens stand for; special ones stand for none. In byte-level BPE a letter is a byte."""
    special = set(tokenizer.all_special_ids)
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    sizes = torch.tensor([0 if i in special else len(token) for i, token in enumerate(tokens)])
    return int(sizes[ids].sum())
