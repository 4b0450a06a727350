"""The table of routers, and routers of other packages."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shunter import routers
from shunter.cli import main
from shunter.routers import LinearRouter, Router, taxonomy
from tests.helpers import TIME_LIMIT

DOCS = Path(__file__).parents[2] / "docs" / "routers.md"
MODULE = """
from shunter import (Routing)
from shunter.routers import (LinearRouter)

class Best(LinearRouter):
    "The best expert of each token."
    chooses = "tokens"
    source = "elsewhere"

    def choose(self, logits, context):
        value, index = logits.softmax(-1).max(-1, keepdim=True)
        return Routing.from_topk(index, value, self.num_experts)
"""


def test_every_router_has_a_row_that_says_what_it_is():
    rows = {row.name: row for row in taxonomy.taxonomy()}
    assert set(rows) == set(routers.names())
    for name, row in rows.items():
        cls = routers.find(name)
        router = routers.create(name, 64, 8, **cls.example_options)
        assert row.in_review is cls.in_review and row.source == cls.source
        assert (row.tokens == "dropless") is (router.capacity_factor is None)
        assert (row.causal == "yes") is (router.leak is None)
        assert (row.causal == "no") is (router.eval().leak is not None)
    assert rows["base"].causal == "in evaluation"


def test_the_page_is_what_the_command_prints(capsys):
    assert main(["routers", "--format", "markdown"]) == 0
    assert capsys.readouterr().out == DOCS.read_text(encoding="utf-8")


def test_the_command_prints_tables_and_json(capsys):
    assert main(["routers"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in routers.names())
    assert main(["routers", "--format", "json"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == [r.name for r in taxonomy.taxonomy()]


def test_a_router_of_another_package_is_found_by_name(tmp_path):
    (tmp_path / "elsewhere.py").write_text(MODULE)
    info = tmp_path / "elsewhere-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: elsewhere\nVersion: 1.0\n")
    points = "[shunter.routers]\nbest = elsewhere:Best\nbroken = elsewhere:Missing\n"
    (info / "entry_points.txt").write_text(points)
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import torch, shunter
from shunter import (routers)
assert "best" in routers.names()
moe = shunter.MoE(8, 8, 4, router="best", load_balancing_loss=0.01)
moe(torch.randn(5, 8)).sum().backward()
assert type(moe.router).__module__ == "elsewhere"
try:
    routers.find("broken")
except ValueError as error:
    assert "elsewhere:Missing cannot be loaded" in str(error), error
else:
    raise AssertionError
from shunter.recipes.text import (TextConfig)
from shunter.recipes.config import (load_config)
assert load_config(TextConfig, None, ["sparse.router=best"]).sparse.router == "best"
import warnings
warnings.simplefilter("ignore")
from shunter.routers.taxonomy import (taxonomy)
assert [row.source for row in taxonomy() if row.name == "best"] == ["elsewhere"]
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=TIME_LIMIT)


def test_a_router_that_cannot_be_made_is_left_out_with_a_warning():
    class Demanding(LinearRouter):
        chooses = "tokens"
        source = "here"

        def __init__(self, dim, num_experts, *, colour, **options):
            super().__init__(dim, num_experts, **options)

    routers.register("demanding", Demanding)
    try:
        with pytest.warns(UserWarning, match="'demanding' is left out of the table: .*colour"):
            rows = taxonomy.taxonomy()
        assert "demanding" not in [row.name for row in rows]
    finally:
        del routers.registry._ROUTERS["demanding"]


def test_a_class_works_in_place_of_a_name():
    assert isinstance(routers.create(routers.TopK, 6, 4, top_k=1), Router)
    assert torch.equal(
        routers.create(routers.TopK, 6, 4).eval().assign(torch.eye(4)).dense(),
        routers.create("topk", 6, 4).eval().assign(torch.eye(4)).dense(),
    )
