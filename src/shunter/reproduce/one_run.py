"""Sections 5.2, 4.1 and 7.1: experts that come in mid-run (split, upcycled, residual); updates that are undone."""

from __future__ import annotations

from typing import Any

import torch
from matplotlib.figure import Figure

from ..analysis.ledger import TRAINING_FLOPS, ledger
from ..analysis.pages.style import PAPER
from ..hf.sparsifying import sparsify
from ..moe import MoE, moe_layers
from ..training.growing import losses_by_expert, split_expert, token_losses, upcycle_in_training
from ..training.guards import GuardedLoop
from .results import Result, Row, judge
from .small_text import BATCH, LENGTH, dense_model, held_out_loss, logits_of, step, windows

__all__ = [
    "dense_then_sparse",
    "draw_dense_then_sparse",
    "draw_growing",
    "draw_guards",
    "growing",
    "guards",
    "residual",
]

RATE = 3e-3
EVERY = 25  # steps between two looks at the held-out loss
DOMAINS = ("english", "code", "languages")


def _adam(model: torch.nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), RATE)


def growing(steps: int = 150) -> Result:
    """Domains one after the other: a small model, one that splits an expert of each layer per domain, a large one."""
    torch.set_num_threads(1)
    parts = [windows(steps, [domain]) for domain in DOMAINS]
    held_out = torch.cat([rest for _, rest in parts])
    curves: dict[str, list[float]] = {}
    for name, experts in {"two experts": 2, "growing": 2, "four experts": 4}.items():
        model = sparsify(dense_model(), experts, "topk", top_k=1, renormalize="no", load_balancing_loss=0.01)
        optimizer, curve = _adam(model), []
        jump = 0.0
        for number, (batches, _) in enumerate(parts):
            if name == "growing" and number:
                jump = max(jump, _split_worst(model, optimizer, batches[0]))
            for i, ids in enumerate(batches):
                step(model, optimizer, ids)
                if (i + 1) % EVERY == 0:
                    curve.append(held_out_loss(model, held_out))
        curves[name] = curve
        if name == "growing":
            kept, counts = jump, [layer.num_experts for layer in moe_layers(model).values()]
    small, grown, large = (curves[name][-1] for name in ("two experts", "growing", "four experts"))
    rows = [
        Row(
            "a split keeps the function",
            "the new expert is a copy",
            f"logits move by {kept:.1e} at most",
            judge(kept < 1e-4),
        ),
        Row(
            "a model that grows when data arrive ends better than one that stays small",
            "it does (Caccia et al. 2021)",
            f"{grown:.3f} nats a byte with {counts[0]} experts in the end, {small:.3f} with two throughout",
            judge(grown < small - 0.01, direction=grown < small),
        ),
        Row(
            "and nearly as well as one that was large from the beginning",
            "at less computing",
            f"{grown:.3f} against {large:.3f}",
            judge(grown < large + 0.03, direction=grown < large + 0.1),
        ),
    ]
    notes = [
        f"A decoder of bytes of width 64 with two layers reads {', '.join(DOMAINS)} one after the other, {steps} steps "
        "each; the loss is that of held-out windows of all three. Of each layer the expert whose tokens lose most is "
        "split. One seed."
    ]
    data = {"every": EVERY, "steps": steps, "losses": curves}
    return Result("growing", rows, data, notes=notes)


