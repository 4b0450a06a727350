"""What the text knows of its tokens besides their ids reaches the routers, in training, evaluation and the report."""

import json
import math

import pytest
import torch

from shunter import MoE
from shunter.cli import main
from shunter.recipes.compare import compare
from shunter.recipes.config import load_config
from shunter.recipes.run import configuration_of, load_model
from shunter.recipes.text import RECIPE, TextConfig
from shunter.training import loop

from .conftest import SMALL


@pytest.fixture
def spoken(tmp_path):
    """A file of documents of three domains and five languages."""
    records = [
        {"text": f"{word} " * 40, "domain": domain, "language": language}
        for domain, words in (("a", "ab ac ad"), ("b", "be bf bg"), ("c", "ch ci cj"))
        for word, language in zip(words.split(), ("de", "en", domain * 2), strict=True)
        for _ in range(4)
    ]
    file = tmp_path / "spoken.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def _experts(model):
    """The expert (T,) of each token in the last forward, by layer."""
    return [module.routing.dense().argmax(1) for module in model.modules() if isinstance(module, MoE)]


@pytest.mark.parametrize("name, labels", [("domain", 3), ("language", 5)])
def test_tokens_go_where_their_labels_say(name, labels, spoken, tmp_path, monkeypatch):
    """In training and in evaluation; five languages take turns at four experts."""
    inner, seen = loop._Trainer.compute_loss, []

    def watch(trainer, model, inputs, *args, **kwargs):
        wanted = inputs[name] if inputs[name].dim() == 2 else inputs[name][:, None].expand(inputs["input_ids"].shape)
        found = inner(trainer, model, inputs, *args, **kwargs)
        seen.extend((wanted.flatten(), experts) for experts in _experts(model))
        return found

    monkeypatch.setattr(loop._Trainer, "compute_loss", watch)
    config = load_config(TextConfig, None, [*SMALL, "training.steps=4", f"data.source=['{spoken}']"])
    result = compare(RECIPE, config, [name], tmp_path / "run", as_json=True)
    assert torch.tensor([row["eval_loss"] for row in result["models"]]).isfinite().all()
    assert len(seen) == 2 * 4, "two layers, four steps"
    assert all(torch.equal(experts, wanted % 4) for wanted, experts in seen)
    model, data = load_model(tmp_path / "run", name), RECIPE.prepare(config)
    assert data.label_counts[name] == labels
    for domain in data.eval:
        RECIPE.evaluate(model, type("Data", (), {"eval": [domain]}))
        wanted = domain.labels[name]
        wanted = (wanted if wanted.dim() == 2 else wanted[:, None].expand(domain.input_ids.shape)).flatten()
        assert all(torch.equal(experts, wanted % 4) for experts in _experts(model))


def test_a_run_by_domain_reports_whom_each_expert_serves(spoken, tmp_path):
    run = tmp_path / "run"
    args = [*SMALL, "training.steps=2", "sparse.router=domain", f"data.source=['{spoken}']"]
    assert main(["train", "text", "--run", str(run), "--json", *args]) == 0
    found = json.loads((run / "specialisation.json").read_text())
    assert found["domains"] == ["a", "b", "c"]
    for layer in found["layers"].values():
        for number, name in enumerate(found["domains"]):
            assert layer["domains"][name] == pytest.approx([float(expert == number) for expert in range(4)])
    assert main(["inspect", str(run), "--tokens", "200", "--ablate", "0", "--out", str(tmp_path / "seen")]) == 0
    seen = json.loads((tmp_path / "seen/inspect.json").read_text())
    for layer in seen["models"][0]["layers"].values():
        assert layer["information"]["domain"]["bits"] == pytest.approx(math.log2(3))


def test_labels_that_the_text_has_not_are_named(corpus, tmp_path, capsys):
    args = [*SMALL, f"data.source=['{corpus}']", "sparse.router=language"]
    assert main(["train", "text", "--run", str(tmp_path / "run"), *args]) == 2
    said = capsys.readouterr().err.strip()
    assert "router 'language' needs language of each token, which plain text has not" in said and "\n" not in said


def test_a_run_is_evaluated_without_drops_in_one_word(corpus, tmp_path, capsys):
    """As the same experts without a capacity, whatever the run's capacity is."""
    run = tmp_path / "run"
    options = "sparse.options={capacity_factor: 0.25, eval_capacity_factor: 0.25}"
    args = [*SMALL, "training.steps=2", "sparse.router=switch", options, f"data.source=['{corpus}']"]
    assert main(["train", "text", "--run", str(run), "--json", *args]) == 0
    capsys.readouterr()
    found = {}
    for flags in ([], ["--dropless"]):
        assert main(["eval", str(run), "--json", *flags]) == 0
        said = capsys.readouterr()
        assert not said.err
        found[bool(flags)] = json.loads(said.out)
    assert found[True]["dense"] == found[False]["dense"]
    model = load_model(run, "sparse")
    for module in model.modules():
        if isinstance(module, MoE):
            module.router.capacity_factor = None
    expected = RECIPE.evaluate(model, RECIPE.prepare(configuration_of(run)[1]))
    assert found[True]["sparse"]["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert abs(found[False]["sparse"]["loss"] - expected["loss"]) > 1e-6
