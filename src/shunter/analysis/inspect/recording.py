"""Recording: from a model and material to the decisions of each mixture-of-experts layer, and the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from ...hf.observe.listening import Decisions, Observation, listening
from ...moe import tell
from .material import Batch, Material

__all__ = ["Loss", "Progress", "Recording", "batch_logits", "batch_losses", "record"]

Progress = Callable[[Iterable[Batch], str, int], Iterable[Batch]]
"""Wraps what is gone through, with what it is for and how many there are, to show progress."""


@dataclass(frozen=True)
class Loss:
    """The cross-entropy in nats: the sum over targets and their number, in all and by domain."""

    nats: float
    targets: int
    domains: dict[str, tuple[float, int]]

    @property
    def mean(self) -> float:
        """Nats a target."""
        return self.nats / self.targets


@dataclass(frozen=True)
class Recording:
    """What a pass over the material left.

    Args:
        layers: by qualified name.
        loss: None where the model has no logits that fit the targets.
        batches: how many forwards; fewer than the material has where Ctrl-C came between.
    """

    layers: dict[str, Decisions]
    loss: Loss | None
    batches: int


@torch.no_grad()
def record(model: PreTrainedModel, material: Material, progress: Progress) -> Recording:
    """Run the model in evaluation mode over the material and keep what its layers decide; Ctrl-C ends it early.

    Raises:
        ValueError: where the model has no layer whose routing can be read.
        KeyboardInterrupt: where Ctrl-C comes before the first forward is done.
    """
    layers: dict[str, list[list[Decisions]]] = {}
    losses: list[Tensor | None] = []
    was_training = model.training
    model.eval()
    now: dict[str, list[Decisions]] = {}

    def hear(name: str, seen: Observation) -> None:
        now.setdefault(name, []).append(Decisions.of(seen, seen.logits, details=True))

    try:
        with listening(model, hear):
            for batch in progress(material.batches, "routing", len(material.batches)):
                now.clear()
                loss = batch_losses(model, batch)
                for name, forwards in now.items():
                    layers.setdefault(name, []).append(list(forwards))
                losses.append(loss)
    except KeyboardInterrupt:
        if not losses:
            raise
        for batches in layers.values():
            del batches[len(losses) :]
    finally:
        model.train(was_training)
    joined = {name: Decisions.joined([one for batch in batches for one in batch]) for name, batches in layers.items()}
    return Recording(joined, _loss(losses, material), len(losses))


@torch.no_grad()
def batch_losses(model: PreTrainedModel, batch: Batch) -> Tensor | None:
    """The cross-entropy in nats of each target of a batch, in float32, NaN where it has none; None without logits."""
    rows = batch_logits(model, batch)
    if rows is None:
        return None
    wanted = batch.targets.to(rows.device).flatten()
    nats = F.cross_entropy(rows, wanted, reduction="none", ignore_index=-100)
    return nats.masked_fill(wanted == -100, float("nan")).cpu()


def batch_logits(model: PreTrainedModel, batch: Batch) -> Tensor | None:
    """The logits (N, V) of each target of a batch in float32; None from a model without, or without one for each."""
    device = next(model.parameters()).device
    if device.type == "meta":  # its weights are on disk
        device = torch.device("cpu")
    with tell(model, **{name: value.to(device) for name, value in batch.told.items()}):
        output = model(**{name: value.to(device) for name, value in batch.inputs.items()})
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.shape[:-1] != batch.targets.shape:
        return None
    return logits.reshape(-1, logits.shape[-1]).float()


def _loss(losses: list[Tensor | None], material: Material) -> Loss | None:
    if any(part is None for part in losses):
        return None
    nats = torch.cat([part for part in losses if part is not None]).double()
    real = ~nats.isnan()
    if not bool(real.any()):
        return None
    group = material.groups[: len(nats)]
    domains = {}
    for number, name in enumerate(material.domains):
        mine = nats[real & (group == number)]
        if len(mine):
            domains[name] = (float(mine.sum()), len(mine))
    return Loss(float(nats[real].sum()), int(real.sum()), domains)
