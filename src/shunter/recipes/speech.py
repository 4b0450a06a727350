"""Speech: a Conformer and its sparse twin (SpeechMoE), trained from scratch to write down what is said, by CTC."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, SeamlessM4TFeatureExtractor, set_seed

from .. import routers
from ..analysis.error_rates import error_rates
from ..analysis.exhibits import Exhibit, Table
from ..analysis.inspect.inspecting import specialisation
from ..analysis.inspect.material import Batch, Material, Stream
from ..analysis.ledger import Ledger, ledger
from ..analysis.runs import Words
from ..data.orders import passes
from ..data.sounds import RATE, Sound
from ..data.speech import SYNTHESISED, VOICES, Corpus, read_clips, split, synthesised
from ..durable import write
from ..errors import UserError
from ..hf import sparsify
from ..hf.recogniser import BLANK, Recogniser, RecogniserConfig, best_path, ctc_nats
from ..moe import tell
from . import run
from .recipe import Recipe
from .sections import RunConfig, RunName, Section, SparseConfig, TrainingConfig

__all__ = ["RECIPE", "SpeechConfig", "SpeechRecipe"]

EVAL_BATCH = 32  # clips of a forward
FRAMES = 50  # a second
UNHEARD = 1  # the label of what no text to train on has
_CACHE = 2**28  # bytes of features that are kept
_MOST_UNITS = 2000


class DataConfig(Section):
    """Which sounds, and what is learned of them."""

    source: list[Annotated[str, Field(min_length=1)]] | None = Field(
        None, min_length=1, description="tables or folders of sounds; none: digits, synthesised"
    )
    seconds: float = Field(1.6, ge=0.1, le=60, description="the longest that a sound may last; others are left out")
    units: Literal["words", "characters"] = Field("words", description="what a label stands for")
    mels: int = Field(40, ge=8, le=256, description="bands of a frame's spectrum")
    eval_share: float = Field(0.2, gt=0, lt=1, description="of the voices, held out where the data do not say what is")
    train_clips: int = Field(100_000, ge=1, description="at most")
    eval_clips: int = Field(10_000, ge=1, description="at most")
    languages: list[Literal["en", "es", "fr", "it", "ru"]] = Field(
        ["en", "es", "fr", "it", "ru"], min_length=1, description="that are synthesised"
    )
    mask_bands: int = Field(8, ge=0, description="mel bands that are hidden at most in training, at random")
    mask_frames: int = Field(8, ge=0, description="frames that are hidden at most in training, at random")
    voices: int = Field(60, ge=2, le=len(VOICES), description="that are synthesised")
    takes: int = Field(8, ge=1, le=1000, description="strings of digits of a voice in a language")
    digits: int = Field(3, ge=1, le=20, description="of a string at most")
    noise: tuple[float, float] = Field((0.0, 20.0), description="least and greatest signal-to-noise ratio, in dB")


class ModelConfig(Section):
    """The dense Conformer; the sparse twin differs in its feed-forward blocks, two of each layer, alone."""

    dim: int = Field(96, ge=8, le=16384, description="d, width of the hidden states")
    layers: int = Field(3, ge=1, le=256, description="blocks")
    heads: int = Field(4, ge=1, description="of attention")
    hidden: int = Field(192, ge=8, description="width of the dense feed-forward blocks")
    kernel: int = Field(15, ge=1, le=255, description="frames that a convolution sees, itself and those before")
    decoder_layers: int = Field(0, ge=0, le=64, description="of an attending head beside CTC; 0: none")
    attention_loss: float = Field(0.5, ge=0, le=1, description="weight of the attending head's loss")
    transducer_dim: int = Field(0, ge=0, le=16384, description="width of a transducer head beside CTC; 0: none")
    transducer_loss: float = Field(0.3, ge=0, le=1, description="weight of its loss; CTC's is what is left of 1")


class SpeechSparse(SparseConfig):
    """SpeechMoE: both feed-forward blocks of each layer are experts, and all routers share an embedding network."""

    num_experts: int = Field(8, ge=1, le=4096)
    router: str = "speech"
    embedding_dim: int = Field(32, ge=1, le=4096, description="width of the embedding network")
    domain_input: bool = Field(False, description="tell the router which language is spoken (SpeechMoE2)")


class SpeechTraining(TrainingConfig):
    """Seven times through the built-in sounds."""

    steps: int = Field(800, ge=1)
    batch_tokens: int = Field(1280, ge=8, description="frames of one optimizer step, rounded down to whole clips")
    warmup: int = Field(100, ge=0)
    learning_rate: float = Field(2e-3, gt=0, le=1)
    eval_every: int = Field(200, ge=1)
    beta2: float = Field(0.98, gt=0, lt=1)


class SpeechConfig(RunConfig):
    """The configuration of `shunter train speech`."""

    causal: ClassVar[bool] = False
    name: RunName = "speech"
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    sparse: SpeechSparse = SpeechSparse()
    training: SpeechTraining = SpeechTraining()

    @model_validator(mode="after")
    def _fits(self) -> SpeechConfig:
        m, s = self.model, self.sparse
        if m.dim % (2 * m.heads):
            raise ValueError(f"model.dim {m.dim} must be a multiple of twice model.heads {m.heads}")
        if m.decoder_layers and m.transducer_dim and m.attention_loss + m.transducer_loss >= 1:
            raise ValueError(
                f"model.attention_loss {m.attention_loss} and model.transducer_loss {m.transducer_loss} must leave CTC "
                "a part of 1"
            )
        if self.data.noise[0] > self.data.noise[1]:
            raise ValueError(f"data.noise {list(self.data.noise)} must be the least ratio, then the greatest")
        if self.data.mask_bands >= self.data.mels:
            raise ValueError(f"data.mask_bands {self.data.mask_bands} must be less than data.mels {self.data.mels}")
        if self.training.batch_tokens < self.frames:
            raise ValueError(
                f"training.batch_tokens {self.training.batch_tokens} must be at least the {self.frames} of a clip"
            )
        if s.domain_input and s.router != "speech":
            raise ValueError(f"sparse.domain_input is of the router speech; sparse.router is {s.router!r}")
        s.leave_room(2, m.hidden)
        return self

    @property
    def frames(self) -> int:
        """Of a clip, with the padding behind it."""
        return max(1, int(self.data.seconds * FRAMES))

    @property
    def embeds(self) -> bool:
        """Whether the routers read the embedding network."""
        return "embedding" in routers.find(self.sparse.router).needs


class Vocabulary:
    """Texts to labels and back: 0 is CTC's blank, 1 what was not heard in training, then words or characters.

    Args:
        units: "words" or "characters".
        texts: what is trained on.

    Raises:
        UserError: where there are too many.
    """

    def __init__(self, units: str, texts: list[str]) -> None:
        self.units = units
        self.known = sorted({unit for text in texts for unit in self._cut(text)})
        if len(self.known) > _MOST_UNITS:
            cure = "; set data.units=characters" if units == "words" else ""
            raise UserError(f"the texts have {len(self.known):,} {units}, and {_MOST_UNITS:,} can be learned{cure}")
        self.number = {unit: n for n, unit in enumerate(self.known, 2)}

    def __len__(self) -> int:
        return len(self.known) + 2

    def _cut(self, text: str) -> list[str]:
        return text.split() if self.units == "words" else list(text)

    def labels(self, text: str) -> list[int]:
        """Of a text."""
        return [self.number.get(unit, UNHEARD) for unit in self._cut(text)]

    def text(self, labels: list[int]) -> str:
        """Of labels."""
        heard = ["\N{REPLACEMENT CHARACTER}" if n == UNHEARD else self.known[n - 2] for n in labels if n != BLANK]
        return (" " if self.units == "words" else "").join(heard)


@dataclass(frozen=True)
class SpeechData:
    """Sounds as the models take them.

    Args:
        corpus: the sounds, and which are held out.
        config: how they are heard.
        count: how many are trained on, with those that come again.
    """

    corpus: Corpus
    config: SpeechConfig
    count: int
    _features: dict[int, Tensor] = field(default_factory=dict, repr=False)

    @cached_property
    def extractor(self) -> SeamlessM4TFeatureExtractor:
        """Log-mel frames of 25 ms every 10 ms, two by two, each band of mean 0 and variance 1 over a clip."""
        mels = self.config.data.mels
        return SeamlessM4TFeatureExtractor(feature_size=mels, num_mel_bins=mels, sampling_rate=RATE)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Of what is trained on."""
        return Vocabulary(self.config.data.units, [self.corpus.texts[i] for i in self.corpus.train])

    @cached_property
    def languages(self) -> list[str]:
        """Of all that is used."""
        return sorted({self.corpus.clips[i].language for i in self._used})

    @cached_property
    def groups(self) -> dict[str, list[int]]:
        """Held-out clips by language, and by corpus where there are several."""
        corpora = {self.corpus.clips[i].corpus for i in self._used}
        found: dict[str, list[int]] = {}
        for i in self.corpus.held_out:
            found.setdefault(self._group(i, len(corpora) > 1), []).append(i)
        return dict(sorted(found.items()))

    def _group(self, i: int, several: bool) -> str:
        clip = self.corpus.clips[i]
        return f"{clip.language}, {clip.corpus}" if several else clip.language

    @property
    def _used(self) -> list[int]:
        return [*self.corpus.train, *self.corpus.held_out]

    def features(self, i: int) -> Tensor:
        """The frames (S, f) of clip i, without padding.

        Raises:
            UserError: where it cannot be read any more.
        """
        if i not in self._features:
            sound = self.corpus.clips[i].read(self.config.data.seconds)
            found = features(self.extractor, sound)[: self.config.frames]
            if len(self._features) * self.config.frames * found.shape[1] * 4 > _CACHE:
                return found
            self._features[i] = found
        return self._features[i]

    @cached_property
    def longest(self) -> int:
        """Labels of a text at most."""
        return max(len(self.vocabulary.labels(self.corpus.texts[i])) for i in self._used)

    def example(self, i: int) -> dict[str, Tensor]:
        """The keywords of a forward, and what its layers are told."""
        frames, labels = self.features(i), self.vocabulary.labels(self.corpus.texts[i])
        padding = self.config.frames - len(frames)
        language = torch.tensor(self.languages.index(self.corpus.clips[i].language))
        return {
            "input_features": nn.functional.pad(frames, (0, 0, 0, padding)),
            "attention_mask": torch.arange(self.config.frames) < len(frames),
            "labels": torch.tensor(labels + [-100] * (self.longest - len(labels))),
            "language": language,
            "domain": language,
        }

    @property
    def train(self) -> Dataset[dict[str, Tensor]]:
        """Clips in training order."""
        return _Clips(self)

    def batches(self) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """The held-out clips in their order: their numbers, and the keywords of a forward."""
        held_out = self.corpus.held_out
        for start in range(0, len(held_out), EVAL_BATCH):
            some = held_out[start : start + EVAL_BATCH]
            examples = [self.example(i) for i in some]
            yield some, {name: torch.stack([example[name] for example in examples]) for name in examples[0]}

    @property
    def domains(self) -> list[dict[str, Any]]:
        """A record of each language, and corpus."""
        clips, several = self.corpus.clips, len({self.corpus.clips[i].corpus for i in self._used}) > 1
        trained: dict[str, list[int]] = {}
        for i in self.corpus.train:
            trained.setdefault(self._group(i, several), []).append(i)
        rows = []
        for name in sorted({*trained, *self.groups}):
            mine = {"train": trained.get(name, []), "eval": self.groups.get(name, [])}
            first = clips[next(iter([*mine["train"], *mine["eval"]]))]
            row: dict[str, Any] = {"name": name, "license": first.license, "source": first.source}
            for part, some in mine.items():
                row |= {f"{part}_clips": len(some), f"{part}_frames": len(some) * self.config.frames}
            rows.append(row)
        return rows

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the bytes and texts of all sounds that are used."""
        return self.corpus.fingerprint

    def describe(self) -> dict[str, Any]:
        """What data.json holds."""
        d, corpus, vocabulary = self.config.data, self.corpus, self.vocabulary
        real = sum(len(self.features(i)) for i in corpus.held_out)
        padding = 100 * (1 - real / (len(corpus.held_out) * self.config.frames))
        speakers = [{corpus.clips[i].speaker for i in part} - {""} for part in (corpus.train, corpus.held_out)]
        seen = (
            f"{self.config.frames} frames of {d.mels} mel bands, two by two, for each clip, {padding:.0f} % of them "
            f"padding, which is counted as trained on. {len(vocabulary) - 2:,} {d.units} are told apart. "
            f"{len(speakers[0]):,} voices are heard in training, {len(speakers[1]):,} in evaluation, "
            f"{len(speakers[0] & speakers[1]):,} in both. The {len(corpus.train):,} clips to train on come "
            f"{self.count / len(corpus.train):.1f} times."
        )
        notes = [seen, *corpus.notes]
        said = [label for i in corpus.held_out for label in vocabulary.labels(corpus.texts[i])]
        if unheard := said.count(UNHEARD):
            notes.append(f"{unheard:,} of {len(said):,} held-out {d.units} are none of those trained on: always wrong.")
        return {"domains": self.domains, "fingerprint": self.fingerprint, "notes": notes}

    def save_pretrained(self, folder: Path) -> None:
        """Write the settings of the feature extractor, and the labels."""
        self.extractor.save_pretrained(folder)
        labels = {"units": self.vocabulary.units, "known": self.vocabulary.known}
        write(folder / "labels.json", json.dumps(labels, ensure_ascii=False))


def features(extractor: SeamlessM4TFeatureExtractor, sound: Sound) -> Tensor:
    """The log-mel frames (S, 2 * mels) of a sound, 50 a second."""
    found = extractor(np.asarray(sound.samples), sampling_rate=RATE, return_tensors="np")
    real = found["attention_mask"][0].astype(bool)
    return torch.from_numpy(found["input_features"][0][real].astype(np.float32))


class _Clips(Dataset[dict[str, Tensor]]):
    """Item i is the i-th clip of training, a function of the seed and i: each pass in another order, with other masks.

    A run of mel bands and a run of frames are 0, their mean (SpecAugment; Park et al. 2019, section 2).
    """

    def __init__(self, data: SpeechData) -> None:
        self.data = data
        generator = torch.Generator().manual_seed(data.config.seed)
        self.order = passes(len(data.corpus.train), data.count, generator)
        self.masks = torch.rand(data.count, 4, generator=generator)

    def __len__(self) -> int:
        return self.data.count

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        example = self.data.example(self.data.corpus.train[int(self.order[i])])
        d, (wide, low, long, early) = self.data.config.data, self.masks[i].tolist()
        pairs = example["input_features"].clone().unflatten(1, (2, d.mels))
        pairs[:, :, _run(wide, low, d.mask_bands, d.mels)] = 0
        real = int(example["attention_mask"].sum())
        pairs[_run(long, early, min(d.mask_frames, real // 2), real)] = 0
        return example | {"input_features": pairs.flatten(1)}


def _run(wide: float, first: float, most: int, of: int) -> slice:
    """A run of at most so many of some, by two numbers from 0 to 1."""
    width = int(wide * (most + 1))
    start = int(first * (of - width + 1))
    return slice(start, start + width)


class SpeechRecipe(Recipe[SpeechConfig, SpeechData]):
    """Recognition of speech: the loss is what CTC gives a text in nats, by label."""

    name = "speech"
    config = SpeechConfig
    words = Words(
        "speech",
        "Two Conformers hear the same sounds in the same order, as frames of their spectrum, and learn to write down "
        "what is said.",
        "nats/label",
        "the right text",
        {"wer": "wrong of 100 words", "cer": "wrong of 100 characters"},
        data="sounds",
        domain="language",
        token="frame",
    )
    knows = ("mask", "sequence", "position", "embedding", "language", "domain")

    def prepare(self, config: SpeechConfig) -> SpeechData:
        """The sounds of the configuration, and which are held out."""
        d = config.data
        clips = []
        for source in d.source or [SYNTHESISED]:
            if source == SYNTHESISED:
                clips += synthesised(d.voices, d.takes, d.digits, languages=d.languages, noise=d.noise)
            else:
                clips += read_clips(source)

        def enough(sound: Sound, text: str) -> str:
            units = text.split() if d.units == "words" else list(text)
            needed = len(units) + sum(a == b for a, b in zip(units, units[1:], strict=False))
            frames = min(len(features(extractor, sound)), config.frames)
            return f"its {frames} frames are too few for {len(units)} {d.units}" if frames < needed else ""

        extractor = SeamlessM4TFeatureExtractor(feature_size=d.mels, num_mel_bins=d.mels, sampling_rate=RATE)
        corpus = split(
            clips,
            enough,
            share=d.eval_share,
            seconds=d.seconds,
            most=d.train_clips,
            most_held_out=d.eval_clips,
        )
        found = SpeechData(corpus, config, config.training.steps * self.items_per_step(config))
        if len(found.vocabulary) < 4:  # two of these stand for nothing that is said
            heard = ", ".join(map(repr, found.vocabulary.known))
            raise UserError(f"of what is said to train on, {heard} is all that is told apart; it takes two {d.units}")
        return found

    def build(self, config: SpeechConfig, data: SpeechData, sparse: bool) -> PreTrainedModel:
        """A Conformer of the data's labels."""
        m, s = config.model, config.sparse
        rates = ("hidden", "attention", "activation", "feat_proj", "final", "conformer_conv")
        shape = RecogniserConfig(
            embedding_dim=s.embedding_dim if sparse and config.embeds else 0,
            decoder_layers=m.decoder_layers,
            attention_loss=m.attention_loss,
            transducer_dim=m.transducer_dim,
            transducer_loss=m.transducer_loss,
            most_labels=data.longest + 1,
            vocab_size=len(data.vocabulary),
            pad_token_id=BLANK,
            feature_projection_input_dim=2 * config.data.mels,
            hidden_size=m.dim,
            output_hidden_size=m.dim,
            num_hidden_layers=m.layers,
            num_attention_heads=m.heads,
            intermediate_size=m.hidden,
            conv_depthwise_kernel_size=m.kernel,
            position_embeddings_type="rotary",
            initializer_range=m.dim**-0.5,  # the default 0.02 is that of 768 and more
            apply_spec_augment=False,
            mask_time_prob=0.0,
            layerdrop=0.0,
            **{f"{name}_dropout": 0.0 for name in rates},
        )
        set_seed(config.seed)
        model = Recogniser(shape)
        if not sparse:
            return model
        labels = {"language": len(data.languages), "embedding": s.embedding_dim}
        if s.domain_input or "domain" in routers.find(s.router).needs:
            labels["domain"] = len(data.languages)
        blocks = s.blocks(m.layers)
        # The blocks pay for the embedding network, of each layer two.
        network = 0.0 if model.embedding is None else _flops(model.embedding) / (2 * len(blocks) * 4 * m.dim)
        room = m.hidden - network
        hidden = s.hidden or run.expert_width(room, s.build_router(m.dim, labels), config.frames, gated=False)
        options = s.router_options(labels) | {"allow_leak": s.allow_leak, "backend": s.backend}
        heads, model.heads = model.heads, nn.ModuleDict()  # whose blocks stay dense
        sparsify(model, s.num_experts, s.router, layers=blocks, hidden=hidden, **options)
        model.heads = heads
        return model

    def evaluate(self, model: PreTrainedModel, data: SpeechData) -> dict[str, Any]:
        """Nats a label under CTC, and the error rates of its best path, in all and by language."""
        heard = _recognise(model, data)
        found = {name: _scores(data, heard, some) for name, some in data.groups.items()}
        return _scores(data, heard, data.corpus.held_out) | {"domains": found}

    @torch.no_grad()
    def predictions(self, model: PreTrainedModel, data: SpeechData) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Of the text of each held-out clip among those of its batch, by their probabilities under CTC."""
        for numbers, batch in data.batches():
            batch = {name: value.to(model.device) for name, value in batch.items()}
            real = batch["attention_mask"]
            with tell(model, language=batch["language"], domain=batch["domain"]):
                logits = model(input_features=batch["input_features"], attention_mask=real).logits
            texts, own = batch["labels"].unique(dim=0, return_inverse=True)
            likely = torch.stack([-ctc_nats(logits, real, text.expand(len(numbers), -1)) for text in texts], 1)
            for name, clips in data.groups.items():
                mine = torch.tensor([i in clips for i in numbers], device=own.device)
                if bool(mine.any()):
                    yield name, likely[mine].cpu(), own[mine].cpu()

    def ledger(self, model: PreTrainedModel, config: SpeechConfig) -> Ledger:
        """Of a frame. Heads beside CTC, the same in both models, are left out of the operations."""
        found = ledger(model, config.frames)
        found.flops["projections"] -= _flops(model.get_submodule("heads"))
        return found

    def items_per_step(self, config: SpeechConfig) -> int:
        """Clips."""
        return config.training.batch_tokens // config.frames

    def tokens_per_step(self, config: SpeechConfig) -> int:
        """The frames of whole clips, with their padding."""
        return self.items_per_step(config) * config.frames

    def material(self, model: PreTrainedModel, data: SpeechData, tokens: int) -> Material:
        """Held-out clips with so many frames at most, of each language in turn."""
        frames, names = data.config.frames, list(data.groups)
        ranked = [(n, number, i) for number, some in enumerate(data.groups.values()) for n, i in enumerate(some)]
        chosen = sorted(ranked)[: max(1, tokens // frames)]
        batches, groups, places, seen = [], [], [], []
        for start in range(0, len(chosen), EVAL_BATCH):
            part = chosen[start : start + EVAL_BATCH]
            examples = [data.example(i) for _, _, i in part]
            rows = {name: torch.stack([example[name] for example in examples]) for name in examples[0]}
            real = rows["attention_mask"]
            inputs = {name: rows[name] for name in ("input_features", "attention_mask")}
            told = {name: rows[name] for name in ("language", "domain")}
            batches.append(Batch(inputs, torch.full_like(real, -100, dtype=torch.int64), told))
            group = torch.tensor([number for _, number, _ in part])[:, None].expand(-1, frames)
            groups.append(group.where(real, -1).flatten())
            seen.append(real.flatten())
            tenths = (torch.arange(frames) * 10 // frames).expand(len(part), -1)
            places.append(tenths.flatten())
        domain, real, seconds = torch.cat(groups), torch.cat(seen), data.config.data.seconds
        spans = [f"{seconds * n / 10:.2f}–{seconds * (n + 1) / 10:.2f} s" for n in range(10)]
        labels = {"domain": domain[real], "position": torch.cat(places)[real]}
        stream = Stream(labels, {"domain": names, "position": spans})
        return Material(batches, {"": stream}, domain, names, int(real.sum()), frames, sound=True)

    def specialisation(self, model: PreTrainedModel, data: SpeechData) -> dict[str, Any]:
        """Which languages' frames each expert took."""
        return specialisation(model, self.material(model, data, 256 * data.config.frames))

    def exhibits(self, models: dict[str, PreTrainedModel], config: SpeechConfig, data: SpeechData) -> list[Exhibit]:
        """Error rates by voice; of all heads, where there are several; and what was heard of some clips."""
        heard = {which: _recognise(model, data) for which, model in models.items()}
        shown: list[Exhibit] = [_by_voice(data, heard)]
        if config.model.decoder_layers or config.model.transducer_dim:
            shown.append(_by_head(data, heard))
        return [*shown, _samples(data, heard)]


