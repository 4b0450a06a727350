"""Findings: planted routing is named, with its tokens, domains, patches and drops."""

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

import shunter
from shunter.analysis.inspect.inspecting import Inspected, inspect
from shunter.analysis.inspect.material import image_material, text_material
from shunter.analysis.pages.inspect_page import LABELS, render
from shunter.data.documents import Domain
from tests.analysis.inspect.subjects import (
    BYTES,
    EXPERTS,
    MARK,
    RULES,
    Planted,
    letters,
    material_of,
    random_documents,
    sparse,
    vit,
)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("label", RULES)
def test_planted_specialisation_is_named(plant, label):
    plant(RULES[label])
    subject = sparse("planted")
    if label == "language":  # of one domain alone, or a language would tell nothing that the domain does not
        third = Domain("b", [letters(400)] * 6, languages=["z"] * 6)
        documents = [random_documents()[1], third]
        material = text_material(subject.model, BYTES, documents, tokens=6000, length=32)
    else:
        material = material_of(subject)
    findings = inspect(subject, material, ablations=0, quiet=True)
    for layer in findings["models"][0]["layers"].values():
        if label is None:
            assert layer["follows"] is None
            assert all(abs(row["adjusted"]) < 0.05 for row in layer["information"].values() if row["adjusted"])
        else:
            assert layer["follows"]["label"] == label
            assert layer["follows"]["part"] == pytest.approx(1, abs=1e-6)
            row = layer["information"][label]
            assert row["bits"] == pytest.approx(row["entropy"], abs=1e-6)
    page = render(findings)
    if label is None:
        assert "None of the labels looked at decides" in page
    else:
        assert f"In all layers {LABELS[label]} decides most: 100\u00a0% of the routing" in page


def test_a_planted_expert_shows_its_tokens_its_domain_and_the_dead(plant):
    plant(lambda ids, sequence, position: (ids == MARK).long())
    subject = sparse("planted")
    findings = inspect(subject, material_of(subject), ablations=0, quiet=True)
    for layer in findings["models"][0]["layers"].values():
        assert layer["dead"] == [2, 3]
        [[text, share, lift]] = layer["tokens_served"][1]
        assert text == "Q" and share == 1 and lift > 5
        assert layer["serves"]["domain"]["a"][1] == 0 < layer["serves"]["domain"]["b"][1]
        assert layer["experts_per_token"] == 1 and layer["together"] is None
        assert layer["balance"] == pytest.approx(EXPERTS * max(layer["load"]))


def test_routing_that_is_capped_reports_its_drops():
    subject = sparse("switch", capacity_factor=0.5, eval_capacity_factor=0.5, allow_leak=True)
    layer = next(
        iter(inspect(subject, material_of(subject, 2000), ablations=0, quiet=True)["models"][0]["layers"].values())
    )
    assert layer["dropped"] > 0.3
    assert sum(layer["load"]) == pytest.approx(1)


def test_patches_are_those_that_the_layer_routed(monkeypatch, tmp_path, plant):
    """By position: the patch at place p of an image is the layer's token p + 1 of it, after the class token."""
    plant(None)
    monkeypatch.setattr(Planted, "needs", ("position",))
    monkeypatch.setattr(
        Planted, "score", lambda self, x, context: torch.nn.functional.one_hot(context.position % EXPERTS).float()
    )
    model, images = vit(tmp_path)
    shunter.sparsify(model, EXPERTS, "planted")
    material = image_material(model, tmp_path, [str(images)], tokens=160)
    findings = inspect(Inspected("vit", model, tmp_path), material, ablations=0, quiet=True)
    for layer in findings["models"][0]["layers"].values():
        assert layer["follows"] == {"label": "position", "part": pytest.approx(1, abs=1e-6)}
        for expert, patches in enumerate(layer["patches"]):
            assert len(patches) == 16 and all((patch + 1) % EXPERTS == expert for _, patch, _ in patches)
