"""A budget to advice: sparse or dense, how many experts, how often, which capacity, and why.

A sparse model and a dense one of equal operations a token train for the same time on the same devices. The simulator
says how many tokens each then sees; how large a dense model the sparse one acts as is the effective parameter count of
the unified scaling law of routed models (Clark et al., arXiv 2202.01169), and the loss of so many parameters and tokens
that of Hoffmann et al. (arXiv 2203.15556, approach 3).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from ..analysis.scaling_law import UnifiedLaw
from ..errors import UserError
from .clusters import Cluster
from .shapes import ModelShape
from .step import Job, Step, best

__all__ = ["Advice", "Budget", "Choice", "advise", "dropped", "loss"]

LAW = UnifiedLaw(a=-0.083783, b=-0.123369, c=0.0104239, d=1.12156, e_start=2.39422, e_max=217.655)
"""Fitted by `shunter law fit` to the S-BASE runs with one expert a token in every second block that the paper's authors
released (CC BY 4.0): 53 and 8 dense ones, of 17 M to 1.3 B dense parameters, each of 130 B tokens."""

FREQUENCIES = {0.25: 0.66, 0.5: 1.0, 1.0: 1.14}
"""By the share of sparse blocks, what is left of the gain of every second one: means over the same release (64 and 256
experts, two sizes)."""

EXPERTS = tuple(2**i for i in range(1, 10))
CAPACITIES = (1.0, 1.25, 2.0)
SPREAD = 0.3
"""Of the load of experts that a loss balances, in standard deviations over the mean: an assumption."""

_TOKENS_A_PARAMETER = 20  # where a dense model is largest for its operations (Hoffmann et al.)
_SEQUENCE, _VOCAB, _HEAD = 2048, 32000, 128


@dataclass(frozen=True)
class Budget:
    """What there is.

    Args:
        flops: of the whole training, as a dense model's.
        memory: bytes of a device.
        devices: how many.
        bandwidth: bytes/s of a device to others.
        device_flops: peak FLOP/s of a device.
    """

    flops: float
    memory: float
    devices: int
    bandwidth: float
    device_flops: float = 9.89e14

    @property
    def cluster(self) -> Cluster:
        """The devices, known as little as this: one network, and the shares of the peak that training steps reach."""
        speed = (self.bandwidth,) * 3
        return Cluster(
            "the budget's", 8, self.device_flops, (0.3, 0.38, 0.45), self.memory, self.device_flops / 295, speed, speed,
            latency=(2e-5, 3.8e-5, 6e-5), layer_seconds=(1e-4, 3e-4, 6e-4), overlap=(0.0, 0.2, 0.6),
        )  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """A model and what comes of it.

    Args:
        experts, frequency, capacity_factor: of it; 1, 0 and 0: dense.
        step: of its training, in the best layout.
        parameters: in all.
        tokens: that it sees in the time.
        effective: dense parameters that it acts as.
        loss: predicted.
    """

    experts: int
    frequency: float
    capacity_factor: float
    step: Step
    parameters: int
    tokens: float
    effective: float
    loss: float

    def row(self) -> dict[str, Any]:
        """For JSON."""
        names = ("experts", "frequency", "capacity_factor", "parameters", "tokens", "effective", "loss")
        return {name: getattr(self, name) for name in names} | {"step": self.step.row()}


@dataclass(frozen=True)
class Advice:
    """What to train.

    Args:
        best, dense: the choice, and the dense model of equal operations a token.
        choices: all that were compared, the best first; those that do not fit last.
        days: of training, the same for all.
        reasons: in words and numbers.
    """

    best: Choice
    dense: Choice
    choices: list[Choice]
    days: float
    reasons: list[str]


def loss(parameters: float, tokens: float) -> float:
    """Nats a token of a dense model of so many parameters after so many tokens."""
    return 1.69 + 406.4 / parameters**0.34 + 410.7 / tokens**0.28


def dropped(capacity_factor: float, spread: float = SPREAD) -> float:
    """The share of tokens over capacity, where the experts' loads are normal around their mean."""
    z = (capacity_factor - 1) / spread
    normal = NormalDist()
    return spread * (normal.pdf(z) - z * (1 - normal.cdf(z)))


