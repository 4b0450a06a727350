"""What `shunter eval --calibration` does: a run or a model to tables, JSON and the reliability diagram."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..durable import make_folder, write, writing
from ..errors import UserError, escaped

if TYPE_CHECKING:
    from ..analysis.calibration import Calibration

__all__ = ["calibrate"]


def calibrate(args: argparse.Namespace) -> int:
    """Measure how far the confidence of a run's models, or of one model, is their accuracy.

    Raises:
        UserError: for what is neither a finished run nor the folder of a model, and for a model without classes.
    """
    from ..analysis.pages.calibration_figures import reliability_diagram
    from ..analysis.pages.style import PAPER, style
    from ..environment import machine, versions

    is_run = (args.run / "config.yaml").exists()
    if is_run and args.data:
        raise UserError("a run is evaluated on its own held-out data; leave --data out")
    models = _of_run(args) if is_run else _of_model(args)
    found: dict[str, Any] = {
        "subject": args.run.resolve().name,
        "models": {
            name: {
                **sum(list(groups.values())[1:], start=next(iter(groups.values()))).as_json(),
                "domains": {group: one.as_json() for group, one in groups.items()},
            }
            for name, groups in models.items()
        },
        "machine": machine(),
        "versions": versions("transformers"),
    }
    out = args.out or Path("runs") / f"calibration-{found['subject']}"
    make_folder(out)
    write(out / "calibration.json", json.dumps(found, indent=1, allow_nan=False) + "\n")
    with style(PAPER), writing(out / "calibration.png") as part:
        reliability_diagram(found["models"]).savefig(part, format="png", metadata={"Software": None})
    if args.json:
        print(json.dumps(found, allow_nan=False))
        return 0
    rows = {
        name: {name: one, **{f"  {group}": part for group, part in one["domains"].items()}}
        for name, one in found["models"].items()
    }
    width = max(14, *(len(escaped(row)) for group in rows.values() for row in group))
    print(f"{'':{width}} {'error':>8} {'by chance':>10} {'confidence':>11} {'accuracy':>9} {'predictions':>12}")
    for group in rows.values():
        for row, value in group.items():
            print(
                f"{escaped(row):{width}} {value['error']:8.2%} {value['noise']:10.2%} {value['confidence']:11.2%} "
                f"{value['accuracy']:9.2%} {value['predictions']:12,}"
            )
    print(f"All of it: {out / 'calibration.json'}\nPicture: {out / 'calibration.png'}")
    return 0


def _of_run(args: argparse.Namespace) -> dict[str, dict[str, Calibration]]:
    from ..recipes.run import calibrate_run

    return calibrate_run(args.run, without_drops=args.dropless)


def _of_model(args: argparse.Namespace) -> dict[str, dict[str, Calibration]]:
    import torch

    from ..analysis.calibration import calibrations
    from ..analysis.inspect.inspecting import load, material_for
    from ..analysis.inspect.recording import batch_logits
    from ..moe import dropless

    subject = load(str(args.run), experts=False)
    if args.dropless:
        dropless(subject.model)
    material = material_for(subject, args.data or None)
    groups = material.groups.split([batch.targets.numel() for batch in material.batches])

    def parts() -> Any:
        for batch, group in zip(material.batches, groups, strict=True):
            with torch.no_grad():
                logits = batch_logits(subject.model, batch)
            if logits is None:
                continue
            for place in group.unique().tolist():
                mine = group == place
                yield material.domains[place], logits[mine.to(logits.device)].cpu(), batch.targets.flatten()[mine]

    found = calibrations(parts())
    if not sum(int(one.count.sum()) for one in found.values()):
        raise UserError(
            f"{args.run}: nothing is known to be right of what this model guesses; it needs text for a causal or "
            "masked language model, or folders of images named as a classifier's classes"
        )
    return {subject.name: {name: one for name, one in found.items() if one.count.sum()}}
