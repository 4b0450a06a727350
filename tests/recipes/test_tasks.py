"""Tasks: a small run from end to end; gates that are planted are shown; equal operations; each model what it says."""

import json
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")

from shunter.analysis.exhibits import HeatMap
from shunter.cli import main
from shunter.recipes.config import load_config
from shunter.recipes.tasks import NAMES, RECIPE, TasksConfig, _gates
from tests.conftest import SEED
from tests.recipes.whole import whole

SMALL = [
    "data.rows=60", "data.features=5", "data.correlations=[0.0, 1.0]", "data.digits=false", f"seed={SEED % 1000}",
    "model.dim=8", "model.hidden=16", "model.tower=3", "sparse.num_experts=3",
    "training.steps=3", "training.batch_tokens=8", "training.warmup=1", "training.threads=1",
    "training.eval_every=3", "training.log_every=1", "training.save_every=100",
]  # fmt: skip


def made(*settings):
    config = load_config(TasksConfig, None, [*SMALL, *settings])
    return config, RECIPE.prepare(config)


def test_a_run_from_end_to_end(tmp_path, capsys):
    run = whole("tasks", SMALL, tmp_path, capsys)
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "Loss by problem" in page and "shared bottom" in page and "What each expert serves" not in page
    shown = {one["title"]: one for one in json.loads((run / "exhibits.json").read_text())}
    summary = json.loads((run / "summary.json").read_text())
    lines = shown["Loss by how related the tasks are"]["lines"]
    for which in ("dense", "sparse"):
        expected = [[p, summary[which]["domains"][f"correlation {p:g}"]["loss"]] for p in (0.0, 1.0)]
        assert lines[NAMES[which]] == expected
    assert (run / "single/model.safetensors").is_file() and len(lines) == 3
    assert main(["inspect", str(run), "--out", str(tmp_path / "seen"), "--ablate", "1"]) == 0
    seen = json.loads((tmp_path / "seen/inspect.json").read_text())
    asked = 2 * int(RECIPE.prepare(made()[0]).tables[0].held_out.sum())
    layers = seen["models"][0]["layers"]
    assert {name: layer["tokens"] for name, layer in layers.items()} == dict.fromkeys(
        ("networks.0.moe", "networks.1.moe"), asked
    )
    assert set(layers["networks.0.moe"]["serves"]["domain"]) == {"task 1", "task 2"}


def test_planted_gates_are_shown():
    config, data = made("model.hidden=32")
    model = RECIPE.build(config, data, True).eval()
    with torch.no_grad():
        for number, network in enumerate(model.networks):
            router = network.moe.router
            router.weight.zero_()
            network.embed[0].weight.zero_()
            network.embed[0].bias.fill_(1.0)
            for task in range(2):  # task k of problem n goes to expert (k + n) % 3 alone
                router.weight[3 * task + (task + number) % 3] = 100.0
    found = _gates(model, data)
    assert isinstance(found, HeatMap)
    for number, rows in enumerate(found.panels.values()):
        for task, row in enumerate(rows):
            assert [round(weight, 6) for weight in row] == [float(e == (task + number) % 3) for e in range(3)]


def test_an_answer_costs_the_same_in_all_three():
    for hidden, experts in ((64, 8), (48, 3), (200, 10)):
        config, data = made(f"model.hidden={hidden}", f"sparse.num_experts={experts}")
        models = {which: RECIPE.model(config, data, which) for which in NAMES}
        flops = {which: RECIPE.ledger(model, config).flops_per_token for which, model in models.items()}
        assert flops["single"] == flops["dense"]
        slack = experts * 4 * config.model.dim / flops["dense"]  # widths are whole numbers
        assert math.isclose(flops["sparse"], flops["dense"], rel_tol=slack), (hidden, experts)


def test_in_a_shared_bottom_tasks_meet_and_in_single_models_they_do_not():
    config, data = made()
    row = data.train[0]
    features = row["features"][None]
    labels = row["labels"][None].clone()
    labels[..., 1] = math.nan  # the first task alone is asked
    for which, meets in (("dense", True), ("single", False), ("sparse", True)):
        model = RECIPE.model(config, data, which).train()
        model(features=features, labels=labels).loss.backward()
        second = [
            p
            for name, p in model.named_parameters()
            if ".towers.1." in name or (which == "single" and (".block.1." in name or ".embed.1." in name))
        ]
        assert second and not any(p.grad is not None and bool(p.grad.any()) for p in second), which
        before = RECIPE.model(config, data, which).eval()
        first = [p for name, p in before.named_parameters() if ".embed.0." in name]
        with torch.no_grad():
            was = before(features=features).logits
            for p in first:
                p.add_(1.0)
            now = before(features=features).logits
        assert not torch.equal(was[..., 0], now[..., 0])
        assert torch.equal(was[..., 1], now[..., 1]) is not meets, which


def test_a_table_of_ones_own_with_holes(tmp_path, capsys, monkeypatch):
    pytest.importorskip("pandas")
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(SEED)
    values = torch.randn(40, 3, generator=generator).tolist()
    rows = [f"{a},{b},{a + b},{a - c if i % 5 else ''},{c}" for i, (a, b, c) in enumerate(values)]
    Path("houses.csv").write_text("a,b,sum,difference,c\n" + "\n".join(rows))
    settings = [s for s in SMALL if not s.startswith(("data.", "sparse"))]
    args = ["train", "tasks", "--data", "houses.csv", "data.targets=[sum,difference]", "name=houses"]
    assert main([*args, "sparse.num_experts=2", *settings]) == 0
    about = json.loads(Path("runs/houses/data.json").read_text())
    assert "houses: 8 targets are missing and not asked for, the first in record 1." in about["notes"]
    assert "NaN" not in Path("runs/houses/exhibits.json").read_text()
    summary = json.loads(Path("runs/houses/summary.json").read_text())
    assert all(math.isfinite(summary[which]["eval_loss"]) for which in ("dense", "sparse"))
    assert main(["train", "tasks", "--data", "houses.csv", "name=other"]) == 2
    assert "say which columns are asked for" in capsys.readouterr().err


def test_routers_are_compared_on_tasks(tmp_path):
    run = tmp_path / "compared"
    assert main(["compare", "tasks", "--routers", "mmoe,soft,task:top_k=1", "--run", str(run), *SMALL]) == 0
    rows = json.loads((run / "compare.json").read_text())["models"]
    assert [row["router"] for row in rows] == ["dense", "mmoe", "soft", "task:top_k=1"]


@pytest.mark.parametrize(
    "setting, part",
    [
        ("data.correlations=[2]", "data.correlations.0=2"),
        ("data.correlations=[0,0]", "each may come once"),
        ("data.targets=[a]", "data.targets are columns of data.source"),
        ("sparse.every=2", "these models have one"),
        ("sparse.num_experts=65", "less than a unit for each"),
    ],
)
def test_mistakes_are_one_line(setting, part, tmp_path, capsys):
    assert main(["train", "tasks", "--run", str(tmp_path / "run"), setting]) == 2
    said = capsys.readouterr().err.strip()
    assert part in said and "\n" not in said


def test_a_damaged_model_is_one_line(tmp_path):
    config, data = made()
    RECIPE.build(config, data, True).save_pretrained(tmp_path)
    RECIPE.load(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ValueError, match="cannot be loaded"):
        RECIPE.load(tmp_path)
