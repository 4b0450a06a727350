"""The decisions of every mixture-of-experts layer of a model on given material, and the loss, in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from ...hf.observe.taps import Observation, listening
from ...metrics import margins, routing_entropy
from .material import Batch, Material

__all__ = ["Decisions", "Loss", "Progress", "Recording", "batch_losses", "record"]


Progress = Callable[[Iterable[Batch], str, int], Iterable[Batch]]
"""Wraps what is gone through, with what it is for and how many there are, to show progress."""


@dataclass(frozen=True)
class Decisions:
    """What one layer decided for N tokens.

    Args:
        index: (N, k) int16 experts, best first, -1 for none.
        weight: (N, k) float32 combine weights.
        dropped: how many choices capacity took away.
        margin: (N,) float32, of `margins`; NaN where there are no logits.
        margin_size: (N,) float32, of `margins`.
        entropy: the mean over tokens of `routing_entropy`; None where there are no logits.
        num_experts: E.
        dim: d.
    """

    index: Tensor
    weight: Tensor
    dropped: int
    margin: Tensor
    margin_size: Tensor
    entropy: float | None
    num_experts: int
    dim: int


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


@dataclass(frozen=True)
class _Forward:
    index: Tensor
    weight: Tensor
    margin: Tensor
    margin_size: Tensor
    entropy: Tensor
    dropped: int
    num_experts: int
    dim: int


def _keep(seen: Observation) -> _Forward:
    real = slice(None) if seen.mask is None else seen.mask
    index = seen.index[real]
    margin = size = entropy = torch.full((len(index),), float("nan"))
    if seen.logits is not None:
        logits = seen.logits[real]
        (margin, size), entropy = margins(logits, index), routing_entropy(logits)
    dropped = 0 if seen.dropped is None else int(seen.dropped[real].sum())
    return _Forward(
        index.to(torch.int16).cpu(),
        seen.weight[real].float().cpu(),
        margin.float().cpu(),
        size.float().cpu(),
        entropy.cpu(),
        dropped,
        seen.num_experts,
        seen.hidden.shape[-1],
    )


def _joined(forwards: list[_Forward]) -> Decisions:
    k = max(one.index.shape[1] for one in forwards)  # of routers whose k varies, the most
    entropy = torch.cat([one.entropy for one in forwards])
    return Decisions(
        torch.cat([F.pad(one.index, (0, k - one.index.shape[1]), value=-1) for one in forwards]),
        torch.cat([F.pad(one.weight, (0, k - one.weight.shape[1])) for one in forwards]),
        sum(one.dropped for one in forwards),
        torch.cat([one.margin for one in forwards]),
        torch.cat([one.margin_size for one in forwards]),
        None if bool(entropy.isnan().all()) else float(entropy.double().nanmean()),
        max(one.num_experts for one in forwards),
        forwards[0].dim,
    )


@torch.no_grad()
def record(model: PreTrainedModel, material: Material, progress: Progress) -> Recording:
    """Run the model in evaluation mode over the material and keep what its layers decide; Ctrl-C ends it early.

    Raises:
        ValueError: where the model has no layer whose routing can be read.
        KeyboardInterrupt: where Ctrl-C comes before the first forward is done.
    """
    layers: dict[str, list[list[_Forward]]] = {}
    losses: list[Tensor | None] = []
    was_training = model.training
    model.eval()
    now: dict[str, list[_Forward]] = {}
    try:
        with listening(model, lambda name, seen: now.setdefault(name, []).append(_keep(seen))):
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
    decisions = {name: _joined([one for batch in batches for one in batch]) for name, batches in layers.items()}
    return Recording(decisions, _loss(losses, material), len(losses))


@torch.no_grad()
def batch_losses(model: PreTrainedModel, batch: Batch) -> Tensor | None:
    """The cross-entropy in nats of each target of a batch, in float32, NaN where it has none; None without logits."""
    device = next(model.parameters()).device
    output = model(**{name: value.to(device) for name, value in batch.inputs.items()})
    logits = getattr(output, "logits", None)
    targets = batch.targets.to(device)
    if not isinstance(logits, Tensor) or logits.shape[:-1] != targets.shape:
        return None
    rows, wanted = logits.reshape(-1, logits.shape[-1]).float(), targets.flatten()
    nats = F.cross_entropy(rows, wanted, reduction="none", ignore_index=-100)
    return nats.masked_fill(wanted == -100, float("nan")).cpu()


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
