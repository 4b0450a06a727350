"""From the folder of a training run to one self-contained HTML page, or a picture: losses, costs, experts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...durable import write, writing
from ...errors import UserError
from ...metrics import DEAD_BELOW
from .. import information
from ..ledger import TRAINING_FLOPS
from ..runs import MODELS, ModelSummary, Run, Summary, Words, read_run
from . import heat_maps, html, run_figures
from .exhibit_figures import exhibit
from .style import PAPER, THEME, style

__all__ = ["mutual_information", "write_picture", "write_report"]


def write_report(run: Path) -> Path:
    """Writes report.html into the run folder `run` and returns its path.

    The page needs no network and no script. Runs that are still training or were killed get what they have so far.
    Raises `UserError` where there is nothing to show or a file does not follow its schema.
    """
    content = read_run(run)
    with style(THEME):
        text = html.environment().get_template("report.html.jinja").render(_page(content))
    target = content.path / "report.html"
    write(target, text)
    return target


def write_picture(run: Path, path: Path) -> Path:
    """Writes the result of the run folder `run` as a PNG at `path`: loss of both models, and the gain by domain.

    Raises `UserError` where the two models have not both been evaluated yet.
    """
    content = read_run(run)
    if not content.scored_domains:
        raise UserError(f"{content.path} has no domain on which both models were evaluated: nothing to compare yet.")
    with style(PAPER), writing(path) as part:
        run_figures.picture(content).savefig(part, format="png", metadata={"Software": None})
    return path


def mutual_information(share: NDArray[np.float64]) -> float:
    """Mutual information of domain and expert in bits, the domains taken as equally frequent.

    `share` (D, E) is of each domain's tokens the share that each expert takes. 0 where every domain uses the experts
    alike; at most log2(min(D, E)), where the expert tells the domain. Domains without tokens are left out.
    """
    share = share[share.sum(axis=1) > 0]
    if not len(share):
        return 0.0
    return information.mutual_information(torch.from_numpy(share / share.sum(axis=1, keepdims=True)))


def _page(run: Run) -> dict[str, Any]:
    experts = {load.share.shape[1] for load in run.loads.values()} or {len(row.load) for row in run.layers.values()}
    return {
        "name": run.path.resolve().name,
        "words": run.words,
        "run": run,
        "summary": run.summary,
        "finite": run.summary is not None and math.isfinite(run.summary.gain),
        "costs": _costs(run.summary, run.words) if run.summary else [],
        "compute_gap": _compute_gap(run.summary) if run.summary else 0.0,
        "experts": " or ".join(map(str, sorted(experts))),
        "routing": _routing(run),
        "routers": run.summary.routers if run.summary else {},
        "losses": _loss_figures(run),
        "domains": _domain_rows(run),
        "domain_figure": _domain_figure(run),
        "loads": _load_figures(run),
        "dead": sum(len(load.dead) for load in run.loads.values()),
        "specialisation": _specialisation(run),
        "exhibits": [exhibit(one, f"exhibit-{number}") for number, one in enumerate(run.exhibits)],
        "shown_layers": html.SHOWN_LAYERS,
        "dead_below": DEAD_BELOW,
        "training_flops": TRAINING_FLOPS,
    }


_DECIDES = {
    "tokens": "a learned router sends each {token} to a few experts",
    "experts": "each expert takes the {tokens} to which a learned router gives it the highest scores",
    "both": "{tokens} apply to experts by learned scores, and each expert takes the best that applied",
    "global": "all {tokens} of a batch are assigned to experts at once, by learned scores",
    "fixed": "a fixed rule, which learns nothing, sends each {token} to a few experts",
    "all": "every {token} takes all experts, weighed by a learned router",
    "slots": "each expert computes learned mixtures of all {tokens}",
}


def _routing(run: Run) -> str:
    """Who decides in how many of the sparse layers, in a sentence; before that is known, that a router does."""
    found = list(run.summary.routers.values()) if run.summary else []
    if not found:
        return f"A router decides which experts compute a {run.words.token}."
    parts = []
    for kind in dict.fromkeys(who.chooses for who in found):
        names = [who.router for who in found if who.chooses == kind]
        clause = _DECIDES.get(kind, "a router decides").format(token=run.words.token, tokens=run.words.tokens)
        where = "" if len(names) == len(found) else f"in {len(names)} of these layers "
        parts.append(f"{where}{clause} ({', '.join(dict.fromkeys(names))})")
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}."


def _domain_figure(run: Run) -> str | None:
    if not run.scored_domains:
        return None
    return html.svg(run_figures.domain_losses(run, THEME), "domains", f"Held-out loss by {run.words.domain}")


def _costs(summary: Summary, words: Words) -> list[dict[str, Any]]:
    """Rows of the cost table: label, what the number is, the formatting filter, and the value of each model."""
    rows = (
        ("Training time", "seconds", "fixed", lambda model: model.seconds),
        ("Training speed", f"{words.tokens}/s", "si", lambda model: model.tokens_per_second),
        ("Peak memory", "of the training process", "binary", lambda model: model.peak_rss_bytes),
        ("Parameters stored", "all experts", "si", lambda model: model.params_total),
        ("Parameters active", f"used by one {words.token}", "si", lambda model: model.params_active),
        (f"Compute per {words.token}", "FLOPs, forward pass", "si", lambda model: model.flops_per_token),
        ("Compute of training", "FLOPs", "si", lambda model: model.training_flops),
    )
    return [
        {"label": label, "unit": unit, "format": form, "dense": value(summary.dense), "sparse": value(summary.sparse)}
        for label, unit, form, value in rows
    ]


def _compute_gap(summary: Summary) -> float:
    """Sparse over dense FLOPs per token, less one."""
    dense, sparse = summary.dense.flops_per_token, summary.sparse.flops_per_token
    return sparse / dense - 1 if dense else math.nan


def _loss_figures(run: Run) -> list[dict[str, Any]]:
    if not run.train and not run.evals:
        return []
    one = dict.fromkeys(MODELS, 1.0)
    axes = [
        (
            "tokens",
            f"against {run.words.tokens}",
            run_figures.Axis(f"{run.words.tokens} read in training", "tokens", one),
        )
    ]
    if run.summary:
        models = {name: _model(run.summary, name) for name in MODELS}
        flops = {
            name: model.training_flops / model.tokens if model.tokens else math.nan for name, model in models.items()
        }
        if all(math.isfinite(value) for value in flops.values()):
            axes.append(("flops", "against compute", run_figures.Axis("training FLOPs", "tokens", flops)))
    axes.append(("seconds", "against time", run_figures.Axis("seconds of training", "seconds", one)))
    return [
        {"title": title, "svg": html.svg(run_figures.loss_curves(run, axis, THEME), f"loss-{key}", f"Loss {title}")}
        for key, title, axis in axes
    ]


def _model(summary: Summary, model: str) -> ModelSummary:
    return summary.dense if model == "dense" else summary.sparse


def _domain_rows(run: Run) -> list[dict[str, Any]]:
    rows = [(name, run.scores["dense"][name], run.scores["sparse"][name]) for name in run.scored_domains]
    return [
        {"name": name, "dense": dense, "sparse": sparse, "gain": dense.loss - sparse.loss}
        for name, dense, sparse in rows
    ]


def _load_figures(run: Run) -> dict[str, Any] | None:
    if not run.loads:
        return None
    scale = run_figures.load_scale(run.loads)
    bar = heat_maps.colour_bar(scale, "load of an expert, in even shares")
    layers = [
        {
            "name": layer,
            "balance": float(load.balance[-1]),
            "dead": load.dead,
            "svg": html.svg(
                run_figures.load_map(load, scale, THEME),
                f"load-{number}",
                f"Load of {load.share.shape[1]} experts of {layer} over training",
            ),
        }
        for number, (layer, load) in enumerate(run.loads.items())
    ]
    return {"key": html.svg(bar, "load-key", "Colour key of the load maps"), "layers": layers}


def _specialisation(run: Run) -> dict[str, Any] | None:
    if not run.layers or not run.domains:
        return None
    scale = heat_maps.domain_scale(len(run.domains))
    what, pieces = run.words.domain, run.words.tokens
    bar = heat_maps.colour_bar(scale, f"{what}'s part of an expert's {pieces}, in even shares")
    layers = []
    for number, (layer, row) in enumerate(run.layers.items()):
        mix = heat_maps.domain_mix(row.share)
        title = f"{run.words.domains.capitalize()} served by the {len(row.load)} experts of {layer}"
        layers.append(
            {
                "name": layer,
                "svg": html.svg(heat_maps.domain_map(row.share, run.domains, what), f"domain-{number}", title),
                "information": mutual_information(row.share),
                "at_most": math.log2(min(row.share.shape)),
                "experts": [
                    {
                        "load": float(row.load[expert]) * len(row.load),
                        "domain": run.domains[int(mix[:, expert].argmax())] if mix[:, expert].any() else None,
                        "domain_share": float(mix[:, expert].max()),
                        "tokens": tokens,
                    }
                    for expert, tokens in enumerate(row.tokens)
                ],
            }
        )
    told = any(tokens for row in run.layers.values() for tokens in row.tokens)
    key = html.svg(bar, "domain-key", f"Colour key of the {what} maps")
    return {"key": key, "layers": layers, "with_tokens": told}
