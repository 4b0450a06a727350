"""The findings of an inspection as one self-contained HTML page."""

from __future__ import annotations

from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.colors import Normalize
from numpy.typing import NDArray
from torch import Tensor

from ...metrics import DEAD_BELOW
from . import heat_maps, html, inspect_figures
from .style import THEME, style

__all__ = ["render"]

LABELS = {
    "token": "the token itself",
    "previous": "the token before",
    "kind": "the kind of token",
    "domain": "the domain",
    "language": "the language",
    "modality": "the modality",
    "position": "the position",
}
HEADINGS = {
    "token": "token",
    "previous": "token\nbefore",
    "kind": "kind of\ntoken",
    "domain": "domain",
    "language": "language",
    "modality": "modality",
    "position": "position",
    "domain, given the token": "domain,\ngiven token",
    "previous, given the token": "before,\ngiven token",
    "position, given the token": "position,\ngiven token",
}
PIECES = {
    "text": ("token", "tokens", "token (a piece of a word)"),
    "images": ("patch", "patches", "patch of an image"),
    "sounds": ("frame", "frames", "frame of sound"),
}
"""What a router sends to experts, by the kind of data: one, several, and for who has not met one."""
SERVES = {
    "domain": "domain",
    "modality": "modality",
    "language": "language",
    "kind": "kind of token",
    "position": "position",
}
MOST_NEEDED = 10
SERVED_FROM = 0.2  # of an expert's work: less is not said to be what it serves


def render(findings: dict[str, Any], images: Tensor | None = None, patch: int = 0) -> str:
    """The page of the findings of `shunter.analysis.inspect.inspecting.inspect`; it needs no network and no script.

    Args:
        findings: what was measured; what is None is left out.
        images: (images, channels, height, width) in [0, 1], that patches are cut from.
        patch: their size.
    """
    model = findings["models"][-1]
    layers: dict[str, dict[str, Any]] = model["layers"]
    piece, pieces, each = PIECES[findings["data"]["kind"]]
    with style(THEME):
        content = {
            "findings": findings,
            "model": model,
            "before": findings["models"][0] if len(findings["models"]) > 1 else None,
            "headline": _headline(findings),
            "each": each,
            "tiles": _tiles(model, piece),
            "piece": piece,
            "pieces": pieces,
            "layers": layers,
            "labels": LABELS,
            "evidence": _evidence(layers),
            "loads": _loads(layers),
            "serves": _serves(layers, pieces),
            "experts": {name: _experts(layer) for name, layer in layers.items()},
            "patches": _patches(layers, images, patch),
            "margins": _margins(layers),
            "together": _matrices(layers, "together"),
            "similarity": _matrices(layers, "similarity"),
            "ablation": _ablation(layers),
            "comparison": _comparison(findings),
            "shown_layers": html.SHOWN_LAYERS,
            "dead_below": DEAD_BELOW,
        }
        return html.environment().get_template("inspect.html.jinja").render(content)


def _percent(part: float) -> str:
    return f"{max(0.0, part) * 100:.0f}\u00a0%"


def _range(parts: list[float]) -> str:
    low, high = _percent(min(parts)), _percent(max(parts))
    return high if low == high else f"{low} to {high}"


def _plural(count: int, one: str) -> str:
    return f"{count} {one}" if count == 1 else f"{count} {one}s"


def _headline(findings: dict[str, Any]) -> str:
    if findings["comparison"]:
        kept = [layer["saturation"] for layer in findings["comparison"]["layers"].values()]
        return f"{_percent(sum(kept) / len(kept))} of the routing decisions are the same in both checkpoints"
    layers = findings["models"][-1]["layers"].values()
    if all(layer["information"] is None for layer in layers):
        return "How the experts are used"
    followed: dict[str, list[float]] = {}
    for layer in layers:
        if layer["follows"]:
            followed.setdefault(layer["follows"]["label"], []).append(layer["follows"]["part"])
    if not followed:
        return f"None of the labels looked at decides where {PIECES[findings['data']['kind']][1]} go"
    label, parts = max(followed.items(), key=lambda item: (len(item[1]), max(item[1])))
    where = "all" if len(parts) == len(layers) else f"{len(parts)} of {len(layers)}"
    where = f"In {where} {'layer' if len(layers) == 1 else 'layers'}" if len(layers) > 1 else "In this layer"
    return f"{where} {LABELS[label]} decides most: {_range(parts)} of the routing"


