"""The figure of a forest: the held-out loss by domain of its seed, branches, averages and ensembles."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .style import PAPER, shorten

__all__ = ["losses_by_domain"]


def losses_by_domain(losses: Mapping[str, Mapping[str, float]]) -> Figure:
    """Nats per token as points, a row for each model and a panel for each domain; the first model's loss as a line.

    `losses` is by model and domain. Branches of other domains may be far off: an axis ends at twice the way from the
    best to the first model, and an arrow stands for what is beyond; the legend says so.
    """
    (first, start), *_ = losses.items()
    figure = Figure(figsize=(2.2 + 2.1 * len(start), 1.3 + 0.24 * len(losses)), layout="constrained")
    panels = figure.subplots(1, len(start), sharey=True, squeeze=False)[0]
    legend: dict[str, Line2D] = {}
    for axes, domain in zip(panels, start, strict=True):
        values = [by_domain[domain] for by_domain in losses.values()]
        best = min(values)
        reach = max(1e-6, 2 * (start[domain] - best))
        for row, value in enumerate(values):
            beyond = value > best + reach
            place = best + reach if beyond else value
            mark, colour = (">", PAPER.dense) if beyond else ("o", PAPER.sparse)
            (point,) = axes.plot(place, row, mark, color=colour, markersize=5)
            if beyond:
                legend["further right"] = point
        legend[first] = axes.axvline(start[domain], color=PAPER.dense, linestyle=(0, (4, 3)), linewidth=1.2)
        axes.set_title(shorten(domain), fontsize="medium")
        axes.set_xlabel("held-out loss (nats/token)")
        axes.margins(x=0.12)
    panels[0].set_yticks(range(len(losses)), list(losses))
    panels[0].set_ylim(len(losses) - 0.5, -0.5)
    figure.legend(list(legend.values()), list(legend), loc="outside upper right", ncols=2)
    return figure
