"""The figures of an inspection: what decides the routing, loads, margins, pairs of experts, removals, patches."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from .heat_maps import draw_heat_map
from .style import COLOUR_MAP, MAX_LABELS, Palette, shorten

__all__ = ["ablation_bars", "evidence_map", "load_map", "margin_ranges", "matrix_map", "patch_sheet", "saturation_bars"]

WIDE, ROW = 4.6, 0.26
PATCH_PIXELS, PATCH_COLUMNS = 24, 8
LIGHT = 0.62  # of the colour scale: above it text is dark


def _array(rows: list[Any]) -> NDArray[np.float64]:
    return np.array([[math.nan if value is None else value for value in row] for row in rows], dtype=np.float64)


def _short(layer: str) -> str:
    """A layer's number where its name has one, as a label."""
    numbers = [part for part in layer.split(".") if part.isdigit()]
    stack = "encoder " if "encoder" in layer.split(".") else "decoder " if "decoder" in layer.split(".") else ""
    return shorten(stack + " ".join(numbers[:1]) if numbers else layer)


def _labels(layers: Iterable[str]) -> list[str]:
    """A label of each layer; where some have the same number, the last part of their names too."""
    names = list(layers)
    short = [_short(name) for name in names]
    return [
        f"{label} {name.rpartition('.')[2]}" if short.count(label) > 1 else label
        for name, label in zip(names, short, strict=True)
    ]


def evidence_map(parts: dict[str, dict[str, float | None]], labels: dict[str, str]) -> Figure:
    """What decides each layer's routing: layers by row, labels by column, the part that each label decides written in.

    `parts` is by layer and by label; `labels` gives the columns' headings.
    """
    values = _array([[row.get(label) for label in labels] for row in parts.values()])
    figure = Figure(figsize=(1.1 + 0.72 * len(labels), 0.6 + ROW * len(parts)), layout="constrained")
    axes = figure.add_subplot()
    drawn = np.clip(np.nan_to_num(values), 0, 1)
    axes.pcolormesh(drawn, cmap=COLOUR_MAP, norm=Normalize(0, 1), rasterized=True)
    for (row, column), value in np.ndenumerate(values):
        text = "–" if math.isnan(value) else f"{max(0.0, value) * 100:.0f}"
        colour = "#000000" if drawn[row, column] > LIGHT else "#ffffff"
        axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", color=colour, fontsize=8)
    axes.set_xticks(np.arange(len(labels)) + 0.5, list(labels.values()))
    axes.xaxis.tick_top()
    axes.set_yticks(np.arange(len(parts)) + 0.5, _labels(parts))
    axes.invert_yaxis()
    axes.set_ylabel("layer")
    axes.grid(visible=False)
    axes.tick_params(length=0)
    return figure


def load_map(loads: dict[str, list[float]], dead: dict[str, list[int]]) -> tuple[Figure, Normalize]:
    """The load of every expert in even shares, layers by row; dead experts are crossed out. Also the colour scale."""
    experts = max(len(load) for load in loads.values())
    values = np.full((len(loads), experts), np.nan)
    for row, load in enumerate(loads.values()):
        values[row, : len(load)] = np.array(load) * len(load)
    scale = Normalize(0, min(max(2.0, float(np.nanmax(values))), 4.0))
    figure = Figure(figsize=(11.8, 0.7 + ROW * len(loads)), layout="constrained")
    axes = figure.add_subplot()
    draw_heat_map(axes, values, scale)
    for row, layer in enumerate(loads):
        axes.plot(dead[layer], [row] * len(dead[layer]), "x", color="#ffffff", markersize=5)
    axes.set_yticks(range(len(loads)), _labels(loads))
    axes.xaxis.set_major_locator(MaxNLocator(16, integer=True))
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    return figure, scale


