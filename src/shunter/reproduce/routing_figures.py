"""The pictures of figures 1, 2, 6 and 7: from decisions that routers made to matplotlib figures."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from ..analysis.pages.heat_maps import draw_heat_map
from ..analysis.pages.style import PAPER

__all__ = ["draw_figure_1", "draw_figure_2", "draw_figure_6", "draw_figure_7"]

IDLE = "#eceff2"
TOKEN_COLOURS = (PAPER.sparse, PAPER.dense, "#3f7d20", "#7a3e9d", "#8a6d00")


def _box(axes: Axes, x: float, y: float, text: str, colour: str, width: float = 0.8, height: float = 0.5) -> None:
    patch = FancyBboxPatch(
        (x - width / 2, y - height / 2), width, height, boxstyle="round,pad=0.02", facecolor=colour, edgecolor=PAPER.ink
    )
    patch.set_linewidth(0.8)
    axes.add_patch(patch)
    dark = colour not in (IDLE, "white")
    axes.text(x, y, text, ha="center", va="center", fontsize=8, color="white" if dark else PAPER.ink)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str, text: str = "") -> None:
    axes.annotate(
        "", end, start, arrowprops={"arrowstyle": "-|>", "color": colour, "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0}
    )
    if text:
        x, y = start[0] + 0.84 * (end[0] - start[0]), start[1] + 0.84 * (end[1] - start[1])
        axes.text(x, y, text, fontsize=7, color=colour, ha="center", va="center", backgroundcolor="white").set_bbox(
            {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
        )


def _blank(axes: Axes, width: float, height: float, title: str) -> None:
    axes.set_xlim(0, width)
    axes.set_ylim(0, height)
    axes.set_axis_off()
    axes.set_title(title, fontsize=9)


def _routed(axes: Axes, experts: int, names: list[str], routing: list[list[float]], title: str) -> None:
    """Tokens below, experts above, an arrow with its weight for each triple; experts without tokens are grey."""
    _blank(axes, experts, 3.2, title)
    taken = {int(e): int(t) for t, e, _ in routing}
    places = [experts * (token + 0.5) / len(names) for token in range(len(names))]
    for e in range(experts):
        _box(axes, e + 0.5, 2.7, f"FFN {e + 1}", TOKEN_COLOURS[taken[e]] if e in taken else IDLE)
    shared = {e for e in taken if sum(int(other) == e for _, other, _ in routing) > 1}
    for e in shared:
        _box(axes, e + 0.5, 2.7, f"FFN {e + 1}", PAPER.ink)
    for t, expert, weight in routing:
        _arrow(axes, (places[int(t)], 0.75), (expert + 0.5, 2.4), TOKEN_COLOURS[int(t)], f"{weight:.2f}")
    for token, name in enumerate(names):
        _box(axes, places[token], 0.45, name, TOKEN_COLOURS[token])


def draw_figure_1(data: dict[str, Any]) -> Figure:
    """A dense and a sparse block, with what each computes and holds."""
    figure = Figure(figsize=(8.0, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = ["token 1", "token 2"]
    _blank(left, 4, 3.2, _cost("dense", data["flops"]["dense"], data["parameters"][0]))
    _box(left, 2, 2.7, "FFN", PAPER.ink)
    for token, name in enumerate(names):
        _arrow(left, (1 + 2 * token, 0.75), (1.9 + 0.2 * token, 2.4), TOKEN_COLOURS[token])
        _box(left, 1 + 2 * token, 0.45, name, TOKEN_COLOURS[token])
    title = _cost("sparse", data["flops"]["sparse"], data["parameters"][1])
    _routed(right, data["experts"], names, data["routing"], title)
    return figure


def _cost(which: str, flops: float, parameters: int) -> str:
    return f"{which}: {flops / 1e3:.1f} kFLOP a token, {parameters:,} parameters"


def draw_figure_2(data: dict[str, Any]) -> Figure:
    """For each token its logits, its probabilities, and the experts that it takes."""
    logits, probability = np.array(data["h"]), np.array(data["p"])
    tokens, experts = logits.shape
    figure = Figure(figsize=(8.0, 1.0 + 1.3 * tokens), layout="constrained")
    rows = figure.subplots(tokens, 2, sharex=True, squeeze=False)
    chosen = {(int(t), int(e)) for t, e, _ in data["routing"]}
    for token, row in enumerate(rows):
        colours = [TOKEN_COLOURS[token] if (token, e) in chosen else "#c9ced4" for e in range(experts)]
        for axes, values in zip(row, (logits[token], probability[token]), strict=True):
            axes.bar(range(experts), values, color=colours)
            axes.axhline(0, color=PAPER.ink, linewidth=0.8)
            axes.grid(axis="x", visible=False)
        row[1].set_ylim(0, 1)
        for e in range(experts):
            text = f"{probability[token, e]:.2f}"
            row[1].text(e, probability[token, e] + 0.03, text, ha="center", fontsize=8)
        row[0].set_ylabel(f"token {token + 1}")
    rows[0][0].set_title("h(x) = W x")
    rows[0][1].set_title("p(x) = softmax of h(x); taken in colour")
    for axes in rows[-1]:
        axes.set_xticks(range(experts), [f"FFN {e + 1}" for e in range(experts)])
    return figure


def draw_figure_6(data: dict[str, Any]) -> Figure:
    """The same matrix three times, experts down and tokens across; what was decided is framed."""
    probability = np.array(data["probability"]).T
    figure = Figure(figsize=(9.6, 2.4), layout="constrained")
    for axes, (name, cells) in zip(figure.subplots(1, 3, sharey=True), data["cells"].items(), strict=True):
        draw_heat_map(axes, probability, Normalize(0, 1))
        for t, e in cells:
            axes.add_patch(Rectangle((t - 0.44, e - 0.42), 0.88, 0.84, fill=False, edgecolor="#ff6a00", linewidth=2.2))
        for (e, t), value in np.ndenumerate(probability):
            axes.text(
                t, e, f"{value:.2f}", ha="center", va="center", fontsize=6, color="black" if value > 0.6 else "white"
            )
        axes.set_title(name, fontsize=9)
        axes.set_xticks(range(probability.shape[1]), [str(t + 1) for t in range(probability.shape[1])])
        axes.set_yticks(range(probability.shape[0]), [f"expert {e + 1}" for e in range(probability.shape[0])])
        axes.set_xlabel("token")
        axes.set_aspect("equal")
    return figure


def draw_figure_7(data: dict[str, Any]) -> Figure:
    """Six panels, an algorithm each: which experts the two tokens go to, and with which weights."""
    figure = Figure(figsize=(9.6, 5.2), layout="constrained")
    for axes, (label, routing) in zip(figure.subplots(2, 3).flat, data["routings"].items(), strict=True):
        _routed(axes, data["experts"], data["tokens"], routing, label)
    return figure
