"""The recipe of facts: what experts add is there to be seen, and its runs can be evaluated, resumed and calibrated."""

import json

import pytest
import torch

pytest.importorskip("pydantic")
pytest.importorskip("transformers")

from shunter.cli import main
from shunter.recipes.facts import RECIPE, FactsConfig
from shunter.recipes.run import configuration_of, load_model, train

SMALL = {
    "data": {"keys": 64, "values": 4, "sequence_length": 16, "eval_windows": 8},
    "model": {"dim": 8, "hidden": 8},
    "sparse": {"num_experts": 4},
    "training": {"steps": 12, "batch_tokens": 64, "eval_every": 6, "log_every": 6},
}


def test_draws_follow_zipf_and_tell_nothing_to_a_hash():
    config = FactsConfig.model_validate(
        {"data": {"keys": 512, "sequence_length": 512}, "training": {"batch_tokens": 1024}}
    )
    data = RECIPE.prepare(config)
    keys = torch.stack([data.train[i]["keys"] for i in range(200)])
    weight = torch.arange(1, 513, dtype=torch.float64) ** -1.0
    expected = weight / weight.sum()
    seen = torch.bincount(keys.flatten(), minlength=512) / keys.numel()
    assert (seen - expected).abs().max() < 0.02
    assert (data.train[3]["keys"] == data.train[3]["keys"]).all() and (
        data.train[3]["keys"] != data.train[4]["keys"]
    ).any()
    assert (data.values[data.train[5]["keys"]] == data.train[5]["labels"]).all()
    # Were values and a hash router's experts drawn alike, an expert would know the value without learning.
    model = RECIPE.build(
        FactsConfig.model_validate({"sparse": {"router": "hash", "num_experts": 64}}),
        RECIPE.prepare(FactsConfig()),
        True,
    )
    values = RECIPE.prepare(FactsConfig()).values
    table = model.block.decider.table.flatten()[: len(values)]
    joint = torch.zeros(64, 64).index_put_((table, values), torch.ones(len(values)), accumulate=True)
    assert joint.max() < 20  # 8192 draws on 4096 cells: one of 20 has a chance below 1e-10


def test_a_run_is_calibrated_as_its_predictions_are(tmp_path, capsys):
    run = tmp_path / "run"
    train(RECIPE, FactsConfig.model_validate(SMALL), run, as_json=True)
    capsys.readouterr()
    assert main(["eval", str(run), "--calibration", "--out", str(tmp_path / "out"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "out" / "calibration.json").read_text(encoding="utf-8"))
    assert (tmp_path / "out" / "calibration.png").stat().st_size > 5_000
    recipe, config = configuration_of(run)
    data = recipe.prepare(config)
    for which in ("dense", "sparse"):
        model = load_model(run, which)
        for name, keys in data.eval.items():
            with torch.no_grad():
                probability = model(keys).logits.softmax(-1).flatten(0, 1).double()
            confidence, guess = probability.max(-1)
            right = (guess == data.values[keys].flatten()).double()
            error = sum(
                float((right[inside] - confidence[inside]).sum().abs())
                for b in range(15)
                for inside in [(confidence > b / 15) & (confidence <= (b + 1) / 15)]
            ) / len(right)
            assert found["models"][which]["domains"][name]["error"] == pytest.approx(error, abs=1e-6)
            assert found["models"][which]["domains"][name]["accuracy"] == pytest.approx(float(right.mean()))
    assert main(["eval", str(run)]) == 0
    assert "drawn" in capsys.readouterr().out
    assert main(["eval", str(run), "--data", "x"]) == 2
    assert main(["eval", str(run), "--calibration", "--data", "x"]) == 2
    assert main(["eval", str(tmp_path), "--calibration"]) == 2
    assert capsys.readouterr().err.count("\n") == 3
