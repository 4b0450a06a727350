"""The numbers that the review quotes, each with what became of it here."""

from __future__ import annotations

import math
from pathlib import Path

from ..analysis.runs import Metrics
from .results import IMPOSSIBLE, NOT_RUN, Result, Row, judge
from .sweep import FACT_SWEEP

__all__ = ["headline"]

_LARGE = "it is of models that take hundreds of accelerators"
_GPUS = "it is a speed of accelerators"
_QUOTED = (
    ("inference of single examples, every layer sparse (Jaszczur et al. 2021)", "37 times faster", IMPOSSIBLE, _LARGE),
    ("inference with DeepSpeed-MoE (Rajbhandari et al. 2022)", "10 times faster", IMPOSSIBLE, _LARGE),
    ("translation by GShard, 600 billion parameters, 100 languages", "+13.5 BLEU on average", IMPOSSIBLE, _LARGE),
    ("pre-training of Switch-C", "4 times the speed of T5-XXL", IMPOSSIBLE, _LARGE),
    ("GLaM's inference against GPT-3's", "49 % fewer FLOPs a token", IMPOSSIBLE, _LARGE),
    ("GLaM's training against GPT-3's", "65 % less power", IMPOSSIBLE, _LARGE),
    ("BIG-bench, 161 JSON tasks", "about twice the computing in quality", IMPOSSIBLE, _LARGE),
    ("Sparse Mixer against BERT", "89 % faster in training, 98 % in inference", NOT_RUN, ""),
    ("ST-MoE against PaLM-540B on SuperGLUE", "20 times less pre-training, 40 times inference", IMPOSSIBLE, _LARGE),
    ("residual mixture of experts (Wu et al. 2022)", "30 % less training", NOT_RUN, ""),
    ("Tutel's Swin-V2-MoE", "1.5 to 2 times faster", IMPOSSIBLE, _GPUS),
    ("distilled DeepSpeed-MoE", "7.3 times lower latency", IMPOSSIBLE, _LARGE),
    ("the best few-shot and fine-tuned models", "at most 64 large experts a layer", IMPOSSIBLE, _LARGE),
)


def headline(runs: Path) -> Result:
    """A row for each of the review's headline numbers."""
    rows = list(FACT_SWEEP.run(runs, ("switch", "hash")))
    loss = {(row["router"], row["size"], row["experts"]): row["loss"] for row in rows}
    sizes = FACT_SWEEP.sizes
    switch = {
        size: [math.log(loss["switch", size, e] / loss["switch", size, 2 * e]) for e in (2, 4, 8, 16, 32)]
        for size in sizes
    }
    last = {size: gains[-1] for size, gains in switch.items()}
    first = {size: gains[0] for size, gains in switch.items()}
    two = [loss[router, size, 2] < loss["dense", size, 1] for router in ("switch", "hash") for size in sizes]
    speed = {size: _speed_up(FACT_SWEEP.place(runs, size), "switch-64") for size in sizes}
    known = [value for value in speed.values() if value is not None]
    claims = [
        Row(
            "Switch's gain from doubling the experts diminishes at 256 and more",
            "at 256",
            "doubling 32 to 64 gives "
            + ", ".join(f"{last[size] / first[size]:.2f}" for size in sizes)
            + " times what doubling 2 to 4 gives, by size",
            judge(False, direction=all(last[size] < first[size] for size in sizes)),
            "at this size it does so before",
        ),
        Row(
            "training to a dense model's loss with Switch, against that dense model",
            "4 to 7 times faster (wall-clock)",
            ", ".join("not reached" if value is None else f"{value:.2f}" for value in speed.values())
            + " times fewer draws, 64 experts, by size",
            judge(
                bool(known) and len(known) == len(sizes) and min(known) >= 4, direction=bool(known) and min(known) > 1
            ),
            "counted in draws at equal computing, not in seconds",
        ),
        Row(
            "as few as two experts help",
            "2",
            f"{sum(two)} of {len(two)} pairs of router and size",
            judge(all(two), direction=sum(two) > len(two) / 2),
        ),
    ]
    claims += [Row(what, paper, "", verdict, why) for what, paper, verdict, why in _QUOTED]
    return Result("headline", claims, {}, math.fsum(row["seconds"] for row in rows))


def _speed_up(run: Path, name: str) -> float | None:
    """The draws of the dense model over those after which another has its last training loss; None if never."""
    metrics = Metrics(run / "metrics.jsonl")
    dense, mine = ([line for line in metrics.lines(which) if line["kind"] == "train"] for which in ("dense", name))
    reached = [line["tokens"] for line in mine if line["loss"] <= dense[-1]["loss"]]
    return dense[-1]["tokens"] / reached[0] if reached else None
