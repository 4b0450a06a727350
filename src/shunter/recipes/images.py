"""Images: a Vision Transformer or an MLP-Mixer and its sparse twin, trained to tell the classes of images."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification, set_seed

from ..analysis.exhibits import Curves, Exhibit, Pictures, Table
from ..analysis.inspect.findings import patches_served
from ..analysis.inspect.inspecting import specialisation
from ..analysis.inspect.material import Material, pixel_material
from ..analysis.inspect.recording import record
from ..analysis.ledger import Ledger, ledger
from ..analysis.pages.inspect_figures import patch_sheet
from ..analysis.runs import Words
from ..data.images import PATCH_IDS, Normalisation, image_ids, moved, pixels_of, square_processor
from ..data.labelled_images import Split, built_in_images, read_labelled, split
from ..data.orders import passes
from ..durable import verify
from ..errors import UserError
from ..hf import sparsify
from ..hf.checkpoints.loading import load_folder
from ..hf.checkpoints.reading import read_json
from ..moe import moe_layers, tell
from ..training.roles import train_only
from . import run
from .mixer import Mixer, MixerShape, mixer_ledger, mixes_channels
from .recipe import Recipe
from .sections import RunConfig, RunName, Section, SparseConfig, TrainingConfig

__all__ = ["RECIPE", "ImagesConfig", "ImagesRecipe"]

EVAL_BATCH = 64  # images of a forward
SHOWN = 256  # images whose patches are looked at
FACTORS = (0.125, 0.25, 0.375, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0)
"""The capacity factors of the evaluation; V-MoE's figure goes from 0 to 2."""
ORDERS = {"batch": "batch priority", "position": "position order"}


class DataConfig(Section):
    """Which images, and how they are seen."""

    source: list[Annotated[str, Field(min_length=1)]] | None = Field(
        None, min_length=1, max_length=1, description="a folder of images or IDX files, a datasets name; none: MNIST"
    )
    image_size: int = Field(28, ge=4, le=1024, description="height and width that images are brought to")
    channels: Literal[1, 3] | None = Field(None, description="1: grey, 3: colours; none: as the images are")
    eval_share: float = Field(0.2, gt=0, lt=1, description="held out of each class where the data do not say what is")
    train_images: int = Field(100_000, ge=2, description="at most")
    eval_images: int = Field(10_000, ge=2, description="at most")
    shift: int = Field(2, ge=0, description="pixels that images are moved by at most in training, at random")


class ModelConfig(Section):
    """The dense model; the sparse twin differs in some of its feed-forward blocks alone."""

    kind: Literal["vit", "mixer"] = Field("vit", description="a Vision Transformer, or an MLP-Mixer")
    start: str | None = Field(None, description="a dense model of these sizes, with which both begin; none: scratch")
    patch_size: int = Field(4, ge=1, le=256, description="pixels of a side")
    dim: int = Field(96, ge=8, le=16384, description="d, width of the hidden states")
    layers: int = Field(4, ge=1, le=256, description="blocks")
    heads: int = Field(4, ge=1, description="of attention")
    hidden: int = Field(192, ge=8, description="width of the dense feed-forward block")
    tokens_hidden: int = Field(96, ge=8, description="mixer: that of the block over the patches of a channel")


class ImagesSparse(SparseConfig):
    """V-MoE blocks in place of every second dense one."""

    num_experts: int = Field(8, ge=1, le=4096)
    router: str = "vmoe"
    every: int = Field(2, ge=1)
    experts: Literal["separate", "residual"] = Field(
        "separate", description="weights of their own, or a core that all share and a residual of each"
    )
    init: Literal["scratch", "copy"] = Field("scratch", description="copy: experts begin as the dense block, as wide")
    train: str = Field("all", min_length=1, description="roles that the sparse model trains, as router,expert")

    @model_validator(mode="after")
    def _as_wide(self) -> ImagesSparse:
        if self.init == "copy" and self.hidden is not None:
            raise ValueError("sparse.init=copy has experts as wide as the dense block; leave sparse.hidden out")
        return self


class ImagesTraining(TrainingConfig):
    """Nineteen times through the built-in images."""

    steps: int = Field(2400, ge=1)
    batch_tokens: int = Field(1600, ge=8, description="patches of one optimizer step, rounded down to whole images")
    warmup: int = Field(100, ge=0)
    learning_rate: float = Field(1.5e-3, gt=0, le=1)
    eval_every: int = Field(400, ge=1)
    beta2: float = Field(0.99, gt=0, lt=1)


