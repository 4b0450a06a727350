"""What the HTML pages share: the templates' environment, how numbers are written, figures as inline SVG."""

from __future__ import annotations

import math

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from .style import printable, to_svg, visible

__all__ = ["NOT_KNOWN", "SHOWN_LAYERS", "environment", "svg"]

NOT_KNOWN = "n/a"
SHOWN_LAYERS = 6  # of a page; further layers are folded away


def environment() -> Environment:
    """Templates of this package: everything escaped, characters made safe to look at, numbers by filters."""
    made = Environment(
        loader=PackageLoader(__package__ or ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
    )
    made.filters |= {"fixed": _fixed, "si": _si, "binary": _binary, "ratio": _ratio, "visible": visible}
    made.filters |= {"signed": _signed, "significant": _significant, "exp": math.exp}
    return made


def _fixed(value: float, digits: int = 3) -> str:
    text = f"{round(value, digits) + 0.0:,.{digits}f}"  # + 0.0: no "-0.00"
    return text.replace("-", "\u2212") if math.isfinite(value) else NOT_KNOWN


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "\u2212") if math.isfinite(value) else NOT_KNOWN


def _significant(value: float, sign: str = "") -> str:
    """Three significant digits, with "+" before what is positive where asked for."""
    return f"{value:{sign}.3g}".replace("-", "\u2212") if math.isfinite(value) else NOT_KNOWN


def _scaled(value: float, base: int, prefixes: tuple[str, ...], unit: str) -> str:
    if not math.isfinite(value):
        return NOT_KNOWN
    power = 0
    while abs(value) >= base and power < len(prefixes) - 1:
        value, power = value / base, power + 1
    whole = power == 0 and value == int(value)
    digits = 0 if whole else max(0, 2 - int(math.log10(max(abs(value), 1))))
    return f"{value:.{digits}f}\u00a0{prefixes[power]}{unit}".strip()


def _si(value: float, unit: str = "") -> str:
    """Three significant digits with an SI prefix: 1234567 is "1.23 M", unbroken."""
    return _scaled(value, 1000, ("", "k", "M", "G", "T", "P", "E"), unit)


def _binary(value: float) -> str:
    """Bytes with a binary prefix: 1536 is "1.50 KiB", unbroken."""
    return _scaled(value, 1024, ("", "Ki", "Mi", "Gi", "Ti"), "B")


def _ratio(sparse: float, dense: float) -> str:
    """Sparse over dense as "1.41×"."""
    return f"{sparse / dense:.2f}×" if dense and math.isfinite(sparse / dense) else NOT_KNOWN


def svg(figure: Figure, name: str, title: str) -> Markup:
    """A figure as inline SVG for a template; `name` keeps its ids apart on the page."""
    return Markup(to_svg(figure, name, printable(title)))
