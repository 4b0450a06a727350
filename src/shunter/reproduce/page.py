"""Kept results to one page in Markdown that follows the review section by section; its numbers are the JSON's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..durable import write
from ..environment import described
from .registry import Reproduction
from .results import NOT_RUN, Result, read, summary

__all__ = ["entry", "write_pages"]


def write_pages(folder: Path, everything: Sequence[Reproduction]) -> None:
    """Write index.md and NAME.md of what a folder of results holds."""
    parts = [_HEAD]
    section = ""
    for one in everything:
        result = read(folder, one.name)
        if one.section != section:
            section = one.section
            parts.append(f"## {section}\n")
        text = entry(one, result, (folder / f"{one.name}.png").is_file())
        if result is None:
            parts.append(f"### {one.title}\n\n{text}")
        else:
            parts.append(f"### [{one.title}]({one.name}.md)\n\n{text}")
            write(folder / f"{one.name}.md", f"# {one.title}\n\n{text}")
    write(folder / "index.md", "\n".join(parts))


_HEAD = """# The review, reproduced

Figures, tables and numbers of Fedus, Dean and Zoph, *A Review of Sparse Expert Models in Deep Learning*
(arXiv 2209.01667), in its order, each computed by a command: `shunter reproduce NAME`. `shunter reproduce` lists them.
This page is made from the JSON files beside it. A claim is *reproduced*, found in the *same direction*, *not
reproduced*, *not possible at this size* (with the reason), or *not run*. Whatever is trained here is tiny and takes
minutes on a CPU, so that "reproduced" means that the claim holds at that size too.
"""


def entry(one: Reproduction, result: Result | None, picture: bool) -> str:
    """What a page says of a reproduction: its claims as a table, the picture, the notes, where it ran."""
    lines = [f"{one.about} Source: {one.source}.", ""]
    if result is None:
        command = f"`shunter reproduce {one.name}` runs it" if one.run else "no command computes it yet"
        return "\n".join([*lines, f"**{NOT_RUN}**: {command}.", ""])
    lines += [f"`shunter reproduce {one.name}`: {summary(result.rows)}.", ""]
    if picture:
        lines += [f"![{one.title}]({one.name}.png)", ""]
    lines += ["| claim | paper | here | verdict |", "|---|---|---|---|"]
    for row in result.rows:
        why = f": {row.why}" if row.why else ""
        lines.append("| " + " | ".join(map(_cell, (row.what, row.paper, row.ours, f"**{row.verdict}**{why}"))) + " |")
    lines += ["", *(line for note in result.notes for line in (note, ""))]
    where = described({"machine": result.machine, "versions": result.versions})
    lines += [f"[{one.name}.json]({one.name}.json); {result.seconds:.0f} s on {where}.", ""]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
