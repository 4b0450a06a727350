"""Windows of text to what a model sees of them and must restore: hidden tokens (BERT), spans left out (T5)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from .windows import EvalDomain, TextData, predicted_bytes

__all__ = ["MASK", "PAD", "Corruption", "corrupt", "hide_tokens", "leave_out_spans", "sentinels", "span_counts"]

MASK = "<|mask|>"
PAD = "<|pad|>"
SHARE = 0.15  # of the tokens, by both papers
SPAN = 3  # tokens of a span that is left out, in the mean
_HELD_OUT = 1 << 40  # the first seed of held-out windows


def span_counts(length: int, share: float = SHARE, span: float = SPAN) -> tuple[int, int]:
    """How many tokens of a window of a length are left out, and in how many spans; at least one, and one is seen."""
    hidden = min(max(round(length * share), 1), length - 1)
    return hidden, min(max(round(hidden / span), 1), hidden, length - hidden)


def sentinels(length: int) -> list[str]:
    """The sentinel tokens that a window of a length takes: one for each span, and one at the end of the target."""
    return [f"<|{i}|>" for i in range(span_counts(length)[1] + 1)]


def hide_tokens(
    ids: Tensor, mask: int, others: Tensor, generator: torch.Generator, share: float = SHARE
) -> tuple[Tensor, Tensor]:
    """Hide tokens of a window (S,): what is seen of it (S,), and the hidden ones (S,), -100 at the others.

    Of a share of the tokens, drawn evenly, eight in ten are seen as the mask, one as a token drawn from `others`, one
    as itself.

    Source: Devlin et al. 2019 (BERT), section 3.1.
    """
    count = max(1, round(len(ids) * share))
    chosen = torch.randperm(len(ids), generator=generator)[:count]
    way = torch.rand(count, generator=generator)
    drawn = others[torch.randint(len(others), (count,), generator=generator)]
    seen, labels = ids.clone(), torch.full_like(ids, -100)
    labels[chosen] = ids[chosen]
    seen[chosen] = torch.where(way < 0.8, mask, torch.where(way < 0.9, drawn, ids[chosen]))
    return seen, labels


def leave_out_spans(ids: Tensor, marks: Sequence[int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Leave spans out of a window (S,): the source, a sentinel in the place of each, and the target, each sentinel and
    then its span, and one more sentinel.

    As many tokens and spans as `span_counts` says, so that all windows of a length have sources of one length, and
    targets of one. The lengths of the spans, and of what is seen between them, are drawn evenly; as in the paper's code
    a window begins with what is seen and ends with a span.

    Source: Raffel et al. 2020 (T5), section 3.1.4 and 3.3.4.
    """
    hidden, spans = span_counts(len(ids))
    seen_parts, hidden_parts = (_parts(total, spans, generator) for total in (len(ids) - hidden, hidden))
    source, target, at = [], [], 0
    for number, (seen, left_out) in enumerate(zip(seen_parts, hidden_parts, strict=True)):
        mark = torch.tensor([marks[number]])
        source += [ids[at : at + seen], mark]
        target += [mark, ids[at + seen : at + seen + left_out]]
        at += seen + left_out
    return torch.cat(source), torch.cat([*target, torch.tensor([marks[spans]])])


def _parts(total: int, parts: int, generator: torch.Generator) -> list[int]:
    """A total as a sum of so many positive numbers, all sums being as likely."""
    cuts = torch.randperm(total - 1, generator=generator)[: parts - 1].sort().values + 1
    edges = [0, *cuts.tolist(), total]
    return [after - before for before, after in zip(edges, edges[1:], strict=False)]


@dataclass(frozen=True)
class Corruption:
    """What is done to each window.

    Args:
        kind: "hidden" tokens, or "spans" left out.
        tokenizer: which has the mask or the sentinels.
        length: of the windows.
    """

    kind: Literal["hidden", "spans"]
    tokenizer: PreTrainedTokenizerBase
    length: int

    @cached_property
    def marks(self) -> Any:
        """The ids of the sentinels."""
        return self.tokenizer.convert_tokens_to_ids(sentinels(self.length))

    @cached_property
    def others(self) -> Tensor:
        """The ids of all tokens that are not special."""
        special = set(self.tokenizer.all_special_ids)
        return torch.tensor([i for i in range(len(self.tokenizer)) if i not in special])

    def __call__(self, ids: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """What is seen of a window (S,), and the labels; a function of the window and the seed."""
        generator = torch.Generator().manual_seed(seed)
        if self.kind == "spans":
            return leave_out_spans(ids, self.marks, generator)
        return hide_tokens(ids, int(self.tokenizer.mask_token_id), self.others, generator)


def corrupt(data: TextData, corruption: Corruption, seed: int) -> TextData:
    """The same windows in the same order, each seen in part; held-out ones always the same part of them.

    Args:
        data: windows of text.
        corruption: what is done to them.
        seed: of what is hidden of the windows of training.
    """
    held_out = []
    digest = hashlib.sha256(f"{data.fingerprint} {corruption.kind} {seed}".encode())
    for domain in data.eval:
        pairs = [corruption(ids, _HELD_OUT + i) for i, ids in enumerate(domain.input_ids)]
        seen, targets = (torch.stack([pair[side] for pair in pairs]) for side in (0, 1))
        digest.update(seen.numpy().tobytes() + targets.numpy().tobytes())
        labels = domain.labels if seen.shape == domain.input_ids.shape else _alike(domain.labels, 1)
        size = predicted_bytes(targets[targets >= 0], data.tokenizer)
        held_out.append(EvalDomain(domain.name, seen, size, labels, targets))
    train = _Corrupted(data.train, corruption, seed)
    return replace(data, train=train, eval=held_out, fingerprint=digest.hexdigest())


def _alike(labels: dict[str, Tensor], sizes: int) -> dict[str, Tensor]:
    """Of labels those that all tokens of a window have alike, (windows,): others do not fit what is seen of it."""
    return {name: label for name, label in labels.items() if label.dim() == sizes}


class _Corrupted(Dataset[dict[str, Tensor]]):
    """Item i is the i-th window of training, seen in part, by the seed and i."""

    def __init__(self, windows: Any, corruption: Corruption, seed: int) -> None:
        self.windows, self.corruption, self.seed = windows, corruption, seed

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        item = dict(self.windows[i])
        seen, labels = self.corruption(item.pop("input_ids"), self.seed * 1_000_003 + i)
        told = {name: value for name, value in item.items() if name != "labels"}
        if seen.shape != item["labels"].shape:
            told = _alike(told, 0)
        return {"input_ids": seen, "labels": labels, **told}
