"""The tutorials run as they stand, and show what they print."""

import re

import pytest

from .pages import ROOT, run_page

FOLDER = ROOT / "docs" / "tutorials"
PAGES = sorted(page.name for page in FOLDER.glob("*.md") if page.name != "index.md")


@pytest.mark.parametrize("page", PAGES)
def test_the_tutorial_runs(page, tmp_path, monkeypatch):
    run_page(FOLDER / page, monkeypatch, tmp_path)


def test_the_index_names_every_tutorial():
    assert sorted(set(re.findall(r"\]\(([\w-]+\.md)\)", (FOLDER / "index.md").read_text(encoding="utf-8")))) == PAGES


def test_output_of_several_lines_is_compared(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    code = '```python\nfor i in range(5):\n    print("line", i)\n```\n'
    page.write_text(f"{code}\n```text\nline 0\n…\nline 3\nline 4\n```\n", encoding="utf-8")
    run_page(page, monkeypatch, tmp_path)


@pytest.mark.parametrize(
    "text, error",
    [
        ("```python\nprint(1)\n```\n\n```text\n2\n```\n", "line 6: the page shows\n2\n\nand this was printed\n1"),
        ("```python\nprint(1)\n```\n\n```text\n1\n…\n2\n```\n", "the page shows"),
        ("```text\n1\n```\n", "no code stands before"),
        ("```python\nassert 1 == 2, 'a false claim'\n```\n", "a false claim"),
        ("```pyhton\nprint(1)\n```\n", "a block of 'pyhton'"),
        ("```console\n$ shunter nothing\n```\n", "shunter nothing"),
        ("```console\n$ shunter routers\nno such table\n```\n", "the page shows\nno such table"),
        ("```console\n$ shunter routers\nshunter routers: refused\n```\n", "shunter routers"),
        ("```console\n$ rm -rf everything\n```\n", "'rm' is not run here"),
        ("Nothing to run.\n", "no block that could run"),
    ],
)
def test_what_is_wrong_on_a_page_is_found(text, error, tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(text, encoding="utf-8")
    with pytest.raises(AssertionError, match=re.escape(error)):
        run_page(page, monkeypatch, tmp_path)
