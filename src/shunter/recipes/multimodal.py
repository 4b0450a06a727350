"""Images and captions: LIMoE, one sparse tower for patches and words, and dense twins with one tower and with two."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerFast, set_seed

from ..analysis.exhibits import Exhibit, HeatMap, Table
from ..analysis.inspect.inspecting import specialisation
from ..analysis.inspect.material import Batch, Material, Stream
from ..analysis.inspect.recording import record
from ..analysis.ledger import Ledger
from ..analysis.modalities import COLLAPSED, ModalityUse, modality_use
from ..analysis.runs import Words
from ..data.images import PATCH_IDS, Normalisation, moved, patch_ids, pixels_of, square_processor
from ..data.orders import passes
from ..data.pairs import BUILT_IN_HELD_OUT, PairSplit, built_in_pairs, read_pairs, split_pairs
from ..data.windows import sample, train_tokenizer
from ..hf import sparsify
from ..hf.contrastive import IMAGE, TEXT, ContrastiveConfig, ContrastiveModel
from ..moe import moe_layers, tell
from . import run
from .images import patches_of_experts
from .recipe import Recipe
from .sections import RunConfig, RunName, Section, SparseConfig, TrainingConfig

__all__ = ["RECIPE", "MultimodalConfig", "MultimodalRecipe"]

EVAL_BATCH = 64  # pairs of a forward
SHOWN = 256  # pairs whose tokens are looked at
MEASURED = 1000  # images of which mean and standard deviation are taken
KEPT_BYTES = 2**27  # of images that are kept decoded
TWO_TOWERS, NO_GLOBAL = "two_towers", "without_global_loss"
NAMES = {
    "sparse": "one sparse tower",
    "dense": "one dense tower",
    TWO_TOWERS: "two dense towers",
    NO_GLOBAL: "one sparse tower, no global loss",
}
MODALITIES = ("patches", "words")
RECALLS = (1, 5)


class DataConfig(Section):
    """Which pairs, and how they are seen."""

    source: list[Annotated[str, Field(min_length=1)]] | None = Field(
        None, min_length=1, max_length=1, description="a folder or table of images and captions; none: emoji"
    )
    image_size: int = Field(32, ge=4, le=1024, description="height and width that images are brought to")
    channels: Literal[1, 3] | None = Field(None, description="1: grey, 3: colours; none: as the images are")
    vocab_size: int = Field(1024, ge=257, le=65536, description="of the BPE of the captions")
    caption_tokens: int = Field(10, ge=1, le=256, description="of a caption at most; the rest is cut off")
    eval_share: float = Field(
        0.2, gt=0, lt=1, description="of the concepts, held out where the data do not say what is"
    )
    held_out_styles: list[str] | None = Field(None, description="drawing styles; none: Twemoji of the emoji")
    train_pairs: int = Field(100_000, ge=2, description="at most")
    eval_pairs: int = Field(2000, ge=2, description="at most, of each part that is held out")
    shift: int = Field(2, ge=0, description="pixels that images are moved by at most in training, at random")


class ModelConfig(Section):
    """The dense tower; the sparse twin differs in some of its feed-forward blocks alone."""

    patch_size: int = Field(8, ge=1, le=256, description="pixels of a side")
    dim: int = Field(64, ge=8, le=16384, description="d, width of the hidden states")
    layers: int = Field(2, ge=1, le=256, description="blocks")
    heads: int = Field(4, ge=1, description="of attention")
    hidden: int = Field(192, ge=8, description="width of the dense feed-forward block")


class MultimodalSparse(SparseConfig):
    """LIMoE blocks in place of every second dense one."""

    num_experts: int = Field(8, ge=1, le=4096)
    router: str = "limoe"
    every: int = Field(2, ge=1)


class MultimodalTraining(TrainingConfig):
    """Each step so many pairs, which are told apart from each other."""

    steps: int = Field(600, ge=1)
    batch_tokens: int = Field(1664, ge=8, description="patches and words of one step, rounded down to whole pairs")
    warmup: int = Field(40, ge=0)
    learning_rate: float = Field(4e-3, gt=0, le=1)
    eval_every: int = Field(300, ge=1)
    beta2: float = Field(0.99, gt=0, lt=1)


class MultimodalConfig(RunConfig):
    """The configuration of `shunter train multimodal`."""

    causal: ClassVar[bool] = False
    name: RunName = "multimodal"
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    sparse: MultimodalSparse = MultimodalSparse()
    training: MultimodalTraining = MultimodalTraining()

    @model_validator(mode="after")
    def _fits(self) -> MultimodalConfig:
        m, d = self.model, self.data
        if d.image_size % m.patch_size:
            raise ValueError(f"data.image_size {d.image_size} must be a multiple of model.patch_size {m.patch_size}")
        if m.dim % m.heads:
            raise ValueError(f"model.dim {m.dim} must be a multiple of model.heads {m.heads}")
        if d.shift >= d.image_size:
            raise ValueError(f"data.shift {d.shift} must be less than data.image_size {d.image_size}")
        if self.training.batch_tokens < 2 * self.tokens:
            raise ValueError(
                f"training.batch_tokens {self.training.batch_tokens} must be at least the {2 * self.tokens} of two "
                "pairs, which are told apart"
            )
        self.sparse.leave_room(2, m.hidden)
        return self

    @property
    def patches(self) -> int:
        """Of an image."""
        return (self.data.image_size // self.model.patch_size) ** 2

    @property
    def tokens(self) -> int:
        """Of a pair: its patches, and the words with their padding."""
        return self.patches + self.data.caption_tokens


@dataclass(frozen=True)
class PairData:
    """Pairs as the models take them.

    Args:
        found: the pairs, and which are held out.
        config: how they are seen.
        count: how many are trained on, with those that come again.
        tokenizer: of the captions.
    """

    found: PairSplit
    config: MultimodalConfig
    count: int
    tokenizer: PreTrainedTokenizerFast

    @property
    def channels(self) -> int:
        """1 for grey, 3 for colours."""
        return self.config.data.channels or (3 if self.found.colours else 1)

    @cached_property
    def normalise(self) -> Normalisation:
        """To mean 0 and standard deviation 1 in each channel of the first images of training.

        Drawings are mostly background, which all have in common: with values from -1 to 1 it is most of their vectors.
        """
        some = torch.stack([self.pixels(i) for i in self.found.train[: min(MEASURED, self.kept)]])
        return Normalisation(1.0, some.mean((0, 2, 3)), some.std((0, 2, 3)).clamp_min(1e-3))

    @property
    def kept(self) -> int:
        """How many images are kept decoded, one at least."""
        return max(1, KEPT_BYTES // (4 * self.channels * self.config.data.image_size**2))

    @cached_property
    def pixels(self) -> Any:
        """Image i of all, (channels, size, size) in [0, 1]; those of late are kept.

        Raises:
            UserError: where it cannot be read any more.
        """
        size = self.config.data.image_size

        @lru_cache(maxsize=self.kept)
        def decoded(i: int) -> Tensor:
            with self.found.pairs.images.open(i) as image:
                return pixels_of(image, size, self.channels)

        return decoded

    def words(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Captions as ids (B, S) and the mask of those that are no padding, both int64."""
        length = self.config.data.caption_tokens
        ids = torch.zeros(len(captions), length, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, one in enumerate(captions):
            found = self.tokenizer.backend_tokenizer.encode(" " + one).ids[:length]
            ids[row, : len(found)], mask[row, : len(found)] = torch.tensor(found), 1
        return ids, mask

    def example(self, pixels: Tensor, caption: str) -> dict[str, Tensor]:
        """The keywords of a forward, and the ids of the tokens."""
        shown = self.normalise(pixels)
        ids, mask = (each[0] for each in self.words([caption]))
        patches = patch_ids(shown[None], self.config.model.patch_size)[0]
        return {
            "pixel_values": shown,
            "input_ids": ids,
            "attention_mask": mask,
            "token_ids": torch.cat([patches, PATCH_IDS + ids]),
        }

    def batch(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """Of pairs as they are, by the first of their captions."""
        examples = [self.example(self.pixels(i), self.found.pairs.captions[i][0]) for i in numbers]
        return {name: torch.stack([example[name] for example in examples]) for name in examples[0]}

    @property
    def train(self) -> Dataset[dict[str, Tensor]]:
        """Pairs in training order."""
        return _Pairs(self)

    @property
    def domains(self) -> list[dict[str, Any]]:
        """A record of each drawing style."""
        pairs, size = self.found.pairs, self.config.tokens
        parts = {"train": self.found.train, "eval": [i for some in self.found.parts.values() for i in some]}
        counts = {part: Counter(pairs.styles[i] for i in some) for part, some in parts.items()}
        return [
            {"name": style or "pairs", "license": pairs.licenses.get(style, pairs.images.license)}
            | {"source": pairs.images.source}
            | {
                f"{part}_{unit}": times * counts[part][style]
                for part in parts
                for unit, times in (("pairs", 1), ("tokens", size))
            }
            for style in sorted({*counts["train"], *counts["eval"]})
        ]

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the bytes, captions and styles of all pairs that are used."""
        return self.found.fingerprint

    def describe(self) -> dict[str, Any]:
        """What data.json holds."""
        d, found = self.config.data, self.found
        patch = self.config.model.patch_size
        pairs = found.pairs
        concepts = len({pairs.images.labels[i] for i in found.train})
        seen = (
            f"Images of {d.image_size} by {d.image_size} in {'colours' if self.channels == 3 else 'grey'}, "
            f"{self.config.patches} patches of {patch} by {patch} each; captions of up to {d.caption_tokens} words or "
            f"pieces of words. {len(found.train):,} pairs of {concepts:,} concepts to train on; each concept comes "
            f"{self.count / concepts:.1f} times."
        )
        parts = "; ".join(
            f"{name}: {len(some):,} pairs of {len({pairs.images.labels[i] for i in some}):,} concepts"
            for name, some in found.parts.items()
        )
        notes = [seen, f"Held out: {parts}.", *([f"Captions: {pairs.names}."] if pairs.names else [])]
        used = [i for part in (found.train, *found.parts.values()) for i in part]
        captions = [" " + caption for i in used for caption in pairs.captions[i]]
        ids = self.tokenizer.backend_tokenizer.encode_batch(captions)
        if cut := sum(len(one.ids) > d.caption_tokens for one in ids):
            notes.append(f"Cut off at data.caption_tokens={d.caption_tokens}: {cut:,} of {len(ids):,} captions.")
        notes += [found.left_out] if found.left_out else []
        return {"domains": self.domains, "fingerprint": self.fingerprint, "notes": notes}

    def save_pretrained(self, folder: Path) -> None:
        """Write the tokenizer and the settings of the image processor."""
        self.tokenizer.save_pretrained(folder)
        square_processor(self.config.data.image_size, self.normalise).save_pretrained(folder)


class _Pairs(Dataset[dict[str, Tensor]]):
    """Item i is the i-th pair of training, a function of the seed and i.

    Each pass has every concept once, in another order, in one of its pictures and by one of its names, moved.
    """

    def __init__(self, data: PairData) -> None:
        self.data = data
        generator = torch.Generator().manual_seed(data.config.seed)
        concepts: dict[str, list[int]] = {}
        for i in data.found.train:
            concepts.setdefault(data.found.pairs.images.labels[i], []).append(i)
        self.pictures = list(concepts.values())
        self.order = passes(len(self.pictures), data.count, generator)
        self.drawn = torch.rand(data.count, 2, generator=generator, dtype=torch.float64)
        most = data.config.data.shift
        self.moves = torch.randint(-most, most + 1, (data.count, 2), generator=generator, dtype=torch.int16)

    def __len__(self) -> int:
        return self.data.count

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        pictures, (which, called) = self.pictures[int(self.order[i])], self.drawn[i].tolist()
        number = pictures[int(which * len(pictures))]
        captions = self.data.found.pairs.captions[number]
        pixels = moved(self.data.pixels(number), *self.moves[i].tolist())
        return self.data.example(pixels, captions[int(called * len(captions))])


class MultimodalRecipe(Recipe[MultimodalConfig, PairData]):
    """Contrast of images and captions: the loss is the mean of finding either by the other, in nats."""

    name = "multimodal"
    config = MultimodalConfig
    words = Words(
        "multimodal",
        "Two models see the same images with the same captions in the same order, and learn to tell which belong "
        "together. In each, patches of images and words of captions pass through one tower.",
        "nats/pair",
        "",
        {"image_to_text": "of 100 images find their caption", "text_to_image": "of 100 captions find their image"},
        ["image_to_text", "text_to_image"],
        data="pairs",
        domain="part",
    )
    knows = ("mask", "token_ids", "modality", "sequence", "position")
    others = (TWO_TOWERS, NO_GLOBAL)

    def others_of(self, config: MultimodalConfig) -> tuple[str, ...]:
        """Two towers, and where the router has a global loss, the sparse tower without it."""
        return self.others if _has_global_loss(config) else (TWO_TOWERS,)

    def prepare(self, config: MultimodalConfig) -> PairData:
        """The pairs of the configuration, and which are held out."""
        d = config.data
        pairs = built_in_pairs(d.image_size) if d.source is None else read_pairs(d.source[0])
        styles = d.held_out_styles
        if styles is None:
            styles = [BUILT_IN_HELD_OUT] if d.source is None else []
        found = split_pairs(pairs, share=d.eval_share, styles=styles, most=d.train_pairs, most_held_out=d.eval_pairs)
        texts = [" " + caption for i in found.train for caption in pairs.captions[i]]
        tokenizer = train_tokenizer(sample(texts), d.vocab_size)
        return PairData(found, config, config.training.steps * self.items_per_step(config), tokenizer)

    def build(self, config: MultimodalConfig, data: PairData, sparse: bool) -> PreTrainedModel:
        """A tower for both modalities."""
        return self._build(config, data, 1, config.sparse if sparse else None)

    def build_other(self, config: MultimodalConfig, data: PairData, name: str) -> PreTrainedModel:
        """Two dense towers, or the sparse tower without the global entropy loss."""
        if name == TWO_TOWERS:
            return self._build(config, data, 2, None)
        options = config.sparse.options | {"global_entropy_loss": 0.0}
        return self._build(config, data, 1, config.sparse.model_copy(update={"options": options}))

    def _build(
        self, config: MultimodalConfig, data: PairData, towers: int, sparse: SparseConfig | None
    ) -> PreTrainedModel:
        m, d = config.model, config.data
        shape = ContrastiveConfig(
            m.dim,
            m.layers,
            m.heads,
            m.hidden,
            towers,
            d.image_size,
            m.patch_size,
            data.channels,
            len(data.tokenizer),
            d.caption_tokens,
            initializer_range=m.dim**-0.5,
        )
        labels = {"token_ids": PATCH_IDS + len(data.tokenizer), "modality": len(MODALITIES)}
        set_seed(config.seed)
        model = ContrastiveModel(shape)
        if sparse is None:
            return model
        router = sparse.build_router(m.dim, labels)
        hidden = sparse.hidden or run.expert_width(m.hidden, router, config.tokens, gated=False)
        options = sparse.router_options(labels) | {"allow_leak": sparse.allow_leak, "backend": sparse.backend}
        return sparsify(
            model, sparse.num_experts, sparse.router, layers=sparse.blocks(m.layers), hidden=hidden, **options
        )

    def evaluate(self, model: PreTrainedModel, data: PairData) -> dict[str, Any]:
        """Nats a pair, and of a hundred how many are found among the first, in each part; the mean of the parts."""
        parts = {name: _retrieval(model, data, name) for name in data.found.parts}
        keys = next(iter(parts.values()))
        return {key: sum(part[key] for part in parts.values()) / len(parts) for key in keys} | {"domains": parts}

    def predictions(self, model: PreTrainedModel, data: PairData) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Of the caption of each held-out image among all captions of its part and style."""
        for name in data.found.parts:
            for numbers in data.found.groups(name).values():
                similar, caption = _similar(model, data, numbers)
                yield name, similar, caption

    def ledger(self, model: PreTrainedModel, config: MultimodalConfig) -> Ledger:
        """Of a patch or word, of a pair with a caption of full length; what padding costs is in it."""
        parts: Any = model
        tower, towers = parts.towers[0], len(parts.towers)
        count, patches = config.tokens, config.patches
        layers = moe_layers(model).values()
        flops = {"projections": 0.0, "attention": 0.0, "routers": 0.0, "experts": 0.0}
        for layer in layers:
            for part, cost in layer.flops_per_token(count).items():
                flops[part] += cost
        inside = {id(part) for layer in layers for part in layer.modules()}
        for module in tower.modules():
            if isinstance(module, torch.nn.Linear) and id(module) not in inside:
                flops["projections"] += 2 * module.weight.numel()
        heads = parts.image_head.weight.numel() + parts.text_head.weight.numel()
        flops["projections"] += 2 * (patches * parts.patches.weight.numel() + heads) / count
        pairs = count**2 if towers == 1 else patches**2 + (count - patches) ** 2
        flops["attention"] = config.model.layers * 2 * 2 * pairs / count * config.model.dim
        total = sum(p.numel() for p in model.parameters())
        inactive = sum(layer.inactive_parameters(count) for layer in layers)
        inactive += (towers - 1) * sum(p.numel() for p in tower.parameters())
        return Ledger(total, total - inactive, flops)

    def items_per_step(self, config: MultimodalConfig) -> int:
        """Pairs."""
        return config.training.batch_tokens // config.tokens

    def tokens_per_step(self, config: MultimodalConfig) -> int:
        """The patches and words of whole pairs."""
        return self.items_per_step(config) * config.tokens

    def material(self, model: PreTrainedModel, data: PairData, tokens: int) -> Material:
        """Held-out pairs with so many patches and words at most, of each part in turn."""
        return _material(data, _in_turn(data, max(2, tokens // data.config.tokens)))

    def specialisation(self, model: PreTrainedModel, data: PairData) -> dict[str, Any]:
        """Which parts' tokens each expert took."""
        return specialisation(model, self.material(model, data, SHOWN * data.config.tokens))

    def exhibits(self, models: dict[str, PreTrainedModel], config: MultimodalConfig, data: PairData) -> list[Exhibit]:
        """All models on all parts; the experts of each modality with the global loss and without; patches."""
        material = self.material(models["sparse"], data, SHOWN * config.tokens)
        found = {which: self.evaluate(model, data)["domains"] for which, model in models.items()}
        use = {which: _use(models[which], material) for which in ("sparse", NO_GLOBAL) if which in models}
        without = "; an expert without any takes words alone, or nothing"
        patches = patches_of_experts(models["sparse"], material, without)
        return [_retrieval_table(found, data), *_modalities(use), patches]


RECIPE = MultimodalRecipe()


def _has_global_loss(config: MultimodalConfig) -> bool:
    router = config.sparse.build_router(8, {"token_ids": PATCH_IDS + 257, "task": 2})
    return float(router.coefficients.get("global_entropy_loss", 0.0)) > 0


@torch.no_grad()
def _embedded(model: PreTrainedModel, data: PairData, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The vectors (N, d) float32 of the images and of the captions of pairs."""
    was_training = model.training
    model.eval()
    found = []
    for start in range(0, len(numbers), EVAL_BATCH):
        batch = {k: v.to(model.device) for k, v in data.batch(numbers[start : start + EVAL_BATCH]).items()}
        with tell(model, token_ids=batch.pop("token_ids")):
            out = model(**batch)
        found.append((out.image_embeds.float().cpu(), out.text_embeds.float().cpu()))
    model.train(was_training)
    images, texts = zip(*found, strict=True)
    return torch.cat(images), torch.cat(texts)


def _similar(model: PreTrainedModel, data: PairData, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The scaled similarity (N, M) of the images of pairs with their different captions, and which is whose (N,)."""
    images, texts = _embedded(model, data, numbers)
    first: dict[str, int] = {}
    captions = [data.found.pairs.captions[i][0] for i in numbers]
    right = torch.tensor([first.setdefault(caption, len(first)) for caption in captions])
    rows = [captions.index(caption) for caption in first]
    scale: Any = model.scale
    return float(scale.detach()) * images @ texts[rows].T, right


def _retrieval(model: PreTrainedModel, data: PairData, part: str) -> dict[str, float]:
    """The numbers of an evaluation on a part, the mean over its pairs; each style is looked through by itself."""
    sums: dict[str, float] = {}
    count = 0
    for numbers in data.found.groups(part).values():
        similar, right = _similar(model, data, numbers)
        for key, value in retrieved(similar, right).items():
            sums[key] = sums.get(key, 0.0) + value * len(numbers)
        count += len(numbers)
    return {key: value / count for key, value in sums.items()}


def retrieved(similar: Tensor, right: Tensor) -> dict[str, float]:
    """Loss in nats, and in % how often captions are found by images and images by captions, first or among 5.

    What is as similar as the right one counts as before it, so that a model which embeds all alike finds nothing.

    Args:
        similar: (N, M) of N images with M captions.
        right: (N,) int64, the caption of each image; every caption has one image at least.
    """
    similar = similar.double()
    mine = F.one_hot(right, similar.shape[1]).bool()
    own = similar[mine][:, None]  # of each image
    before = (similar.masked_fill(mine, -torch.inf) >= own).sum(1)
    best = similar.masked_fill(~mine, -torch.inf).max(0).values  # of each caption
    ahead = (similar.masked_fill(mine, -torch.inf) >= best).sum(0)
    to_text = similar.logsumexp(1) - own[:, 0]
    to_image = similar.logsumexp(0) - similar.masked_fill(~mine, -torch.inf).logsumexp(0)
    found = {"loss": float(to_text.mean() + to_image.mean()) / 2}
    for way, rank in (("image_to_text", before), ("text_to_image", ahead)):
        found |= {way: 100 * float((rank < 1).double().mean()), f"{way}_5": 100 * float((rank < 5).double().mean())}
    return found


def _in_turn(data: PairData, most: int) -> list[int]:
    """So many held-out pairs at most, in a fixed random order, of each part in turn."""
    orders = [random.Random(0).sample(some, len(some)) for some in data.found.parts.values()]
    ranked = [(rank, part, i) for part, some in enumerate(orders) for rank, i in enumerate(some)]
    return [i for _, _, i in sorted(ranked)[:most]]


def _material(data: PairData, numbers: Sequence[int]) -> Material:
    """Pairs as forwards, with modality, part and place of each patch and word."""
    patches = data.config.patches
    side = data.config.data.image_size // data.config.model.patch_size
    part = {i: n for n, some in enumerate(data.found.parts.values()) for i in some}
    batches, labels = [], {"domain": [], "modality": [], "position": []}  # type: ignore[var-annotated]
    for start in range(0, len(numbers), EVAL_BATCH):
        some = numbers[start : start + EVAL_BATCH]
        inputs = data.batch(some)
        words = inputs["attention_mask"].sum(1).tolist()
        told = {"token_ids": inputs.pop("token_ids")}
        batches.append(Batch(inputs, torch.arange(len(some)), told, len(some) * patches + sum(words)))
        for i, count in zip(some, words, strict=True):
            labels["domain"] += [part[i]] * (patches + count)
            labels["modality"] += [IMAGE] * patches + [TEXT] * count
            labels["position"] += [*range(patches), *[-1] * count]
    names = {
        "domain": list(data.found.parts),
        "modality": list(MODALITIES),
        "position": [f"r{i // side} c{i % side}" for i in range(patches)],
    }
    stream = Stream({what: torch.tensor(label) for what, label in labels.items()}, names)
    pixels = torch.stack([data.pixels(i) for i in numbers])
    groups = torch.tensor([part[i] for i in numbers])
    total = sum(batch.tokens or 0 for batch in batches)
    patch = data.config.model.patch_size
    return Material(batches, {"": stream}, groups, names["domain"], total, patches, pixels, patch)


def _use(model: PreTrainedModel, material: Material) -> dict[str, list[ModalityUse]]:
    """How each modality uses the experts of each layer, in evaluation."""
    recording = record(model, material, lambda batches, what, total: batches)
    modality = material.streams[""].labels["modality"]
    return {
        name: modality_use(layer.index, modality, layer.num_experts, len(MODALITIES))
        for name, layer in recording.layers.items()
    }


def _retrieval_table(found: dict[str, dict[str, dict[str, float]]], data: PairData) -> Table:
    heads = ["part", "model", *(f"{way} @{k}" for way in ("image to caption", "caption to image") for k in RECALLS)]
    rows: list[list[str | float]] = []
    for part in data.found.parts:
        sizes = [len({data.found.pairs.captions[i][0] for i in some}) for some in data.found.groups(part).values()]
        for which, name in NAMES.items():
            if which in found:
                numbers = [value for key, value in found[which][part].items() if key != "loss"]
                rows.append([part, name, *(f"{value:.1f} %" for value in numbers)])
        chance = [min(100.0, 100 * k / max(sizes)) for k in RECALLS]
        rows.append([part, "chance", *(f"{value:.1f} %" for value in chance * 2)])
    return Table(
        "Retrieval and zero-shot accuracy",
        "Of each part, and in it of each drawing style by itself: how often the right caption of an image is among the "
        "first 1 or 5 of all captions there, and the right image of a caption among the first of all images there. "
        "“Image to caption @1” is the zero-shot accuracy: of all names of the part, the model gives the image its own. "
        "One seed; another gives other numbers.",
        heads,
        rows,
    )


def _modalities(use: dict[str, dict[str, list[ModalityUse]]]) -> list[Exhibit]:
    """The experts of each modality as a map, and in numbers with what they say of the global loss."""
    experts = max(len(row.shares) for layers in use.values() for rows in layers.values() for row in rows)
    panels: dict[str, list[list[float]]] = {}
    rows: list[list[str | float]] = []
    collapsed: dict[str, list[str]] = {which: [] for which in use}
    for which, layers in use.items():
        for name, uses in layers.items():
            block = "block " + next(part for part in reversed(name.split(".")) if part.isdigit())
            panels[f"{block}, {NAMES[which]}"] = [row.shares for row in uses]
            for modality, row in zip(MODALITIES, uses, strict=True):
                cells = [f"{row.effective:.2f}", f"{100 * max(row.shares):.0f} %", f"{100 * row.unserved:.0f} %"]
                rows.append([f"{block}, {NAMES[which]}: {modality}", *cells, "yes" if row.collapsed else "no"])
                if row.collapsed:
                    collapsed[which].append(f"{modality} in {block}")
    says = " ".join(
        f"{NAMES[which].capitalize()}: " + (f"collapsed are {', '.join(some)}." if some else "no modality collapsed.")
        for which, some in collapsed.items()
    )
    if NO_GLOBAL in use and not collapsed[NO_GLOBAL]:
        says += " So what the global loss is there to prevent did not appear at this size without it either."
    elif NO_GLOBAL in use and not collapsed["sparse"]:
        says += " So the global loss prevented what happened without it."
    map_ = HeatMap(
        "Experts by modality",
        "Of the assignments of each modality the share of each expert, on held-out pairs in evaluation. " + says,
        list(MODALITIES),
        [str(e) for e in range(experts)],
        panels,
        "expert",
        "share of the modality’s assignments",
    )
    table = Table(
        "Collapse of a modality",
        "Effective experts: how many evenly used ones have the same entropy; a modality with fewer than "
        f"{COLLAPSED:g} has collapsed to one. Unserved: tokens that found their expert full. {says}",
        ["block, model: modality", "effective experts", "largest share", "unserved", "collapsed"],
        rows,
    )
    return [map_, table]
