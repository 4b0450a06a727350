"""Section 9: a language model with a store of its own states against experts, at equal bytes and equal computing."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from torch import Tensor
from transformers import PreTrainedModel

from ..analysis.neighbours import Datastore, best_mixture, mixed_loss, neighbour_probability
from ..analysis.pages.style import PAPER
from ..data.windows import TextData
from ..durable import sealed
from ..errors import UserError
from ..recipes.run import account, begin, load_model, train_one
from ..recipes.text import EVAL_BATCH, RECIPE, TextConfig, TextSparse
from .results import Result, Row, judge

__all__ = ["States", "draw_retrieval", "measure", "retrieval", "states", "wider"]

CELLS, PROBES, CODE_BYTES, NEIGHBOURS = 1024, 16, 16, 128
SMALL = 16  # the smallest store has 1 / SMALL of all states
_PERPLEXITY = "perplexity 18.65 without, 16.12 with (Wikitext-103)"


@dataclass(frozen=True)
class States:
    """What a model makes of windows, a row for each predicted token.

    Args:
        keys: (n, d) float32, what the last feed-forward block receives.
        targets: (n,) int64, the token that follows.
        probability: (n,) float64, that the model gives it.
        window: (n,) int64, of which window it is.
    """

    keys: Tensor
    targets: Tensor
    probability: Tensor
    window: Tensor

    def of(self, chosen: Tensor) -> States:
        """Those of a mask or of indices."""
        return States(self.keys[chosen], self.targets[chosen], self.probability[chosen], self.window[chosen])


@torch.no_grad()
def states(model: PreTrainedModel, windows: Tensor) -> States:
    """What a decoder makes of windows (N, L) of tokens.

    The keys are those that Khandelwal et al. 2020 found best (section 5): the input of the last layer's feed-forward
    block, after the norm.
    """
    block: Any = model.get_decoder().layers[-1].mlp
    seen: list[Tensor] = []
    hook = block.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    keys, targets, probability = [], [], []
    try:
        for ids in windows.split(EVAL_BATCH):
            logits = model(input_ids=ids).logits[:, :-1]
            keys.append(seen.pop()[:, :-1].flatten(0, 1).float())
            targets.append(ids[:, 1:].flatten())
            chosen = logits.float().log_softmax(-1).gather(-1, ids[:, 1:, None])
            probability.append(chosen.double().exp().flatten())
    finally:
        hook.remove()
    window = torch.arange(len(windows)).repeat_interleave(windows.shape[1] - 1)
    return States(torch.cat(keys), torch.cat(targets), torch.cat(probability), window)


def wider(config: TextConfig, flops: float) -> TextConfig:
    """The configuration whose dense model computes so many FLOPs more for each token, in its feed-forward blocks."""
    m = config.model
    return config.model_copy(
        update={"model": m.model_copy(update={"hidden": m.hidden + round(flops / (6 * m.dim * m.layers))})}
    )


def _read_in_training(data: TextData) -> Tensor:
    """The windows (N, L) that training reads, each once, in the order in which they first come."""
    found = dict[bytes, Tensor]()
    for i in range(len(data.train)):  # type: ignore[arg-type]
        ids = data.train[i]["input_ids"]
        found.setdefault(ids.numpy().tobytes(), ids)
    return torch.stack(list(found.values()))


def _trained(folder: Path, config: TextConfig) -> tuple[dict[str, dict[str, Any]], TextData]:
    """Both models of a run, trained where they are not yet: what they reached and cost."""
    with begin(
        RECIPE, config, folder, dict.fromkeys(("dense", "sparse"), config), resume=sealed(folder), as_json=False
    ) as begun:
        found = {name: account(begun, name, train_one(begun, name)).as_json() for name in begun.configs}
        return found, begun.data


def _size(model: PreTrainedModel) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _store(keys: Tensor, tokens: Tensor) -> Datastore:
    return Datastore(keys, tokens, CELLS, PROBES, CODE_BYTES)


def _entries(room: int, dim: int) -> int:
    """How many entries a store of so many bytes has."""
    centroids = 4 * dim * (CELLS + 256)
    return max(0, room - centroids - 16 * CELLS - 1024) // (CODE_BYTES + 8)


@dataclass(frozen=True)
class _Measured:
    """A model with a store, or without: what it takes, and its loss by window (W,), the windows in the same order."""

    entries: int
    num_bytes: int
    flops: float
    share: float
    temperature: float
    losses: Tensor

    def as_json(self) -> dict[str, float]:
        numbers = {name: getattr(self, name) for name in ("entries", "num_bytes", "flops", "share", "temperature")}
        return numbers | {"loss": float(self.losses.mean())}


def _by_window(losses: Tensor, window: Tensor) -> Tensor:
    return losses.reshape(len(window.unique()), -1).mean(1)


def measure(
    learned: States, choose: States, report: States, sizes: list[int], num_bytes: int, flops: float
) -> list[_Measured]:
    """A model without a store, and with one of each size.

    Args:
        learned: of the training text, of which the store has the first.
        choose: on which share and temperature are chosen.
        report: on which the loss is.
        sizes: entries.
        num_bytes, flops: of the model alone.
    """
    alone = _by_window(-report.probability.log(), report.window)
    found = [_Measured(0, num_bytes, flops, 0.0, 1.0, alone)]
    for size in sizes:
        store = _store(learned.keys[:size], learned.targets[:size])
        distances, tokens = store.search(choose.keys, NEIGHBOURS)
        share, temperature = best_mixture(choose.probability, distances, tokens, choose.targets)
        distances, tokens = store.search(report.keys, NEIGHBOURS)
        neighbours = neighbour_probability(distances, tokens, report.targets, temperature)
        losses = _by_window(mixed_loss(report.probability, neighbours, share), report.window)
        cost = flops + store.flops_per_query(report.keys)
        found.append(_Measured(size, num_bytes + store.num_bytes, cost, share, temperature, losses))
        print(f"{size:,} states: loss {float(losses.mean()):.4f}, share {share:.2f}", file=sys.stderr)
    return found


def retrieval(runs: Path, config: TextConfig | None = None) -> Result:
    """Dense and sparse, with a store of their states and without; and both wider, as much computing as the search.

    Args:
        runs: the folder of training runs.
        config: of the models; None for that of `shunter train text`.

    Raises:
        UserError: where training reads fewer tokens than the store has cells.
    """
    config = config or TextConfig(sparse=TextSparse(num_experts=24, router="topk"))
    folder = runs / "retrieval"
    trained, data = _trained(folder / "as-trained", config)
    began = time.monotonic()
    held_out = torch.cat([domain.input_ids for domain in data.eval])
    place = torch.cat([torch.arange(len(domain.input_ids)) >= len(domain.input_ids) // 2 for domain in data.eval])
    windows = _read_in_training(data)
    total = windows.numel() - len(windows)
    if total < CELLS:
        raise UserError(f"retrieval: a store has at least {CELLS:,} states, and training reads {total:,}; train longer")
    models = {name: load_model(folder / "as-trained", name) for name in trained}
    size = {name: _size(model) for name, model in models.items()}
    extra, dim = size["sparse"] - size["dense"], config.model.dim
    # Entries with which the dense model takes what the sparse does, and the sparse one what the dense does with all.
    same, fewer = min(total, _entries(extra, dim)), max(0, total - -(-extra // (CODE_BYTES + 8)))
    sizes = {"dense": {total // SMALL, same, total}, "sparse": {total // SMALL, fewer, total}}
    measured = dict[str, dict[int, _Measured]]()
    for name, model in models.items():
        learned, seen = states(model, windows), states(model, held_out)
        chosen = place[seen.window]
        found = measure(
            learned,
            seen.of(~chosen),
            seen.of(chosen),
            sorted(count for count in sizes[name] if count >= CELLS),
            size[name],
            trained[name]["flops_per_token"],
        )
        measured[name] = {one.entries: one for one in found}
        del learned
    dense, sparse = measured["dense"], measured["sparse"]
    search = dense[total].flops - dense[0].flops
    searched = time.monotonic() - began
    broad = wider(config, search)
    run = folder / f"wider-{broad.model.hidden}"
    costs, _ = _trained(run, broad)
    for name in costs:
        model = load_model(run, name)
        report = states(model, held_out[place])
        losses = _by_window(-report.probability.log(), report.window)
        measured[f"wider {name}"] = {0: _Measured(0, _size(model), costs[name]["flops_per_token"], 0.0, 1.0, losses)}
    claims = [
        _claim("neighbours lower the loss of the dense model", _PERPLEXITY, dense[total], dense[0]),
        _claim("neighbours lower the loss of the sparse model", _OPEN, sparse[total], sparse[0]),
    ]
    if same in dense:
        claims.append(
            _claim("at equal bytes, experts are better than neighbours", _OPEN, sparse[0], dense[same], _megabytes)
        )
    if fewer in sparse:
        claims.append(
            _claim(
                "at equal bytes, experts and neighbours are better than more neighbours alone",
                _OPEN,
                sparse[fewer],
                dense[total],
                _megabytes,
            )
        )
    broad_dense, broad_sparse = (measured[f"wider {name}"][0] for name in ("dense", "sparse"))
    claims += [
        _claim(
            "at equal computing, wider experts are better than neighbours", _OPEN, broad_sparse, dense[total], _flops
        ),
        _claim(
            "at equal computing, neighbours are better than a wider dense model",
            _OPEN,
            dense[total],
            broad_dense,
            _flops,
        ),
        _claim(
            "at equal computing, experts and neighbours are better than wider experts",
            _OPEN,
            sparse[total],
            broad_sparse,
            _flops,
        ),
        _adds(dense, sparse, total),
    ]
    first = trained["sparse"]
    notes = [
        f"The models are those of `shunter train text`: width {dim}, {config.sparse.num_experts} experts, "
        f"{first['tokens']:,} tokens of training. The store holds what each model’s last feed-forward block received "
        f"at {total:,} places of that text, and the token that followed (Khandelwal et al. 2020): {CODE_BYTES} bytes "
        f"by product quantisation and 8 for the token, in {CELLS:,} cells of which {PROBES} are searched for "
        f"{NEIGHBOURS} neighbours. A smaller store holds the first of them in the order of training.",
        f"λ and temperature are chosen on the first half of the held-out windows of each domain, and the losses are "
        f"of the other {int(place.sum())} windows; a difference is taken where it is more than two standard errors "
        "of its mean over windows, from one run of one seed. “Same direction”: the difference is as the claim has it, "
        "and less than that.",
        "Bytes are float32 parameters and the store as a file. Computing is the forward pass of a token, and of the "
        "search the distances to centroids and codes and the additions for each key that is looked at. The wider "
        f"models have feed-forward blocks of {broad.model.hidden} in place of {config.model.hidden}. The review leaves "
        "open how retrieval and experts compare: “reproduced” says of such a claim that it holds here.",
    ]
    shown = {name: [one.as_json() for one in found.values()] for name, found in measured.items()}
    seconds = math.fsum([searched, *(one["seconds"] for one in (*trained.values(), *costs.values()))])
    return Result("retrieval", claims, {"models": shown}, seconds, notes)


_OPEN = "an open question"


def _megabytes(one: _Measured) -> str:
    return f"{one.num_bytes / 1e6:.1f} MB"


def _flops(one: _Measured) -> str:
    return f"{one.flops / 1e6:.2f} MFLOP a token"


def _claim(what: str, paper: str, better: _Measured, worse: _Measured, cost: Any = None) -> Row:
    """That one loses less than another on the same windows."""
    gain = worse.losses - better.losses
    mean, error = float(gain.mean()), float(gain.std() / math.sqrt(len(gain)))
    losses = [f"{float(one.losses.mean()):.3f}" + (f" with {cost(one)}" if cost else "") for one in (better, worse)]
    return Row(
        what,
        paper,
        f"loss {losses[0]}, against {losses[1]}: {abs(mean):.3f} {'less' if mean > 0 else 'more'}, standard error "
        f"{error:.3f}",
        judge(mean > 2 * error, direction=mean > 0),
    )


def _adds(dense: dict[int, _Measured], sparse: dict[int, _Measured], total: int) -> Row:
    """How much of the sum of both gains both have together."""
    start = dense[0].losses
    alone = [float((start - one.losses).mean()) for one in (dense[total], sparse[0])]
    both = float((start - sparse[total].losses).mean())
    least, most = max(alone), sum(alone)
    return Row(
        "the gains of neighbours and of experts add up",
        _OPEN,
        f"{alone[0]:.3f} nats by neighbours, {alone[1]:.3f} by experts, {both:.3f} by both: "
        f"{both / most:.2f} of the sum",
        judge(both > 0.9 * most, direction=both > least),
    )


def draw_retrieval(data: dict[str, Any]) -> Figure:
    """Loss against bytes and against computing; a line from each model alone to its largest store."""
    figure = Figure(figsize=(8.4, 3.4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (key, unit) in zip(panels, {"num_bytes": 1e6, "flops": 1e6}.items(), strict=True):
        for name, points in data["models"].items():
            colour = PAPER.of(name.removeprefix("wider "))
            line = [(point[key] / unit, point["loss"]) for point in sorted(points, key=lambda p: p["entries"])]
            if name.startswith("wider"):
                axes.plot(*line[0], "D", color=colour, markerfacecolor="none", label=f"{name}, no store")
            else:
                axes.plot(*zip(*line[1:], strict=True), "o", color=colour, label=f"{name} with neighbours")
                axes.plot(*zip(*line, strict=True), "-", color=colour, linewidth=1)
                axes.plot(*line[0], "s", color=colour, label=name)
    panels[0].set_xscale("log")
    panels[0].xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panels[0].xaxis.set_minor_locator(NullLocator())
    panels[0].xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panels[0].set_xlabel("megabytes of parameters and store")
    panels[1].set_xlabel("MFLOP a token, forward, with the search")
    panels[0].set_ylabel("held-out loss (nats/token)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper")
    return figure
