"""Texts with labels and models in, a sweep of fine-tunings out: a sparse model and its dense twin on one task.

Sparse models want other batches and rates than dense ones, may train a part alone, and may drop tokens in evaluation
that training kept (Fedus et al. 2022, section 7.2): each cell of the sweep is a fine-tuning from the same weights.
"""

from __future__ import annotations

import copy
import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from ..analysis.pages.style import PAPER
from ..data.documents import Domain
from ..environment import described, machine, run_versions
from ..errors import Diverged, UserError
from ..hf.observe.taps import taps
from ..moe import aux_loss, moe_layers, update_routers
from .fine_tuning import expert_dropout
from .roles import GROUPS, ROLES, parameter_groups, select

__all__ = ["Labelled", "labelled_windows", "markdown", "picture", "sweep"]


class Labelled:
    """Windows of token ids with a label each.

    Args:
        train: ids (N, L) int64 and labels (N,) to learn from.
        test: those that are held out, later parts of the same texts.
        names: of the labels.
    """

    def __init__(self, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], names: list[str]) -> None:
        self.train, self.test, self.names = train, test, names


def labelled_windows(domains: Sequence[Domain], tokenizer: Any, length: int, each: int) -> Labelled:
    """Windows of texts, labelled with their domain, or of a single domain with their language.

    Args:
        domains: the texts.
        tokenizer: of the models.
        length: tokens of a window.
        each: windows of a label; the last fifth of them is held out.

    Raises:
        UserError: where there are fewer than two labels with enough text.
    """
    texts: dict[str, list[str]] = {}
    for domain in domains:
        languages = (
            domain.languages if len(domains) == 1 and domain.languages else [domain.name] * len(domain.documents)
        )
        for text, label in zip(domain.documents, languages, strict=True):
            if label is not None:
                texts.setdefault(label, []).append(text)
    windows: dict[str, Tensor] = {}
    for label, documents in sorted(texts.items()):
        ids: list[int] = []
        for text in documents:
            ids += tokenizer(text, add_special_tokens=False)["input_ids"]
            if len(ids) >= length * each:
                break
        rows = torch.tensor(ids[: len(ids) // length * length][: length * each], dtype=torch.int64).reshape(-1, length)
        if len(rows) >= 10:
            windows[label] = rows
    if len(windows) < 2:
        raise UserError(
            f"finetune: {len(windows)} labels have ten windows of {length} tokens; give --data files or folders, each "
            "a label, or one with texts in several languages"
        )
    parts: list[list[Tensor]] = [[], [], [], []]
    for number, rows in enumerate(windows.values()):
        cut = len(rows) * 4 // 5
        for i, some in enumerate((rows[:cut], rows[cut:])):
            parts[2 * i].append(some)
            parts[2 * i + 1].append(torch.full((len(some),), number))
    joined = [torch.cat(part) for part in parts]
    return Labelled((joined[0], joined[1]), (joined[2], joined[3]), list(windows))


def sweep(
    models: dict[str, Any],
    data: Labelled,
    *,
    rates: Sequence[float] = (3e-4, 1e-3),
    batches: Sequence[int] = (16, 64),
    train: Sequence[str] = ("all", "non_moe", "moe"),
    capacities: Sequence[float] = (),
    dropout: float = 0.0,
    examples: int = 2048,
    seeds: Sequence[int] = (0,),
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Fine-tune each model with every rate and batch, and sparse ones with every part trained alone too.

    Args:
        models: name -> a model of transformers or of Shunter, with or without a head, which is not used: a linear map
            of the mean of the last hidden states classifies.
        data: what is learned and what is held out.
        rates: learning rates of AdamW.
        batches: examples of a step.
        train: roles or groups of `shunter.training.roles`; a dense model, which has no experts, trains "all".
        capacities: factors of the experts' capacity in evaluation to try besides the model's own, where its routers
            have a capacity.
        dropout: within experts.
        examples: how many are seen in all, whatever the batch.
        seeds: of the order of the examples; each cell is fine-tuned once with each, from the same weights.
        say: what is told of the progress, a line at a time.

    Returns:
        For JSON: `cells`, each with the model, rate, batch, what was trained, how many numbers that is, the held-out
        accuracy and loss, and the accuracy at other capacities: means over the seeds, with the standard deviations over
        them in `spread` and each seed's in `by_seed`; `labels`, `seeds`, `machine`, `versions`.

    Raises:
        UserError: for impossible numbers, or a role that a sparse model does not have, before the first fine-tuning.
    """
    if not rates or not batches:
        raise UserError(f"finetune: rates {list(rates)} and batches {list(batches)} must name one or more each")
    for name, values in (("rates", rates), ("batches", batches), ("capacities", capacities)):
        if not all(math.isfinite(value) and value > 0 for value in values):
            raise UserError(f"finetune: {name} {list(values)} must be numbers above 0")
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"finetune: seeds {list(seeds)} must be one or more, and different")
    for words in train:
        for word in words.split(","):
            if word.strip().removeprefix("-") not in (*ROLES, *GROUPS):
                raise UserError(f"finetune: {word!r} is neither a role nor a group: {', '.join((*ROLES, *GROUPS))}")
        for model in models.values():
            if taps(model):
                select(model.base_model, words)
    cells = []
    for name, model in models.items():
        sparse = bool(taps(model))
        for part, rate, batch in itertools.product(train if sparse else ["all"], rates, batches):
            found = [
                _fine_tuned(copy.deepcopy(model), data, part, rate, batch, capacities, dropout, examples, seed)
                for seed in seeds
            ]
            cell = {"model": name, "train": part, "rate": rate, "batch": batch, **_over_seeds(found)}
            say(f"{name}, {part}, rate {rate:g}, batch {batch}: accuracy {_with_spread(cell, 'accuracy')}")
            cells.append(cell)
    return {
        "cells": cells,
        "labels": data.names,
        "examples": examples,
        "held_out": len(data.test[1]),
        "dropout": dropout,
        "seeds": list(seeds),
        "machine": machine(),
        "versions": run_versions(),
    }


def _over_seeds(found: list[dict[str, Any]]) -> dict[str, Any]:
    """A cell of means, with standard deviations over the seeds where there are several."""
    cell = dict(found[0])
    for key in ("accuracy", "loss"):
        cell[key] = statistics.fmean(one[key] for one in found)
    cell["at_capacity"] = {c: statistics.fmean(one["at_capacity"][c] for one in found) for c in cell["at_capacity"]}
    if len(found) > 1:
        cell["spread"] = {key: statistics.stdev(one[key] for one in found) for key in ("accuracy", "loss")}
        cell["by_seed"] = [{key: one[key] for key in ("accuracy", "loss", "at_capacity")} for one in found]
    return cell


def _with_spread(cell: dict[str, Any], key: str) -> str:
    spread = cell.get("spread")
    return f"{cell[key]:.4f}" + (f" ± {spread[key]:.4f}" if spread else "")


def _fine_tuned(
    model: Any,
    data: Labelled,
    part: str,
    rate: float,
    batch: int,
    capacities: Sequence[float],
    dropout: float,
    examples: int,
    seed: int,
) -> dict[str, Any]:
    torch.manual_seed(seed)
    body = model.base_model.float()
    if dropout and taps(body):
        expert_dropout(body, dropout)
    width = body.config.get_text_config().hidden_size
    head = nn.Linear(width, len(data.names))
    nn.init.zeros_(head.weight)
    groups = parameter_groups(body, rate, part)
    sizes = sum(p.numel() for group in groups for p in group["params"])
    groups = [*groups, {"params": list(head.parameters()), "lr": rate}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    own = bool(moe_layers(body))
    body.train()
    ids, labels = data.train
    steps = max(1, examples // batch)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        chosen = torch.randint(len(ids), (batch,), generator=generator)
        loss = F.cross_entropy(_logits(body, head, ids[chosen]), labels[chosen])
        total = loss + aux_loss(body) if own else loss
        if not bool(total.isfinite()):
            raise Diverged(
                f"finetune: the loss of step {step + 1} is not finite; leave out the rate {rate:g}", since=step
            )
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_([*body.parameters(), *head.parameters()], 1.0)
        for group in optimizer.param_groups:  # a linear fall to a tenth
            group.setdefault("initial_lr", group["lr"])
            group["lr"] = group["initial_lr"] * (1 - 0.9 * step / steps)
        optimizer.step()
        if own:
            update_routers(body)
    body.eval()
    found: dict[str, Any] = {"trained": sizes, **_measured(body, head, data), "at_capacity": {}}
    deciders = [layer.decider.innermost for layer in moe_layers(body).values()]
    limited = [router for router in deciders if router.capacity_factor is not None]
    for factor in capacities if limited else ():
        for router in limited:
            router.eval_capacity_factor = factor
        found["at_capacity"][f"{factor:g}"] = _measured(body, head, data)["accuracy"]
    return found


def _logits(body: Any, head: nn.Linear, ids: Tensor) -> Tensor:
    out: Tensor = head(body(input_ids=ids).last_hidden_state.float().mean(1))
    return out


@torch.no_grad()
def _measured(body: Any, head: nn.Linear, data: Labelled) -> dict[str, float]:
    """Accuracy and loss on what is held out, in parts of 64."""
    ids, labels = data.test
    logits = torch.cat([_logits(body, head, ids[i : i + 64]) for i in range(0, len(ids), 64)])
    right = (logits.argmax(-1) == labels).double().mean()
    return {"accuracy": float(right), "loss": float(F.cross_entropy(logits, labels))}


def markdown(found: dict[str, Any]) -> str:
    """What a sweep found, as a page: every cell, the best of each model first."""
    cells = sorted(found["cells"], key=lambda cell: (cell["model"], -cell["accuracy"]))
    capacities = list(dict.fromkeys(c for cell in cells for c in cell["at_capacity"]))
    lines = [
        "# Fine-tuning a sparse model and its dense twin",
        "",
        f"{described(found)}. {len(found['labels'])} labels, {found['held_out']} held-out windows; each cell sees "
        f"{found['examples']} examples, whatever its batch.",
        "",
        "| model | trained | numbers | rate | batch | accuracy | loss |" + "".join(f" at {c} |" for c in capacities),
        "|---|---|---:|---:|---:|---:|---:|" + "---:|" * len(capacities),
    ]
    for cell in cells:
        others = "".join(f" {cell['at_capacity'][c]:.4f} |" if c in cell["at_capacity"] else " |" for c in capacities)
        lines.append(
            f"| {cell['model']} | {cell['train']} | {cell['trained']:,} | {cell['rate']:g} | {cell['batch']} | "
            f"{_with_spread(cell, 'accuracy')} | {_with_spread(cell, 'loss')} |{others}"
        )
    if capacities:
        lines += ["", "At c: the accuracy with the capacity factor c in evaluation."]
    best = {name: next(cell for cell in cells if cell["model"] == name) for name in {c["model"] for c in cells}}
    if len(found["seeds"]) > 1:
        seeds = ", ".join(map(str, found["seeds"]))
        lines += [
            "",
            f"Means over the seeds {seeds}; ± is the standard deviation over them. {_difference(best)}".strip(),
        ]
    share = max(cell["accuracy"] for cell in cells)
    error = (share * (1 - share) / found["held_out"]) ** 0.5
    lines += [
        "",
        f"An accuracy of {share:.2f} on {found['held_out']} windows has itself a standard error of {error:.3f}.",
    ]
    return "\n".join([*lines, ""])


def _difference(best: dict[str, dict[str, Any]]) -> str:
    """By how much the best cell of the sparse model beats that of the dense one, over pairs of seeds, in words."""
    if best.keys() < {"sparse", "dense"}:
        return ""
    pairs = zip(best["sparse"]["by_seed"], best["dense"]["by_seed"], strict=True)
    gains = [sparse["accuracy"] - dense["accuracy"] for sparse, dense in pairs]
    gain = f"{statistics.fmean(gains):+.4f} ± {statistics.stdev(gains):.4f}"
    return f"The accuracy of the best sparse cell minus that of the best dense one is {gain}, over pairs of one seed."


def picture(found: dict[str, Any]) -> Figure:
    """Accuracy by learning rate, a line for each batch and part trained; dense models dashed; bars over the seeds."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    lines: dict[tuple[str, str, int], list[tuple[float, float, float]]] = {}
    for cell in found["cells"]:
        key = (cell["model"], cell["train"], cell["batch"])
        lines.setdefault(key, []).append((cell["rate"], cell["accuracy"], cell.get("spread", {}).get("accuracy", 0.0)))
    for i, ((model, part, batch), points) in enumerate(sorted(lines.items())):
        rates, values, spreads = zip(*sorted(points), strict=True)
        dense = model == "dense"
        axes.errorbar(
            rates,
            values,
            spreads if any(spreads) else None,
            capsize=2,
            linewidth=1,
            marker="os^Dvx"[i % 6],
            markersize=5,
            color=PAPER.dense if dense else PAPER.sparse,
            linestyle="--" if dense else ("-", "-.", ":")[i % 3],
            label=f"{model}, {part}, batch {batch}",
        )
    rates_shown = sorted({cell["rate"] for cell in found["cells"]})
    axes.set_xscale("log")
    axes.set_xticks(rates_shown, [f"{rate:g}" for rate in rates_shown])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("learning rate")
    axes.set_ylabel("held-out accuracy")
    figure.legend(loc="outside right upper", fontsize=7)
    return figure
