"""Kinds of drawn patches, planted experts, and figure 8 of a model that was hardly trained."""

import math

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("mlxtend")
pytest.importorskip("PIL")
pytest.importorskip("pydantic")
pytest.importorskip("transformers")

from shunter.recipes.images import ImagesConfig
from shunter.reproduce.patches import KINDS, alike, draw_figure_8, figure_8, patch_kinds


def stroke(degrees, shift, size=9, channels=1):
    """A soft line through a patch, its direction counted as a reader sees it: 45 degrees is as in a slash."""
    y, x = torch.meshgrid(torch.arange(size) - size // 2, torch.arange(size) - size // 2, indexing="ij")
    angle = math.radians(degrees)
    distance = x * math.sin(angle) + y * math.cos(angle) - shift
    return torch.exp(-distance.square() / 2).expand(channels, -1, -1)


@pytest.mark.parametrize("degrees, kind", [(0, "horizontal"), (45, "rising"), (90, "vertical"), (135, "falling")])
def test_a_drawn_stroke_is_of_its_kind(degrees, kind, seed):
    torch.manual_seed(seed)
    turns, shifts = (torch.rand(20) - 0.5) * 30, torch.rand(20) * 2 - 1
    drawn = torch.stack([stroke(degrees + float(t), float(s), channels=3) for t, s in zip(turns, shifts, strict=True)])
    drawn *= 0.3 + 0.7 * torch.rand(20, 1, 1, 1)
    assert [KINDS[i] for i in patch_kinds(drawn)] == [kind] * 20
    assert [KINDS[i] for i in patch_kinds(1 - drawn)] == [kind] * 20, "dark on light"


def test_nothing_and_crossings():
    flat = torch.rand(5, 1, 1, 1).expand(5, 1, 7, 7)
    assert patch_kinds(flat).tolist() == [KINDS.index("blank")] * 5
    cross = torch.maximum(stroke(0, 0.0), stroke(90, 0.0))[None]
    assert KINDS[int(patch_kinds(cross))] == "bends and crossings"


def test_alike_is_the_mean_over_pairs(seed):
    torch.manual_seed(seed)
    patches = torch.rand(6, 2, 3, 3)
    pairs = [(patches[i] - patches[j]).square().mean() for i in range(6) for j in range(i)]
    assert alike(patches) == pytest.approx(float(torch.stack(pairs).mean()), rel=1e-5)
    assert alike(patches[:1].expand(4, -1, -1, -1)) == 0


@pytest.mark.slow
def test_it_runs_and_draws_what_experts_take(tmp_path):
    config = ImagesConfig.model_validate(
        {
            "data": {"train_images": 60, "eval_images": 40},
            "model": {"patch_size": 7, "dim": 16, "layers": 2, "heads": 2, "hidden": 32},
            "sparse": {"num_experts": 4},
            "training": {"steps": 3, "batch_tokens": 170, "eval_every": 3, "save_every": 3, "warmup": 1},
        }
    )
    found = figure_8(tmp_path, config)
    [(name, sheets)] = found.data["sheets"].items()
    assert len(sheets) == 4 and len(found.rows) == len(KINDS) + 3
    assert sum(found.data["shares"].values()) == pytest.approx(1)
    titled = [axes.get_title() for axes in draw_figure_8(found.data).axes]
    assert [title[:17] for title in titled] == [f"block 1, expert {e}" for e in range(4)]
    draw_figure_8({"sheets": {"a.0.mlp": [sheets[0], ""], "b.1.mlp": sheets[:1]}})
    kept = (tmp_path / "patches" / "sparse" / "model.safetensors").stat().st_ino
    assert figure_8(tmp_path, config).rows == found.rows
    assert (tmp_path / "patches" / "sparse" / "model.safetensors").stat().st_ino == kept
