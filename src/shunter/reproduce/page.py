"""Kept results to one page in Markdown that follows the review section by section; its numbers are the JSON's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..durable import write
from ..environment import described
from ..errors import UserError
from .registry import Reproduction
from .results import NOT_RUN, Result, read, summary

__all__ = ["SECTIONS", "entry", "write_pages"]


SECTIONS = {
    "1 Introduction": "What a layer is: the tutorial `docs/tutorials/layer.md`.",
    "2 Sparse expert models": (
        "2.1, in deep learning: `shunter routers` lists what chooses experts, `docs/layers.md` and "
        "`docs/networks.md` the kinds of experts. 2.2, hardware: several devices (`docs/parallel.md`), "
        "experts larger than memory (`docs/offload.md`), `shunter bench parallel`, `shunter bench experts`."
    ),
    "3 Scaling": (
        "3.1, upstream: `shunter law fit` on any table of runs (`docs/scaling.md`). 3.2, downstream: "
        "`shunter finetune`, and `shunter eval --calibration` for any run or model. 3.3, number, size and frequency of "
        "experts: `shunter simulate` and `shunter advise` (`docs/simulate.md`)."
    ),
    "4 Routing": (
        "4.1, the taxonomy: `shunter routers`, each explained in `docs/routers.md`; `shunter compare text` "
        "trains one after another. 4.2, load balancing: `docs/balance.md`."
    ),
    "5 Domains": (
        "5.1, language: `shunter train text` and `shunter train translation`. 5.2, vision: `shunter train images`. "
        "5.3, speech: `shunter train speech`. 5.4, several at once: `shunter train multimodal`. All in "
        "`docs/recipes/index.md`; `shunter simulate --ledger` counts the models that the review names."
    ),
    "6 When to use sparse and dense models": "For a budget of your own: `shunter advise` (`docs/simulate.md`).",
    "7 Training": (
        "7.1, instability, and 7.2, transfer: guards, losses, roles and fine-tuning in `docs/training.md`, "
        "`shunter finetune`. 7.3, inference: `shunter prune`, `shunter distill`, `shunter extract`, `shunter quantize`."
    ),
    "8 Interpretability": "Of any model: `shunter inspect` (`docs/inspect.md`).",
    "9 Future directions": (
        "Experts that differ in width, depth and kind: `docs/layers.md`; tokens that leave early: `docs/networks.md`."
    ),
    "Numbers that the review quotes": "",
}
"""The review's sections in order, and by which commands and pages a reader follows them."""


def write_pages(folder: Path, everything: Sequence[Reproduction]) -> None:
    """Write index.md and NAME.md of what a folder of results holds."""
    parts = [_HEAD]
    for section, line in SECTIONS.items():
        parts.append(f"## {section}\n" + (f"\n{line}\n" if line else ""))
        for one in everything:
            if one.section != section:
                continue
            try:
                result = read(folder, one.name)
            except UserError:
                parts.append(f"### {one.title}\n\n{_damaged(one)}")
                continue
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
        return "\n".join([*lines, f"**{NOT_RUN}**: `shunter reproduce {one.name}` runs it.", ""])
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


def _damaged(one: Reproduction) -> str:
    return (
        f"{one.about} Source: {one.source}.\n\nIts result is damaged: `shunter reproduce {one.name}` runs it again.\n"
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
