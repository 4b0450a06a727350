"""The figure of fitted scaling laws: losses by experts with the law through them, and what the experts are worth."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from numpy.typing import NDArray

from ..scaling_law import UnifiedLaw
from .style import COLOUR_MAP, PAPER, shorten

__all__ = ["law_figure", "shown_count"]


def law_figure(groups: dict[str, dict[str, Any]]) -> Figure:
    """A row of two panels for each group.

    Left the loss of each run by experts, a line of the law for each size. Right the effective parameter count over the
    parameters by size, a line for each expert count; all meet at the cut-off, whose interval is shaded.

    Args:
        groups: by name, as `shunter.analysis.scaling_law.account` gives them.
    """
    figure = Figure(figsize=(9.6, 3.3 * len(groups)), layout="constrained")
    for (name, found), row in zip(groups.items(), figure.subplots(len(groups), 2, squeeze=False), strict=True):
        law = UnifiedLaw(**found["law"])
        _losses(row[0], found, law)
        _gains(row[1], found, law)
        row[0].set_title(shorten(name, 40), loc="left")
    return figure


def _losses(axes: Any, found: dict[str, Any], law: UnifiedLaw) -> None:
    runs = {key: np.array([run[key] for run in found["runs"]]) for key in ("parameters", "experts", "loss")}
    sizes = np.unique(runs["parameters"])
    fine = np.geomspace(1, runs["experts"].max(), 100)
    for size, colour in zip(sizes, _colours(len(sizes)), strict=True):
        here = runs["parameters"] == size
        axes.plot(runs["experts"][here], runs["loss"][here], "o", color=colour, markersize=4, label=shown_count(size))
        axes.plot(fine, _shown(law.loss(size, fine)), color=colour, linewidth=1.2)
    axes.set_xscale("log")
    axes.set_yscale("log")
    counts = np.unique(runs["experts"])
    axes.set_xticks(counts, [f"{count:g}" for count in counts])
    axes.xaxis.set_minor_locator(NullLocator())
    low, high = axes.get_ylim()
    _plain_ticks(axes.yaxis, MaxNLocator(6).tick_values(low, high) if high < 3 * low else _decades(low, high))
    axes.set_xlabel("experts (1: dense)")
    axes.set_ylabel("held-out loss")
    axes.legend(title="dense parameters", loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, title_fontsize=8)


def _gains(axes: Any, found: dict[str, Any], law: UnifiedLaw) -> None:
    sizes = np.array([run["parameters"] for run in found["runs"]])
    counts = [count for count in np.unique([run["experts"] for run in found["runs"]]) if count > 1]
    cutoff, interval = found["log10_cutoff"], found["intervals"].get("log10_cutoff")
    near = [value for value in (cutoff, *(interval or [])) if value is not None]
    low, high = np.log10(sizes.min()), np.log10(sizes.max())
    high = max([high + 1, *(value + 0.3 for value in near if value < high + 5)])
    fine = 10 ** np.linspace(low, high, 100)
    for count, colour in zip(counts, _colours(len(counts)), strict=True):
        worth = _shown(law.effective_parameters(fine, count) / fine)
        axes.plot(fine, worth, color=colour, linewidth=1.2, label=f"{count:g}")
    axes.axhline(1, color=PAPER.ink, linewidth=0.8)
    if interval and interval[0] is not None and interval[0] < high:
        end = high if interval[1] is None else min(interval[1], high)
        axes.axvspan(10 ** max(interval[0], low), 10**end, color=PAPER.dense, alpha=0.12, linewidth=0)
    if cutoff is not None and low <= cutoff <= high:
        axes.axvline(10**cutoff, color=PAPER.dense, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.axvspan(sizes.min(), sizes.max(), color=PAPER.ink, alpha=0.06, linewidth=0)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(10**low, 10**high)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: shown_count(value)))
    axes.xaxis.set_minor_locator(NullLocator())
    bottom, top = axes.get_ylim()
    _plain_ticks(axes.yaxis, _decades(bottom, top))
    axes.set_ylim(bottom, top)
    marked = "" if cutoff is None else "; dashed: the cut-off" + (" and its interval" if interval else "")
    axes.set_xlabel(f"dense parameters (grey: of the runs{marked})", fontsize=9)
    axes.set_ylabel("effective over dense parameters")
    axes.legend(title="experts", loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, title_fontsize=8)


def _shown(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Values that a picture can show; a law far from its runs may say anything."""
    return np.where((values > 1e-12) & (values < 1e12), values, np.nan)


def _decades(low: float, high: float) -> list[float]:
    """Ticks of a logarithmic axis, at most eight or so."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    units = (1, 2, 5) if high < 1e3 * low else (1,)
    step = max(1, (last - first) // 6)
    return [10.0**scale * unit for scale in range(first, last + 1, step) for unit in units]


def _plain_ticks(axis: Any, ticks: Iterable[float]) -> None:
    """These ticks as plain numbers, those inside of the view alone."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if 1e3 <= value < 1e7 else f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def _colours(count: int) -> list[Any]:
    return list(matplotlib.colormaps[COLOUR_MAP](np.linspace(0, 0.85, count)))


def shown_count(value: float) -> str:
    """A number of parameters, as in 1.3 B."""
    for unit, name in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if value >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:g}"
