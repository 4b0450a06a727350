"""Figure 8: the patches of images that each expert takes, by kind, by how alike they are, and by where they are."""

from __future__ import annotations

import base64
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from ..analysis.information import information
from ..analysis.inspect.findings import patches_served
from ..analysis.inspect.recording import record
from ..analysis.pages.inspect_figures import patch_sheet
from ..durable import sealed
from ..recipes.images import RECIPE, ImagesConfig
from ..recipes.run import account, begin, load_model, train_one
from .results import IMPOSSIBLE, Result, Row, judge
from .tables import SHUFFLES, kind_lifts

__all__ = ["KINDS", "alike", "draw_figure_8", "figure_8", "patch_kinds"]

KINDS = ("blank", "horizontal", "rising", "vertical", "falling", "bends and crossings")
"""What a patch of a drawing has: nothing, strokes of one direction, or of several."""
_FAINT, _COHERENT = 0.02, 0.6
_IMAGES = 512
_PAPER = "experts of textures, plants, hands, eyes, wheels, door handles, words"


def patch_kinds(patches: Tensor) -> Tensor:
    """The kind of each patch (N,) int64, of `KINDS`, by the directions in which its brightness changes.

    Args:
        patches: (N, channels, height, width) in [0, 1].

    Source: the structure tensor, Bigün and Granlund 1987; a stroke runs across the direction of most change.
    """
    rows, columns = torch.gradient(patches.double().mean(1), dim=(1, 2))
    xx, yy, xy = (value.mean((1, 2)) for value in (columns * columns, rows * rows, columns * rows))
    change = xx + yy
    coherence = ((xx - yy).square() + 4 * xy.square()).sqrt() / change.clamp_min(1e-12)
    across = torch.atan2(2 * xy, xx - yy) / 2 + math.pi / 2  # from 0 to pi, rows counted downwards
    direction = (4 - (across / (math.pi / 4)).round().long()) % 4
    kind = torch.where(coherence < _COHERENT, len(KINDS) - 1, direction + 1)
    return torch.where(change.sqrt() < _FAINT, 0, kind)


def alike(patches: Tensor) -> float:
    """The mean squared difference of a number of two patches, over all pairs of (N, channels, height, width)."""
    rows = patches.double().flatten(1)
    return float(2 * rows.var(0, correction=1).mean())


def _config() -> ImagesConfig:
    return ImagesConfig.model_validate(
        {
            "name": "patches",
            "model": {"patch_size": 7},
            "training": {"steps": 500, "eval_every": 500, "save_every": 500},
        }
    )


