"""The pictures of section 3: losses by experts, the law, recall and calibration by compute, gains by domain."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FixedLocator, FuncFormatter, NullLocator

from ..analysis.pages.law_figures import law_figure, shown_count
from ..analysis.pages.style import PAPER
from .scaling import LAW_ROUTERS, NAMES, compute_of

__all__ = ["draw_domains", "draw_figure_3", "draw_figure_4", "draw_figure_5", "draw_law", "draw_released_law"]

COLOURS = {"dense": PAPER.dense, "switch": PAPER.sparse, "hash": "#3f7d20"}
MARKERS = {"dense": "s", "switch": "o", "hash": "^"}


def draw_figure_3(data: dict[str, Any]) -> Figure:
    """A panel for each router: loss against experts, a line for each size, the dense model first."""
    runs = data["runs"]
    routers = list(dict.fromkeys(run["router"] for run in runs if run["router"] != "dense"))
    sizes = sorted({run["size"] for run in runs})
    figure = Figure(figsize=(11.0, 3.4), layout="constrained")
    panels = figure.subplots(1, len(routers), sharey=True)
    for axes, router in zip(panels, routers, strict=True):
        for number, size in enumerate(sizes):
            mine = sorted(
                (run["experts"], run["loss"])
                for run in runs
                if run["size"] == size and run["router"] in (router, "dense")
            )
            shade = 0.35 + 0.65 * number / max(1, len(sizes) - 1)
            parameters = next(run["parameters"] for run in runs if run["size"] == size)
            axes.plot(*zip(*mine, strict=True), "o-", color=PAPER.sparse, alpha=shade, label=f"{parameters:,.0f}")
            axes.plot(*mine[0], "s", color=PAPER.dense, alpha=shade)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_title(NAMES[router])
        axes.set_xlabel("experts")
    panels[0].set_ylabel(f"held-out loss ({data['unit']})")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", title="dense\nparameters")
    return figure


def draw_law(data: dict[str, Any]) -> Figure:
    """`law_figure` of our own runs."""
    return law_figure(data["groups"])


def draw_released_law(data: dict[str, Any]) -> Figure:
    """The cut-offs: ours with their intervals, and the published ones."""
    from .scaling import PUBLISHED

    figure = Figure(figsize=(6.0, 2.2), layout="constrained")
    axes = figure.add_subplot()
    for row, (router, found) in enumerate(data["groups"].items()):
        low, high = found["intervals"]["log10_cutoff"]
        axes.plot([10**low, 10**high], [row, row], color=PAPER.sparse, linewidth=4, alpha=0.4)
        axes.plot(10 ** found["log10_cutoff"], row, "o", color=PAPER.sparse, label="here, and 90 % of the bootstrap")
        axes.plot(PUBLISHED[router][1], row, "D", color=PAPER.dense, label="published")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: shown_count(value)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_yticks(range(len(data["groups"])), list(data["groups"]))
    axes.set_ylim(len(data["groups"]) - 0.5, -0.5)
    axes.set_xlabel("cut-off: dense parameters from which on experts no longer help")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[:2], labels[:2], loc="outside upper right", ncols=2)
    return figure


def _by_compute(axes: Any, data: dict[str, Any], value: Any, compute: str) -> None:
    for router in ("dense", *LAW_ROUTERS):
        count = 1 if router == "dense" else data["experts"]
        mine = sorted(
            (compute_of(run), value(run)) for run in data["runs"] if run["router"] == router and run["experts"] == count
        )
        label = "dense" if router == "dense" else f"{NAMES[router]}, {count} experts"
        axes.plot(*zip(*mine, strict=True), marker=MARKERS[router], color=COLOURS[router], label=label)
    axes.set_xscale("log")
    costs = [compute_of(run) for run in data["runs"]]
    marks = [digit * 10**power for power in range(3, 9) for digit in (1, 2, 5)]
    ticks = [tick for tick in marks if 0.8 * min(costs) < tick < 1.2 * max(costs)]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    longer = any(run.get("longer", 1) > 1 for run in data["runs"])
    axes.set_xlabel(f"FLOPs of {compute}, forward" + (" (times the length of training)" if longer else ""))


def draw_figure_4(data: dict[str, Any]) -> Figure:
    """Share of right predictions against compute."""
    figure = Figure(figsize=(5.4, 3.4), layout="constrained")
    axes = figure.add_subplot()
    _by_compute(axes, data, lambda run: run["right"], data["compute"])
    axes.set_ylabel(f"{data['quality']} (%)")
    axes.legend()
    return figure


def draw_figure_5(data: dict[str, Any]) -> Figure:
    """Calibration error against compute."""
    figure = Figure(figsize=(5.4, 3.4), layout="constrained")
    axes = figure.add_subplot()
    _by_compute(axes, data, lambda run: 100 * run["error"], data["compute"])
    axes.set_ylim(bottom=0)
    axes.set_ylabel("expected calibration error (%)")
    axes.legend()
    return figure


def draw_domains(data: dict[str, Any]) -> Figure:
    """Loss against compute, in the domain of training and out of it."""
    figure = Figure(figsize=(9.0, 3.4), layout="constrained")
    outside, item = ("outside_loss", "token") if "outside_loss" in data["runs"][0] else ("even_loss", "fact")
    for axes, key, title in zip(
        np.atleast_1d(figure.subplots(1, 2)),
        ("loss", outside),
        ("in the domain of training", "out of it"),
        strict=True,
    ):
        _by_compute(axes, data, lambda run, key=key: run[key], f"a {item}")
        axes.set_title(title)
        axes.set_ylabel(f"loss (nats/{item})")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper")
    return figure