def margin_ranges(margins: dict[str, dict[str, Any]], palette: Palette) -> Figure:
    """The margin of the choice in logits, layers by row: 10 to 90 % of the tokens thin, 25 to 75 % bold, the median."""
    figure = Figure(figsize=(WIDE, 0.8 + ROW * len(margins)), layout="constrained")
    axes = figure.add_subplot()
    rows = np.arange(len(margins))
    low, first, middle, third, high = np.array([margin["quantiles"] for margin in margins.values()]).T
    axes.hlines(rows, low, high, color=palette.sparse, linewidth=1)
    axes.hlines(rows, first, third, color=palette.sparse, linewidth=5, alpha=0.5)
    axes.plot(middle, rows, "o", color=palette.sparse, markersize=5)
    axes.axvline(0, color=palette.ink, linewidth=0.8)
    axes.set_yticks(rows, _labels(margins))
    axes.set_ylim(len(margins) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("margin (logits)")
    axes.set_ylabel("layer")
    return figure


def matrix_map(matrix: list[list[float | None]], scale: Normalize) -> Figure:
    """A table (E, E) of pairs of experts; the diagonal is left out."""
    values = _array(matrix)
    np.fill_diagonal(values, np.nan)
    experts = len(values)
    figure = Figure(figsize=(3.6, 3.4), layout="constrained")
    axes = figure.add_subplot()
    draw_heat_map(axes, values, scale)
    axes.set_aspect("equal")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(min(8, max(1, experts)), integer=True))
    axes.set_xlabel("expert")
    axes.set_ylabel("expert")
    return figure


def ablation_bars(removals: list[dict[str, float] | None], palette: Palette) -> Figure:
    """How much the loss rises without each expert of a layer, with two standard errors; no bar where not removed."""
    figure = Figure(figsize=(4.2, 2.0), layout="constrained")
    axes = figure.add_subplot()
    done = [expert for expert, removal in enumerate(removals) if removal]
    rise = np.array([removal["rise"] for removal in removals if removal])
    spread = np.array([removal["spread"] for removal in removals if removal])
    axes.bar(done, rise, width=0.8, color=palette.sparse, yerr=2 * spread, error_kw={"ecolor": palette.ink, "lw": 0.7})
    axes.axhline(0, color=palette.ink, linewidth=0.8)
    axes.set_xlim(-0.6, len(removals) - 0.4)
    axes.xaxis.set_major_locator(MaxNLocator(min(MAX_LABELS, len(removals)), integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.grid(axis="x", visible=False)
    axes.set_xlabel("expert removed")
    axes.set_ylabel("rise of the loss")
    return figure


def saturation_bars(layers: dict[str, dict[str, Any]], palette: Palette) -> Figure:
    """The share of decisions that both checkpoints share, layers by row; a mark where chance alone would be."""
    figure = Figure(figsize=(WIDE, 0.9 + ROW * len(layers)), layout="constrained")
    axes = figure.add_subplot()
    rows = np.arange(len(layers))
    kept, chance = (np.array([layer[key] for layer in layers.values()]) * 100 for key in ("saturation", "chance"))
    axes.barh(rows, kept, height=0.6, color=palette.sparse, label="the same in both")
    axes.plot(chance, rows, "|", color=palette.ink, markersize=9, markeredgewidth=2, label="by chance")
    axes.set_xlim(0, 100)
    axes.set_yticks(rows, _labels(layers))
    axes.set_ylim(len(layers) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("decisions (%)")
    axes.set_ylabel("layer")
    figure.legend(loc="outside upper right", ncols=2)
    return figure


def patch_sheet(patches: list[list[Any]], images: Tensor, size: int) -> str:
    """An expert's patches, [image, patch, weight] each, as a sheet: a PNG in a data URI.

    Args:
        patches: at least one.
        images: (images, channels, height, width) in [0, 1].
        size: of a patch.
    """
    per_row, pixels = images.shape[-1] // size, PATCH_PIXELS
    rows = -(-len(patches) // PATCH_COLUMNS)
    sheet = Image.new("RGBA", (PATCH_COLUMNS * (pixels + 2), rows * (pixels + 2)))
    for number, (image, patch, _) in enumerate(patches):
        top, left = (part * size for part in divmod(patch, per_row))
        cut = images[image, :, top : top + size, left : left + size]
        cut = cut.expand(3, -1, -1) if cut.shape[0] == 1 else cut[:3]
        array = (cut.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        tile = Image.fromarray(array, "RGB").resize((pixels, pixels), Image.Resampling.NEAREST)
        row, column = divmod(number, PATCH_COLUMNS)
        sheet.paste(tile, (column * (pixels + 2), row * (pixels + 2)))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
