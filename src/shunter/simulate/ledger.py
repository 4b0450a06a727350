"""The ledger of the published models of the review's section 5.1: parameters and operations from their shapes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .shapes import ModelShape, load_model

__all__ = ["PUBLISHED", "ledger", "markdown"]

PUBLISHED = {
    "shazeer-131072": 137e9,
    "switch-base": 7.41e9,
    "switch-large": 26e9,
    "switch-xxl": 395e9,
    "switch-c": 1571e9,
    "st-moe-32b": 269e9,
    "gshard-600b": 600e9,
    "glam-64b-64e": 1.2e12,
}
"""By description the parameters that its paper states."""


def ledger() -> list[dict[str, Any]]:
    """For each model: its name, source, parameters by part, in all and those of a token, what was published, forward
    FLOPs of a token at its sequence length, and a note where the count and the paper disagree."""
    return [_row(load_model(name), published) for name, published in PUBLISHED.items()]


def _row(model: ModelShape, published: float) -> dict[str, Any]:
    return {
        "name": model.name,
        "source": model.source,
        "parameters": model.parameters,
        "total": model.total,
        "published": published,
        "error": model.total / published - 1,
        "active": model.active,
        "flops": sum(model.flops().values()),
        "note": _note(model, published),
    }


def _note(model: ModelShape, published: float) -> str:
    if model.name == "Switch-XXL":
        fewer = replace(model, experts=64).total
        return (
            f"table 9 prints 64 experts, which make {fewer / 1e9:.0f} B; 128, as the released configuration has, make "
            f"the {published / 1e9:.0f} B that the same table states: 64 is a misprint"
        )
    if model.name == "GShard 600B":
        experts = model.parameters["experts"]
        return (
            f"the paper rounds: experts alone are {experts / 1e9:.0f} B; sizes of attention are not published in full"
        )
    if model.name == "Switch-Large":
        return "the shape makes more than the paper states; not explained"
    if abs(model.total / published - 1) > 0.01:
        return "the paper states a rounded number"
    return ""


def markdown(rows: list[dict[str, Any]]) -> str:
    """The ledger as a page."""
    lines = [
        "# Published sparse models, counted",
        "",
        "Written by `shunter simulate --ledger`, from the shapes in `src/shunter/simulate/models/`. Matrices are "
        "counted (attention, blocks, experts, routers, embeddings of input and output), norms and biases are not; of a "
        "token those that multiply for it, in encoder and decoder together. FLOPs are of one token forward, scores "
        "over half of the sequence.",
        "",
        "| model | parameters | published | error | of which experts | of a token | GFLOP a token | |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        experts = row["parameters"]["experts"] / row["total"]
        lines.append(
            f"| {row['name']} | {row['total'] / 1e9:,.2f} B | {row['published'] / 1e9:,.4g} B | {row['error']:+.1%} | "
            f"{experts:.1%} | {row['active'] / 1e9:.2f} B | {row['flops'] / 1e9:.2f} | {row['note']} |"
        )
    return "\n".join(lines) + "\n"
