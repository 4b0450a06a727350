"""The figure of a comparison of routers, from what its compare.json holds."""

from __future__ import annotations

import re
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..runs import Words
from .style import PAPER

__all__ = ["comparison"]

LINE = 34  # characters of a router's label


def wrapped(router: str) -> str:
    """A router with its options in lines of at most `LINE` characters, cut behind plus, colon or comma.

    What is longer has a line for each router that blocks take in turn; a part without such a sign has one of its own.
    """
    lines = []
    for turn in [router] if len(router) <= LINE else re.findall(r"[^+]+\+?", router):
        lines.append("")
        for part in re.findall(r"[^:,]*[:,] ?|[^:,]+", turn):
            if lines[-1] and len(lines[-1]) + len(part.rstrip()) > LINE:
                lines.append("")
            lines[-1] += part
    return "\n".join(line.rstrip() for line in lines)


def comparison(result: dict[str, Any], words: Words) -> Figure:
    """Loss, balance, drops, time and memory as points, a row for each router, the best loss on top; dense as a line.

    Of several seeds the loss has an error bar, and the dense model's a band: a standard deviation to both sides.
    `result` is what compare.json of `shunter compare` holds.
    """
    dense, *sparse = result["models"]
    sparse = sorted(sparse, key=lambda row: row["eval_loss"])
    panels = [
        (f"held-out loss\n({words.loss})", [row["eval_loss"] for row in sparse], dense["eval_loss"]),
        ("busiest expert\n(times the mean)", [row["balance"] for row in sparse], None),
        ("assignments\ndropped (%)", [100 * row["dropped"] for row in sparse], None),
        ("training time\n(times the dense)", [row["seconds"] / dense["seconds"] for row in sparse], 1.0),
        ("peak memory\n(MiB)", [row["peak_rss_bytes"] / 2**20 for row in sparse], dense["peak_rss_bytes"] / 2**20),
    ]
    labels = [wrapped(row["router"]) for row in sparse]
    widest = max(len(line) for label in labels for line in label.split("\n"))
    tallest = max(label.count("\n") for label in labels)
    size = (8.8 + 0.08 * widest, 1.3 + (0.26 + 0.15 * tallest) * len(sparse))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True)
    for one, (label, values, baseline) in zip(axes, panels, strict=True):
        one.plot(values, range(len(sparse)), "o", color=PAPER.sparse, markersize=5, clip_on=False)
        if baseline is not None:
            one.axvline(baseline, color=PAPER.dense, linestyle=(0, (4, 3)), linewidth=1.2, label="dense")
        one.margins(x=0.12)
        if baseline is None:
            one.set_xlim(0, 1.12 * max(values) or 1)
        one.xaxis.set_major_locator(MaxNLocator(4))
        one.set_xlabel(label)
    if "seeds" in result:
        spread = [row["spread"]["eval_loss"] for row in sparse]
        losses = [row["eval_loss"] for row in sparse]
        axes[0].errorbar(losses, range(len(sparse)), xerr=spread, fmt="none", ecolor=PAPER.sparse, capsize=2)
        middle, width = dense["eval_loss"], dense["spread"]["eval_loss"]
        axes[0].axvspan(middle - width, middle + width, color=PAPER.dense, alpha=0.15, linewidth=0)
    axes[0].set_yticks(range(len(sparse)), labels)
    axes[0].set_ylim(len(sparse) - 0.5, -0.5)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right")
    return figure