def effective(parameters: float, experts: int, frequency: float, capacity_factor: float) -> float:
    """Dense parameters that a sparse model of so many dense ones acts as.

    A dropped token gains nothing, and goes without the two thirds of a block that its experts replace.
    """
    if experts == 1:
        return parameters
    lost = dropped(capacity_factor)
    gain = math.log(float(LAW.effective_parameters(parameters, experts)) / parameters)
    return parameters * math.exp(gain * FREQUENCIES[frequency] * (1 - lost)) * (1 - lost * frequency * 2 / 3)


def shape(parameters: float, experts: int = 1, frequency: float = 0.0, capacity_factor: float = 0.0) -> ModelShape:
    """A decoder whose dense blocks have about so many parameters, 12 d^2 in each, as deep as d / 128."""
    width = max(_HEAD, _HEAD * round((parameters * 128 / 12) ** (1 / 3) / _HEAD))
    layers = max(2, round(parameters / (12 * width**2)))
    sparse = max(1, round(frequency * layers)) if experts > 1 else 0
    return ModelShape(
        f"{parameters:.2g}", width, layers, width // _HEAD, _HEAD, hidden=4 * width, expert_hidden=4 * width,
        experts=experts if sparse else 0, sparse_layers=sparse, gated=False, vocab=_VOCAB, tied=True,
        sequence_length=_SEQUENCE, capacity_factor=capacity_factor,
    )  # fmt: skip


def advise(budget: Budget) -> Advice:
    """What to train with a budget.

    Raises:
        UserError: where not even a small dense model fits.
    """
    cluster = budget.cluster
    batch = max(2.0**19, budget.devices * _SEQUENCE)
    job = Job(batch_tokens=math.ceil(batch / (budget.devices * _SEQUENCE)) * budget.devices * _SEQUENCE)
    wanted = math.sqrt(budget.flops / (6 * _TOKENS_A_PARAMETER))
    while wanted >= 1e5 and not best(shape(wanted), cluster, budget.devices, job).fits:
        wanted *= 0.8
    if wanted < 1e5:
        raise UserError(
            f"no dense model fits into {budget.memory:,.0f} bytes a device and trains within {budget.flops:.3g} "
            "operations; give more of both"
        )
    plain = shape(wanted)
    size = float(plain.parameters["attention"] + plain.parameters["dense blocks"])
    step = best(plain, cluster, budget.devices, job)
    tokens = budget.flops / (6 * size)
    seconds = tokens / (step.tokens_per_s * budget.devices)
    dense = Choice(1, 0.0, 0.0, step, plain.total, tokens, size, loss(size, tokens))
    found = [dense]
    for experts in EXPERTS:
        for frequency in FREQUENCIES:
            for capacity in CAPACITIES:
                model = shape(wanted, experts, frequency, capacity)
                step = best(model, cluster, budget.devices, job)
                seen = step.tokens_per_s * budget.devices * seconds
                acts = effective(size, experts, frequency, capacity)
                found.append(Choice(experts, frequency, capacity, step, model.total, seen, acts, loss(acts, seen)))
            if not step.fits:
                break  # nor do more experts
    found.sort(key=lambda choice: (not choice.step.fits, choice.loss))
    return Advice(found[0], dense, found, seconds / 86400, _reasons(budget, found, dense, size, seconds / 86400))


