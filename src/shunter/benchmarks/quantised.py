"""`shunter bench quantised`: the held-out loss of a run's sparse model by the bits of its experts, and their bytes.

Codes are calibrated with windows of the run's own training text, or with nothing; the loss is on its held-out text.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

from ..environment import described, machine, versions
from ..errors import UserError
from ..hf.quantising import quantize
from ..recipes.run import configuration_of, load_model

__all__ = ["CODINGS", "bench", "markdown"]

CODINGS: dict[str, dict[str, Any]] = {
    "8 bits, by row": {"bits": 8},
    "4 bits, groups of 64": {"bits": 4, "group": 64},
    "4 bits, groups of 32": {"bits": 4, "group": 32},
    "4 bits, groups of 32, zero points": {"bits": 4, "group": 32, "zero_point": True},
}


def bench(run: Path, windows: int = 64, say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Evaluate a run's sparse model as it is, and with its experts in each of `CODINGS`.

    Args:
        run: the folder of a finished run of `shunter train text`.
        windows: of training text that calibrate.
        say: what is told of the progress, a line at a time.

    Returns:
        For JSON: `machine`, `versions`, `run`, and by coding `loss` (nats a token), `perplexity`, `expert_bytes` (of
        the matrices, as numbers of bfloat16 where they are not in codes), `share` (of the model's numbers in codes),
        `error` (relative, of the matrices) and `few` (experts that fewer than 16 tokens calibrated).

    Raises:
        UserError: where the folder holds no such run.
    """
    recipe, config = configuration_of(run)
    if recipe.name != "text":
        raise UserError(f"{run} is a run of {recipe.name}; bench quantised takes one of text")
    data = recipe.prepare(config)
    model = load_model(run, "sparse")
    batches = [{"input_ids": item["input_ids"][None]} for item in islice(data.train, windows)]
    found: dict[str, Any] = {"machine": machine(), "versions": versions("transformers", "numba"), "windows": windows}
    say("as trained …")
    loss = recipe.evaluate(model, data)["loss"]
    found["results"] = {"as trained": {"loss": loss, "perplexity": math.exp(loss)}}
    for name, options in CODINGS.items():
        for calibrated in (False, True):
            label = f"{name}, calibrated" if calibrated else name
            say(f"{label} …")
            coded = copy.deepcopy(model)
            report = quantize(coded, **options, calibrate=batches if calibrated else None)
            layers, loss = report["layers"].values(), recipe.evaluate(coded, data)["loss"]
            numbers = report["quantised_share"] * sum(p.numel() for p in model.parameters())
            found["results"]["as trained"] |= {"expert_bytes": round(2 * numbers)}
            found["results"][label] = {
                "loss": loss,
                "perplexity": math.exp(loss),
                "expert_bytes": sum(entry["bytes_after"] for entry in layers),
                "share": report["quantised_share"],
                "error": sum(entry["error"] for entry in layers) / len(layers),
                "few": sum(len(entry.get("few", [])) for entry in layers),
            }
    return found


def markdown(found: dict[str, Any]) -> str:
    """What `bench` found, as a page."""
    results = found["results"]
    plain = results["as trained"]
    lines = [
        "# Quantised experts",
        "",
        "Written by `shunter bench quantised`; the numbers behind it are in the JSON file beside it.",
        "",
        f"{described(found)}. The sparse model of a run, its experts' matrices in codes and all else as it was; loss "
        f"in nats a token on the run's held-out text; calibrated with {found['windows']} windows of its training text. "
        "Bytes of the experts' matrices are relative to bfloat16; error is that of the matrices, relative.",
        "",
        "| | loss | change | perplexity | bytes | error |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, row in results.items():
        error = f"{row['error']:.4f}" if "error" in row else ""
        lines.append(
            f"| {name} | {row['loss']:.4f} | {row['loss'] - plain['loss']:+.4f} | {row['perplexity']:.3f} | "
            f"{row['expert_bytes'] / plain['expert_bytes']:.3f} | {error} |"
        )
    share = max(row.get("share", 0) for row in results.values())
    few = max(row.get("few", 0) for row in results.values())
    lines += ["", f"The codes are {share:.1%} of the model's numbers. Fewer than 16 tokens calibrated {few} experts."]
    return "\n".join(lines) + "\n"