class ImagesConfig(RunConfig):
    """The configuration of `shunter train images`."""

    causal: ClassVar[bool] = False
    name: RunName = "images"
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    sparse: ImagesSparse = ImagesSparse()
    training: ImagesTraining = ImagesTraining()

    @model_validator(mode="after")
    def _fits(self) -> ImagesConfig:
        m, d = self.model, self.data
        if d.image_size % m.patch_size:
            raise ValueError(f"data.image_size {d.image_size} must be a multiple of model.patch_size {m.patch_size}")
        if m.kind == "vit" and m.dim % m.heads:
            raise ValueError(f"model.dim {m.dim} must be a multiple of model.heads {m.heads}")
        if d.shift >= d.image_size:
            raise ValueError(f"data.shift {d.shift} must be less than data.image_size {d.image_size}")
        if self.training.batch_tokens < self.tokens:
            raise ValueError(
                f"training.batch_tokens {self.training.batch_tokens} must be at least the {self.tokens} of an image"
            )
        if m.kind == "mixer" and (self.sparse.init == "copy" or m.start):
            raise ValueError(
                "model.kind=mixer begins from scratch: sparse.init=copy and model.start are of model.kind=vit"
            )
        if m.kind == "mixer":
            self.sparse.leave_room(2, m.tokens_hidden, "model.tokens_hidden")
        if self.sparse.init != "copy":
            self.sparse.leave_room(2, m.hidden)
        return self

    @property
    def tokens(self) -> int:
        """Of an image: its patches, and in a Vision Transformer one for the class."""
        return (self.data.image_size // self.model.patch_size) ** 2 + (self.model.kind == "vit")

    @property
    def patches(self) -> int:
        """Of an image."""
        return int((self.data.image_size // self.model.patch_size) ** 2)


@dataclass(frozen=True)
class ImageData:
    """Images as the models take them.

    Args:
        found: the images, and which are held out.
        config: how they are seen.
        count: how many are trained on, with those that come again.
    """

    found: Split
    config: ImagesConfig
    count: int

    @property
    def channels(self) -> int:
        """1 for grey, 3 for colours."""
        return self.config.data.channels or (3 if self.found.colours else 1)

    @property
    def normalise(self) -> Normalisation:
        """Values from -1 to 1."""
        return Normalisation(1.0, torch.full((self.channels,), 0.5), torch.full((self.channels,), 0.5))

    def pixels(self, i: int) -> Tensor:
        """Image i of all, (channels, size, size) in [0, 1].

        Raises:
            UserError: where it cannot be read any more.
        """
        with self.found.images.open(i) as image:
            return pixels_of(image, self.config.data.image_size, self.channels)

    def example(self, pixels: Tensor, i: int) -> dict[str, Tensor]:
        """The keywords of a forward, and the ids of the tokens, where all layers are sent the same tokens."""
        shown = self.normalise(pixels)
        keywords = {"pixel_values": shown, "labels": torch.tensor(self.found.targets[i])}
        if self.config.model.kind == "mixer":
            return keywords
        return keywords | {"token_ids": image_ids(shown[None], self.config.model.patch_size)[0]}

    @property
    def train(self) -> Dataset[dict[str, Tensor]]:
        """Images in training order."""
        return _Images(self)

    def batches(self) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """The held-out images in their order: their numbers, and the keywords of a forward."""
        held_out = self.found.held_out
        for start in range(0, len(held_out), EVAL_BATCH):
            some = held_out[start : start + EVAL_BATCH]
            examples = [self.example(self.pixels(i), i) for i in some]
            yield some, {name: torch.stack([example[name] for example in examples]) for name in examples[0]}

    @property
    def domains(self) -> list[dict[str, Any]]:
        """A record of each class."""
        images, size = self.found.images, self.config.tokens
        parts = {"train": self.found.train, "eval": self.found.held_out}
        counts = {part: Counter(self.found.targets[i] for i in some) for part, some in parts.items()}
        return [
            {"name": name, "license": images.license, "source": images.source}
            | {
                f"{part}_{unit}": times * counts[part][n]
                for part in parts
                for unit, times in (("images", 1), ("patches", size))
            }
            for n, name in enumerate(self.found.classes)
        ]

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the bytes and labels of all images that are used."""
        return self.found.fingerprint

    def describe(self) -> dict[str, Any]:
        """What data.json holds."""
        d, found = self.config.data, self.found
        patch = self.config.model.patch_size
        own = "; the class has a token of its own" if self.config.model.kind == "vit" else ""
        seen = (
            f"Images of {d.image_size} by {d.image_size} in {'colours' if self.channels == 3 else 'grey'}, "
            f"{self.config.patches} patches of {patch} by {patch} each{own}. "
            f"The {len(found.train):,} to train on come "
            f"{self.count / len(found.train):.1f} times."
        )
        return {
            "domains": self.domains,
            "fingerprint": self.fingerprint,
            "notes": [seen, *([found.left_out] if found.left_out else [])],
        }

    def save_pretrained(self, folder: Path) -> None:
        """Write the settings of the image processor."""
        square_processor(self.config.data.image_size, self.normalise).save_pretrained(folder)


class _Images(Dataset[dict[str, Tensor]]):
    """Item i is the i-th image of training, a function of the seed and i: each pass in another order, all moved."""

    def __init__(self, data: ImageData) -> None:
        self.data = data
        generator = torch.Generator().manual_seed(data.config.seed)
        self.order = passes(len(data.found.train), data.count, generator)
        most = data.config.data.shift
        self.moves = torch.randint(-most, most + 1, (data.count, 2), generator=generator, dtype=torch.int16)

    def __len__(self) -> int:
        return self.data.count

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        number = self.data.found.train[int(self.order[i])]
        return self.data.example(moved(self.data.pixels(number), *self.moves[i].tolist()), number)


class ImagesRecipe(Recipe[ImagesConfig, ImageData]):
    """Classification of images: the loss is the cross-entropy of the class in nats."""

    name = "images"
    config = ImagesConfig
    words = Words(
        "images",
        "Two models see the same images in the same order, cut into patches, and learn to tell the class of each.",
        "nats/image",
        "the right class",
        {"accuracy": "of 100 images right"},
        ["accuracy"],
        data="images",
        domain="class",
        token="patch",
    )
    knows = ("mask", "token_ids", "sequence", "position")

    def tells(self, name: str, config: ImagesConfig) -> bool:
        """What `knows` says, but that the channels of a Mixer, which are sent to experts too, have no ids."""
        return super().tells(name, config) and (name != "token_ids" or config.model.kind == "vit")

    def prepare(self, config: ImagesConfig) -> ImageData:
        """The images of the configuration, and which are held out."""
        d = config.data
        images = built_in_images() if d.source is None else read_labelled(d.source[0])
        found = split(images, share=d.eval_share, most=d.train_images, most_held_out=d.eval_images)
        return ImageData(found, config, config.training.steps * self.items_per_step(config))

    def build(self, config: ImagesConfig, data: ImageData, sparse: bool) -> PreTrainedModel:
        """A ViT or Mixer of the data's classes."""
        m, s, d = config.model, config.sparse, config.data
        if m.kind == "mixer":
            return _mixer(config, data, sparse)
        shape = ViTConfig(
            hidden_size=m.dim,
            num_hidden_layers=m.layers,
            num_attention_heads=m.heads,
            intermediate_size=m.hidden,
            image_size=d.image_size,
            patch_size=m.patch_size,
            num_channels=data.channels,
            initializer_range=m.dim**-0.5,  # the default 0.02 is that of 768 and more
            id2label=dict(enumerate(data.found.classes)),
            label2id={name: n for n, name in enumerate(data.found.classes)},
        )
        shape.problem_type = "single_label_classification"
        labels = {"token_ids": PATCH_IDS + 1}
        hidden = s.hidden or run.expert_width(m.hidden, s.build_router(m.dim, labels), config.tokens, gated=False)
        set_seed(config.seed)
        model = ViTForImageClassification(shape)
        if m.start is not None:
            _begin_as(model, Path(m.start))
        if not sparse:
            return model
        options = s.router_options(labels) | {"allow_leak": s.allow_leak, "backend": s.backend}
        options |= {"expert_weights": s.experts, "init": s.init, "hidden": None if s.init == "copy" else hidden}
        made = sparsify(model, s.num_experts, s.router, layers=s.blocks(m.layers), **options)
        if s.train != "all":
            train_only(made, s.train)
        return made

    def load(self, folder: Path) -> PreTrainedModel:
        """A model that a run left."""
        if (folder / "config.json").is_file() and read_json(folder / "config.json").get(
            "model_type"
        ) == MixerShape.model_type:
            verify(folder)
            return Mixer.from_pretrained(folder).eval()
        return super().load(folder)

    def evaluate(self, model: PreTrainedModel, data: ImageData) -> dict[str, Any]:
        """Nats an image, and how many of a hundred are right, in all and by class."""
        loss, right = _predict(model, data)
        target = torch.tensor([data.found.targets[i] for i in data.found.held_out])

        def of(chosen: Tensor) -> dict[str, float]:
            return {"loss": float(loss[chosen].mean()), "accuracy": 100 * float(right[chosen].double().mean())}

        classes = {name: of(target == n) for n, name in enumerate(data.found.classes)}
        return of(torch.ones_like(right)) | {"domains": classes}

    def predictions(self, model: PreTrainedModel, data: ImageData) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Of the class of each held-out image, by class."""
        for logits, target in _logits(model, data):
            for n in target.unique().tolist():
                yield data.found.classes[n], logits[target == n], target[target == n]

    def ledger(self, model: PreTrainedModel, config: ImagesConfig) -> Ledger:
        """Of an image's patches and the token of its class."""
        if isinstance(model, Mixer):
            return mixer_ledger(model)
        return ledger(model, config.tokens, once=("classifier",))

    def items_per_step(self, config: ImagesConfig) -> int:
        """Images."""
        return config.training.batch_tokens // config.tokens

    def tokens_per_step(self, config: ImagesConfig) -> int:
        """The patches of whole images."""
        return self.items_per_step(config) * config.tokens

    def material(self, model: PreTrainedModel, data: ImageData, tokens: int) -> Material:
        """Held-out images with so many patches at most, of each class in turn."""
        chosen = _in_turn(data, max(1, tokens // data.config.patches))
        pixels = torch.stack([data.pixels(i) for i in chosen])
        domain = [data.found.targets[i] for i in chosen]
        return pixel_material(model, data.normalise, pixels, domain, data.found.classes)

    def specialisation(self, model: PreTrainedModel, data: ImageData) -> dict[str, Any]:
        """Which classes' patches each expert took."""
        found = specialisation(model, self.material(model, data, SHOWN * data.config.patches))
        return found | {"layers": {name: one for name, one in found["layers"].items() if _takes_patches(model, name)}}

    def exhibits(self, models: dict[str, PreTrainedModel], config: ImagesConfig, data: ImageData) -> list[Exhibit]:
        """Both models on the same images; accuracy against the capacity factor; the patches of each expert."""
        right = {which: _predict(model, data)[1] for which, model in models.items()}
        shown: list[Exhibit] = [_side_by_side(right["dense"], right["sparse"])]
        shown += self._capacity(models, config, data)
        material = self.material(models["sparse"], data, SHOWN * data.config.patches)
        return [*shown, patches_of_experts(models["sparse"], material)]

    def _capacity(self, models: dict[str, PreTrainedModel], config: ImagesConfig, data: ImageData) -> list[Exhibit]:
        """V-MoE's figure; nothing where the router has no capacity."""
        sparse = models["sparse"]
        chooses = {layer.decider.chooses for layer in moe_layers(sparse).values()}
        if not chooses <= {"tokens", "experts"}:
            return []
        orders = ORDERS if chooses == {"tokens"} else {"position": "experts choose"}
        dense_flops = self.ledger(models["dense"], config).flops_per_token
        whole = self.ledger(sparse, config)
        dense = self.evaluate(models["dense"], data)["accuracy"]
        lines: dict[str, list[tuple[float, float]]] = {name: [] for name in orders.values()}
        rows: list[list[str | float]] = []
        for factor in FACTORS:
            cells: list[str | float] = []
            for order, name in orders.items():
                with _capacity_of(sparse, factor, order) as taken:
                    accuracy = self.evaluate(sparse, data)["accuracy"]
                lines[name].append((factor, accuracy))
                kept = taken["kept"] / max(taken["asked"], 1)
                share = (whole.flops_per_token - (1 - kept) * whole.flops["experts"]) / dense_flops
                cells += [f"{accuracy:.2f} %", f"{100 * kept:.0f} %", f"{share:.2f}×"]
            rows.append([f"{factor:g}", *cells])
        heads = ["factor", *(f"{name}: {what}" for name in orders.values() for what in ("right", "kept", "compute"))]
        says = _capacity_words(lines, rows, dense)
        figure = Curves(
            "Accuracy against the capacity in evaluation",
            says,
            "capacity factor in evaluation",
            "% of the images right",
            lines,
            {"dense": dense},
            logarithmic=True,
        )
        table = Table(
            "The same in numbers",
            "Right: of the held-out images. Kept: of the assignments of patches to experts; the others find "
            "their expert full and are passed over by it. Compute: FLOPs of the whole model per patch, over the dense "
            "model’s.",
            heads,
            rows,
        )
        return [figure, table]


RECIPE = ImagesRecipe()


def _mixer(config: ImagesConfig, data: ImageData, sparse: bool) -> Mixer:
    m, s, d = config.model, config.sparse, config.data
    names = dict(enumerate(data.found.classes))
    shape: dict[str, Any] = {
        "image_size": d.image_size,
        "patch_size": m.patch_size,
        "num_channels": data.channels,
        "hidden_size": m.dim,
        "num_hidden_layers": m.layers,
        "tokens_hidden": m.tokens_hidden,
        "intermediate_size": m.hidden,
        "id2label": names,
        "label2id": {name: n for n, name in names.items()},
    }
    if sparse:
        alike = {"num_experts": s.num_experts, "router": s.router, "backend": s.backend, "expert_weights": s.experts}
        alike |= s.router_options()
        shape["sparse"] = s.blocks(m.layers)
        for which, dim, rows, width in (
            ("tokens", config.patches, m.dim, m.tokens_hidden),
            ("channels", m.dim, config.patches, m.hidden),
        ):
            hidden = s.hidden or run.expert_width(width, s.build_router(dim), rows, gated=False)
            shape[f"{which}_experts"] = {**alike, "hidden": hidden}
    set_seed(config.seed)
    model = Mixer(MixerShape(**shape))
    if sparse and s.train != "all":
        train_only(model, s.train)
    return model


def patches_of_experts(model: PreTrainedModel, material: Material, more: str = "") -> Pictures:
    """For each expert of each layer that is sent patches, those of a material's that its router weighs most.

    Args:
        model: the sparse model.
        material: images, with words or without.
        more: a half-sentence on what it means to have none.
    """
    recording = record(model, material, lambda batches, what, total: batches)
    groups: dict[str, list[tuple[str, str]]] = {}
    for name, layer in recording.layers.items():
        stream = material.stream(name, len(layer.index), recording.batches)
        if stream is None or layer.weight is None or not _takes_patches(model, name):
            continue
        assert material.images is not None
        sheets = patches_served(layer, stream, material.window)
        groups[name] = [
            (f"expert {n}", patch_sheet(patches, material.images, material.patch) if patches else "")
            for n, patches in enumerate(sheets)
        ]
    return Pictures(
        "The patches of each expert",
        f"Of {len(material.groups)} held-out images, for each expert up to 16 patches, those that its router weighs "
        f"most{more}.",
        groups,
    )


def _takes_patches(model: PreTrainedModel, layer: str) -> bool:
    """Whether a layer is sent patches, as all are but those of a Mixer over the patches of a channel."""
    return not isinstance(model, Mixer) or mixes_channels(layer)


def _begin_as(model: PreTrainedModel, folder: Path) -> None:
    """Give a model the weights of one that is on disk.

    Raises:
        UserError: where that is of other sizes, or none.
    """
    if not folder.is_dir():
        raise UserError(
            f"model.start={str(folder)!r} is no folder; give the dense model of a run, as runs/images/dense"
        )
    own, other = model.state_dict(), load_folder(folder).state_dict()
    for name, value in own.items():
        if name not in other or other[name].shape != value.shape:
            there = f"{tuple(other[name].shape)} there" if name in other else "not there"
            raise UserError(
                f"model.start={str(folder)!r}: {name} is {there}, and {tuple(value.shape)} with these settings"
            )
    if more := next((name for name in other if name not in own), None):
        raise UserError(f"model.start={str(folder)!r} has {more}, which a model of these settings has not")
    model.load_state_dict(other)


@torch.no_grad()
def _predict(model: PreTrainedModel, data: ImageData) -> tuple[Tensor, Tensor]:
    """The loss (N,) float64 of each held-out image, and whether the model is right about it (N,) bool."""
    was_training = model.training
    model.eval()
    losses, right = [], []
    for logits, target in _logits(model, data):
        losses.append(torch.nn.functional.cross_entropy(logits, target, reduction="none").double().cpu())
        right.append((logits.argmax(-1) == target).cpu())
    model.train(was_training)
    return torch.cat(losses), torch.cat(right)


@torch.no_grad()
def _logits(model: PreTrainedModel, data: ImageData) -> Iterator[tuple[Tensor, Tensor]]:
    """The logits (B, classes) float32 and the class (B,) of held-out images, a batch at a time, in their order."""
    for _, batch in data.batches():
        with tell(model, **{name: batch[name].to(model.device) for name in ("token_ids",) if name in batch}):
            logits = model(pixel_values=batch["pixel_values"].to(model.device)).logits.float()
        yield logits, batch["labels"].to(model.device)


def _in_turn(data: ImageData, most: int) -> list[int]:
    """So many held-out images at most, a first of each class, then a second, ….

    A pass over part of them has seen all classes.
    """
    targets, seen = data.found.targets, [0] * len(data.found.classes)
    ranked = []
    for i in data.found.held_out:
        ranked.append((seen[targets[i]], targets[i], i))
        seen[targets[i]] += 1
    return [i for _, _, i in sorted(ranked)[:most]]


def _side_by_side(dense: Tensor, sparse: Tensor) -> Table:
    both, neither = int((dense & sparse).sum()), int((~dense & ~sparse).sum())
    gained, lost = int((sparse & ~dense).sum()), int((dense & ~sparse).sum())
    chance = _sign_test(gained, lost)
    verdict = (
        "which is more than chance would explain"
        if chance < 0.05
        else "so that these images do not show which model is the better one"
    )
    return Table(
        "The same images, both models",
        f"Of {len(dense):,} held-out images the sparse model alone is right about {gained:,}, the dense one "
        f"alone about {lost:,}. Were they equally good, a difference as large would come with probability "
        f"{chance:.2g} (sign test), {verdict}. It is one run with one seed; another seed gives other models.",
        ["", "sparse right", "sparse wrong"],
        [["dense right", f"{both:,}", f"{lost:,}"], ["dense wrong", f"{gained:,}", f"{neither:,}"]],
    )


def _sign_test(a: int, b: int) -> float:
    """The two-sided probability of counts as uneven as a and b, were both outcomes equally likely (McNemar, exact)."""
    total = sum(math.comb(a + b, i) for i in range(min(a, b) + 1))
    return min(1.0, float(Fraction(2 * total, 2 ** (a + b))))


@contextmanager
def _capacity_of(model: PreTrainedModel, factor: float, order: str) -> Iterator[dict[str, int]]:
    """Within the block, the layers of a model have this capacity; what they ask for and keep is counted."""
    layers = list(moe_layers(model).values())
    routers = [layer.decider for layer in layers]
    before = [(r.capacity_factor, r.eval_capacity_factor, r.capacity_order) for r in routers]
    counts = {"asked": 0, "kept": 0}

    def count(layer: Any, *_: Any) -> None:
        counts["asked"] += int(layer.routing.demand.sum())
        counts["kept"] += layer.routing.token.numel()

    handles = [layer.register_forward_hook(count) for layer in layers]
    try:
        for router in routers:
            router.capacity_factor, router.eval_capacity_factor, router.capacity_order = factor, None, order
        yield counts
    finally:
        for router, old in zip(routers, before, strict=True):
            router.capacity_factor, router.eval_capacity_factor, router.capacity_order = old
        for handle in handles:
            handle.remove()


def _capacity_words(lines: dict[str, list[tuple[float, float]]], rows: list[list[Any]], dense: float) -> str:
    name, first = next(iter(lines.items()))
    half = {name: dict(points)[0.5] for name, points in lines.items()}
    says = (
        "With a capacity factor of 1 an expert has as many slots as its even share of the patches; with less, some "
        "find their expert full. With batch priority the patches that the router is surest of go first, with position "
        "order those that come first. With half of the slots (0.5) "
        + ", ".join(f"{value:.2f} % of the images are right by {name}" for name, value in half.items())
        + f"; the dense model is right about {dense:.2f} %. "
    )
    good = [row for row, (_, accuracy) in zip(rows, first, strict=True) if accuracy >= dense]
    if good:
        return says + (
            f"The least factor at which {name} is at least as often right as the dense model is {good[0][0]}, for "
            f"{good[0][3]} of the dense model’s compute."
        )
    return says + f"At no factor is {name} as often right as the dense model."
