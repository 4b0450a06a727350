"""One model folder made of another: a plan of its tensors, carried out one by one, checked, and kept account of."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...durable import new_folder
from ...environment import VERSION, Memory
from .check import compare_logits
from .reading import Checkpoint, Stored
from .writing import Writer, copy_companions

__all__ = ["Plan", "convert", "describe", "loader_of", "megabytes"]


@dataclass(frozen=True)
class Plan:
    """What a new folder will hold, and what becomes of each tensor of the old one.

    Args:
        source: the old folder's tensors.
        config: the new folder's configuration.
        tensors: name in the new folder -> dtype and shape.
        became: name in the old folder -> {"how": in words, "to": names in the new folder}.
        new: name of a tensor that comes from none of the old ones -> in words.
        values: a tensor's name, how many of its elements come before these, and these; made when they are asked for.
        facts: further entries of the receipt.
        check_dtype: what both models are compared in.
        exact: whether the new model must compute what the old one does.
        measure: what the check of a new model that does not is, from its folder; None compares the logits.
    """

    source: Checkpoint
    config: Any
    tensors: dict[str, Stored]
    became: dict[str, dict[str, Any]]
    new: dict[str, str]
    values: Iterable[tuple[str, int, Tensor]]
    facts: dict[str, Any]
    check_dtype: torch.dtype
    exact: bool
    measure: Callable[[Path], dict[str, Any]] | None = None


def convert(verb: str, plan: Plan, out: Path, memory: Memory, check: bool, max_shard_bytes: int) -> dict[str, Any]:
    """Carry out a plan: `out` appears when it is whole and its receipt.json is written, or not at all.

    Args:
        verb: of the command line, for the receipt.
        plan: what is to be done.
        out: the new folder.
        memory: notes the peak with every tensor.
        check: whether to load both models and compare their logits.
        max_shard_bytes: of a file.

    Returns:
        The receipt.

    Raises:
        UserError: where `out` exists, the disk is full, a tensor cannot be read, or the models compute differently.
    """
    left_over = set(plan.source.tensors) - set(plan.became)
    if left_over:
        raise RuntimeError(f"{len(left_over)} tensors were left over, the first is {min(left_over)!r}; report this")
    with new_folder(out) as folder:
        writer = Writer(folder, plan.tensors, max_shard_bytes)
        for name, offset, tensor in plan.values:
            memory.note()
            writer.write(name, tensor, offset)
        writer.finish()
        plan.config.save_pretrained(folder)
        copy_companions(plan.source.folder, folder)
        receipt = {"made_by": f"shunter {VERSION} {verb}", **plan.facts, "peak_bytes": memory.peak, "check": None}
        if check and plan.measure is not None:
            receipt["check"] = plan.measure(folder)
        elif check:
            receipt["check"] = compare_logits(plan.source.folder, folder, plan.check_dtype, exact=plan.exact)
        receipt |= {"tensors": plan.became, "new": plan.new}
        (folder / "receipt.json").write_text(json.dumps(receipt, indent=1) + "\n", encoding="utf-8")
    return receipt


def describe(receipt: Mapping[str, Any], lines: Iterable[str], other: str) -> str:
    """A receipt in words: lines of the verb's own, and what was measured against the other model."""
    check = receipt["check"]
    if not check:
        return "\n".join(lines)
    measured = (
        f"Logits against the {other} model: largest difference {check['max_difference']:.2g}, root mean square "
        f"{check['rms_difference']:.2g}; rounding alone moves the first model by {check['rms_rounding']:.2g}, and its "
        f"logits are {check['rms_logits']:.2g}."
    )
    return "\n".join([*lines, measured])


def loader_of(receipt: Mapping[str, Any]) -> str:
    """What loads the new folder."""
    return "shunter.from_pretrained" if receipt["format"] == "shunter" else "plain transformers"


def megabytes(size: int) -> str:
    """A number of bytes in words."""
    return f"{size / 1e6:,.1f} MB"