RECIPE = SpeechRecipe()


def _flops(module: nn.Module) -> float:
    """Of the maps and convolutions of a module, for a frame."""
    return sum(2.0 * part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear | nn.Conv1d))


@dataclass(frozen=True)
class _Heard:
    """What a model made of a clip: its loss in nats, its text by CTC's best path, and by the other heads' names."""

    nats: float
    text: str
    others: dict[str, str]


@torch.no_grad()
def _recognise(model: PreTrainedModel, data: SpeechData) -> dict[int, _Heard]:
    """Of each held-out clip, by its number."""
    was_training = model.training
    model.eval()
    found: dict[int, _Heard] = {}
    for numbers, batch in data.batches():
        batch = {name: value.to(model.device) for name, value in batch.items()}
        real = batch["attention_mask"]
        with tell(model, language=batch["language"], domain=batch["domain"]):
            output = model(input_features=batch["input_features"], attention_mask=real)
        nats = ctc_nats(output.logits, real, batch["labels"]).double().tolist()
        texts = map(data.vocabulary.text, best_path(output.logits, real))
        heads: Any = model.get_submodule("heads")
        others = {name: head.greedy(output.hidden_states[0], real) for name, head in heads.items()}
        for row, (i, loss, text) in enumerate(zip(numbers, nats, texts, strict=True)):
            found[i] = _Heard(loss, text, {name: data.vocabulary.text(said[row]) for name, said in others.items()})
    model.train(was_training)
    return found


