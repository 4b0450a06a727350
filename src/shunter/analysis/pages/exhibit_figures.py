"""From an exhibit of a recipe to what a run's page shows of it: figures as SVG, tables and pictures as they are."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from ..exhibits import Curves, Exhibit, HeatMap, Pictures, Table
from . import html
from .heat_maps import colour_bar, draw_heat_map
from .style import MAX_LABELS, THEME, Palette, shorten

__all__ = ["exhibit"]

_STYLES = (("sparse", "o", "-"), ("sparse", "^", (0, (4, 2))), ("ink", "s", "-"), ("ink", "v", (0, (4, 2))))


def exhibit(one: Exhibit, name: str) -> dict[str, Any]:
    """What the template is given; `name` keeps the ids of its figures apart on the page."""
    shown: dict[str, Any] = {"title": one.title, "says": one.says, "figure": None, "panels": [], "key": None}
    shown |= {"heads": [], "rows": [], "groups": []}
    match one:
        case Curves():
            shown["figure"] = html.svg(curves(one, THEME), name, one.title)
        case Table():
            shown |= {"heads": one.heads, "rows": one.rows}
        case HeatMap():
            values = {panel: np.array(rows, dtype=np.float64) for panel, rows in one.panels.items()}
            scale = Normalize(0, max([1e-12, *(float(array.max()) for array in values.values() if array.size)]))
            top = float(scale.vmax or 1)
            key = colour_bar(scale, one.unit, {0.0: "0", top / 2: f"{top / 2:.2g}", top: f"{top:.2g}"})
            shown["key"] = html.svg(key, f"{name}-key", f"Colour key: {one.unit}")
            shown["panels"] = [
                (panel, html.svg(heat_map(one, array, scale), f"{name}-{number}", f"{one.title}: {panel}"))
                for number, (panel, array) in enumerate(values.items())
            ]
        case Pictures():
            shown["groups"] = list(one.groups.items())
    return shown


def curves(one: Curves, palette: Palette) -> Figure:
    """The lines with markers, the levels dashed."""
    figure = Figure(figsize=(4.2, 3.3), layout="constrained")
    axes = figure.add_subplot()
    for number, (name, points) in enumerate(one.lines.items()):
        colour, marker, line = _STYLES[number % len(_STYLES)]
        x, y = zip(*sorted(points), strict=True) if points else ((), ())
        axes.plot(x, y, color=getattr(palette, colour), marker=marker, markersize=4, linestyle=line, label=name)
    for name, level in one.levels.items():
        axes.axhline(level, color=palette.dense, linewidth=1.2, linestyle=(0, (4, 3)), label=name)
    if one.logarithmic:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel(one.x)
    axes.set_ylabel(one.y)
    if one.lines or one.levels:
        figure.legend(loc="outside upper left")
    return figure


def heat_map(one: HeatMap, values: np.ndarray, scale: Normalize) -> Figure:
    """One panel: values (R, C) with the labels of rows and columns."""
    figure = Figure(figsize=(4.2, 1.0 + 0.3 * len(one.rows)), layout="constrained")
    axes = figure.add_subplot()
    draw_heat_map(axes, values, scale)
    axes.set_yticks(range(len(one.rows)), [shorten(row) for row in one.rows])
    few = len(one.columns) <= MAX_LABELS
    axes.set_xticks(range(len(one.columns)) if few else [], [shorten(column) for column in one.columns] if few else [])
    axes.set_xlabel(one.across)
    return figure
