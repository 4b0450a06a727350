"""Inspection as a whole: comparisons of checkpoints, the same JSON twice, what Ctrl-C leaves."""

import copy
import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

import shunter
from shunter.analysis.inspect import inspecting as room
from shunter.analysis.inspect.inspecting import inspect, load, specialisation
from shunter.analysis.inspect.material import Window, text_material, window_material
from shunter.analysis.pages.inspect_page import render
from shunter.errors import UserError
from tests.analysis.inspect.subjects import BYTES, EXPERTS, material_of, random_documents, saved, sparse


@pytest.mark.usefixtures("undrawn")
def test_the_same_checkpoint_is_saturated_and_has_not_moved():
    subject = sparse("topk", top_k=2)
    findings = inspect(subject, material_of(subject, 800), earlier=subject, ablations=0, quiet=True)
    for layer in findings["comparison"]["layers"].values():
        assert layer["saturation"] == 1 and layer["load_moved"] == 0
        assert layer["weights_moved"] == [0.0] * EXPERTS
        assert layer["chance"] < 1
    assert "100\u00a0% of the routing decisions are the same" in render(findings)


@pytest.mark.usefixtures("undrawn")
def test_another_checkpoint_differs_and_is_compared_domain_by_domain():
    subject, earlier = sparse("topk", top_k=2), sparse("topk", top_k=2)
    findings = inspect(subject, material_of(subject, 800), earlier=earlier, ablations=0, quiet=True)
    for layer in findings["comparison"]["layers"].values():
        assert layer["saturation"] < 1 and min(layer["weights_moved"]) > 0.5
    page = render(findings)
    assert "What changed between the two checkpoints" in page
    assert findings["models"][0]["domain_loss"].keys() == {"a", "b"}


def test_two_runs_give_the_same_json_and_leave_the_model_as_it_was():
    subject = sparse("topk", top_k=2)
    subject.model.train()
    before = copy.deepcopy(subject.model.state_dict())
    documents = random_documents()
    found = []
    for _ in range(2):
        material = text_material(subject.model, BYTES, documents, tokens=1500, length=32)
        found.append(json.dumps(inspect(subject, material, ablations=2, quiet=True), allow_nan=False))
        torch.rand(3)  # another state of torch's generator
    assert found[0] == found[1]
    assert subject.model.training
    assert all(torch.equal(before[name], value) for name, value in subject.model.state_dict().items())


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("stage", "after"),
    [("routing", 2), ("what experts serve", 1), ("experts' weights", 1), ("removing experts", 3)],
)
def test_ctrl_c_leaves_what_there_is(monkeypatch, stage, after):
    def stopping(self, items, what, total):
        for number, item in enumerate(items):
            if what == stage and number == after:
                raise KeyboardInterrupt
            yield item

    monkeypatch.setattr(room._Progress, "steps", stopping)
    subject = sparse("topk", top_k=2)
    material = material_of(subject, 4000)
    before = copy.deepcopy(subject.model.state_dict())
    findings = inspect(subject, material, quiet=True)
    assert not findings["complete"] and findings["notices"][-1].startswith("Stopped early")
    first, second = findings["models"][0]["layers"].values()
    expected = sum(b.targets.numel() for b in material.batches[:2]) if stage == "routing" else material.tokens
    assert first["tokens"] == expected and first["information"]
    assert (second["information"] is None) == (stage == "what experts serve")
    assert (first["ablation"] is None) == (stage != "removing experts")
    assert "Stopped early" in render(findings)
    assert all(torch.equal(before[name], value) for name, value in subject.model.state_dict().items())
    if stage == "routing":
        monkeypatch.setattr(room._Progress, "steps", lambda self, items, what, total: _at_once())
        with pytest.raises(KeyboardInterrupt):
            inspect(subject, material, quiet=True)


def _at_once():
    raise KeyboardInterrupt
    yield


def test_two_checkpoints_see_the_same_where_ctrl_c_comes_during_the_first(monkeypatch):
    passes = []

    def stopping(self, items, what, total):
        passes.append(what)
        for number, item in enumerate(items):
            if passes == ["routing"] and number == 2:
                raise KeyboardInterrupt
            yield item

    monkeypatch.setattr(room._Progress, "steps", stopping)
    one, other = sparse("topk", top_k=2), sparse("topk", top_k=2)
    material = material_of(one, 4000)
    findings = inspect(other, material, earlier=one, quiet=True)
    assert passes.count("routing") == 2 and not findings["complete"]
    seen = sum(batch.targets.numel() for batch in material.batches[:2])
    for model in findings["models"]:
        assert all(layer["tokens"] == seen and layer["information"] for layer in model["layers"].values())
    assert all(0 < layer["saturation"] < 1 for layer in findings["comparison"]["layers"].values())


def test_progress_is_shown_unless_it_is_to_be_quiet(capsys):
    subject = sparse("topk")
    material = material_of(subject, 400)
    for quiet in (False, True):
        inspect(subject, material, ablations=1, quiet=quiet)
        shown = capsys.readouterr().err
        for what in ("routing", "what experts serve", "experts' weights", "removing experts"):
            assert (what in shown) is not quiet


def test_loading_takes_the_sparse_model_of_a_run(tmp_path):
    saved(tmp_path / "run" / "sparse", sparse("topk").model)
    assert load(str(tmp_path / "run")).name == "run"
    with pytest.raises(UserError, match="no such folder"):
        load(str(tmp_path / "nothing"))


def test_hash_routing_shows_each_expert_its_own_tokens():
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=257,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
        )  # fmt: skip
    )
    shunter.sparsify(model, 4, "hash")
    ids = {"a": torch.randint(0, 20, (6, 32)), "b": torch.randint(20, 40, (6, 32))}
    windows = [Window(row, name) for name, rows in ids.items() for row in rows.tolist()]
    found = specialisation(model, window_material(model, BYTES, windows, ["a", "b"], batch_size=4))
    assert found["domains"] == ["a", "b"]
    for name, layer in shunter.moe_layers(model).items():
        table, seen = layer.router.table, found["layers"][name]
        for domain, windows in ids.items():
            expected = torch.bincount(table[windows.flatten()], minlength=4) / windows.numel()
            assert torch.allclose(torch.tensor(seen["domains"][domain]), expected)
        assert abs(sum(seen["load"]) - 1) < 1e-6
        for expert, tokens in enumerate(seen["tokens"]):
            assert tokens
            for text, share, lift in tokens:
                [i] = [i for i in range(257) if BYTES.decode([i]) == text]
                assert table[i] == expert
                everything = torch.cat(list(ids.values())).flatten()
                mine = everything[table[everything] == expert]
                assert abs(share - float((mine == i).float().mean())) < 1e-6
                assert abs(lift - share / float((everything == i).float().mean())) < 1e-4
