"""Images and captions: a small run from end to end; retrieval; experts by modality; what training sees."""

import json
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("matplotlib")
pytest.importorskip("pandas")

from shunter.analysis.exhibits import HeatMap
from shunter.cli import main
from shunter.moe import moe_layers
from shunter.recipes import multimodal
from shunter.recipes.config import load_config
from shunter.recipes.multimodal import NO_GLOBAL, RECIPE, TWO_TOWERS, MultimodalConfig, retrieved
from tests.conftest import SEED
from tests.recipes.whole import whole

SMALL = [
    "data.image_size=8", "data.shift=1", "data.eval_share=0.3", "data.vocab_size=300", "data.caption_tokens=4",
    "model.patch_size=4", "model.dim=8", "model.layers=2", "model.heads=2", "model.hidden=24",
    "sparse.num_experts=4", "training.batch_tokens=48", "training.warmup=1", "training.threads=1",
    "training.steps=3", "training.eval_every=3", "training.log_every=1", "training.save_every=100",
]  # fmt: skip


@pytest.fixture
def table(tmp_path):
    """Twelve things in two styles, with names."""
    draw = np.random.default_rng(SEED)
    lines = ["image,caption,style"]
    (tmp_path / "images").mkdir()
    for i in range(12):
        shape = draw.integers(0, 255, (8, 8, 3), dtype=np.uint8)
        for style in ("plain", "dark"):
            Image.fromarray(shape // (1 + (style == "dark"))).save(tmp_path / f"images/{style}{i}.png")
            lines.append(f"images/{style}{i}.png,thing {i},{style}")
    (tmp_path / "pairs.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "pairs.csv"


def made(table, *settings):
    return load_config(MultimodalConfig, None, [*SMALL, f"data.source=['{table}']", *settings])


def test_a_run_from_end_to_end(table, tmp_path, capsys, monkeypatch):
    (table.parent / "images/plain3.png").write_bytes(b"no image")
    table.write_text(table.read_text() + "images/plain1.png,,plain\n")
    run = whole("multimodal", [*SMALL, f"data.source=['{table}']", "data.held_out_styles=[dark]"], tmp_path, capsys)
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "Left out 2 of 25 pairs" in page and "plain3.png" in page and "record 25: has no caption" in page
    body = page.partition("<main>")[2].partition("<h2>Configuration")[0]
    assert not re.search(r"\b(text|domains?)\b", re.sub(r"<[^>]*>", " ", body)), "words of other recipes"
    assert {path.name for path in run.iterdir()} >= {"dense", "sparse", TWO_TOWERS, NO_GLOBAL}
    shown = {one["title"]: one for one in json.loads((run / "exhibits.json").read_text())}
    rows = shown["Retrieval and zero-shot accuracy"]["rows"]
    parts = ["known concepts, new style", "new concepts", "new concepts, new style"]
    assert [row[0] for row in rows] == [part for part in parts for _ in range(5)], "four models and chance"
    assert len(shown["Experts by modality"]["panels"]) == 2 and len(shown["Collapse of a modality"]["rows"]) == 4

    summary = json.loads((run / "summary.json").read_text())
    assert math.isclose(summary["dense"]["flops_per_token"], summary["sparse"]["flops_per_token"], rel_tol=0.05)
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", str(run), "--out", str(tmp_path / "seen"), "--ablate", "1"]) == 0
    seen = json.loads((tmp_path / "seen/inspect.json").read_text())
    [layer] = seen["models"][0]["layers"].values()
    assert (
        seen["complete"]
        and "modality" in layer["information"]
        and set(layer["serves"]["modality"]) <= {"patches", "words"}
    )
    assert seen["models"][0]["loss"] > 0 and any(entry is not None for entry in layer["ablation"])

    capsys.readouterr()
    assert main(["eval", str(run), "--calibration", "--json"]) == 0
    calibrated = json.loads(capsys.readouterr().out)["models"]
    for which in ("dense", "sparse"):
        for part, row in summary[which]["domains"].items():
            assert 100 * calibrated[which]["domains"][part]["accuracy"] == pytest.approx(row["image_to_text"])

    table.write_text(table.read_text().replace("thing 7", "thing seven"))
    assert main(["eval", str(run)]) == 2
    assert "the pairs have changed since this run" in capsys.readouterr().err


def test_captions_that_are_cut_off_are_counted(table):
    lines = table.read_text().splitlines()
    lines[1] = lines[1].replace("thing 0", " ".join(f"word{i}" for i in range(10_000)))
    table.write_text("\n".join(lines) + "\n")
    notes = RECIPE.prepare(made(table, "data.caption_tokens=20")).describe()["notes"]
    assert "Cut off at data.caption_tokens=20: 1 of 24 captions." in notes


@pytest.mark.slow
def test_routers_are_compared_on_pairs(table, tmp_path, capsys):
    run = tmp_path / "compared"
    routers = "limoe:eval_capacity_factor=dropless,topk:top_k=1,expert_choice,hash"
    settings = [*SMALL, f"data.source=['{table}']", "training.steps=2"]
    assert main(["compare", "multimodal", "--routers", routers, "--run", str(run), *settings]) == 0
    rows = json.loads((run / "compare.json").read_text())["models"]
    assert [row["router"] for row in rows] == ["dense", *routers.split(",")]
    for row in rows[1:]:
        assert math.isclose(row["flops_per_token"], rows[0]["flops_per_token"], rel_tol=0.06), row["router"]


def test_retrieval_is_that_of_a_loop_over_candidates():
    for _ in range(20):
        images, captions = int(torch.randint(4, 12, ())), 4
        similar = torch.randint(0, 6, (images, captions)).double()  # with ties
        right = torch.cat([torch.arange(captions), torch.randint(0, captions, (images - captions,))])
        found = retrieved(similar, right)
        to_text = [
            sum(float(s) >= float(row[r]) for j, s in enumerate(row) if j != r)
            for row, r in zip(similar, right, strict=True)
        ]
        to_image = []
        for c in range(captions):
            best = max(float(similar[i, c]) for i in range(images) if right[i] == c)
            to_image.append(sum(float(similar[i, c]) >= best for i in range(images) if right[i] != c))
        for way, ranks in (("image_to_text", to_text), ("text_to_image", to_image)):
            assert found[way] == pytest.approx(100 * sum(r < 1 for r in ranks) / len(ranks))
            assert found[f"{way}_5"] == pytest.approx(100 * sum(r < 5 for r in ranks) / len(ranks))
        nats = [-float(row.log_softmax(0)[r]) for row, r in zip(similar, right, strict=True)]
        other = [-float(similar[:, c].softmax(0)[right == c].sum().log()) for c in range(captions)]
        assert found["loss"] == pytest.approx((sum(nats) / images + sum(other) / captions) / 2)
    alike = retrieved(torch.zeros(6, 6), torch.arange(6))
    assert alike["image_to_text_5"] == alike["text_to_image_5"] == 0, "what embeds all alike finds nothing"
    assert retrieved(10 * torch.eye(6), torch.arange(6))["image_to_text"] == 100


def test_a_planted_collapse_of_a_modality_is_reported(table):
    config = made(table, "sparse.options.eval_capacity_factor=dropless")
    data = RECIPE.prepare(config)
    model = RECIPE.build(config, data, True).eval()
    [layer] = moe_layers(model).values()
    material = RECIPE.material(model, data, 1000)
    told = material.streams[""].labels["modality"]
    assert material.tokens == len(told) and 0 < int((told == 1).sum()) < len(told)
    inner = layer.router.choose

    def collapsed(logits, context):
        words = context.modality == 1
        chosen = torch.arange(len(logits)) % 4
        planted = torch.nn.functional.one_hot(torch.where(words, 2, chosen), 4).to(logits.dtype) * 20
        return inner(torch.cat([planted, planted], -1)[:, : logits.shape[-1]], context)

    layer.router.choose = collapsed
    [uses] = multimodal._use(model, material).values()
    patches, words = uses
    assert words.collapsed and words.shares[2] == 1 and not patches.collapsed
    map_, numbers = multimodal._modalities(
        {"sparse": {"towers.0.layers.1.mlp": [patches, patches]}, NO_GLOBAL: {"layers.1": uses}}
    )
    assert isinstance(map_, HeatMap) and "collapsed are words in block 1" in map_.says
    assert "the global loss prevented" in map_.says and [row[-1] for row in numbers.rows] == ["no", "no", "no", "yes"]
    map_, _ = multimodal._modalities({which: {"layers.1": [patches, patches]} for which in ("sparse", NO_GLOBAL)})
    assert "did not appear at this size" in map_.says


def test_a_pass_has_every_concept_once_and_is_a_function_of_the_seed(table):
    data = RECIPE.prepare(made(table, "training.steps=30"))
    again, other = RECIPE.prepare(made(table, "training.steps=30")).train, RECIPE.prepare(made(table, "seed=1")).train
    one = data.train
    concepts = len({data.found.pairs.images.labels[i] for i in data.found.train})
    assert len(one) == 30 * 6 and len(one.pictures) == concepts == 8
    for start in range(0, len(one) - concepts, concepts):
        assert sorted(one.order[start : start + concepts].tolist()) == list(range(concepts))
    for i in range(len(one)):
        assert all(torch.equal(one[i][key], again[i][key]) for key in one[i])
    assert any(not torch.equal(one[i]["pixel_values"], other[i]["pixel_values"]) for i in range(len(other)))
    assert one[0]["token_ids"].shape == (4 + 4,) and one[0]["attention_mask"].sum() >= 1


def test_without_a_global_loss_there_is_no_model_without_it(table):
    assert RECIPE.others_of(made(table)) == (TWO_TOWERS, NO_GLOBAL)
    assert RECIPE.others_of(made(table, "sparse.router=topk")) == (TWO_TOWERS,)
    assert RECIPE.others_of(made(table, "sparse.options.global_entropy_loss=0.0")) == (TWO_TOWERS,)
    config = made(table)
    data = RECIPE.prepare(config)
    sparse, without = (RECIPE.model(config, data, name) for name in ("sparse", NO_GLOBAL))
    [one], [other] = (moe_layers(model).values() for model in (sparse, without))
    assert one.router.coefficients["global_entropy_loss"] > 0 == other.router.coefficients["global_entropy_loss"]
    for (name, a), b in zip(sparse.named_parameters(), without.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    "setting, part",
    [
        ("model.patch_size=3", "data.image_size 32 must be a multiple of model.patch_size 3"),
        ("model.heads=5", "must be a multiple of model.heads 5"),
        ("training.batch_tokens=40", "must be at least the 52 of two pairs"),
        ("data.source=[a,b]", "at most 1"),
        ("data.source=[./nowhere]", "nowhere: no such folder or table"),
    ],
)
def test_mistakes_are_one_line(setting, part, tmp_path, capsys):
    assert main(["train", "multimodal", "--run", str(tmp_path / "run"), setting]) == 2
    said = capsys.readouterr().err.strip()
    assert part in said and "\n" not in said


def test_mean_and_deviation_are_of_no_more_images_than_are_kept(table, monkeypatch):
    monkeypatch.setattr(multimodal, "KEPT_BYTES", 5 * 4 * 3 * 8 * 8)
    data = RECIPE.prepare(made(table))
    seen = torch.stack([data.pixels(i) for i in data.found.train[:5]])
    assert torch.equal(data.normalise.mean, seen.mean((0, 2, 3))) and torch.equal(
        data.normalise.std, seen.std((0, 2, 3))
    )
