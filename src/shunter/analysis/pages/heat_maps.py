"""Heat maps that several pages show: what experts serve, by domain or another label, and the key to their colours."""

from __future__ import annotations

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray

from .style import COLOUR_MAP, MAX_LABELS, shorten

__all__ = ["colour_bar", "domain_map", "domain_mix", "domain_scale", "draw_heat_map"]


def draw_heat_map(
    axes: Axes, values: NDArray[np.float64], scale: Normalize, columns: NDArray[np.float64] | None = None
) -> None:
    """A table (R, C) as colours, its first row on top; `columns` (C + 1,) are the edges of its columns."""
    edges = [np.arange(size + 1) - 0.5 for size in values.shape]
    x = edges[1] if columns is None else columns
    axes.pcolormesh(x, edges[0], values, cmap=COLOUR_MAP, norm=scale, rasterized=True)
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.grid(visible=False)


def domain_scale(domains: int) -> Normalize:
    """The colour scale of domain maps: from none to `domains` times an even share, at most four times."""
    return Normalize(0, min(max(domains, 2), 4))


def domain_map(share: NDArray[np.float64], domains: list[str], what: str = "domain") -> Figure:
    """How much of each expert's work is from each domain, in even shares, the domains counted as equally long.

    Args:
        share: (D, E), of each domain's tokens the share that each expert takes; experts are ordered by the domain that
            they serve most.
        domains: D names.
        what: a domain is.
    """
    mix = domain_mix(share)
    favourite = mix.argmax(axis=0)
    order = np.lexsort((-mix.max(axis=0), favourite))
    experts = len(order)
    figure = Figure(figsize=(4.2, 1.0 + 0.3 * len(domains)), layout="constrained")
    axes = figure.add_subplot()
    draw_heat_map(axes, mix[:, order] * len(domains), domain_scale(len(domains)))
    axes.set_yticks(range(len(domains)), [shorten(name) for name in domains])
    labels = [str(expert) for expert in order] if experts <= 2 * MAX_LABELS else []
    axes.set_xticks(range(len(labels)), labels, fontsize=6 if experts > MAX_LABELS else None)
    axes.set_xlabel(f"experts, by main {what}")
    return figure


def domain_mix(share: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of each expert's tokens the share from each domain, (D, E), were the domains equally long.

    `share` (D, E) is of each domain's tokens the share that each expert takes. Experts without tokens get zeros.
    """
    total = share.sum(axis=0)
    return np.divide(share, total, out=np.zeros_like(share), where=total > 0)


def colour_bar(scale: Normalize, label: str, ticks: dict[float, str] | None = None) -> Figure:
    """The key to a group of heat maps; by default their unit is an even share."""
    figure = Figure(figsize=(4.2, 0.62), layout="constrained")
    axes = figure.add_subplot()
    bar = figure.colorbar(matplotlib.cm.ScalarMappable(scale, COLOUR_MAP), cax=axes, orientation="horizontal")
    even: dict[float, str] = {value: str(value) for value in range(int(scale.vmax or 0) + 1)}
    ticks = ticks or even | {0: "0: none", 1: "1: even"}
    bar.set_ticks(list(ticks), labels=list(ticks.values()))
    bar.set_label(label)
    bar.outline.set_visible(False)
    return figure
