"""The reliability diagram: accuracy by confidence of one or several models, and how often they are that confident."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from .style import COLOUR_MAP, PAPER, shorten

__all__ = ["reliability_diagram"]


def reliability_diagram(models: dict[str, dict[str, Any]]) -> Figure:
    """Accuracy against confidence by bin, two standard errors of each, above the shares of the predictions.

    Args:
        models: by name, as `shunter.analysis.calibration.Calibration.as_json` gives them.
    """
    figure = Figure(figsize=(4.6, 4.8), layout="constrained")
    curve, shares = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    curve.plot([0, 1], [0, 1], color=PAPER.ink, linewidth=0.8, linestyle=(0, (4, 3)))
    width = 1 / (len(models) + 1)
    for number, (name, found) in enumerate(models.items()):
        bins = [each for each in found["bins"] if each["predictions"]]
        x, y, n = (np.array([each[key] for each in bins]) for key in ("confidence", "accuracy", "predictions"))
        colour: Any = PAPER.of(name)
        if len(models) > 2 and name != "dense":
            colour = colormaps[COLOUR_MAP](number / len(models))
        label = f"{shorten(name)}: error {100 * found['error']:.2f} %"
        error = 2 * np.sqrt(y * (1 - y) / n)
        curve.errorbar(
            x, y, yerr=error, color=colour, marker="s" if name == "dense" else "o", markersize=4, label=label
        )
        count = len(found["bins"])
        edges = np.arange(count) + (number + 0.5) * width
        values = [each["predictions"] / found["predictions"] for each in found["bins"]]
        shares.bar((edges + width / 2) / count, values, width=width / count, color=colour)
    curve.set_xlim(0, 1)
    curve.set_ylim(0, 1)
    curve.set_ylabel("accuracy")
    curve.legend(loc="upper left")
    shares.set_ylabel("share")
    shares.set_xlabel("confidence: probability of the likeliest guess")
    return figure
