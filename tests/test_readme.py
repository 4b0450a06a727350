"""The code in README, CONTRIBUTING and the pages of docs runs as it stands."""

import re

import pytest

from shunter import routers

from .pages import ROOT, run_page

PAGES = ["README.md", "CONTRIBUTING.md", "docs/balance.md", "docs/layers.md", "docs/training.md", "docs/reliability.md"]


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    """Each block by itself; those of a page of docs one after the other."""
    if "shunter[lora]" in (ROOT / page).read_text(encoding="utf-8"):
        pytest.importorskip("peft")
    run_page(ROOT / page, monkeypatch, tmp_path, together=page.startswith("docs/"))


def test_readme_names_routers_that_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.search(r"\| who decides \|.*?\n\n", text, re.DOTALL)
    named = {name for cell in re.findall(r"^\|[^|]*\|(.*)\|$", rows.group(), re.MULTILINE) for name in _code(cell)}
    assert named == set(routers.names())


def _code(text):
    return re.findall(r"`(\w+)`", text)