def _split_worst(model: Any, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> float:
    """Split the expert of each layer whose tokens lose most; how far that moves the logits."""
    model.eval()
    with torch.no_grad():
        before = logits_of(model, ids)
        losses = token_losses(before, ids)
        for layer in moe_layers(model).values():
            assert isinstance(layer, MoE) and layer.routing is not None
            split_expert(layer, int(losses_by_expert(layer.routing, losses).nan_to_num(-torch.inf).argmax()), optimizer)
        return float((logits_of(model, ids) - before).abs().max())


def draw_growing(data: dict[str, Any]) -> Figure:
    """The held-out loss by step, with a line where a domain ends."""
    figure = _curves(data, "held-out loss of all domains (nats/byte)")
    for number in (1, 2):
        figure.axes[0].axvline(number * data["steps"], color=PAPER.ink, alpha=0.4, linewidth=0.8)
    return figure


def dense_then_sparse(steps: int = 300) -> Result:
    """A dense model, one that is sparse from scratch, and two that become sparse halfway, on the same batches."""
    torch.set_num_threads(1)
    batches, held_out = windows(steps)
    curves: dict[str, list[float]] = {}
    jumps: dict[str, float] = {}
    ways: dict[str, dict[str, Any] | None] = {
        "dense": None,
        "sparse from scratch": None,
        "upcycled halfway (Dua)": {"router": "topk", "top_k": 2},
        "upcycled halfway (EvoMoE)": {"router": "dense_to_sparse", "noise": 0.05},
    }
    for name, way in ways.items():
        model = dense_model()
        if name == "sparse from scratch":
            sparsify(model, 8, "topk", top_k=2)
        optimizer = _adam(model)
        curve = []
        for i, ids in enumerate(batches):
            if way is not None and i == steps // 2:
                model.eval()
                with torch.no_grad():
                    before = logits_of(model, ids)
                    upcycle_in_training(model, optimizer, 8, **way)
                    for layer in moe_layers(model).values():
                        layer.decider.expect_steps(steps - i)
                    jumps[name] = float((logits_of(model.eval(), ids) - before).abs().max())
            step(model, optimizer, ids)
            if (i + 1) % EVERY == 0:
                curve.append(held_out_loss(model, held_out))
        curves[name] = curve
    dense, scratch, dua, evo = (curves[name][-1] for name in ways)
    rows = [
        Row(
            "experts that are copies keep the function",
            "the dense network is copied into every expert (Dua et al. 2021)",
            f"logits move by {jumps['upcycled halfway (Dua)']:.1e} at most",
            judge(jumps["upcycled halfway (Dua)"] < 1e-4),
        ),
        Row(
            "dense, then experts, ends better than dense to the end",
            "it does",
            f"{dua:.3f} nats a byte, and {dense:.3f} dense",
            judge(dua < dense - 0.01, direction=dua < dense),
        ),
        Row(
            "and at least as well as experts from the beginning",
            "it does, for half of the steps",
            f"{dua:.3f}, and {scratch:.3f} sparse from scratch",
            judge(dua < scratch + 0.01),
        ),
        Row(
            "noisy copies whose gate goes from all experts to one end better than dense",
            "they do (EvoMoE, Nie et al. 2021)",
            f"{evo:.3f}, and {dense:.3f} dense",
            judge(evo < dense - 0.01, direction=evo < dense),
        ),
    ]
    notes = [
        f"Decoders of bytes of width 64 with two layers, {steps} steps, the same batches; halfway two of them get "
        "eight experts in each layer, with the optimizer's moments. A token then takes two experts as wide as the "
        "dense block, or as many as the gate still leaves, so that the second half costs more than the dense model's. "
        "One seed."
    ]
    return Result("dense-then-sparse", rows, {"every": EVERY, "steps": steps, "losses": curves}, notes=notes)


def draw_dense_then_sparse(data: dict[str, Any]) -> Figure:
    """The held-out loss by step, with a line where models become sparse."""
    figure = _curves(data, "held-out loss (nats/byte)")
    figure.axes[0].axvline(data["steps"] // 2, color=PAPER.ink, alpha=0.4, linewidth=0.8)
    return figure


def residual(steps: int = 300, share: float = 0.9) -> Result:
    """A dense model, one with experts from the beginning, and one whose experts are residuals of a dense core, late."""
    torch.set_num_threads(1)
    batches, held_out = windows(steps)
    found: dict[str, dict[str, float]] = {}
    first = {"dense": steps, "experts from the beginning": 0, "residuals of a dense core": round(share * steps)}
    for name, dense_steps in first.items():
        model = dense_model()
        optimizer, cost = _adam(model), 0.0
        for i, ids in enumerate(batches):
            if i == dense_steps:
                weights = "residual" if dense_steps else "separate"
                sparsify(
                    model, 8, "topk", top_k=2, expert_weights=weights, init="copy" if dense_steps else "scratch",
                    load_balancing_loss=0.01,
                )  # fmt: skip
                optimizer = _adam(model)
            step(model, optimizer, ids)
            if i in (0, dense_steps):
                flops = ledger(model, LENGTH).flops_per_token
            cost += flops
        found[name] = {"loss": held_out_loss(model, held_out), "flops": TRAINING_FLOPS * cost * BATCH * LENGTH}
    dense, scratch, late = (found[name] for name in first)
    less = 100 * (1 - late["flops"] / scratch["flops"])
    rows = [
        Row(
            "a dense core and then residuals are as good as experts from the beginning, for less training",
            "30 % less (Wu et al. 2022)",
            f"{late['loss']:.3f} nats a byte for {less:.0f} % less computing; {scratch['loss']:.3f} with experts from "
            f"the beginning, {dense['loss']:.3f} dense",
            judge(
                late["loss"] < scratch["loss"] + 0.01 and less >= 29.5,
                direction=late["loss"] < dense["loss"] and less > 0,
            ),
        )
    ]
    notes = [
        f"Decoders of bytes of width 64 with two layers, {steps} steps, the same batches; eight experts in each layer "
        f"as wide as the dense block, two for a token. Residuals come in the last {steps - round(share * steps)} "
        "steps, and are trained with the rest. Computing is counted, forward and backward. One seed."
    ]
    return Result("residual", rows, {"models": found}, notes=notes)


SPIKES = (90, 130)  # steps whose learning rate is a hundred times too high
BROKEN = (60, 110, 111)  # steps whose loss is not a number


def guards(steps: int = 250) -> Result:
    """The same training with planted trouble: as it comes, with updates skipped, and with rewinding too."""
    torch.set_num_threads(1)
    batches, held_out = windows(steps)
    curves: dict[str, list[float]] = {}
    seen: dict[str, list[float | None]] = {}
    said: dict[str, Any] = {}
    for name in ("no trouble", "no guard", "skips", "skips and rewinds"):
        model = sparsify(dense_model(), 8, "topk", top_k=2)
        optimizer = _adam(model)
        losses, curve = [], []
        rewinds = 3 if name == "skips and rewinds" else 0
        with GuardedLoop(model, optimizer, strikes=10, rewinds=rewinds, every=20, margin=3) as guard:
            for i, ids in enumerate(batches):
                trouble = name != "no trouble"
                model.train()
                loss = model(input_ids=ids, labels=ids).loss
                if trouble and i in BROKEN:
                    loss = loss * torch.nan
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                losses.append(float(loss.detach()))
                for group in optimizer.param_groups:
                    group["lr"] = RATE * (100 if trouble and i in SPIKES else 1)
                if name in ("no trouble", "no guard") or guard.admits(loss):
                    optimizer.step()
                optimizer.zero_grad()
                if (i + 1) % EVERY == 0:
                    curve.append(held_out_loss(model, held_out))
            said[name] = {"skipped": list(guard.skipped), "rewound": list(guard.rewound)}
        curves[name] = curve
        seen[name] = [value if value == value else None for value in losses]
    good, bad, skips, rewinds_too = (curves[name][-1] for name in curves)
    rows = [
        Row(
            "without a guard one update that is not finite ends the training",
            "instabilities end trainings",
            "every later loss is not a number" if bad != bad else f"{bad:.3f} nats a byte",
            judge(bad != bad),
        ),
        Row(
            "updates that are not finite are left out, and do no harm",
            "GLaM skips them",
            f"steps {', '.join(map(str, said['skips']['skipped']))} skipped; training goes on",
            judge(len(said["skips"]["skipped"]) == len(BROKEN) and skips == skips),
        ),
        Row(
            "going back to an earlier state takes a leap of the loss back",
            "GLaM restarts from an earlier checkpoint",
            f"{rewinds_too:.3f} nats a byte with {len(said['skips and rewinds']['rewound'])} rewinds, {skips:.3f} "
            f"without, {good:.3f} where nothing went wrong",
            judge(rewinds_too < skips and rewinds_too < good + 0.05, direction=rewinds_too < skips),
        ),
    ]
    notes = [
        f"A sparse decoder of bytes, {steps} steps. Planted: losses that are not a number at steps "
        f"{', '.join(str(i + 1) for i in BROKEN)}, and a learning rate a hundred times too high at steps "
        f"{', '.join(str(i + 1) for i in SPIKES)}. One seed."
    ]
    data = {
        "every": EVERY,
        "steps": steps,
        "losses": {name: [v if v == v else None for v in curve] for name, curve in curves.items()},
        "training": seen,
        "guard": said,
    }
    return Result("guards", rows, data, notes=notes)


def draw_guards(data: dict[str, Any]) -> Figure:
    """The training loss of each step."""
    figure = Figure(figsize=(5.4, 3.4), layout="constrained")
    axes = figure.add_subplot()
    for name, losses in data["training"].items():
        points = [(i + 1, value) for i, value in enumerate(losses) if value is not None]
        axes.plot(*zip(*points, strict=True), linewidth=0.9, label=name)
    axes.set_xlabel("step")
    axes.set_ylabel("training loss (nats/byte)")
    axes.legend()
    return figure


def _curves(data: dict[str, Any], label: str) -> Figure:
    figure = Figure(figsize=(5.4, 3.4), layout="constrained")
    axes = figure.add_subplot()
    for name, losses in data["losses"].items():
        axes.plot([data["every"] * (i + 1) for i in range(len(losses))], losses, label=name)
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.legend()
    return figure
