"""Recipe: one kind of input as a run needs it: configuration, data, models, metric, and what the numbers are called."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from ..analysis.exhibits import Exhibit
from ..analysis.inspect.material import Material
from ..analysis.ledger import Ledger
from ..analysis.runs import Words
from ..errors import UserError
from ..hf.checkpoints.loading import load_folder
from .sections import RunConfig

__all__ = ["Prepared", "Recipe"]


class Prepared(Protocol):
    """Data that are read: what is trained on, and a record of it for people."""

    @property
    def train(self) -> Dataset[Any]:
        """The items in training order, each the keywords of a model's forward.

        What has the name of a field of `shunter.routers.Context` (domain, language, …) is told to the layers instead.
        """

    @property
    def domains(self) -> list[dict[str, Any]]:
        """A record of each kind of data: name, license, source; train_N and eval_N, by what N they are counted."""

    @property
    def fingerprint(self) -> str:
        """A hash over all that is trained and evaluated on."""

    def describe(self) -> dict[str, Any]:
        """What data.json holds: domains, fingerprint, notes (sentences for people: what was left out, and why)."""

    def save_pretrained(self, folder: Path) -> None:
        """Write beside a model what it needs to read new data: a tokenizer, a feature extractor; or nothing."""


C = TypeVar("C", bound=RunConfig)
D = TypeVar("D", bound=Prepared)


class Recipe(ABC, Generic[C, D]):
    """One kind of input. A run trains a dense model and its sparse twin on the same items in the same order.

    Adding one is a file with a subclass, and a line in `registry.py` or a call of `shunter.recipes.register`.
    """

    name: ClassVar[str]
    """What `shunter train` calls it."""
    config: ClassVar[type[RunConfig]]
    """Its configuration's class."""
    words: ClassVar[Words]
    """What its numbers are called, unless `words_of` says otherwise of a configuration."""
    others: ClassVar[tuple[str, ...]] = ()
    """Further models of a run, that its exhibits compare with both, unless `others_of` says otherwise."""
    reader: ClassVar[str] = "reader"
    """The folder of a run with what reads its data, where `save_pretrained` of these writes something."""
    knows: ClassVar[tuple[str, ...]] = ("mask",)
    """The fields of `shunter.routers.Context` that its batches tell."""

    def words_of(self, config: C) -> Words:
        """What the numbers of a configuration's models are called."""
        return self.words

    @abstractmethod
    def prepare(self, config: C) -> D:
        """Read the data; the same configuration gives the same.

        Raises:
            UserError: for data that cannot be read or are too few, and for a package that is missing.
        """

    @abstractmethod
    def build(self, config: C, data: D, sparse: bool) -> PreTrainedModel:
        """The dense model, or its sparse twin at equal FLOPs with the same initial weights outside of the experts.

        A function of its arguments: both are built once more to see that they run. In training, the `loss` of a
        forward has `shunter.aux_loss` in it (`shunter.sparsify` sees to that).
        """

    def others_of(self, config: C) -> tuple[str, ...]:
        """Further models of a run of a configuration; `build_other` makes them."""
        return self.others

    def config_of(self, config: C, name: str) -> C:
        """What a further model of a run is trained by."""
        return config

    def data_of(self, data: D, name: str) -> D:
        """What a further model of a run is trained and evaluated on."""
        return data

    def build_other(self, config: C, data: D, name: str) -> PreTrainedModel:
        """A model of `others_of`."""
        raise NotImplementedError

    def model(self, config: C, data: D, name: str) -> PreTrainedModel:
        """The model of a run that has this name: "dense", one of `others_of`, or a sparse one."""
        if name in self.others_of(config):
            return self.build_other(config, data, name)
        return self.build(config, data, sparse=name != "dense")

    def tells(self, name: str, config: C) -> bool:
        """Whether the batches of a configuration's data tell a field of `Context`; by default what `knows` says."""
        return name in self.knows

    def load(self, folder: Path) -> PreTrainedModel:
        """A model that `save_pretrained` wrote, in evaluation mode; by default of any class that transformers finds.

        Raises:
            ValueError: where the folder is damaged.
        """
        return load_folder(folder)

    @abstractmethod
    def evaluate(self, model: PreTrainedModel, data: D) -> dict[str, Any]:
        """`loss`, a number by each key of `words.shown`, and the same by domain in `domains`.

        The model is where it is trained, a GPU perhaps, and keeps its mode.
        """

    def predictions(self, model: PreTrainedModel, data: D) -> Iterator[tuple[str, Tensor, Tensor]]:
        """The held-out predictions of a classifier, in parts: domain, logits (N, V), labels (N,) int64, -100 for none.

        The model is in evaluation mode.

        Raises:
            UserError: where the recipe has no classes.
        """
        raise UserError(f"{self.name} has no classes to be confident of, so no calibration")

    @abstractmethod
    def ledger(self, model: PreTrainedModel, config: C) -> Ledger:
        """What a model costs a token."""

    @abstractmethod
    def items_per_step(self, config: C) -> int:
        """How many items one optimizer step takes."""

    @abstractmethod
    def tokens_per_step(self, config: C) -> int:
        """How many tokens (patches, frames) these are, by which training is counted."""

    def specialisation(self, model: PreTrainedModel, data: D) -> dict[str, Any] | None:
        """What the experts of the sparse model took, as specialisation.json holds it; None where there is nothing."""
        return None

    def material(self, model: PreTrainedModel, data: D, tokens: int) -> Material | None:
        """Of so many held-out tokens at most, what `shunter inspect` shows a model; None where there is nothing."""
        return None

    def exhibits(self, models: dict[str, PreTrainedModel], config: C, data: D) -> list[Exhibit]:
        """What else the page of a finished run shows, by its models: "dense", "sparse" and `others_of`."""
        return []
