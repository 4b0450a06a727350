"""A trained sparse model pruned in every way and distilled, in one table: docs/results/shrinking.{json,md}.

shunter train text training.steps=150 sparse.router=topk sparse.num_experts=24 &&
python tools/shrinking.py runs/text --out docs/results
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from transformers.utils import logging

from shunter.environment import described, machine, versions
from shunter.training.distilling import distill
from shunter.training.pruning import METHODS, prune

KEEPS = (12, 6)


def measure(run: Path, tokens: int, steps: int) -> dict[str, Any]:
    """The losses of a model of a run, pruned by each method, the best of these recovered, and a dense student's."""
    found: dict[str, Any] = {
        "machine": machine(),
        "versions": versions("transformers", "tokenizers"),
        "training_steps": yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["training"]["steps"],
        "tokens": tokens,
        "steps": steps,
        "pruned": {},
    }
    with TemporaryDirectory() as folder:
        for keep in KEEPS:
            for method in METHODS:
                print(f"{method}, {keep} experts …", file=sys.stderr)
                receipt = prune(run, Path(folder) / f"{method}-{keep}", keep, method, tokens=tokens)
                found["pruned"][f"{method}-{keep}"] = receipt["check"] | {
                    name: receipt[name] for name in ("bytes_before", "bytes")
                }
        least = min((m for m in METHODS), key=lambda m: found["pruned"][f"{m}-{KEEPS[-1]}"]["loss_after"])
        found["recovered_from"] = f"{least}-{KEEPS[-1]}"
        options: dict[str, Any] = {"steps": steps, "say": lambda line: print(line, file=sys.stderr)}
        student = Path(folder) / found["recovered_from"]
        for name, more in (("recovered", {"student": student, "learning_rate": 3e-4}), ("dense", {})):
            receipt = distill(run, Path(folder) / name, **options, **more)
            found[name] = {key: receipt[key] for key in ("losses", "gain_kept", "parameters")}
    return found


def markdown(found: dict[str, Any]) -> str:
    """What was found, as a page."""
    pruned = found["pruned"]
    before = next(iter(pruned.values()))["loss_before"]
    lines = [
        "# A sparse model made smaller",
        "",
        "Written by `python tools/shrinking.py`; the numbers behind it are in the JSON file beside it.",
        "",
        f"{described(found)}. The sparse model of a run of `shunter train text` with "
        f"{found['training_steps']} steps, whose loss on held-out windows of "
        f"{found['tokens']} tokens of the built-in text is {before:.4f}; the other half of them chooses the experts.",
        "",
        "| experts kept | " + " | ".join(METHODS) + " |",
        "|---|" + "---:|" * len(METHODS),
    ]
    for keep in KEEPS:
        row = [f"{pruned[f'{method}-{keep}']['loss_after']:.4f}" for method in METHODS]
        lines.append(f"| {keep} | " + " | ".join(row) + " |")
    lines += [
        "",
        f"Distilled for {found['steps']} steps on another part of that text, of which a tenth is held out:",
        "",
        "| student | teacher | before | with the teacher | without | gain kept |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, words in (("recovered", f"pruned, {found['recovered_from']}"), ("dense", "dense")):
        losses, kept = found[name]["losses"], found[name]["gain_kept"]
        numbers = [losses[key] for key in ("teacher", "student_before", "student", "baseline")]
        share = "no gain" if kept is None else f"{kept:.0%}"
        lines.append(f"| {words} | " + " | ".join(f"{number:.4f}" for number in numbers) + f" | {share} |")
    lines += [
        "",
        "Without: the student's twin, a pruned one as it is and a dense one from drawn weights, on the labels alone.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Write the page and its numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    logging.disable_progress_bar()
    found = measure(args.run, args.tokens, args.steps)
    (args.out / "shrinking.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (args.out / "shrinking.md").write_text(markdown(found), encoding="utf-8")


if __name__ == "__main__":
    main()