def _scores(data: SpeechData, heard: dict[int, _Heard], clips: list[int]) -> dict[str, float]:
    texts = data.corpus.texts
    labels = sum(len(data.vocabulary.labels(texts[i])) for i in clips)
    loss = sum(heard[i].nats for i in clips) / labels
    return {"loss": loss, **error_rates((texts[i], heard[i].text) for i in clips)}


def _by_voice(data: SpeechData, heard: dict[str, dict[int, _Heard]]) -> Table:
    """Error rates of the voices that are held out."""
    voices: dict[str, list[int]] = {}
    for i in data.corpus.held_out:
        voices.setdefault(data.corpus.clips[i].speaker or "not known", []).append(i)
    trained = {data.corpus.clips[i].speaker for i in data.corpus.train}
    rows: list[list[str | float]] = []
    better = 0
    for name, some in sorted(voices.items()):
        scores = {which: _scores(data, heard[which], some) for which in ("dense", "sparse")}
        better += scores["sparse"]["wer"] < scores["dense"]["wer"]
        languages = ", ".join(sorted({data.corpus.clips[i].language for i in some}))
        cells = [f"{scores[which][rate]:.1f} %" for rate in ("wer", "cer") for which in scores]
        rows.append([name, languages, f"{len(some):,}", *cells])
    unheard = sum(name not in trained for name in voices if name != "not known")
    says = (
        f"Wrong words and characters (insertions, deletions, substitutions) of a hundred that each held-out voice "
        f"says. {unheard} of {len(voices)} voices are not heard in training. The sparse model has fewer wrong words "
        f"with {better} of them. It is one run with one seed; another seed gives other models."
    )
    heads = ["voice", "language", "clips", "words, dense", "words, sparse", "characters, dense", "characters, sparse"]
    return Table("Errors by voice", says, heads, rows)


