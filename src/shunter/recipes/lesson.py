"""A finished run in, what a student of its sparse model learns from and is measured on out: the run's own batches."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.nn import functional as F
from transformers import default_data_collator
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from ..analysis.inspect.material import Batch, Material
from ..errors import UserError
from ..training.loop import told_and_given
from .run import configuration_of, data_of, load_model

__all__ = ["Lesson", "lesson_of"]

HELD_OUT = 1 << 20  # tokens that the student is measured on, at most


@dataclass(frozen=True)
class Lesson:
    """What a run's dense model learned from, and how.

    Attributes:
        material: the batches of all its steps, in their order.
        held_out: batches that no model of the run has learned from.
        steps, learning_rate: of its training.
    """

    material: Material
    held_out: list[Batch]
    steps: int
    learning_rate: float


def lesson_of(run: Path) -> Lesson:
    """What the dense model of a run learned from, for a student that is to be compared with it.

    Raises:
        UserError: where the run is not finished, its data have changed, or its recipe's data have no labels.
    """
    recipe, config = configuration_of(run)
    data, twin = data_of(run), load_model(run, "dense")
    held_out = recipe.material(twin, data, HELD_OUT)
    if held_out is None or "labels" not in data.train[0]:
        raise UserError(
            f"distill: {recipe.name} has no labels that both a teacher and a student could give; try --data"
        )
    size = recipe.items_per_step(config)
    batches = [
        _batch(twin, default_data_collator([data.train[step * size + i] for i in range(size)]))
        for step in range(config.training.steps)
    ]
    material = Material(batches, {}, held_out.groups[:0], held_out.domains, 0, held_out.window)
    return Lesson(material, held_out.batches, config.training.steps, config.training.learning_rate)


def _batch(model: Any, items: dict[str, Any]) -> Batch:
    """Items as a training has them, with what the logits should give in place of labels."""
    told, given = told_and_given(items)
    targets = given.pop("labels")
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(targets)
    elif LOSS_MAPPING.get(model.loss_type or "") is ForCausalLMLoss:
        targets = F.pad(targets[:, 1:], (0, 1), value=-100)
    return Batch(given, targets, told)
