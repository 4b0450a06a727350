"""The check of pages in a browser sees what it is for."""

import pytest

from tests.recipes.browser import BROWSER, complaints


@pytest.mark.skipif(BROWSER is None, reason="no browser is installed")
@pytest.mark.parametrize(
    "content, said",
    [
        ("<p>" + "word " * 200, ""),
        ("<p>" + "word " * 200 + '<div style="overflow-x: auto"><pre>' + "x" * 400 + "</pre></div>", ""),
        ("<p>" + "word " * 200 + '<div class="fixed" style="width: 800px">wide</div>', "at 390 pixels it takes"),
        ("<p>few", "letters"),
        ("<p>" + "word " * 200 + "<script>nothing()</script>", "CONSOLE"),
    ],
)
def test_what_is_wrong_with_a_page_is_told(content, said, tmp_path):
    page = tmp_path / "report.html"
    page.write_text(f"<!doctype html><meta charset=utf-8><body>{content}", encoding="utf-8")
    found = complaints(page, tmp_path / "browser")
    assert bool(found) == bool(said) and said in " ".join(found)
