"""The bench of offloading: its choices, the gates that take them, and a run of it in small."""

import random

import pytest
import torch
from transformers import AutoModelForCausalLM

from shunter.benchmarks.offload import (
    _VOCABULARY,
    CONTESTANTS,
    Setting,
    _config,
    _plant,
    bench,
    choices,
    markdown,
    right,
)
from shunter.errors import UserError
from shunter.experts.foresight import Foresight


def test_choices_are_different_stay_and_are_the_same_for_a_seed():
    setting = Setting(layers=3, experts=8, top_k=3, seed=random.randrange(2**31))
    found = choices(setting, 400)
    assert found == choices(setting, 400) != choices(Setting(3, 8, 3, seed=setting.seed + 1), 400)
    for token in found:
        for layer, choice in enumerate(token):
            assert -1 <= choice.decided < layer or choice.decided == -1
            taken = choice.experts + choice.before
            assert len(set(taken)) == len(taken) == (3 if choice.decided < 0 else 6) and set(taken) <= set(range(8))
    always = choices(Setting(2, 6, 3, persistence=1.0, late=0.0), 5)
    assert all(token == always[0] and token[1].decided == -1 for token in always)
    assert all(token[1].decided == 0 for token in choices(Setting(2, 6, 3, late=1.0), 5))


def test_gates_choose_by_the_trace_and_other_routers_foresee_what_no_layer_decides_meanwhile():
    setting = Setting(layers=4, experts=6, dim=64, hidden=32, late=0.4, seed=random.randrange(2**31))
    trace = choices(setting, _VOCABULARY)
    model = AutoModelForCausalLM.from_config(_config(setting)).eval()
    _plant(model, setting, trace)
    given = []
    for layer in model.model.layers:
        layer.mlp.experts.register_forward_pre_hook(lambda module, args: given.append(args[:2]))
    ids = random.sample(range(_VOCABULARY), 60)
    with torch.no_grad():
        model(torch.tensor([ids]))
    foresight = Foresight([(layer.mlp.gate.weight, None) for layer in model.model.layers])
    late = 0
    for layer, (hidden, index) in enumerate(given):
        for token, x, chosen in zip((trace[i] for i in ids), hidden, index, strict=True):
            assert set(chosen.tolist()) == set(token[layer].experts)
            foreseen = foresight.foresee(layer, x[None], 2)
            assert [distance for distance, _ in foreseen] == list(range(1, 4 - layer))
            for distance, experts in foreseen:
                choice = token[layer + distance]
                late += choice.decided >= layer
                assert set(experts) == set(choice.before if choice.decided >= layer else choice.experts)
    assert late


def test_a_model_too_narrow_for_its_choices_is_refused():
    with pytest.raises(UserError, match="need a width of at least 509 and experts of at least 224, not 508 and 223"):
        Setting(dim=508, hidden=223)


@pytest.mark.slow
def test_a_small_run_gives_the_same_bits(monkeypatch):
    monkeypatch.delitem(CONTESTANTS, "memory map 2/3")  # under so small a limit the program itself would thrash
    setting = Setting(layers=2, experts=8, dim=64, hidden=64, warm_up=4, tokens=4)
    found = bench(setting, rounds=1)
    assert right(found) and set(found["results"]) == set(CONTESTANTS)
    assert all(row["same_bits"] for row in found["results"].values())
    for name in ("offload 1/3", "offload 1/3, no prefetch"):
        row = found["results"][name]
        assert row["hits"] + row["misses"] == 2 * 2 * (1 + 4 + 4)  # layers x k x tokens
        assert f"| {name} |" in markdown(found)
