"""The bench of offloading: its choices, and a run of it in small."""

import random

import pytest

from shunter.benchmarks.offload import CONTESTANTS, Setting, bench, choices, markdown, right


def test_choices_are_different_stay_and_are_the_same_for_a_seed():
    setting = Setting(layers=2, experts=6, top_k=3, seed=random.randrange(2**31))
    found = choices(setting, 400)
    assert found == choices(setting, 400) != choices(Setting(2, 6, 3, seed=setting.seed + 1), 400)
    assert all(len(set(own)) == 3 and set(own) <= set(range(6)) for token in found for own in token)
    always = choices(Setting(2, 6, 3, persistence=1.0), 5)
    assert all(token == always[0] for token in always)


@pytest.mark.slow
def test_a_small_run_gives_the_same_bits(monkeypatch):
    monkeypatch.delitem(CONTESTANTS, "memory map 2/3")  # under so small a limit the program itself would thrash
    setting = Setting(layers=2, experts=8, dim=64, hidden=64, warm_up=4, tokens=4)
    found = bench(setting, rounds=1)
    assert right(found) and set(found["results"]) == set(CONTESTANTS)
    assert all(row["same_bits"] for row in found["results"].values())
    row = found["results"]["offload 1/3"]
    assert row["hits"] + row["misses"] == 2 * 2 * (1 + 4 + 4)  # layers x k x tokens
    assert "| offload 1/3 |" in markdown(found)
