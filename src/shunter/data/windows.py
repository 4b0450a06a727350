"""Documents to tokens: a held-out split, a tokenizer, windows of equal length in a fixed order."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..recipes.sections import DataConfig, TextConfig
from .documents import DataError, Domain, built_in_domains, read_domains

__all__ = ["EvalDomain", "TextData", "prepare"]


END = "<|end|>"


@dataclass(frozen=True)
class EvalDomain:
    """The held-out windows of a domain.

    Args:
        name: the domain.
        input_ids: (windows, sequence length) int64.
        predicted_bytes: the UTF-8 bytes that the predicted tokens (all but the first of each window) stand for.
    """

    name: str
    input_ids: Tensor
    predicted_bytes: int


@dataclass(frozen=True)
class TextData:
    """What a recipe trains and evaluates on.

    Args:
        train: windows in training order.
        eval: held-out windows by domain.
        tokenizer: saved with the models.
        domains: a record of each domain for people: name, license, source, bytes and tokens of both splits, repeats.
        fingerprint: SHA-256 over all windows and the tokenizer.
    """

    train: Dataset[dict[str, Tensor]]
    eval: list[EvalDomain]
    tokenizer: PreTrainedTokenizerBase
    domains: list[dict[str, Any]]
    fingerprint: str
    kind: str = field(default="bpe")

    def describe(self) -> dict[str, Any]:
        """What data.json holds."""
        return {
            "domains": self.domains,
            "fingerprint": self.fingerprint,
            "vocab_size": len(self.tokenizer),
            "tokenizer": self.kind,
        }


class _Windows(Dataset[dict[str, Tensor]]):
    """Item i is the i-th window of training, a function of the seed and i: domains in turn, each in its own order."""

    def __init__(self, domains: list[Tensor], length: int, seed: int) -> None:
        self.domains, self.length = domains, length
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
        ids = self.domains[which][self.orders[which][turn]]
        return {"input_ids": ids, "labels": ids}


def prepare(config: TextConfig, tokenizer: PreTrainedTokenizerFast | None = None) -> TextData:
    """Read, split, tokenize and cut the text of a configuration; the same configuration gives the same windows.

    Args:
        config: what to read and how to cut it.
        tokenizer: of a model that there is already, byte-level BPE; None trains one on the text.

    Raises:
        DataError: for text that cannot be read or is too little, and for a package that is missing.
    """
    d = config.data
    domains = built_in_domains(d.max_bytes) if d.source is None else read_domains(d.source, d.max_bytes)
    splits = {domain.name: _split(domain, d.eval_share) for domain in domains}
    if tokenizer is None:
        tokenizer = _tokenizer(d, (document for train, _ in splits.values() for document in train))
    digest = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode())
    length = d.sequence_length
    train_windows, held_out, records = [], [], []
    batch = config.training.batch_tokens // length
    needed = -(-config.training.steps * batch // len(domains))
    for domain in domains:
        parts = [_window(documents, tokenizer, length, domain.name) for documents in splits[domain.name]]
        train, evaluation = parts[0], parts[1][: d.eval_windows]
        for part in (train, evaluation):
            digest.update(np.ascontiguousarray(part.numpy()).tobytes())
        train_windows.append(train)
        held_out.append(EvalDomain(domain.name, evaluation, _bytes(evaluation[:, 1:], tokenizer)))
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
    windows = _Windows(train_windows, config.training.steps * batch, config.seed)
    return TextData(windows, held_out, tokenizer, records, digest.hexdigest(), d.tokenizer)


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


def _tokenizer(config: DataConfig, texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on the texts; without merges, bytes themselves."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size if config.tokenizer == "bpe" else len(alphabet) + 1,
        special_tokens=[END],
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts if config.tokenizer == "bpe" else [], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, clean_up_tokenization_spaces=False)


def _window(documents: Sequence[str], tokenizer: PreTrainedTokenizerFast, length: int, domain: str) -> Tensor:
    """The documents as windows (n, length), an end token after each document; the last short piece is left out."""
    end = tokenizer.eos_token_id
    encoded = tokenizer.backend_tokenizer.encode_batch_fast(list(documents), add_special_tokens=False)
    ids = [i for document in encoded for i in (*document.ids, end)]
    count = len(ids) // length
    if count == 0:
        raise DataError(
            f"domain {domain!r} is too small: a split of it has {len(ids)} tokens, and a window takes {length}; "
            "give more text or a shorter data.sequence_length"
        )
    return torch.tensor(ids[: count * length], dtype=torch.int64).reshape(count, length)


def _bytes(ids: Tensor, tokenizer: PreTrainedTokenizerFast) -> int:
    """The UTF-8 bytes that tokens stand for; the end token stands for none. In byte-level BPE a letter is a byte."""
    end = tokenizer.eos_token_id
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    sizes = torch.tensor([0 if i == end else len(token) for i, token in enumerate(tokens)])
    return int(sizes[ids].sum())
