"""The review's taxonomy as a table: what each router does with its default options."""

from __future__ import annotations

import warnings
from typing import NamedTuple

from .registry import create, find, names

__all__ = ["Row", "markdown", "plain", "taxonomy"]

CHOOSERS = {
    "tokens": "tokens choose",
    "experts": "experts choose",
    "both": "tokens apply, experts choose",
    "global": "decided globally",
    "fixed": "fixed",
    "all": "all experts",
    "slots": "slots mix all tokens",
}
"""What `Router.chooses` may be, in words, in the order of the table."""

_TITLE = """# Routers

Each with its default options, as `shunter routers --format markdown` prints it. Options change what is said here:
`capacity_factor=None` makes a router dropless; a capacity with more than one choice is not causal-safe. Causal-safe
means that a later token can never change what an earlier one gets. `shunter.routers.options(name)` lists a router's
options, `help(shunter.routers.find(name))` explains them."""


class Row(NamedTuple):
    """What one router does with its default options."""

    name: str
    chooses: str
    tokens: str
    needs: str
    losses: str
    causal: str
    in_review: bool
    source: str


def taxonomy() -> list[Row]:
    """A row for every known router, those of other packages included, by who chooses; what came after the review last.

    A router that cannot be made is left out with a warning.
    """
    rows = []
    for name in names():
        try:
            rows.append(_row(name))
        except Exception as error:
            warnings.warn(f"router {name!r} is left out of the table: {error}", stacklevel=2)
    order = list(CHOOSERS.values())
    return sorted(rows, key=lambda row: (not row.in_review, order.index(row.chooses)))


def _row(name: str) -> Row:
    cls = find(name)
    router = create(name, 64, 8, **cls.example_options)
    factor = router.capacity_factor
    training, evaluation = router.leak, router.eval().leak
    causal = "yes" if not training else "no" if evaluation else "in evaluation"
    return Row(
        name=name,
        chooses=CHOOSERS[cls.chooses],
        tokens="dropless" if not factor else f"capacity {factor:g}",
        needs=", ".join(router.required),
        losses=", ".join(key.removesuffix("_loss") for key, c in router.coefficients.items() if c),
        causal=causal,
        in_review=cls.in_review,
        source=cls.source,
    )


def markdown(rows: list[Row]) -> str:
    """The table as a page in Markdown, one part for the review and one for what came after."""
    parts = [_TITLE]
    for in_review, title in ((True, "In the review"), (False, "After the review")):
        lines = [
            f"## {title}",
            "",
            "| router | who decides | tokens | needs | losses | causal-safe | source |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in rows:
            if row.in_review is in_review:
                cells = [f"`{row.name}`", row.chooses, row.tokens, row.needs, row.losses, row.causal, row.source]
                lines.append("| " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def plain(rows: list[Row]) -> str:
    """The table for a terminal, columns aligned."""
    lines = [("router", "who decides", "tokens", "needs", "losses", "causal-safe", "source")]
    lines += [(r.name, r.chooses, r.tokens, r.needs, r.losses, r.causal, r.source) for r in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    later = sum(row.in_review for row in rows) + 1
    return "\n".join([*text[:later], "", "after the review", *text[later:]])
