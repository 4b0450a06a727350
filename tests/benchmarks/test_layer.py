"""`shunter bench layer` on sizes that take no time: every part is there, and the floor counts what it says."""

import json

import pytest

from shunter.benchmarks import experts as timing
from shunter.benchmarks.layer import PARTS, _floor, bench, markdown
from shunter.cli import main


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(timing, "ROUND_SECONDS", 0.0)


def test_every_part_is_timed_and_shown(tmp_path, capsys):
    arguments = ["--experts", "2", "4", "--tokens", "8", "16", "--dim", "8", "--width", "16", "--rounds", "1"]
    assert main(["bench", "layer", *arguments, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "bench-layer.json").read_text())
    assert [(case["tokens"], case["experts"]) for case in found["cases"]] == [(8, 2), (8, 4), (16, 2), (16, 4)]
    for case in found["cases"]:
        others = {"grouped_mm experts", "grouped_mm forward", "grouped_mm step"}
        assert set(case["ms"]) == {f"auto {part}" for part in PARTS} | others | {"AdamW", "AdamW fused"}
        assert all(ms > 0 for ms in case["ms"].values())
        assert case["parameters"] == 3 * case["experts"] * 8 * 8 + 8 * case["experts"]
    assert (tmp_path / "bench-layer.md").read_text() == markdown(found) == capsys.readouterr().out


def test_the_floor_counts_operations_and_bytes():
    shape = timing.Shape(tokens=10, dim=4, hidden=6, experts=5, top_k=2)
    floor = _floor(shape, 4, peak=1e3, bandwidth=1e3)
    # Three products forward, twice as many backward; a multiply-add counts as 2.
    assert floor["operations_ms"] == 3 * 2 * (10 * 2 * 3 * 4 * 6 + 10 * 4 * 5)
    assert floor["optimizer_ms"] == 4 * 7 * (5 * 3 * 4 * 6 + 4 * 5)
    assert floor["bytes_ms"] == 4 * (3 * (5 * 3 * 4 * 6 + 4 * 5) + 5 * 10 * 4)


@pytest.mark.parametrize(
    "options, message",
    [({"dtype": "float64"}, "'float64' is unknown"), ({"width": 7}, "a multiple of k"), ({"top_k": 9}, "k at most E")],
)
def test_impossible_sizes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        bench([4], [8], **options)
