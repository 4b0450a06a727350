"""Section 9: what models of facts have memorised, by how often they saw it and by how many experts they have."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from torch import Tensor

from ..analysis.memorisation import CHANCE, exposure
from ..analysis.pages.style import COLOUR_MAP, PAPER
from ..recipes.run import configuration_of, load_model
from .results import Result, Row, judge
from .scaling import LAW_ROUTERS, NAMES
from .sweep import COUNTS, FACT_SWEEP

__all__ = ["draw_memorisation", "memorisation", "times_seen"]

SIZE = 16
BANDS = {"never": (0, 0), "1 to 3 times": (1, 3), "4 to 15 times": (4, 15), "16 to 63 times": (16, 63)}
"""How often a key came in training."""


def times_seen(data: Any) -> Tensor:
    """How often each key of prepared facts comes in training, (keys,) int64."""
    seen = torch.zeros(len(data.values), dtype=torch.int64)
    for i in range(len(data.train)):
        seen += torch.bincount(data.train[i]["keys"], minlength=len(seen))
    return seen


def memorisation(runs: Path) -> Result:
    """Exposure and extraction of planted facts against the number of experts."""
    rows = list(FACT_SWEEP.run(runs, LAW_ROUTERS, (SIZE,)))
    run = FACT_SWEEP.place(runs, SIZE)
    recipe, config = configuration_of(run)
    data = recipe.prepare(config)
    seen = times_seen(data)
    keys = {band: ((seen >= low) & (seen <= high)).nonzero().flatten() for band, (low, high) in BANDS.items()}
    models: dict[str, dict[str, Any]] = {}
    for name in ["dense", *(f"{router}-{count}" for router in LAW_ROUTERS for count in COUNTS)]:
        model = load_model(run, name)
        with torch.no_grad():
            logits = model(torch.arange(len(seen))[None]).logits[0].float()
        found = exposure(logits, data.values)
        right = logits.argmax(-1) == data.values
        models[name] = {
            band: {"exposure": float(found[some].mean()), "extracted": float(right[some].double().mean())}
            for band, some in keys.items()
        }
    claims = []
    for router in LAW_ROUTERS:
        curves = {
            band: [models["dense"][band]["exposure"], *(models[f"{router}-{e}"][band]["exposure"] for e in COUNTS)]
            for band in BANDS
        }
        for band in list(BANDS)[1:]:
            curve = curves[band]
            rising = all(b > a for a, b in zip(curve, curve[1:], strict=False))
            last = models[f"{router}-{COUNTS[-1]}"][band]["extracted"]
            claims.append(
                Row(
                    f"{NAMES[router]}: facts seen {band} are exposed the more, the more experts there are",
                    "an open question",
                    f"{curve[0]:.2f} bits dense, {curve[-1]:.2f} with {COUNTS[-1]} experts; extracted "
                    f"{100 * models['dense'][band]['extracted']:.0f} and {100 * last:.0f} %",
                    judge(rising, direction=curve[-1] > curve[0]),
                )
            )
        never = curves["never"]
        off = 4 * math.log2(math.e) / math.sqrt(len(keys["never"]))  # four standard deviations of a mean
        claims.append(
            Row(
                f"{NAMES[router]}: facts never seen are not exposed",
                f"{CHANCE:.2f} bits by chance",
                f"{min(never):.2f} to {max(never):.2f} bits, over {len(keys['never'])} facts",
                judge(all(abs(value - CHANCE) < off for value in never)),
            )
        )
    notes = [
        f"Models of width {SIZE} of the sweep of facts. A fact is a planted secret: its value is one of 64, chosen "
        f"at random, so that exposure is at most {math.log2(64):.0f} bits (Carlini et al. 2019). “Reproduced” says "
        f"here that the claim holds at every doubling of the experts, “same direction” that it holds from the dense "
        f"model to the largest.",
    ]
    facts = {band: len(some) for band, some in keys.items()}
    return Result(
        "memorisation", claims, {"models": models, "facts": facts}, math.fsum(row["seconds"] for row in rows), notes
    )


def draw_memorisation(data: dict[str, Any]) -> Figure:
    """Exposure against experts, a line for each band of how often a fact was seen."""
    import matplotlib

    figure = Figure(figsize=(8.0, 3.2), layout="constrained")
    panels = figure.subplots(1, len(LAW_ROUTERS), sharey=True)
    for axes, router in zip(panels, LAW_ROUTERS, strict=True):
        for number, band in enumerate(data["facts"]):
            names = ["dense", *(f"{router}-{count}" for count in COUNTS)]
            curve = [data["models"][name][band]["exposure"] for name in names]
            colour = matplotlib.colormaps[COLOUR_MAP](0.85 * number / max(1, len(data["facts"]) - 1))
            axes.plot([1, *COUNTS], curve, "o-", color=colour, label=band)
        axes.axhline(CHANCE, color=PAPER.ink, linewidth=0.8, linestyle=(0, (4, 3)))
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlabel("experts (1: dense)")
        axes.set_title(NAMES[router])
    panels[0].set_ylabel("exposure (bits)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", title="seen in training")
    return figure
