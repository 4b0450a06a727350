"""Removing experts: the rise of the loss equals that of an independent loop, in any family."""

import copy
import math

import pytest
import torch

from shunter.analysis.inspect.inspecting import Inspected, inspect
from shunter.analysis.inspect.recording import batch_losses
from shunter.hf.observe.taps import taps
from tests.analysis.inspect.subjects import EXPERTS, material_of, mixtral, sparse
from tests.hf import families


def _rows_of(found):
    return [(name, e, row) for name, layer in found["layers"].items() for e, row in enumerate(layer["ablation"]) if row]


def test_removing_an_expert_equals_an_independent_loop(monkeypatch):
    """Against the layer with the expert's triples taken out of the routing; and transformers' against zero weights."""
    subject = sparse("topk", top_k=2, backend="reference")
    other = Inspected("mixtral", mixtral(), None)
    for one in (subject, other):
        material = material_of(one, tokens=400)
        before = copy.deepcopy(one.model.state_dict())
        found = inspect(one, material, quiet=True)["models"][0]
        assert all(torch.equal(before[name], value) for name, value in one.model.state_dict().items())
        whole = torch.cat([batch_losses(one.model, batch) for batch in material.batches]).nanmean()
        assert found["loss"] == pytest.approx(float(whole), rel=1e-5)
        rows = _rows_of(found)
        assert len(rows) == 2 * EXPERTS
        for name, expert, row in rows:
            experts = one.model.get_submodule(name).experts
            if one is subject:
                inner = experts.forward
                kept = {"forward": lambda x, routing, e=expert, f=inner: f(x, routing.select(routing.expert != e))}
                monkeypatch.setattr(experts, "forward", kept["forward"])
                alone = torch.cat([batch_losses(one.model, batch) for batch in material.batches])
                monkeypatch.setattr(experts, "forward", inner)
            else:
                hook = experts.register_forward_pre_hook(
                    lambda m, args, e=expert: (args[0], args[1], args[2].masked_fill(args[1] == e, 0.0))
                )
                alone = torch.cat([batch_losses(one.model, batch) for batch in material.batches])
                hook.remove()
            assert row["rise"] == pytest.approx(float(alone.nanmean() - whole), abs=2e-5)


def test_the_busiest_experts_are_removed_first_and_the_rest_is_said():
    subject = sparse("topk")
    findings = inspect(subject, material_of(subject, tokens=400), ablations=3, quiet=True)
    found = findings["models"][0]
    assert len(_rows_of(found)) == 3
    for layer in found["layers"].values():
        done = [e for e, row in enumerate(layer["ablation"]) if row]
        assert max(range(EXPERTS), key=lambda e: layer["load"][e]) in done
    assert "3 busiest of" in findings["notices"][0]


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family_of_transformers_is_measured_whole(family):
    """And the rise without an expert is that of the same forward with the expert's combine weights at zero."""
    model = families.build(family, vocab_size=257)
    subject = Inspected(family, model, None)
    material = material_of(subject, tokens=400)
    found = inspect(subject, material, ablations=1, quiet=True)["models"][0]
    assert found["layers"] and math.isfinite(found["loss"])
    for layer in found["layers"].values():
        assert layer["tokens"] == material.tokens and layer["experts_per_token"] == pytest.approx(2)
        assert all(layer[key] is not None for key in ("information", "together", "margins", "tokens_served"))
        assert layer["similarity"].keys() == {"cosine", "gram"}
    [(name, expert, row)] = _rows_of(found)
    experts = taps(model)[name].experts
    if experts is None:  # Llama 4 and JetMoE decide within
        assert math.isfinite(row["rise"])
        return

    def without(module, args):
        return args[0], args[1], args[2].masked_fill(args[1] == expert, 0.0)

    whole = torch.cat([batch_losses(model, batch) for batch in material.batches])
    hook = experts.register_forward_pre_hook(without)
    alone = torch.cat([batch_losses(model, batch) for batch in material.batches])
    hook.remove()
    assert row["rise"] == pytest.approx(float((alone - whole).nanmean()), abs=2e-5)