def _tiles(model: dict[str, Any], piece: str) -> list[tuple[str, str]]:
    layers = model["layers"].values()
    experts = sum(layer["experts"] for layer in layers)
    dead = sum(len(layer["dead"]) for layer in layers)
    each = sorted({layer["experts"] for layer in layers})
    taken = sum(layer["experts_per_token"] for layer in layers) / len(layers)
    tiles = [
        (str(experts), f"experts: {' or '.join(map(str, each))} in each of {_plural(len(layers), 'layer')}"),
        (f"{taken:.3g}", f"experts take each {piece}, on average"),
        (str(dead), f"dead experts, below {_percent(DEAD_BELOW)} of an even share"),
        (f"{max(layer['balance'] for layer in layers):.2f}×", "the mean load, on the busiest expert of all layers"),
    ]
    ties = [layer["margins"]["near_ties"] for layer in layers if layer["margins"]]
    if ties:
        tiles.append((_percent(sum(ties) / len(ties)), "of decisions are near-ties, which rounding could turn"))
    if model["loss"] is not None:
        tiles.append((f"{model['loss']:.3f}", "loss on these data, in nats a prediction; lower is better"))
    return tiles


def _evidence(layers: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    told = {name: layer["information"] for name, layer in layers.items() if layer["information"]}
    if not told:
        return None
    seen = {label for information in told.values() for label in information}
    headings = {label: text for label, text in HEADINGS.items() if label in seen}
    parts = {name: {label: row["adjusted"] for label, row in told[name].items()} for name in told}
    title = "Part of each layer's routing that each label decides"
    figure = inspect_figures.evidence_map(parts, headings)
    rem = figure.get_figwidth() * 5.3  # at which its text is as large as the page's small print
    return {"svg": html.svg(figure, "evidence", title), "rem": round(rem, 1)}


def _loads(layers: dict[str, dict[str, Any]]) -> dict[str, Markup]:
    loads = {name: layer["load"] for name, layer in layers.items()}
    dead = {name: layer["dead"] for name, layer in layers.items()}
    figure, scale = inspect_figures.load_map(loads, dead)
    bar = heat_maps.colour_bar(scale, "load of an expert, in even shares")
    return {"key": html.svg(bar, "load-key", "Colour key of the loads"), "svg": html.svg(figure, "load", "Loads")}


def _share(rows: dict[str, list[float]]) -> NDArray[np.float64]:
    return np.array(list(rows.values()), dtype=np.float64)


def _serves(layers: dict[str, dict[str, Any]], pieces: str) -> list[dict[str, Any]]:
    found = []
    for what, words in SERVES.items():
        rows = {name: layer["serves"][what] for name, layer in layers.items() if what in (layer["serves"] or {})}
        if not rows:
            continue
        scale = heat_maps.domain_scale(max(len(row) for row in rows.values()))
        bar = heat_maps.colour_bar(scale, f"{words}'s part of an expert's {pieces}, in even shares")
        panels = []
        for number, (name, row) in enumerate(rows.items()):
            svg = html.svg(
                heat_maps.domain_map(_share(row), list(row), words), f"{what}-{number}", f"{words} served by {name}"
            )
            panels.append({"name": name, "svg": svg, "told": layers[name]["information"][what]})
        key = html.svg(bar, f"{what}-key", f"Colour key: {words}")
        found.append({"what": words, "key": key, "layers": panels})
    return found


def _main(layer: dict[str, Any], what: str, expert: int) -> tuple[str, float] | None:
    rows = (layer["serves"] or {}).get(what)
    if not rows:
        return None
    mix = heat_maps.domain_mix(_share(rows))[:, expert]
    return (list(rows)[int(mix.argmax())], float(mix.max())) if mix.any() else None


def _experts(layer: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for expert, load in enumerate(layer["load"]):
        removal = (layer["ablation"] or {}) and layer["ablation"][expert]
        rows.append(
            {
                "load": load * layer["experts"],
                "serves": [
                    main
                    for what in ("domain", "language", "kind")
                    if (main := _main(layer, what, expert)) and main[1] >= SERVED_FROM
                ],
                "tokens": layer["tokens_served"][expert] if layer["tokens_served"] else [],
                "before": layer["tokens_before"][expert] if layer["tokens_before"] else [],
                "rise": removal["rise"] if removal else None,
            }
        )
    return rows


def _patches(layers: dict[str, dict[str, Any]], images: Tensor | None, size: int) -> list[dict[str, Any]]:
    if images is None:
        return []
    return [
        {
            "name": name,
            "experts": [
                inspect_figures.patch_sheet(patches, images, size) if patches else None for patches in layer["patches"]
            ],
        }
        for name, layer in layers.items()
        if layer["patches"]
    ]


def _margins(layers: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    known = {name: layer["margins"] for name, layer in layers.items() if layer["margins"]}
    if not known:
        return None
    figure = inspect_figures.margin_ranges(known, THEME)
    entropy = {name: layers[name]["router_entropy"] for name in known}
    svg = html.svg(figure, "margins", "Margins of the routing decisions")
    return {"svg": svg, "layers": known, "entropy": entropy}


def _matrices(layers: dict[str, dict[str, Any]], key: str) -> dict[str, Any] | None:
    known = {name: layer[key] for name, layer in layers.items() if layer[key]}
    if not known:
        return None
    if key == "together":
        scale, label = Normalize(0, 4), "how often two experts meet, against chance"
        matrices = {name: value["affinity"] for name, value in known.items()}
        bar = heat_maps.colour_bar(scale, label, {0: "0: never", 1: "1: by chance", 2: "2×", 3: "3×", 4: "4× or more"})
    else:
        which = "gram" if all("gram" in value for value in known.values()) else "cosine"
        matrices = {name: value[which]["matrix"] for name, value in known.items()}
        scale = Normalize(0, 1)
        bar = heat_maps.colour_bar(
            scale, "likeness of two experts' weights", {0: "0: none", 0.5: "0.5", 1: "1: copies"}
        )
    panels = [
        {
            "name": name,
            "svg": html.svg(inspect_figures.matrix_map(matrix, scale), f"{key}-{n}", f"Pairs of experts of {name}"),
            "found": known[name],
        }
        for n, (name, matrix) in enumerate(matrices.items())
    ]
    return {"key": html.svg(bar, f"{key}-key", "Colour key"), "layers": panels}


def _ablation(layers: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    known = {
        name: [row if row and row["rise"] is not None else None for row in layer["ablation"] or []]
        for name, layer in layers.items()
    }
    known = {name: rows for name, rows in known.items() if any(rows)}
    if not known:
        return None
    panels = [
        {
            "name": name,
            "svg": html.svg(inspect_figures.ablation_bars(rows, THEME), f"ablation-{n}", f"Removing experts of {name}"),
            "done": sum(row is not None for row in rows),
            "experts": len(rows),
        }
        for n, (name, rows) in enumerate(known.items())
    ]
    ranked = sorted(
        ((row["rise"], row["spread"], name, e) for name, rows in known.items() for e, row in enumerate(rows) if row),
        key=lambda item: -item[0],
    )
    needed = [
        {"layer": name, "expert": e, "rise": rise, "spread": spread, "load": layers[name]["load"][e] * len(known[name])}
        for rise, spread, name, e in ranked[:MOST_NEEDED]
    ]
    return {"layers": panels, "needed": needed}


def _comparison(findings: dict[str, Any]) -> dict[str, Any] | None:
    compared = findings["comparison"]
    if not compared:
        return None
    before, after = findings["models"]
    rows = []
    for name, layer in compared["layers"].items():
        moved = [value for value in layer["weights_moved"] if value is not None]
        old, new = before["layers"][name], after["layers"][name]
        rows.append(
            {
                "name": name,
                "saturation": layer["saturation"],
                "chance": layer["chance"],
                "load_moved": layer["load_moved"],
                "weights_moved": sum(moved) / len(moved) if moved else None,
                "balance": (old["balance"], new["balance"]),
                "dead": (len(old["dead"]), len(new["dead"])),
                "follows": (old["follows"], new["follows"]),
            }
        )
    figure = inspect_figures.saturation_bars(compared["layers"], THEME)
    domains = [(name, before["domain_loss"].get(name), loss) for name, loss in after["domain_loss"].items()]
    return {
        "before": compared["before"],
        "after": compared["after"],
        "rows": rows,
        "svg": html.svg(figure, "saturation", "Decisions that both checkpoints share"),
        "loss": (before["loss"], after["loss"]),
        "domains": [(name, old, new) for name, old, new in domains if old is not None],
    }
