"""The figures of a training run: losses, gains by domain, the load of experts; in the page's colours or plain ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import EngFormatter, MaxNLocator
from numpy.typing import NDArray

from ..runs import MODELS, Curve, Load, Run
from .heat_maps import draw_heat_map
from .style import PAPER, Palette, shorten

__all__ = ["Axis", "domain_losses", "load_map", "load_scale", "loss_curves", "picture"]

MARKERS = {"dense": "s", "sparse": "o"}
MAX_POINTS = 150  # of a training curve
WARM_UP = 0.2  # this first part of training sets no limit of the frame, so that the end can be read


@dataclass(frozen=True)
class Axis:
    """A horizontal axis of training: its label and, per model, what one unit of the curve's `field` is worth."""

    label: str
    field: Literal["tokens", "seconds"]
    unit: dict[str, float]

    def of(self, curve: Curve, model: str) -> NDArray[np.float64]:
        """Positions (N,) of the curve's points."""
        values: NDArray[np.float64] = getattr(curve, self.field)
        return values * self.unit[model]


def loss_curves(run: Run, axis: Axis, palette: Palette, size: tuple[float, float] = (4.2, 3.1)) -> Figure:
    """Loss of both models along `axis`: training loss faint, held-out loss bold with markers."""
    figure = Figure(figsize=size, layout="constrained")
    draw_loss(figure.add_subplot(), run, axis, palette)
    return figure


def draw_loss(axes: Axes, run: Run, axis: Axis, palette: Palette) -> None:
    """`loss_curves` on given axes."""
    for model in MODELS:
        colour = palette.of(model)
        held_out = _finite(run.evals.get(model))
        training = _binned(_finite(run.train.get(model)))
        if training is not None:
            label = None if held_out else f"{model}, training"
            axes.plot(axis.of(training, model), training.loss, color=colour, linewidth=1, alpha=0.4, label=label)
        if held_out is not None:
            x = axis.of(held_out, model)
            marks = max(1, len(x) // 12)
            marker = MARKERS[model]
            label = f"{model}, at last {held_out.loss[-1]:.3f}"
            axes.plot(
                x, held_out.loss, color=colour, linewidth=1.8, marker=marker, markersize=4, markevery=marks, label=label
            )
    dense = _finite(run.evals.get("dense"))
    if dense is not None:
        axes.axhline(dense.loss[-1], color=palette.dense, linewidth=0.9, linestyle=(0, (4, 3)))
    if limits := _loss_limits(run):
        axes.set_ylim(*limits)
    axes.set_xlim(left=0)
    axes.set_xlabel(axis.label)
    axes.set_ylabel(f"loss ({run.words.loss})")
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper right")


def _finite(curve: Curve | None) -> Curve | None:
    if curve is None:
        return None
    keep = np.isfinite(curve.loss)
    return Curve(curve.step[keep], curve.tokens[keep], curve.seconds[keep], curve.loss[keep]) if keep.any() else None


def _binned(curve: Curve | None) -> Curve | None:
    if curve is None or len(curve.loss) <= MAX_POINTS:
        return curve
    fields = (curve.step, curve.tokens, curve.seconds, curve.loss)
    return Curve(*(np.array([part.mean() for part in np.array_split(values, MAX_POINTS)]) for values in fields))


def _loss_limits(run: Run) -> tuple[float, float] | None:
    curves = [*map(_finite, run.evals.values()), *map(_binned, map(_finite, run.train.values()))]
    present = [curve for curve in curves if curve is not None]
    if not present:
        return None
    start = WARM_UP * max(curve.tokens[-1] for curve in present)
    losses = np.concatenate([curve.loss[curve.tokens >= start] for curve in present])
    low, high = float(losses.min()), float(losses.max())
    margin = 0.06 * (high - low) or 0.1
    return low - margin, high + margin


def domain_losses(run: Run, palette: Palette) -> Figure:
    """Held-out loss of both models by domain, joined by a line whose length is the gain."""
    domains = run.scored_domains
    figure = Figure(figsize=(4.2, 0.9 + 0.42 * len(domains)), layout="constrained")
    axes = figure.add_subplot()
    rows = np.arange(len(domains))
    losses = {model: _finite_or_nan([run.scores[model][name].loss for name in domains]) for model in MODELS}
    axes.hlines(rows, losses["dense"], losses["sparse"], color=palette.ink, linewidth=1.2, alpha=0.5)
    for model in MODELS:
        axes.plot(losses[model], rows, MARKERS[model], color=palette.of(model), markersize=5, label=model)
    axes.set_yticks(rows, [shorten(name) for name in domains])
    axes.set_ylim(len(domains) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.08)
    axes.set_xlabel(f"held-out loss ({run.words.loss})")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=2)
    return figure


def _finite_or_nan(values: list[float]) -> NDArray[np.float64]:
    return np.array([value if math.isfinite(value) else math.nan for value in values])


def draw_gain(axes: Axes, run: Run, palette: Palette) -> None:
    """Gain (dense minus sparse held-out loss) by domain as labelled bars."""
    domains = run.scored_domains
    gain = _finite_or_nan([run.scores["dense"][name].loss - run.scores["sparse"][name].loss for name in domains])
    bars = axes.barh([shorten(name) for name in domains], gain, color=palette.sparse, height=0.5)
    axes.bar_label(bars, [f"{value:+.3f}" if math.isfinite(value) else "" for value in gain], padding=4)
    axes.invert_yaxis()
    axes.axvline(0, color=palette.ink, linewidth=0.8)
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.25)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.set_xlabel(f"gain ({run.words.loss})")


def load_scale(loads: dict[str, Load]) -> Normalize:
    """The colour scale that all layers' load maps share: from none to at least twice an even share, at most four."""
    busiest = max(float(load.relative.max()) for load in loads.values())
    return Normalize(0, min(max(2.0, busiest), 4.0))


def load_map(load: Load, scale: Normalize, palette: Palette) -> Figure:
    """One layer's load over training, experts by row, above its balance (busiest expert over mean)."""
    figure = Figure(figsize=(4.2, 3.4), layout="constrained")
    heat, line = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    edges = np.concatenate([[0.0], load.step])
    draw_heat_map(heat, load.relative.T, scale, edges)
    for expert in load.dead:
        heat.plot(edges[-1] * 1.015, expert, "x", color=palette.ink, markersize=4, clip_on=False)
    heat.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    heat.set_ylabel("expert")
    line.stairs(load.balance, edges, color=palette.sparse, linewidth=1.5, baseline=None)
    line.axhline(1, color=palette.ink, linewidth=0.8, linestyle=(0, (4, 3)))
    line.set_ylim(bottom=0.8, top=max(2.0, float(load.balance.max()) * 1.1))
    line.set_ylabel("balance")
    line.set_xlabel("training step")
    line.set_xlim(0, edges[-1])
    line.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    line.xaxis.set_major_formatter(EngFormatter(sep=" "))
    return figure


def picture(run: Run) -> Figure:
    """The result at a glance: loss of both models against tokens, and the gain by domain."""
    figure = Figure(figsize=(9.6, 3.8), layout=ConstrainedLayoutEngine(wspace=0.06), facecolor="white")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    draw_loss(left, run, Axis(f"{run.words.tokens} read in training", "tokens", dict.fromkeys(MODELS, 1.0)), PAPER)
    left.set_title(f"Loss while reading the same {run.words.data}")
    draw_gain(right, run, PAPER)
    right.set_title(f"What the experts gain on held-out {run.words.data}")
    return figure
