"""The figure of a simulated sweep over devices, from the rows that simulate.json holds."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from .style import PAPER, shorten

__all__ = ["PARTS", "sweep_figure"]

PARTS = {
    "compute": "computing",
    "exposed": "exchanges that nothing hides",
    "routing": "routing",
    "tensor": "tensor parallelism",
    "data": "data parallelism",
    "bubble": "pipeline bubble",
}
_COLOURS = ("#0067a8", "#b84e00", "#e9b44c", "#7a8b99", "#4e9a5f", "#c9ced4")


def sweep_figure(found: dict[str, Any]) -> Figure:
    """Step time with its error bar, where it goes, and memory of a device, at each number of devices."""
    rows = found["steps"]
    places, labels = range(len(rows)), [str(row["devices"]) for row in rows]
    figure = Figure(figsize=(max(9.6, 3 + 0.9 * len(rows)), 6.4), layout="constrained")
    (time, speed), (share, memory) = figure.subplots(2, 2)
    figure.suptitle(f"{shorten(found['model'], 40)} on {shorten(found['cluster'], 60)}", fontsize=10)

    seconds = [row["seconds"] for row in rows]
    below = [row["seconds"] - row["shortest"] for row in rows]
    above = [row["longest"] - row["seconds"] for row in rows]
    time.errorbar(places, seconds, yerr=[below, above], fmt="o", color=PAPER.sparse, capsize=3, markersize=4)
    time.set_yscale("log")
    time.set_ylabel("seconds a step\n(cross: does not fit into memory)")
    for place, row in zip(places, rows, strict=True):
        if not row["fits"]:
            time.plot(place, row["seconds"], "x", color=PAPER.dense, markersize=9)

    rates = [row["tokens_per_s"] for row in rows]
    low = [rate - rate * row["seconds"] / row["longest"] for rate, row in zip(rates, rows, strict=True)]
    high = [rate * row["seconds"] / row["shortest"] - rate for rate, row in zip(rates, rows, strict=True)]
    speed.errorbar(places, rates, yerr=[low, high], fmt="o", color=PAPER.sparse, capsize=3, markersize=4)
    speed.set_ylabel("tokens/s of a device")
    speed.set_ylim(bottom=0)

    base = [0.0] * len(rows)
    for (part, label), colour in zip(PARTS.items(), _COLOURS, strict=True):
        parts = [100 * row[part] / row["seconds"] for row in rows]
        share.bar(places, parts, bottom=base, color=colour, label=label, width=0.7)
        base = [a + b for a, b in zip(base, parts, strict=True)]
    share.set_ylabel("% of the step")
    share.set_ylim(0, 100)

    colours = [PAPER.sparse if row["fits"] else PAPER.dense for row in rows]
    memory.bar(places, [row["memory"] / 2**30 for row in rows], color=colours, width=0.7)
    memory.axhline(found["device_memory"] / 2**30, color=PAPER.ink, linestyle=(0, (4, 3)), linewidth=1)
    memory.set_ylabel("GiB a device\n(line: what it has)")
    memory.set_yscale("log")
    for axes in (time, memory):
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    for axes in (time, speed, share, memory):
        axes.tick_params(axis="x", labelsize=7.5)
    for axes in (time, speed, share):
        axes.set_xticks(places, labels)
    memory.set_xticks(
        places,
        [f"{label}\nep {row['ep']}\npp {row['pp']}\ntp {row['tp']}" for label, row in zip(labels, rows, strict=True)],
    )
    share.set_xlabel("devices")
    memory.set_xlabel("devices, and the best layout")
    figure.legend(*share.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure
