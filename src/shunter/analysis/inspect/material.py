"""Material: from documents or images to the forwards of a model, with labels of each token that it sees."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss, ForMaskedLMLoss

from ...data.documents import Domain
from ...data.images import Normalisation, find_images, image_ids, read_image
from ...errors import UserError
from ...moe import moe_layers
from .tokens import KINDS, kind, token_text

__all__ = [
    "Batch",
    "Material",
    "Stream",
    "Window",
    "image_material",
    "pixel_material",
    "text_material",
    "window_material",
]

POSITIONS = 128  # at most; longer windows have runs of positions for one label
MASK_EVERY = 7  # of the tokens of a masked language model's text
IMAGES = 16  # of a forward


class Window(NamedTuple):
    """A sequence of token ids with the domain and the language of its text; None where that is not known."""

    ids: list[int]
    domain: str
    language: str | None = None


@dataclass(frozen=True)
class Batch:
    """One forward: the model's keyword arguments, and the class that each row of its logits should give, or -100.

    And what its layers are told of the tokens besides, by names of `Context`; and how many tokens that are no padding
    the layers see, where that cannot be read off the inputs.
    """

    inputs: dict[str, Tensor]
    targets: Tensor
    told: dict[str, Tensor] = field(default_factory=dict)
    tokens: int | None = None


@dataclass(frozen=True)
class Stream:
    """What is known of the tokens that layers see, in the order of the forwards.

    Args:
        labels: by what they say ("token", "domain", …), (N,) int64, -1 where not known.
        names: by what they say, the text of each label.
    """

    labels: dict[str, Tensor]
    names: dict[str, list[str]]

    def first(self, tokens: int) -> Stream:
        """What is known of the first so many tokens."""
        return Stream({what: label[:tokens] for what, label in self.labels.items()}, self.names)

    def after(self, extra: int, length: int) -> Stream:
        """The same where each sequence of a length begins with so many extra tokens, of which nothing is known."""
        labels = {
            what: F.pad(label.reshape(-1, length), (extra, 0), value=-1).flatten()
            for what, label in self.labels.items()
        }
        return Stream(labels, self.names)


@dataclass(frozen=True)
class Material:
    """Batches and what is known of their tokens.

    Args:
        batches: the forwards.
        streams: "" for the one sequence of most models, "encoder" and "decoder" for models with two.
        groups: (targets,) domain of each target, in order; -1 where it has none.
        domains: their names.
        tokens: how many tokens are shown.
        window: tokens of the longest sequence.
        images: (images, channels, height, width) in [0, 1], for pictures of patches; None for text.
        patch: the height and width of a patch.
        sound: whether the tokens are frames of sound.
        notices: what people should know of the choice.
    """

    batches: list[Batch]
    streams: dict[str, Stream]
    groups: Tensor
    domains: list[str]
    tokens: int
    window: int
    images: Tensor | None = None
    patch: int = 0
    sound: bool = False
    notices: list[str] = field(default_factory=list)

    def first(self, batches: int) -> Material:
        """The same with the first so many batches alone."""
        return replace(self, batches=self.batches[:batches])

    def stream(self, layer: str, tokens: int, batches: int) -> Stream | None:
        """What is known of the tokens that a layer saw in the first forwards; None where they are not the model's.

        Args:
            layer: its qualified name, which says encoder or decoder where there are both.
            tokens: how many it saw.
            batches: how many forwards were done.
        """
        which = "" if "" in self.streams else "decoder" if "decoder" in layer.split(".") else "encoder"
        done = self.batches[:batches]
        if all(batch.tokens is not None for batch in done):
            expected = sum(batch.tokens or 0 for batch in done)
            return self.streams[which].first(expected) if tokens == expected else None
        if self.images is not None:
            images = sum(len(batch.inputs["pixel_values"]) for batch in done)
            extra, rest = divmod(tokens - images * self.window, images)
            stream = self.streams[which].first(images * self.window)
            return stream.after(extra, self.window) if extra >= 0 and not rest else None
        expected = sum(int(_real(batch, which).sum()) for batch in done)
        return self.streams[which].first(expected) if tokens == expected else None


def text_material(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Domain],
    *,
    tokens: int = 16384,
    length: int = 128,
    batch_size: int = 16,
) -> Material:
    """Windows of text, the same for the same documents: equal parts of each domain, and in it of each language.

    Args:
        model: causal, masked or encoder-decoder language model (the encoder then reads the first half of a window).
        tokenizer: the model's own.
        documents: the text, by domain.
        tokens: how many at most, in all.
        length: of a window, at most.
        batch_size: windows of a forward.

    Raises:
        UserError: where there is no text, or the tokenizer is not the model's.
    """
    groups: dict[tuple[str, str | None], list[str]] = {}
    for part in documents:
        for text, language in zip(part.documents, part.languages or [None] * len(part.documents), strict=True):
            if text.strip():
                groups.setdefault((part.name, language), []).append(text)
    if not groups:
        raise UserError("the data hold no text; give --data files with at least a few sentences")
    length = min(length, _longest(model))
    domains = sorted({domain for domain, _ in groups})
    numbered: list[tuple[int, Window]] = []
    for (domain, language), texts in sorted(groups.items(), key=lambda item: (item[0][0], item[0][1] or "")):
        parts = sum(1 for other, _ in groups if other == domain)
        share = max(1, round(tokens / len(domains) / parts / length)) * length
        mine = enumerate(_windows(texts, tokenizer, share, length))
        numbered += [(number, Window(ids, domain, language)) for number, ids in mine]
    # Domains in turn, so that a pass that is stopped has seen them all; windows of one length share forwards.
    windows = [window for _, window in sorted(numbered, key=lambda item: (-len(item[1].ids), item[0]))]
    if not windows:
        raise UserError("the data are too short: a window needs at least two tokens; give more text")
    return replace(window_material(model, tokenizer, windows, domains, batch_size=batch_size), window=length)


def window_material(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    windows: Sequence[Window],
    domains: list[str],
    *,
    batch_size: int,
    seen: int | None = None,
) -> Material:
    """Windows of token ids, in their order; those of one length that follow each other share forwards.

    Args:
        model, tokenizer: of `text_material`.
        windows: at least one.
        domains: the names of the windows' domains, in the order of their labels.
        batch_size: windows of a forward.
        seen: how many of a window's tokens the model sees; what follows them are its targets, -100 for none. None:
            all, and the targets are chosen here.

    Raises:
        UserError: where the tokenizer is not the model's.
    """
    rows = int(cast(Tensor, model.get_input_embeddings().weight).shape[0])
    largest = max(max(window.ids) for window in windows)
    if largest >= rows:
        raise UserError(f"the tokenizer gives token {largest}, but the model has {rows} embeddings; it is another's")
    batches, shown_in, group = [], dict[str, list[Window]](), list[int]()
    for _, same_length in groupby(windows, key=lambda window: len(window.ids)):
        alike = list(same_length)
        for start in range(0, len(alike), batch_size):
            some = alike[start : start + batch_size]
            ids = torch.tensor([window.ids for window in some])
            if seen is None:
                batch, parts = _text_batch(model, tokenizer, ids)
            else:
                batch, parts = _seen_batch(model, ids[:, :seen], ids[:, seen:], tokenizer.pad_token_id)
            batches.append(batch)
            for stream, part in parts.items():
                real = [row[mask].tolist() for row, mask in zip(part, _real(batch, stream), strict=True)]
                shown = zip(real, some, strict=True)
                shown_in.setdefault(stream, []).extend(window._replace(ids=row) for row, window in shown)
            group += [domains.index(window.domain) for window in some for _ in range(batch.targets.shape[1])]
    streams = {name: _text_stream(rows, tokenizer, domains) for name, rows in shown_in.items()}
    total = sum(int(next(iter(stream.labels.values())).numel()) for stream in streams.values())
    longest = seen or max(len(window.ids) for window in windows)
    return Material(batches, streams, torch.tensor(group), domains, total, longest)


def _text_batch(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: Tensor
) -> tuple[Batch, dict[str, Tensor]]:
    """The forward of windows (B, S) as the kind of model takes them, and the ids that the layers of each stream see."""
    loss = LOSS_MAPPING.get(model.loss_type or "")
    if model.config.is_encoder_decoder:
        half = ids.shape[1] // 2
        return _seen_batch(model, ids[:, :half], ids[:, half:])
    if loss is ForMaskedLMLoss and tokenizer.mask_token_id is not None:
        hidden = torch.arange(ids.numel()).reshape(ids.shape) % MASK_EVERY == MASK_EVERY // 2
        shown = ids.where(~hidden, int(tokenizer.mask_token_id))
        return Batch({"input_ids": shown}, ids.where(hidden, -100)), {"": shown}
    target = F.pad(ids[:, 1:], (0, 1), value=-100) if loss is ForCausalLMLoss else torch.full_like(ids, -100)
    return Batch({"input_ids": ids}, target), {"": ids}


def _seen_batch(
    model: PreTrainedModel, source: Tensor, target: Tensor, padding: int | None = None
) -> tuple[Batch, dict[str, Tensor]]:
    """The forward of what a model sees (B, S), with what it should give: of the same places, or by a decoder.

    Behind the tokens of a source and of a target may be padding, which is -100 in the target.
    """
    if not model.config.is_encoder_decoder:
        return Batch({"input_ids": source}, target), {"": source}
    start = model.config.get_text_config().decoder_start_token_id
    begin = torch.full_like(target[:, :1], 0 if start is None else start)
    shifted = torch.cat([begin, target[:, :-1]], 1)
    if padding is not None:
        shifted = shifted.masked_fill(shifted == -100, padding)
    inputs = {
        "input_ids": source,
        "attention_mask": (torch.ones_like(source) if padding is None else source != padding).long(),
        "decoder_input_ids": shifted,
        "decoder_attention_mask": (target != -100).long(),
    }
    return Batch(inputs, target), {"encoder": source, "decoder": shifted}


def _real(batch: Batch, stream: str) -> Tensor:
    """Where the tokens of a stream are no padding (B, S)."""
    before = "decoder_" if stream == "decoder" else ""
    mask = batch.inputs.get(f"{before}attention_mask")
    return torch.ones_like(batch.inputs[f"{before}input_ids"], dtype=torch.bool) if mask is None else mask.bool()


def _longest(model: PreTrainedModel) -> int:
    config = model.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    return int(longest) if longest else 1 << 30


def _windows(texts: list[str], tokenizer: PreTrainedTokenizerBase, tokens: int, length: int) -> list[list[int]]:
    """The first tokens of the texts, in a fixed random order, as windows that begin as a text does."""
    begin = tokenizer.bos_token_id
    prefix = [begin] if begin is not None and tokenizer("a").input_ids[:1] == [begin] else []
    body = length - len(prefix)
    texts = list(texts)
    random.Random(0).shuffle(texts)
    ids: list[int] = []
    for text in texts:
        # A token is rarely longer than 16 characters; the rest of a long document is never looked at.
        ids += tokenizer(text[: 16 * tokens], add_special_tokens=False, verbose=False).input_ids
        if tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
        if len(ids) >= tokens:
            break
    count = max(1, min(len(ids), tokens) // length)
    pieces = [prefix + ids[i * body : (i + 1) * body] for i in range(count)]
    return [piece for piece in pieces if len(piece) >= 4]


def _text_stream(rows: list[Window], tokenizer: PreTrainedTokenizerBase, domains: list[str]) -> Stream:
    languages = sorted({language for _, _, language in rows if language is not None})
    window = max(len(ids) for ids, _, _ in rows)
    run = -(-window // POSITIONS)
    labels: dict[str, list[int]] = {
        what: [] for what in ("domain", "language", "position", "kind", "token", "previous")
    }
    vocabulary = sorted({token for ids, _, _ in rows for token in ids})
    texts = {token: token_text(tokenizer, token) for token in vocabulary}
    special, marked = set(tokenizer.all_special_ids), any(text.startswith("##") for text in texts.values())
    kinds = {t: KINDS.index("special" if t in special else kind(text, marked)) for t, text in texts.items()}
    compact = {token: i for i, token in enumerate(vocabulary)}
    for ids, domain, language in rows:
        labels["domain"] += [domains.index(domain)] * len(ids)
        labels["language"] += [-1 if language is None else languages.index(language)] * len(ids)
        labels["position"] += [i // run for i in range(len(ids))]
        labels["kind"] += [kinds[token] for token in ids]
        labels["token"] += [compact[token] for token in ids]
        labels["previous"] += [-1, *(compact[token] for token in ids[:-1])]
    names = {
        "domain": domains,
        "language": languages,
        "position": [str(i) if run == 1 else f"{i * run}–{(i + 1) * run - 1}" for i in range(-(-window // run))],
        "kind": list(KINDS),
        "token": [texts[token] for token in vocabulary],
    }
    names["previous"] = names["token"]
    return Stream({what: torch.tensor(label) for what, label in labels.items()}, names)


def image_material(model: PreTrainedModel, folder: Path, paths: Sequence[str], *, tokens: int) -> Material:
    """Images cut into patches as a Vision Transformer does, of each domain in turn; an image's folder is its domain.

    Args:
        model: its configuration has image_size, patch_size and num_channels; a classifier's loss counts where the
            folders have the names of its classes.
        folder: the model's; what its preprocessor_config.json says of scale, mean and standard deviation is done.
        paths: image files, or folders of them.
        tokens: how many patches at most, in equal parts of each domain.

    Raises:
        UserError: where there is no image, or one cannot be read.
    """
    size, channels, patches = _image_sizes(model)
    found = find_images(paths, tokens // patches)
    domains = list(found)
    # Domains in turn, so that every batch has images of all: what a router drops depends on the others of its batch.
    numbered = [(i, number, file) for number, name in enumerate(domains) for i, file in enumerate(found[name])]
    numbered.sort(key=lambda image: image[:2])
    domain = [number for _, number, _ in numbered]
    pixels = torch.stack([read_image(file, size, channels) for _, _, file in numbered])
    return pixel_material(model, Normalisation.of(folder, channels), pixels, domain, domains)


def _image_sizes(model: PreTrainedModel) -> tuple[int, int, int]:
    """The height and width of a model's images, their channels, and how many patches they are cut into."""
    size, patch = getattr(model.config, "image_size", None), getattr(model.config, "patch_size", None)
    if not isinstance(size, int) or not isinstance(patch, int):
        raise UserError(f"this model's images are of {size} in patches of {patch}: only square ones can be shown")
    return size, getattr(model.config, "num_channels", 3), (size // patch) ** 2


def pixel_material(
    model: PreTrainedModel, normalise: Normalisation, pixels: Tensor, domain: Sequence[int], domains: list[str]
) -> Material:
    """Images as the model takes them, in their order.

    Args:
        model: as of `image_material`. Where a router goes by token ids, it is given `patch_ids` of the patches.
        normalise: what the model's processor does.
        pixels: (images, channels, height, width) in [0, 1].
        domain: of each image, the number of its domain.
        domains: their names.
    """
    size, _, patches = _image_sizes(model)
    classes = {str(name): int(i) for name, i in (model.config.label2id or {}).items()}
    targets = torch.tensor([classes.get(domains[d], -100) for d in domain])
    shown = normalise(pixels)
    side = math.isqrt(patches)
    by_ids = any("token_ids" in layer.decider.required for layer in moe_layers(model).values())
    batches = [
        Batch({"pixel_values": x}, t, {"token_ids": image_ids(x, size // side)} if by_ids else {})
        for x, t in zip(shown.split(IMAGES), targets.split(IMAGES), strict=True)
    ]
    count = len(pixels) * patches
    stream = Stream(
        {
            "domain": torch.tensor(domain).repeat_interleave(patches),
            "position": torch.arange(patches).repeat(len(pixels)),
        },
        {"domain": domains, "position": [f"r{i // side} c{i % side}" for i in range(patches)]},
    )
    return Material(batches, {"": stream}, torch.tensor(domain), domains, count, patches, pixels, size // side)
