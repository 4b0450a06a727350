"""The verbs of Branch-Train-Merge: branch, merge; and how what they leave is trained, evaluated and continued."""

from __future__ import annotations

import argparse
import json
import math
import shlex
from pathlib import Path
from typing import Any

from ..errors import UserError, escaped

__all__ = ["add_verbs", "evaluate", "evaluate_mixing", "train_branch"]


def add_verbs(verbs: Any) -> None:
    """Add the verbs to the parser of the command line."""
    branch = verbs.add_parser(
        "branch",
        help="begin a forest: a run of text becomes the seed of a model for each domain (Branch-Train-Merge)",
        epilog="Each branch is trained alone: shunter train text --resume --run FOREST/branches/NAME. Their training "
        "is set by dotted names: shunter branch runs/text --out forest training.steps=500",
    )
    branch.add_argument("run", type=Path, help="a run of train text; or a forest, to which domains are added")
    branch.add_argument("--out", type=Path, help="the forest's new folder")
    branch.add_argument("--model", default="dense", help="which model of the run is the seed: dense (default), sparse")
    branch.add_argument("--domains", nargs="+", help="of the text; default: all that have no branch")
    branch.add_argument("--data", nargs="+", help="text as in train; default: the run's own")
    branch.add_argument(
        "--start", default="seed", help="with what weights: seed (default), or posterior: an average of the branches"
    )
    branch.add_argument(
        "--together", action="store_true", help="also a run on all domains, as long as all branches are, to compare"
    )
    branch.set_defaults(verb=_branch)

    merge = verbs.add_parser("merge", help="merge the trained branches of a forest: an ensemble, or one average model")
    merge.add_argument("forest", type=Path, help="the folder that branch made")
    merge.add_argument("--out", type=Path, required=True, help="the folder to make")
    merge.add_argument("--as", dest="how", default="ensemble", help="ensemble (default) or average")
    merge.add_argument("--domains", nargs="+", help="the branches that take part; default: all")
    merge.add_argument(
        "--weights", help="of the average, or the ensemble's prior: english=0.7,code=0.3; default: equal"
    )
    merge.add_argument("--like", metavar="DOMAIN", help="instead: how well each explains held-out text of this domain")
    merge.add_argument("--window", type=int, help="how many of the last tokens the ensemble goes by; default: all")
    merge.add_argument("--top-k", type=int, help="how many of the ensemble predict a token; default: all")
    merge.add_argument("--no-check", action="store_true", help="do not evaluate the forest")
    merge.add_argument("--json", action="store_true", help="the receipt to standard output")
    merge.set_defaults(verb=_merge)


def _branch(args: argparse.Namespace) -> int:
    from transformers.utils import logging

    from ..recipes.forest import branch

    logging.disable_progress_bar()
    settings = [*args.overrides]
    for name in ("domains", "data"):  # which take all words behind them, settings too
        given = getattr(args, name) or []
        settings += [word for word in given if word.startswith("training.") and "=" in word]
        setattr(args, name, [word for word in given if word not in settings] or None)
    made = branch(
        args.run,
        args.out,
        which=args.model,
        domains=args.domains,
        data=args.data,
        start=args.start,
        together=args.together,
        overrides=settings,
    )
    print("Train each, in any order or side by side:")
    others = [args.out / "together"] if args.together else []
    for folder in [*made, *others]:
        print(f"  shunter train text --resume --run {shlex.quote(str(folder))}")
    return 0


def _merge(args: argparse.Namespace) -> int:
    from transformers.utils import logging

    from ..recipes.forest import merge

    logging.disable_progress_bar()
    receipt = merge(
        args.forest,
        args.out,
        args.how,
        domains=args.domains,
        weights=None if args.weights is None else _weights(args.weights),
        like=args.like,
        window=args.window,
        top_k=args.top_k,
        check=not args.no_check,
    )
    if args.json:
        print(json.dumps(receipt))
        return 0
    if "loss" in receipt:
        print(_table(receipt["loss"]))
    share = ", ".join(f"{escaped(name)} {weight:.3g}" for name, weight in receipt["weights"].items())
    print(f"{args.out}: the {receipt['as']} of {share}")
    return 0


def _weights(text: str) -> dict[str, float]:
    """The weights of `english=0.7,code=0.3`."""
    found: dict[str, float] = {}
    for part in text.split(","):
        name, equals, value = part.rpartition("=")
        try:
            found[name.strip()] = float(value)
        except ValueError:
            equals = ""
        if not equals or not math.isfinite(found[name.strip()]):
            raise UserError(f"--weights: {part!r} must be DOMAIN=WEIGHT, as in english=0.7,code=0.3")
    return found


def train_branch(args: argparse.Namespace) -> int:
    """Train a branch, or go on with it."""
    from ..recipes.forest import train_branch

    found = train_branch(args.run, as_json=args.json)
    if not args.json:
        print(f"\nHeld-out loss (nats/token): {found['loss']:.4f}\nModel: {args.run / 'branch'}")
    return 0


def evaluate(args: argparse.Namespace) -> int:
    """Print the loss by domain of a forest's seed, branches, averages and ensembles."""
    from transformers.utils import logging

    from ..recipes.forest import evaluate_forest

    logging.disable_progress_bar()
    found = evaluate_forest(args.run)
    print(json.dumps(found) if args.json else _table(found["loss"]))
    return 0


def evaluate_mixing(args: argparse.Namespace) -> int:
    """Print the loss by domain of a run with experts of domains, under each way of mixing them."""
    from ..recipes.text import evaluate_mixing

    found = evaluate_mixing(args.run)
    print(json.dumps(found) if args.json else _table(found))
    return 0


def _table(loss: dict[str, dict[str, float]]) -> str:
    """Nats per token: a row for each model, a column for each domain, and their plain mean."""
    names = list(next(iter(loss.values())))
    wide = max(len(model) for model in loss)
    lines = [" ".join([" " * wide, *(f"{name[:12]:>12}" for name in names), f"{'mean':>12}"])]
    for model, by_domain in loss.items():
        values = [by_domain[name] for name in names]
        cells = [f"{value:12.4f}" for value in [*values, sum(values) / len(values)]]
        lines.append(" ".join([f"{model:{wide}}", *cells]))
    return "\n".join(lines)
