"""The verbs that plan: simulate, advise."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..durable import make_folder, write, writing
from ..errors import UserError, escaped

if TYPE_CHECKING:
    from ..simulate.published import Row

__all__ = ["add_verbs"]

_MOST = 2**20  # devices
_BYTES, _SPEED = "B", "B(?:/s)?"


def add_verbs(verbs: Any) -> None:
    """Add the verbs to the parser of the command line."""
    simulate = verbs.add_parser(
        "simulate",
        help="time, communication and memory of training steps on machines that are not here, and the best layout",
        epilog="Leaves simulate.json and simulate.png. Error bars are from the ends of what is known of the cluster.",
    )
    simulate.add_argument("model", nargs="?", metavar="CONFIG", help="a name, a YAML file, a config.json or its folder")
    simulate.add_argument("--gpus", default="8..4096", help="as 8..4096 (doubling) or 64,256 (default: 8..4096)")
    simulate.add_argument("--cluster", default="h100", help="a name or a YAML file (default: h100)")
    simulate.add_argument("--batch-tokens", default="4Mi", help="of a step, as 4Mi or 63e6 (default: 4Mi)")
    simulate.add_argument("--weak", action="store_true", help="the batch grows with the devices, up to --batch-tokens")
    simulate.add_argument("--layout", help="as ep=64,pp=16,tp=1,stages=2 (default: the best of all)")
    simulate.add_argument("--recompute", action="store_true", help="the forward runs again in the backward")
    simulate.add_argument("--sequence-length", type=int, help="default: the model's")
    simulate.add_argument("--capacity-factor", type=float, help="default: the model's; 0: dropless")
    simulate.add_argument(
        "--group-limit", type=int, help="to how many nodes a token goes; default: the model's; 0: any"
    )
    simulate.add_argument("--load", type=float, default=0.0, help="rows of the fullest rank over the mean")
    simulate.add_argument(
        "--flat", action="store_true", help="each choice is a row of its own, as in a plain all-to-all"
    )
    simulate.add_argument(
        "--state-bytes",
        type=float,
        default=12.0,
        help="of master weights and optimizer, for each parameter (default: 12, of Adam in float32; Adafactor's: 4)",
    )
    simulate.add_argument("--fp8", action="store_true", help="dispatch in one byte a number")
    simulate.add_argument("--check", action="store_true", help="published measurements next to what is predicted")
    simulate.add_argument(
        "--bench", type=Path, metavar="FILE", help="with --check: bench-parallel.json, whose layers are predicted too"
    )
    simulate.add_argument("--ledger", action="store_true", help="parameters and FLOPs of published models, counted")
    simulate.add_argument("--list", action="store_true", help="the models and clusters that are described here")
    simulate.add_argument("--out", type=Path, help="the folder (default: runs/simulate-NAME)")
    simulate.add_argument("--json", action="store_true", help="JSON to standard output instead of the table")
    simulate.set_defaults(verb=_simulate)

    advise = verbs.add_parser(
        "advise",
        help="sparse or dense, how many experts, how often, which capacity, for a budget; and why",
        epilog="By the simulator, and the scaling law of routed models: an estimate of pre-training's loss.",
    )
    advise.add_argument("--flops", required=True, help="of the whole training, as 1e21")
    advise.add_argument("--memory", required=True, help="of a device, as 80GiB")
    advise.add_argument("--devices", type=int, required=True, help="how many")
    advise.add_argument("--bandwidth", required=True, help="bytes/s of a device to others, as 50GB")
    advise.add_argument("--device-flops", default="9.89e14", help="peak FLOP/s of a device (default: an H100's)")
    advise.add_argument("--json", action="store_true", help="all that was compared, to standard output")
    advise.set_defaults(verb=_advise)


def counts(text: str) -> list[int]:
    """Numbers of devices, of "8..4096", doubling, or "64,256".

    Raises:
        UserError: where it is neither.
    """
    if match := re.fullmatch(r"(\d+)\.\.(\d+)", text.strip()):
        low, high = int(match[1]), int(match[2])
        found = [low * 2**i for i in range(64) if low and low * 2**i <= high]
    else:
        found = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if not found or min(found) < 1 or max(found) > _MOST:
        raise UserError(f"--gpus {text!r} is neither a range as 8..4096 nor a list as 64,256, of 1 to {_MOST:,}")
    return found


def quantity(text: str, name: str, unit: str = "") -> float:
    """A number above zero, as "4e21" or "4Mi", and with a unit as "80GiB" or "50 GB/s".

    Args:
        text: the number, perhaps with a prefix of a thousand or (as Ki) of 1024, and the unit.
        name: of the option.
        unit: that it may have, a pattern.

    Raises:
        UserError: where it is none, and where it has another unit.
    """
    match = re.fullmatch(rf"\s*([\d.]+(?:[eE][+-]?\d+)?)\s*([kKMGTPE]?)(i?)(?:{unit})?\s*", text)
    try:
        value = float(match[1]) if match else 0.0
    except ValueError:
        value = 0.0
    if match:
        value *= (1024 if match[3] else 1000) ** " KMGTPE".index(match[2].upper() or " ")
    if not 0 < value < 1e40 or not math.isfinite(value):
        example = {"": "4e21 or 4Mi", _BYTES: "80GiB or 8e10", _SPEED: "50GB/s or 5e10"}[unit]
        raise UserError(f"{name} {text!r} must be a number above zero, as {example}")
    return value


def _sizes(text: str) -> dict[str, int]:
    """The sizes of a layout, of "ep=64,pp=16"."""
    pairs = [part.split("=") for part in text.replace(" ", "").split(",")]
    known = ("ep", "pp", "tp", "stages", "last")
    if not all(len(p) == 2 and p[0] in known and p[1].isdecimal() and int(p[1]) for p in pairs):
        raise UserError(f"--layout {text!r} is none; give sizes of ep, pp, tp, stages and last, as ep=64,pp=16")
    found = {name: int(size) for name, size in pairs}
    if len(found) < len(pairs):
        raise UserError(f"--layout {text!r} gives a size twice")
    return found


def _simulate(args: argparse.Namespace) -> int:
    from ..simulate.files import names

    if args.list:
        print(f"models: {', '.join(names('models'))}\nclusters: {', '.join(names('clusters'))}")
        return 0
    if args.check:
        return _check(args)
    if args.ledger:
        return _ledger(args)
    if args.model is None:
        raise UserError(f"name a model, as in: shunter simulate {names('models')[0]}; --list has them all")
    from ..analysis.pages.simulate_figures import sweep_figure
    from ..analysis.pages.style import PAPER, style
    from ..simulate.clusters import load_cluster
    from ..simulate.shapes import load_model
    from ..simulate.step import Job, Layout, predict, sweep, weakened

    model, cluster = load_model(args.model), load_cluster(args.cluster)
    for name in ("sequence_length", "capacity_factor", "group_limit"):
        if (value := getattr(args, name)) is not None:
            least = int(name == "sequence_length")
            if not least <= value < 1e9:
                raise UserError(f"--{name.replace('_', '-')} {value} must be a number of at least {least}")
            model = replace(model, **{name: value})
    if args.load and not 1 <= args.load < 1e6:
        raise UserError(f"--load {args.load} must be at least 1: the fullest rank has no less than the mean")
    if not 0 <= args.state_bytes <= 64:
        raise UserError(f"--state-bytes {args.state_bytes} must be from 0 to 64")
    job = Job(
        quantity(args.batch_tokens, "--batch-tokens"),
        dispatch_bytes=1 if args.fp8 else 2,
        form="flat" if args.flat else "deduplicated",
        load=args.load,
        state_bytes=args.state_bytes,
        recompute=args.recompute,
    )
    devices = counts(args.gpus)
    if args.layout is None:
        steps = sweep(model, cluster, devices, job, args.weak)
    else:
        sizes = _sizes(args.layout)
        jobs = [weakened(job, n, max(devices)) if args.weak else job for n in devices]
        steps = [predict(model, cluster, Layout(n, **sizes), each) for n, each in zip(devices, jobs, strict=True)]
    found = {
        "model": model.name, "parameters": model.total, "active": model.active, "shape": asdict(model),
        "cluster": cluster.name, "device_memory": cluster.memory, "job": asdict(job), "weak": args.weak,
        "steps": [step.row() for step in steps],
    }  # fmt: skip
    out = args.out or Path("runs") / f"simulate-{re.sub(r'[^a-z0-9]+', '-', model.name.lower()).strip('-')}"
    make_folder(out)
    write(out / "simulate.json", json.dumps(found, indent=1) + "\n")
    with style(PAPER), writing(out / "simulate.png") as path:
        sweep_figure(found).savefig(path, format="png")
    if args.json:
        print(json.dumps(found))
    else:
        sys.stdout.write(_table(found))
        print(f"Picture: {out / 'simulate.png'}")
    return 0


def _table(found: dict[str, Any]) -> str:
    lines = [
        f"{escaped(found['model'])}: {found['parameters'] / 1e9:.1f} B parameters, {found['active'] / 1e9:.1f} B a "
        f"token, on {escaped(found['cluster'])}",
        f"{'devices':>7} {'ep':>4} {'edp':>4} {'pp':>3} {'tp':>3} {'seconds (from, to)':>26} {'exposed':>8} "
        f"{'bubble':>7} {'load':>5} {'GiB':>7} {'tokens/s':>9} {'TFLOP/s':>8}",
    ]
    for row in found["steps"]:
        span = f"{row['seconds']:.3g} ({row['shortest']:.3g}, {row['longest']:.3g})"
        lines.append(
            f"{row['devices']:7,} {row['ep']:4} {row['edp']:4} {row['pp']:3} {row['tp']:3} {span:>26} "
            f"{row['exposed'] / row['seconds']:8.1%} {row['bubble'] / row['seconds']:7.1%} {row['load']:5.2f} "
            f"{row['memory'] / 2**30:7.1f} {row['tokens_per_s']:9,.0f} {row['flops'] / 1e12:8,.0f}"
            + ("" if row["fits"] else "  does not fit")
        )
    return "\n".join(lines) + "\n"


def _check(args: argparse.Namespace) -> int:
    from ..simulate.published import TOLERANCE, check

    rows = check()
    predictions = [row for row in rows if not row.fitted]
    right = sum(row.within for row in predictions)
    page = [
        "# Published measurements and the simulator",
        "",
        "Written by `shunter simulate --check`. A row that a figure of the simulator was fitted to is marked and says "
        f"nothing; of the {len(predictions)} others {right} are within {TOLERANCE:.0%}.",
        "",
        *_rows(rows),
    ]
    if args.bench:
        layers = _layers(args.bench)
        page += [
            "",
            "Layers of a run of `shunter bench parallel` (`--bench`), each predicted from the others and from what it "
            "computes without expert parallelism:",
            "",
            *_rows(layers),
        ]
        rows += layers
    found = [asdict(row) | {"error": row.error, "within": row.within} for row in rows]
    text = "\n".join(page) + "\n"
    if args.out:
        make_folder(args.out)
        write(args.out / "simulate-published.json", json.dumps(found, indent=1) + "\n")
        write(args.out / "simulate-published.md", text)
    sys.stdout.write(json.dumps(found) + "\n" if args.json else text)
    return 0


def _rows(rows: list[Row]) -> list[str]:
    lines = ["| source | what | measured | predicted | error | |", "|---|---|---:|---:|---:|---|"]
    for row in rows:
        note = f": {row.note}" if row.note else ""
        verdict = "fitted" if row.fitted else ("" if row.within else f"not right{note}")
        lines.append(
            f"| {row.source} | {row.what} | {row.measured:,.4g} {row.unit} | {row.predicted:,.4g} | {row.error:+.1%} | "
            f"{verdict} |"
        )
    return lines


def _layers(path: Path) -> list[Row]:
    from ..simulate.published import layers_of_bench
    from ..untrusted import parse_json, read_file

    try:
        return layers_of_bench(parse_json(read_file(path)))
    except (ValueError, TypeError, LookupError, ArithmeticError) as error:
        raise UserError(
            f"--bench {path}: is no run of shunter bench parallel of three shapes or more ({error!r})"
        ) from None


def _ledger(args: argparse.Namespace) -> int:
    from ..simulate.ledger import ledger, markdown

    rows = ledger()
    if args.out:
        make_folder(args.out)
        write(args.out / "simulate-ledger.json", json.dumps(rows, indent=1) + "\n")
        write(args.out / "simulate-ledger.md", markdown(rows))
    sys.stdout.write(json.dumps(rows) + "\n" if args.json else markdown(rows))
    return 0


def _advise(args: argparse.Namespace) -> int:
    from ..simulate.advise import Budget, advise

    if not 1 <= args.devices <= _MOST:
        raise UserError(f"--devices {args.devices} must be from 1 to {_MOST:,}")
    budget = Budget(
        quantity(args.flops, "--flops"),
        quantity(args.memory, "--memory", _BYTES),
        args.devices,
        quantity(args.bandwidth, "--bandwidth", _SPEED),
        quantity(args.device_flops, "--device-flops"),
    )
    found = advise(budget)
    if args.json:
        rows = [choice.row() for choice in found.choices]
        print(json.dumps({"budget": asdict(budget), "days": found.days, "reasons": found.reasons, "choices": rows}))
        return 0
    best = found.best
    if best.experts == 1:
        print("A dense model.")
    else:
        layout = best.step.layout
        blocks = {1.0: "every block", 0.5: "every second block", 0.25: "every fourth block"}[best.frequency]
        print(
            f"A sparse model: {best.experts} experts in {blocks}, capacity factor {best.capacity_factor:g}; "
            f"ep {layout.ep}, pp {layout.pp}, tp {layout.tp}."
        )
    for reason in found.reasons:
        print(f"- {reason}")
    return 0