_HEADS = {
    "CTC": "CTC, whose best path is taken",
    "attending": "a decoder that attends to the frames and says the likeliest label each time",
    "transducer": "a transducer, which says the likeliest label by a frame and what it said, or goes to the next",
}


def _by_head(data: SpeechData, heard: dict[str, dict[int, _Heard]]) -> Table:
    """Error rates of CTC's best path and of the other heads."""
    texts, rows = data.corpus.texts, list[list[str | float]]()
    names = ["CTC", *next(iter(heard["dense"].values())).others]
    for which in ("dense", "sparse"):
        said = {name: [(i, one.others.get(name, one.text)) for i, one in heard[which].items()] for name in names}
        rates = [error_rates((texts[i], text) for i, text in said[name]) for name in names]
        rows.append([which, *(f"{found[key]:.1f} %" for found in rates for key in ("wer", "cer"))])
    says = (
        f"The same encoder is read by heads that are trained together: {'; '.join(_HEADS[name] for name in names)}. "
        "All other numbers are CTC’s."
    )
    columns = [f"{what}, {name}" for name in names for what in ("words", "characters")]
    return Table("Heads", says, ["model", *columns], rows)


def _samples(data: SpeechData, heard: dict[str, dict[int, _Heard]]) -> Table:
    """What both models made of the first clips of each language."""
    rows: list[list[str | float]] = [
        [name, data.corpus.texts[i], heard["dense"][i].text or "–", heard["sparse"][i].text or "–"]
        for name, some in data.groups.items()
        for i in some[:2]
    ]
    says = "The first held-out clips of each language, not chosen by how well they are recognised."
    return Table("What was heard", says, ["language", "said", "dense heard", "sparse heard"], rows)
