"""The advice, and what the review says of sparse and dense models as its consequences."""

import itertools
import json
import random

import pytest
import torch

from shunter.cli import main
from shunter.errors import UserError
from shunter.simulate.advise import EXPERTS, FREQUENCIES, LAW, Budget, _long, advise, dropped, effective, loss, shape
from shunter.simulate.ledger import PUBLISHED, ledger

from ..helpers import deviation

GIB = 2**30


@pytest.fixture(scope="module")
def ample():
    return advise(Budget(1e21, 80 * GIB, 64, 50e9))


def test_a_fixed_budget_of_operations_and_much_memory_is_sparse(ample):
    assert ample.best.experts > 1 and ample.best.loss < ample.dense.loss
    assert ample.best.step.fits and ample.best.effective > ample.dense.effective
    assert ample.choices[0] is ample.best and {c.experts for c in ample.choices} == {1, *EXPERTS}


def test_one_expert_is_a_dense_model(ample):
    size = 10 ** random.uniform(7.5, 10)
    assert effective(size, 1, 0.5, 1.0) == size
    assert shape(size, 1, 0.5) == shape(size)
    assert ample.dense.effective == pytest.approx(ample.dense.parameters, rel=0.1)  # embeddings and rounded widths


def test_as_few_as_two_experts_help():
    size = 10 ** random.uniform(7, 11)
    for frequency in FREQUENCIES:
        assert size < effective(size, 2, frequency, 2.0) < effective(size, 4, frequency, 2.0)


def test_beyond_the_cut_off_they_do_not():
    size = 10 ** (LAW.log10_cutoff + random.uniform(0.1, 1))
    assert all(effective(size, experts, 0.5, 2.0) < size for experts in EXPERTS)


def test_a_parameter_is_worth_more_in_a_dense_model(ample):
    for choice in ample.choices:
        if choice.experts > 1:
            assert choice.effective < choice.parameters
            assert loss(choice.effective, 1e11) > loss(choice.parameters, 1e11)


def test_little_memory_is_dense():
    found = advise(Budget(1e21, 24 * GIB, 1, 50e9))
    assert found.best.experts == 1 and all(not choice.step.fits for choice in found.choices[1:])
    assert any("GiB of a device's 24" in reason for reason in found.reasons)


def test_more_devices_and_more_memory_hold_more_experts():
    few, many, more = (
        advise(Budget(1e21, memory * GIB, n, 50e9)).best.experts for n, memory in ((8, 40), (64, 40), (8, 192))
    )
    assert few < many and few < more


def test_a_slower_network_has_fewer_expert_layers(ample):
    slower = [advise(Budget(1e21, 80 * GIB, 64, speed)).best for speed in (2e9, 1e9)]
    often = [choice.frequency for choice in (ample.best, *slower)]
    assert often == sorted(often, reverse=True) and often[0] > often[-1] == 0
    losses = [choice.loss for choice in (ample.best, *slower)]
    assert losses == sorted(losses)


def test_capacity_trades_drops_for_rows(ample):
    alike = [c for c in ample.choices if (c.experts, c.frequency) == (ample.best.experts, ample.best.frequency)]
    by_capacity = sorted(alike, key=lambda choice: choice.capacity_factor)
    for less, more in itertools.pairwise(by_capacity):
        assert less.tokens > more.tokens and less.effective < more.effective


def test_drops_are_those_of_drawn_loads():
    factor, spread, draws = random.uniform(0.8, 2), random.uniform(0.1, 0.5), 200_000
    over = (1 + spread * torch.randn(draws, dtype=torch.float64) - factor).clamp(0, 8 * spread)
    assert abs(over.mean() - dropped(factor, spread)) < deviation(draws, width=8 * spread)


def test_no_model_fits_into_nothing():
    with pytest.raises(UserError, match="no dense model fits into 100,000 bytes a device"):
        advise(Budget(1e21, 1e5, 8, 1e9))


def test_what_is_counted_is_the_model_that_is_trained():
    """Widths are rounded: the parameters said are those of the shape whose steps are timed, at any budget."""
    for flops in (1e14, 10 ** random.uniform(14, 22)):
        found = advise(Budget(flops, 80 * GIB, 8, 50e9))
        width, rest = divmod(round(found.dense.parameters - found.dense.effective), 32000)  # of the embeddings
        blocks = found.dense.effective / (12 * width**2)
        assert not rest and not width % 128 and blocks == round(blocks) >= 2
        assert 6 * found.dense.effective * found.dense.tokens == pytest.approx(flops)


@pytest.mark.parametrize(
    "days, said", [(2.5, "2.5 days"), (0.5, "12 hours"), (1.5 / 1440, "1.5 minutes"), (1e-6, "0.0864 seconds")]
)
def test_times_are_in_units_that_people_read(days, said):
    assert _long(days) == said


def test_the_command(capsys):
    args = ["advise", "--flops", "1e21", "--memory", "80GiB", "--devices", "64", "--bandwidth", "50GB"]
    assert main(args) == 0
    said = capsys.readouterr().out
    assert said.startswith("A sparse model: ") and said.count("\n- ") >= 5
    assert main([*args, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert f"{found['choices'][0]['experts']} experts" in said.splitlines()[0]
    assert main([*args[:-1], "50 GB/s", "--flops", "1E21", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found
    for option, wrong in (
        ("devices", "0"), ("flops", "many"), ("memory", "-1"), ("bandwidth", "0"), ("memory", "1e15e3"),
        ("flops", "8GiB"), ("memory", "80GB/s"), ("device-flops", "989TB"), ("bandwidth", "400Gb/s"),
    ):  # fmt: skip
        assert main([*args, f"--{option}", wrong]) == 2, wrong
        error = capsys.readouterr().err
        assert f"--{option} {wrong}" in error.replace("'", "") and error.count("\n") == 1
    assert main([*args, "--memory", "80"]) == 2
    assert "80 bytes a device" in capsys.readouterr().err, "a unit that is missing is seen"


def test_the_ledger_counts_the_eight_models(capsys):
    rows = {row["name"]: row for row in ledger()}
    assert len(rows) == len(PUBLISHED) == 8
    said = {"Switch-Base": 7.440, "Switch-Large": 27.15, "Switch-XXL": 394.7, "Switch-C": 1571.4, "ST-MoE-32B": 269.10}
    for name, total in said.items():
        assert rows[name]["total"] / 1e9 == pytest.approx(total, rel=5e-4)
    assert rows["GShard 600B"]["parameters"]["experts"] / 1e9 == pytest.approx(618.5, abs=0.1)
    assert rows["GLaM 64B/64E"]["total"] / 1e9 == pytest.approx(1161.7, abs=0.1)
    note = rows["Switch-XXL"]["note"]
    assert "64 experts, which make 201 B" in note and "128" in note and "misprint" in note
    assert all(row["note"] for row in rows.values() if abs(row["error"]) > 0.01)
    assert main(["simulate", "--ledger"]) == 0
    assert "394.67 B" in capsys.readouterr().out
