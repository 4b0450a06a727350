"""Text made safe to show, and figures that need nothing but the style."""

import subprocess
import sys

import pytest

pytest.importorskip("matplotlib")

from shunter.analysis.pages.style import printable, shorten, visible
from tests.helpers import TIME_LIMIT


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (" the", "␣the"),
        ("\n\t\r", "⏎⇥⟨U+000D⟩"),
        ("\x00\x7f", "⟨U+0000⟩⟨U+007F⟩"),
        ("\u202e", "⟨U+202E⟩"),
        ("\u00a0", "⟨U+00A0⟩"),
        ("\ud800", "⟨U+D800⟩"),
        ("\u0301x", "\u25cc\u0301x"),
        ("", "(empty)"),
        ("␣", "⟨U+2423⟩"),
        ("é漢\ufffd", "é漢\ufffd"),
    ],
)
def test_tokens_are_visible(token, shown):
    assert visible(token) == shown


def test_printable_keeps_ordinary_text():
    assert printable("a b\n\tc: é\x00") == "a b\n\tc: é⟨U+0000⟩"


def test_labels_are_cut_and_safe():
    assert shorten("x" * 16) == "x" * 16 and shorten("x" * 17) == "x" * 15 + "…"
    assert shorten("\u202eab") == "⟨U+202E⟩ab"


def test_a_figure_needs_neither_a_run_nor_an_inspection():
    code = """
import sys
from matplotlib.figure import Figure
from shunter.analysis.pages.style import THEME, style, to_svg
with style(THEME):
    figure = Figure()
    figure.add_subplot().plot([0, 1], color=THEME.sparse)
    svg = to_svg(figure, "a", "<b>")
assert svg.startswith("<svg") and "&lt;b&gt;" in svg and "var(--sparse)" in svg and THEME.ink not in svg
assert not {"transformers", "shunter.analysis.runs", "shunter.analysis.inspect.inspecting"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=TIME_LIMIT)
