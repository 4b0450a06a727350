"""`shunter bench routers` times every router there is, and asks for reasons."""

import json

import pytest

from shunter import routers
from shunter.benchmarks.experts import Shape
from shunter.benchmarks.routers import REASONS, bench, markdown
from shunter.cli import main

TINY = Shape(96, 16, 8, 16, 1)


def test_every_router_is_timed_and_printed():
    found = json.loads(json.dumps(bench(shape=TINY, rounds=1)))
    assert set(found["results"]) == set(routers.names())
    page = markdown(found)
    for name, row in found["results"].items():
        assert row["router_ms"] > 0 and row["layer_ms"] > 0, row
        assert row["share"] == pytest.approx(row["router_ms"] / row["layer_ms"])
        assert f"\n| `{name}` | {row['experts']:.2f} | " in page
    assert found["results"]["soft"]["experts"] == 16 and found["results"]["switch"]["experts"] <= 1


def test_a_share_above_the_limit_stands_with_its_reason():
    rows = {name: {"experts": 1.0, "router_ms": 1.0, "layer_ms": 5.0, "share": 0.2} for name in ("base", "switch")}
    rows["topk"] = {"experts": 1.0, "router_ms": 0.7, "layer_ms": 5.0, "share": 0.14}
    page = markdown(bench(names=["topk"], shape=TINY, rounds=1) | {"results": rows}).split("## Above 15%")[1]
    assert f"| `base` | 20.0% | {REASONS['base']} |" in page
    assert "| `switch` | 20.0% | none is known |" in page and "topk" not in page


def test_reasons_are_for_routers_that_exist():
    assert set(REASONS) <= set(routers.names())


def test_the_command_writes_a_page_and_json(tmp_path, capsys):
    arguments = ["--shape", "40,16,8,4,1", "--routers", "switch", "hash", "--rounds", "1", "--out", str(tmp_path)]
    assert main(["bench", "routers", *arguments]) == 0
    assert (tmp_path / "bench-routers.md").read_text() == capsys.readouterr().out
    assert list(json.loads((tmp_path / "bench-routers.json").read_text())["results"]) == ["switch", "hash"]


@pytest.mark.parametrize(
    "arguments, message",
    [(["--routers", "swich"], "did you mean 'switch'"), (["--shape", "4,4"], "shape '4,4' is neither")],
)
def test_bad_input_ends_in_one_message(arguments, message, capsys):
    assert main(["bench", "routers", *arguments]) == 2
    assert message in capsys.readouterr().err
