"""Section 9: training without locks: loss by how stale the gradients are, dense and sparse, and by real processes."""

from __future__ import annotations

import math
from itertools import takewhile
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from torch import Tensor

from ..analysis.pages.style import PAPER
from ..recipes.facts import RECIPE, FactsConfig
from ..training.hogwild import delayed, hogwild
from .results import Result, Row, judge

__all__ = ["asynchronous", "draw_asynchronous"]

STALENESS = (0, 1, 2, 4, 8, 16, 32)
RATE, STEPS, EXPERTS = 0.5, 400, 16
_NOISE = 1.02  # times a loss: what is no difference


def _ready(sparse: bool) -> tuple[Any, Any, list[dict[str, Tensor]]]:
    config = FactsConfig.model_validate(
        {
            "data": {"keys": 2048, "values": 16},
            "model": {"dim": 16, "hidden": 64},
            "training": {"steps": STEPS},
            "sparse": {"router": "hash", "num_experts": EXPERTS, "hidden": 64},
        }
    )
    data = RECIPE.prepare(config)
    count = RECIPE.items_per_step(config)
    items = [[data.train[count * step + i] for i in range(count)] for step in range(STEPS)]
    batches = [{key: torch.stack([item[key] for item in some]) for key in ("keys", "labels")} for some in items]
    return RECIPE.build(config, data, sparse).train(), data, batches


def _loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss


def asynchronous() -> Result:
    """Loss against staleness, and one and two processes that share parameters."""
    torch.set_num_threads(1)
    curves: dict[str, list[float | None]] = {"dense": [], "sparse": []}
    synchronous: list[Tensor] = []
    for name, curve in curves.items():
        for staleness in STALENESS:
            model, data, batches = _ready(name == "sparse")
            delayed(model, _loss, batches, staleness=staleness, learning_rate=RATE)
            value = RECIPE.evaluate(model, data)["loss"]
            curve.append(value if math.isfinite(value) else None)
            if name == "sparse" and not staleness:
                synchronous = [p.detach().clone() for p in model.parameters()]
    processes = {}
    equal = False
    for workers in (1, 2):
        model, data, batches = _ready(True)
        stale = hogwild(model, _loss, batches, workers=workers, learning_rate=RATE)
        processes[str(workers)] = {"loss": RECIPE.evaluate(model, data)["loss"], "staleness": sum(stale) / len(stale)}
        if workers == 1:
            equal = all(torch.equal(a, b) for a, b in zip(model.parameters(), synchronous, strict=True))
    one, two = processes["1"], processes["2"]
    claims = [
        Row(
            "one worker is synchronous training", "the same bits", "the same bits" if equal else "others", judge(equal)
        ),
        Row(
            "two processes without locks learn as well as one",
            "they do (Hogwild)",
            f"loss {two['loss']:.3f}, and {one['loss']:.3f} with one; other updates came between "
            f"{two['staleness']:.2f} times on average",
            judge(two["loss"] < _NOISE * one["loss"], direction=two["loss"] < 1.2 * one["loss"]),
        ),
        *(_tolerates(name, curve) for name, curve in curves.items()),
    ]
    notes = [
        f"Models of facts, 2048 keys, width 16, dense and with {EXPERTS} experts behind a hash, {STEPS} steps of plain "
        f"gradient descent at a rate of {RATE}. Gradients are as many updates old as the picture says; processes share "
        "parameters in memory. The review leaves open what asynchronous updates do to experts: “reproduced” "
        "says of such a claim that it holds here.",
    ]
    return Result(
        "asynchronous", claims, {"staleness": STALENESS, "losses": curves, "processes": processes}, notes=notes
    )


def _tolerates(name: str, curve: list[float | None]) -> Row:
    limit = 1.2 * (curve[0] or 0.0)
    points = zip(STALENESS, curve, strict=True)
    near = [s for s, _ in takewhile(lambda point: point[1] is not None and point[1] < limit, points)]
    most = max(near, default=-1)
    reach = f"within a fifth of the synchronous loss up to {most}" if near else "so does synchronous training"
    shown = ", ".join("diverged" if value is None else f"{value:.3f}" for value in curve)
    return Row(
        f"{name}: old gradients do no harm while they are few updates old",
        "an open question",
        f"loss {shown} at a staleness of {', '.join(map(str, STALENESS))}; {reach}",
        judge(most >= 8, direction=most >= 1),
    )


def draw_asynchronous(data: dict[str, Any]) -> Figure:
    """Loss against staleness, dense and sparse; what diverged is left out."""
    figure = Figure(figsize=(5.4, 3.4), layout="constrained")
    axes = figure.add_subplot()
    for name, curve in data["losses"].items():
        points = [(s + 1, value) for s, value in zip(data["staleness"], curve, strict=True) if value is not None]
        axes.plot(*zip(*points, strict=True), "s-" if name == "dense" else "o-", color=PAPER.of(name), label=name)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator([s + 1 for s in data["staleness"]]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value - 1:g}"))
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.tick_params(axis="y", which="minor", labelsize=7)
    axes.set_xlabel("staleness: updates between a gradient's forward and its own update")
    axes.set_ylabel("held-out loss (nats/fact)")
    axes.legend()
    return figure