def figure_8(runs: Path, config: ImagesConfig | None = None) -> Result:
    """The patches that the experts of a vision model take of held-out images.

    Args:
        runs: the folder of training runs.
        config: of the model; None for a small one on the built-in digits.
    """
    config = config or _config()
    run = runs / "patches"
    with begin(RECIPE, config, run, {"sparse": config}, resume=sealed(run), as_json=False) as begun:
        found = account(begun, "sparse", train_one(begun, "sparse"))
        data = begun.data
    model = load_model(run, "sparse")
    material = RECIPE.material(model, data, _IMAGES * config.patches)
    recording = record(model, material, lambda batches, what, total: batches)
    if recording.batches < len(material.batches):
        raise KeyboardInterrupt
    images, size = material.images, material.patch
    assert images is not None
    cut = images.unfold(2, size, size).unfold(3, size, size).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
    kinds = patch_kinds(cut)
    claims, sheets, lifts = [], dict[str, list[str]](), dict[str, dict[str, dict[str, float]]]()
    generator = torch.Generator().manual_seed(0)
    for name, layer in recording.layers.items():
        stream = material.stream(name, len(layer.index), recording.batches)
        if stream is None or layer.weight is None:
            continue
        position = stream.labels["position"]
        label = torch.full_like(position, -1)
        label[position >= 0] = kinds
        best, chance = kind_lifts(layer.index, label, layer.num_experts, len(KINDS))
        lifts[name] = {kind: {"lift": float(best[i]), "shuffled": float(chance[i])} for i, kind in enumerate(KINDS)}
        for kind, numbers in lifts[name].items():
            claims.append(
                Row(
                    f"{name}: an expert of {_WORDS.get(kind, f'{kind} strokes')}",
                    _PAPER,
                    f"{numbers['lift']:.1f} times as often as in the images; {numbers['shuffled']:.1f} by chance",
                    judge(numbers["lift"] > 2 * numbers["shuffled"], direction=numbers["lift"] > numbers["shuffled"]),
                )
            )
        seen, where = (information(layer.index, what, layer.num_experts) for what in (label, position))
        claims.append(
            Row(
                f"{name}: what a patch shows tells its expert",
                "it does",
                f"its kind {seen.bits:.3f} bits of {seen.entropy:.3f}, by chance {seen.null_max:.3f}; its place "
                f"{where.bits:.3f}",
                judge(seen.beyond_chance),
            )
        )
        served = patches_served(layer, stream, material.window)
        closer, shown = 0, 0
        for patches in served:
            if len(patches) < 2:
                continue
            chosen = torch.tensor([image * material.window + patch for image, patch, _ in patches])
            others = [torch.randint(len(cut), (len(chosen),), generator=generator) for _ in range(SHUFFLES)]
            closer += alike(cut[chosen]) < min(alike(cut[some]) for some in others)
            shown += 1
        claims.append(
            Row(
                f"{name}: the patches that an expert weighs most look alike",
                "they do",
                f"those of {closer} of {shown} experts are closer to one another than the closest of {SHUFFLES} "
                "random sheets",
                judge(closer == shown, direction=closer > shown / 2),
                "" if closer == shown else "most patches are blank, and none are as alike as these",
            )
        )
        sheets[name] = [patch_sheet(patches, images, size) if patches else "" for patches in served]
    claims.append(
        Row("experts of plants, hands, eyes, wheels, words", _PAPER, "", IMPOSSIBLE, "handwritten digits show none")
    )
    notes = [
        f"A Vision Transformer of `shunter train images`: {config.model.layers} layers of width {config.model.dim}, "
        f"{config.sparse.num_experts} experts in every {config.sparse.every}nd block (V-MoE), {config.training.steps} "
        f"steps on digits of MNIST in patches of {size} by {size}; {found.shown['accuracy']:.1f} % of held-out digits "
        f"are right. The picture has for each expert the patches of {len(images)} held-out images that its router "
        "weighs most, up to sixteen.",
        "A kind is the direction of the strokes of a patch (structure tensor), rising as in “/”. The lift is of the "
        f"expert where it is largest, and by chance the largest of {SHUFFLES} shuffles of the kinds.",
    ]
    shares = {kind: float((kinds == i).double().mean()) for i, kind in enumerate(KINDS)}
    return Result("figure-8", claims, {"lifts": lifts, "shares": shares, "sheets": sheets}, found.seconds, notes)


_WORDS = {kind: f"{kind} patches" if kind == "blank" else kind for kind in ("blank", "bends and crossings")}


def draw_figure_8(data: dict[str, Any]) -> Figure:
    """A sheet of patches for each expert, four in a row, layer by layer."""
    sheets = [
        (f"{_layer(name)}, expert {number}", sheet)
        for name, experts in data["sheets"].items()
        for number, sheet in enumerate(experts)
    ]
    rows = -(-len(sheets) // _ACROSS)
    figure = Figure(figsize=(2.0 * _ACROSS, 0.8 * rows), layout="constrained")
    for place, axes in enumerate(figure.subplots(rows, _ACROSS, squeeze=False).flat):
        axes.axis("off")
        if place >= len(sheets):
            continue
        title, sheet = sheets[place]
        axes.set_title(title if sheet else f"{title}: none", fontsize=8)
        if sheet:
            with Image.open(io.BytesIO(base64.b64decode(sheet.partition(",")[2]))) as image:
                axes.imshow(np.asarray(image), interpolation="nearest")
    return figure


_ACROSS = 4


def _layer(name: str) -> str:
    return "block " + next((part for part in name.split(".") if part.isdigit()), name)
