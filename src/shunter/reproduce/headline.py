"""The numbers that the review quotes, each with what became of it here."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..analysis.runs import Metrics
from ..simulate.shapes import load_model
from .figures_3_to_5 import facts_figure_5
from .one_run import residual
from .results import IMPOSSIBLE, NOT_RUN, Result, Row, judge
from .scaling import seconds_of, short
from .sweep import FACT_SWEEP

__all__ = ["calibrated", "counted", "fewer_operations", "headline", "headline_of"]

_LARGE = "it is of models that take hundreds of accelerators"
_QUOTED = (
    (
        "inference of single examples, every layer sparse (Jaszczur et al. 2021)",
        "37 times faster",
        f"{_LARGE}; its layers are `shunter.layers.terraformer`",
    ),
    ("inference with DeepSpeed-MoE (Rajbhandari et al. 2022)", "10 times faster", _LARGE),
    (
        "translation by GShard, 600 billion parameters, 100 languages",
        "+13.5 BLEU on average",
        f"{_LARGE}; `shunter train translation` measures BLEU of eleven languages, sparse and dense",
    ),
    (
        "pre-training of Switch-C",
        "4 times the speed of T5-XXL",
        f"{_LARGE}; the claim of Switch against its dense model is above",
    ),
    ("GLaM's training against GPT-3's", "65 % less power", f"{_LARGE}, and power is no count"),
    (
        "BIG-bench, 161 JSON tasks",
        "about twice the computing in quality",
        f"{_LARGE}; figure 4 has the dense computing of the same quality here",
    ),
    (
        "Tutel's Swin-V2-MoE",
        "1.5 to 2 times faster",
        "it is a speed of accelerators; `shunter bench parallel` is ours on two processes",
    ),
    (
        "distilled DeepSpeed-MoE",
        "7.3 times lower latency",
        f"{_LARGE}; `shunter distill` makes a sparse model smaller",
    ),
    (
        "the best few-shot and fine-tuned models",
        "at most 64 large experts a layer",
        f"{_LARGE}; no model here is asked with few examples",
    ),
)
PALM = 540e9  # parameters; a dense model computes twice as many FLOPs a token


def counted() -> list[Row]:
    """The numbers that follow from the shapes of published models, without a run."""
    flops = {name: sum(load_model(name).flops().values()) / 1e9 for name in ("glam-64b-64e", "gpt-3", "st-moe-32b")}
    glam, gpt = flops["glam-64b-64e"], flops["gpt-3"]
    fewer = 100 * (1 - glam / gpt)
    st_moe, palm = flops["st-moe-32b"] / 2, 2 * PALM / 1e9  # a token passes the encoder or the decoder
    times = palm / st_moe
    return [
        Row(
            "GLaM's inference against GPT-3's",
            "49 % fewer FLOPs a token",
            f"{fewer:.0f} % fewer by their shapes: {glam:.0f} and {gpt:.0f} GFLOP",
            judge(abs(fewer - 49) <= 1, direction=fewer > 0),
            "counted, not run; the paper states 180 and 350",
        ),
        Row(
            "ST-MoE against PaLM-540B on SuperGLUE",
            "20 times less pre-training, 40 times inference",
            f"{times:.0f} times less inference by their shapes: {st_moe:.0f} and {palm:,.0f} GFLOP a token",
            judge(36 <= times <= 44, direction=times > 1),
            "counted, not run; the pre-training and the quality are not possible at this size",
        ),
    ]


def fewer_operations() -> Row:
    """Sparse Mixer against BERT, by the operations of one of 512 tokens in the forward."""

    def encoder(dim: int, hidden: int, attention: int, mixing: int, length: int = 512) -> float:
        """Linear mixing is a map over tokens and one over the width; a token has one expert, as wide as the block."""
        block, heads = 4 * dim * hidden, 8 * dim**2 + 4 * length * dim
        return ((attention + mixing) * block + attention * heads + mixing * 2 * dim * (length + dim)) / 1e6

    bert, mixer = encoder(768, 3072, 12, 0), encoder(512, 2048, 4, 10)
    return Row(
        "Sparse Mixer against BERT",
        "89 % faster in training, 98 % in inference",
        f"{bert / mixer:.1f} times fewer operations by shapes, of the one in `SparseMixer`'s documentation and of "
        f"BERT-Base: {mixer:.0f} and {bert:.0f} MFLOP a token",
        judge(False, direction=bert > 1.5 * mixer),
        "counted, not run: speeds are of accelerators",
    )


def calibrated(figure_5: Result) -> Row:
    """The number of calibration, from the rows of figure 5 on facts."""
    [row] = [row for row in figure_5.rows if row.what.startswith("Switch")]
    what = "calibration: sparse as dense of more computing (BIG-bench)"
    return replace(row, what=what, paper="10 times", ours=f"Switch on facts: {row.ours}")


def headline(runs: Path) -> Result:
    """A row for each of the review's headline numbers."""
    rows = list(FACT_SWEEP.run(runs, ("switch", "hash")))
    speed = [_speed_up(FACT_SWEEP.place(runs, size), "switch-64") for size in FACT_SWEEP.sizes]
    return headline_of(rows, speed, facts_figure_5(runs), residual())


