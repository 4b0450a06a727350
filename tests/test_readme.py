"""The code in README, CONTRIBUTING and the pages of docs runs as it stands."""

import re
from pathlib import Path

import pytest

from shunter import routers

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/balance.md"])
def test_python_blocks_run(page, tmp_path, monkeypatch):
    """Each block by itself; those of a page of docs one after the other."""
    monkeypatch.chdir(tmp_path)
    before = dict(routers.registry._ROUTERS)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    names: dict = {}
    try:
        for block in blocks:
            exec(compile(block, page, "exec"), names if page.startswith("docs/") else {})
    finally:
        routers.registry._ROUTERS.clear()
        routers.registry._ROUTERS.update(before)


def test_readme_names_routers_that_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.search(r"\| who decides \|.*?\n\n", text, re.DOTALL)
    named = {name for cell in re.findall(r"^\|[^|]*\|(.*)\|$", rows.group(), re.MULTILINE) for name in _code(cell)}
    assert named == set(routers.names())


def _code(text):
    return re.findall(r"`(\w+)`", text)
