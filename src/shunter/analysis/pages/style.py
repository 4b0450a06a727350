"""The style of every figure and page: colours and fonts, figures to SVG, text made safe to show."""

from __future__ import annotations

import html
import io
import re
import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

SYMBOLS = {" ": "\u2423", "\n": "⏎", "\t": "⇥"}
SPACES = {" ", "\n", "\t", "\u00a0"}
UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs"}  # Unicode categories


def visible(token: str) -> str:
    """A token with every character visible: whitespace as a symbol, other unseen characters as their code point."""
    if token and unicodedata.category(token[0]).startswith("M"):
        token = "\u25cc" + token  # a combining mark needs a base, here the dotted circle
    return "".join(_symbol(character) for character in token) or "(empty)"


def printable(text: str) -> str:
    """`text` with each character that is invisible, ill-formed or reorders its surroundings as its code point, such as
    ⟨U+202E⟩; ordinary spaces, tabs and line ends stay."""
    return "".join(character if character in SPACES else _named(character) for character in text)


def _symbol(character: str) -> str:
    if character in SYMBOLS.values():
        return _code(character)  # a real one is not mistaken for a space
    return SYMBOLS.get(character) or _named(character)


def _named(character: str) -> str:
    return _code(character) if unicodedata.category(character) in UNSEEN else character


def _code(character: str) -> str:
    return f"⟨U+{ord(character):04X}⟩"


COLOUR_MAP = "cividis"  # even lightness, the same to colour-blind readers
MAX_LABELS = 16  # of experts along an axis


@dataclass(frozen=True)
class Palette:
    """Colours of a figure, each as #rrggbb."""

    ink: str
    grid: str
    dense: str
    sparse: str

    def of(self, model: str) -> str:
        """The colour of `model`, "dense" or "sparse"."""
        return self.dense if model == "dense" else self.sparse


PAPER = Palette(ink="#1f2328", grid="#d5d9de", dense="#b84e00", sparse="#0067a8")

# Placeholders: `to_svg` puts the page's own colours, light or dark, in their place.
THEME = Palette(ink="#010101", grid="#020202", dense="#030303", sparse="#040404")
THEME_CSS = {
    THEME.ink: "currentColor",
    THEME.grid: "var(--grid)",
    THEME.dense: "var(--dense)",
    THEME.sparse: "var(--sparse)",
}


@contextmanager
def style(palette: Palette) -> Iterator[None]:
    """Draw and save figures inside this context: fonts, spines and colours of every figure here."""
    settings: Any = {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": palette.grid,
        "grid.linewidth": 0.6,
        "axes.linewidth": 0.7,
        "legend.frameon": False,
        "svg.fonttype": "none",
        "svg.hashsalt": "shunter",
        "text.parse_math": False,
        "axes.formatter.use_mathtext": False,
        "figure.dpi": 100,
        "savefig.dpi": 200,
    }
    for key in ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"):
        settings[key] = palette.ink
    with rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        yield


def to_svg(figure: Figure, name: str, title: str) -> str:
    """`figure` as an inline <svg> titled `title`; `name` (letters, digits, hyphens) keeps its ids apart on the page."""
    buffer = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    view = re.search(r'viewBox="([^"]*)"', svg)
    assert view, "matplotlib writes a viewBox"
    title = html.escape(title)
    opening = f'<svg viewBox="{view[1]}" role="img" aria-label="{title}"><title>{title}</title>'
    svg = opening + svg[svg.index(">") + 1 :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    for placeholder, colour in THEME_CSS.items():
        svg = svg.replace(placeholder, colour)
    return svg


def shorten(name: str, width: int = 16) -> str:
    """`name` made printable and cut to `width` characters with an ellipsis, for a label."""
    name = printable(name)
    return name if len(name) <= width else name[: width - 1] + "…"