def headline_of(
    rows: list[dict[str, Any]], speed: list[float | None], figure_5: Result, residuals: Result | None
) -> Result:
    """The same of runs that are there: how many times fewer draws Switch needs by size, figure 5, residual experts."""
    loss = {(row["router"], row["size"], row["experts"]): row["loss"] for row in rows}
    sizes = FACT_SWEEP.sizes
    switch = {
        size: [math.log(loss["switch", size, e] / loss["switch", size, 2 * e]) for e in (2, 4, 8, 16, 32)]
        for size in sizes
    }
    last = {size: gains[-1] for size, gains in switch.items()}
    first = {size: gains[0] for size, gains in switch.items()}
    gains = all(gain > 0 for gain in first.values())
    two = [loss[router, size, 2] < loss["dense", size, 1] for router in ("switch", "hash") for size in sizes]
    known = [value for value in speed if value is not None]
    claims = [
        Row(
            "Switch's gain from doubling the experts diminishes at 256 and more",
            "at 256",
            "doubling 32 to 64 gives "
            + ", ".join(f"{last[size] / first[size]:.2f}" for size in sizes)
            + " times what doubling 2 to 4 gives, by size"
            if gains
            else "doubling 2 to 4 does not gain at every size, which could diminish",
            judge(False, direction=gains and all(last[size] < first[size] for size in sizes)),
            "at this size it does so before" if gains else "",
        ),
        Row(
            "training to a dense model's loss with Switch, against that dense model",
            "4 to 7 times faster (wall-clock)",
            ", ".join("not reached" if value is None else f"{value:.2f}" for value in speed)
            + " times fewer draws, 64 experts, by size",
            judge(
                bool(known) and len(known) == len(sizes) and min(known) >= 4, direction=bool(known) and min(known) > 1
            ),
            "counted in draws at equal computing, to the first look at the loss that reaches it, not in seconds",
        ),
        Row(
            "as few as two experts help",
            "2",
            f"{sum(two)} of {len(two)} pairs of router and size",
            judge(all(two), direction=sum(two) > len(two) / 2),
        ),
    ]
    claims += [calibrated(figure_5), *counted(), fewer_operations()]
    what, paper = "residual mixture of experts (Wu et al. 2022)", "30 % less training"
    claims.append(
        replace(residuals.rows[0], what=what, paper=paper)
        if residuals
        else Row(what, paper, "", NOT_RUN, "`shunter reproduce residual` trains one")
    )
    claims += [Row(what, paper, "", IMPOSSIBLE, why) for what, paper, why in _QUOTED]
    return Result("headline", claims, {"runs": short(rows), "speed": speed}, seconds_of(rows))


def _speed_up(run: Path, name: str) -> float | None:
    """The draws of the dense model over those after which another has its last training loss; None if never."""
    metrics = Metrics(run / "metrics.jsonl")
    dense, mine = ([line for line in metrics.lines(which) if line["kind"] == "train"] for which in ("dense", name))
    reached = [line["tokens"] for line in mine if line["loss"] <= dense[-1]["loss"]]
    return dense[-1]["tokens"] / reached[0] if reached else None