def _reasons(budget: Budget, found: list[Choice], dense: Choice, size: float, days: float) -> list[str]:
    chosen, fitting = found[0], [choice for choice in found if choice.step.fits]
    sparse = [choice for choice in fitting if choice.experts > 1]
    too_large = [choice for choice in found if not choice.step.fits]
    said = [
        f"The budget trains {_many(size)} dense parameters on {_many(dense.tokens)} tokens in {_long(days)}, to a loss "
        f"of {dense.loss:.3f}."
    ]
    if chosen.experts > 1:
        said.append(
            f"Sparse: in the same time {_named(chosen)} act as {_many(chosen.effective)} dense parameters and see "
            f"{chosen.tokens / dense.tokens:.0%} of the tokens: loss {chosen.loss:.3f}."
        )
        times, worth = chosen.parameters / dense.parameters, chosen.effective / chosen.parameters
        said.append(
            f"It holds {_many(chosen.parameters)} parameters for that, {times:.1f} times the dense model's: one of "
            f"them is worth {worth:.2f} of a dense one, so where memory and not computing is short, dense is better."
        )
        few = [choice for choice in sparse if choice.experts == 2]
        if few and chosen.experts > 2:
            pay = "already help" if few[0].loss < dense.loss else "alone do not pay for their routing here"
            said.append(f"Two experts {pay}: loss {few[0].loss:.3f}.")
        often = {choice.frequency: choice for choice in reversed(sparse) if choice.experts == chosen.experts}
        for f in sorted(often):
            if f != chosen.frequency:
                why = "which gains less" if f < chosen.frequency else "which costs more time than it gains"
                said.append(f"As many experts in {_often(f)}, {why}: loss {often[f].loss:.3f}.")
        for choice in sorted(sparse, key=lambda choice: choice.capacity_factor):
            alike = (choice.experts, choice.frequency) == (chosen.experts, chosen.frequency)
            if alike and choice is not chosen:
                said.append(f"{_capacity(choice)}: loss {choice.loss:.3f}.")
        said.append(f"{_capacity(chosen)}, where the loads of experts spread by {SPREAD:.0%}.")
        few = [choice for choice in sparse if choice.experts == 64]
        if chosen.experts > 64 and few:
            said.append(
                "This is the loss of pre-training: models that were fine-tuned or asked with few examples did best "
                f"with at most 64 experts (arXiv 2209.01667, section 3.3), which reach {few[0].loss:.3f}."
            )
    elif sparse:
        nearest = sparse[0]
        said.append(
            f"Dense: the best sparse model, {_named(nearest)}, would see {nearest.tokens / dense.tokens:.0%} of the "
            f"tokens in the same time, most of all for {_dearest(nearest.step, dense.step)}: loss {nearest.loss:.3f}."
        )
    else:
        least = min(too_large, key=lambda choice: choice.step.memory)
        said.append(
            f"Dense: {_named(least)} would take {least.step.memory / 2**30:.3g} GiB of a device's "
            f"{budget.memory / 2**30:.3g}; parameters that fit are worth more in a dense model."
        )
    larger = [choice for choice in too_large if choice.loss < chosen.loss]
    if larger and chosen.experts > 1:
        one = min(larger, key=lambda choice: choice.step.memory)
        said.append(f"More memory would go further: {_named(one)} needs {one.step.memory / 2**30:.3g} GiB a device.")
    step, speed = chosen.step, f"at {budget.bandwidth / 1e9:.3g} GB/s a device"
    sums = f"umming gradients takes {step.data / step.seconds:.1%} of a step {speed}."
    if chosen.experts > 1:
        said.append(f"Exchanges that nothing hides take {step.exposed / step.seconds:.1%}, and s{sums}")
    else:
        said.append(f"S{sums}")
    low, high = 16.5e6, 1.31e9
    if not low <= size <= high:
        said.append(f"The law was fitted to {_many(low)} to {_many(high)} dense parameters: this is outside.")
    return said


def _capacity(choice: Choice) -> str:
    factor = choice.capacity_factor
    lost = dropped(factor)
    return f"A capacity factor of {factor:g} drops {lost:.1%} of the tokens and computes {factor:g} times the rows"


def _dearest(step: Step, dense: Step) -> str:
    """What takes most more time in one step than in another."""
    parts = {
        "compute": "computing", "exposed": "exchanges", "routing": "routing", "data": "summing gradients",
        "tensor": "tensor parallelism", "bubble": "the pipeline's bubble",
    }  # fmt: skip
    return parts[max(parts, key=lambda part: getattr(step, part) - getattr(dense, part))]


def _named(choice: Choice) -> str:
    return f"{choice.experts} experts in {_often(choice.frequency)}"


def _often(frequency: float) -> str:
    return {1.0: "every block", 0.5: "every second block", 0.25: "every fourth block"}[frequency]


def _long(days: float) -> str:
    for unit, length in (("days", 1.0), ("hours", 24.0), ("minutes", 1440.0)):
        if days * length >= 1:
            return f"{days * length:.3g} {unit}"
    return f"{days * 86400:.3g} seconds"


def _many(number: float) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"
