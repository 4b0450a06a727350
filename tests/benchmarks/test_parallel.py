"""`shunter bench parallel` times right contestants: what they compute is what data parallelism does."""

import json

import pytest

from shunter.benchmarks.parallel import PLAIN, SHARDED
from shunter.cli import main


@pytest.mark.slow
def test_the_command_compares_equal_results(tmp_path, capsys):
    arguments = ["--shapes", "64,16,8,8,2", "--rounds", "2", "--out", str(tmp_path), "--json"]
    assert main(["bench", "parallel", *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    (case,) = found["cases"]
    for name, row in case["results"].items():
        assert row["error"] < 1e-5 and row["ms"] > 0, (name, row)
    assert case["results"][SHARDED]["state_bytes"] * 2 == case["results"][PLAIN]["state_bytes"]
    assert found["dispatch_ms"] > 0
    page = (tmp_path / "bench-parallel.md").read_text()
    assert all(f"| {name} |" in page for name in case["results"])


def test_processes_that_do_not_fit(capsys):
    assert main(["bench", "parallel", "--processes", "3"]) == 2
    assert "--processes 3 must divide" in capsys.readouterr().err
