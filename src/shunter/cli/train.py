"""The verbs of runs: train, compare, eval, generate."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..recipes.registry import names

__all__ = ["add_verbs"]

_SAME = 1e-4  # relatively: what another machine's rounding may change
_OVERRIDE = re.compile(r"-*[A-Za-z_]+(\.[A-Za-z_0-9]+)*=")


def add_verbs(verbs: Any) -> None:
    """Add the verbs to the parser of the command line."""
    train = verbs.add_parser(
        "train",
        help="train a dense model and its sparse twin, and report what the sparsity bought",
        epilog="Anything in the configuration is set by its dotted name: shunter train text training.steps=500",
    )
    train.add_argument("recipe", choices=names(), help="what to train")
    train.add_argument("--config", type=Path, help="YAML or TOML file")
    own = "your own text (files, folders) or images (a folder of classes, or of IDX files), or a datasets name"
    train.add_argument("--data", nargs="+", help=own)
    train.add_argument("--run", type=Path, help="the run's folder (default: runs/<name>)")
    train.add_argument("--resume", action="store_true", help="go on with a run that was stopped")
    train.add_argument("--json", action="store_true", help="metrics to standard output, a JSON object a line")
    train.set_defaults(verb=_train)

    compare = verbs.add_parser(
        "compare",
        help="train one router after another on the same tokens, and report them in one table and one picture",
        epilog="Settings by dotted names as in train: shunter compare text --routers switch,base training.steps=300",
    )
    compare.add_argument("recipe", choices=names(), help="what to train")
    compare.add_argument("--routers", help="as in switch,topk:top_k=1,hash; shunter routers lists them")
    compare.add_argument("--config", type=Path, help="YAML or TOML file")
    compare.add_argument("--data", nargs="+", help=own)
    compare.add_argument(
        "--seeds", help="repeat with so many seeds, or with those of a list as 0,7,9; errors are shown"
    )
    compare.add_argument("--run", type=Path, help="the comparison's folder (default: runs/compare)")
    compare.add_argument("--resume", action="store_true", help="go on with a comparison that was stopped")
    compare.add_argument("--json", action="store_true", help="metrics to standard output, a JSON object a line")
    compare.set_defaults(verb=_compare)

    evaluate = verbs.add_parser("eval", help="evaluate a run's models again")
    evaluate.add_argument("run", type=Path)
    evaluate.add_argument(
        "--dropless", action="store_true", help="drop no token, whatever the capacity was in training"
    )
    evaluate.add_argument("--json", action="store_true")
    evaluate.set_defaults(verb=_eval)

    generate = verbs.add_parser("generate", help="continue a prompt with a run's model")
    generate.add_argument("run", type=Path)
    generate.add_argument("--prompt", default="In the beginning")
    generate.add_argument("--model", choices=["dense", "sparse"], default="sparse")
    generate.add_argument("--max-new-tokens", type=int, default=100)
    generate.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token each time")
    generate.add_argument("--seed", type=int, default=0)
    generate.set_defaults(verb=_generate)


def _overrides(args: argparse.Namespace) -> list[str]:
    """The settings among the arguments, wherever they stand: `--data` takes all words behind it, settings too."""
    given = args.data or []
    settings = [word for word in given if _OVERRIDE.match(word) and not Path(word).exists()]
    args.data = [word for word in given if word not in settings]
    return [*args.overrides, *settings]


def _sources(args: argparse.Namespace) -> list[str]:
    return [f"data.source={json.dumps(args.data)}"] if args.data else []


def _train(args: argparse.Namespace) -> int:
    from ..recipes.config import load_config
    from ..recipes.registry import find
    from ..recipes.run import configuration_of, train

    overrides = _overrides(args)
    if args.resume:
        if args.config or args.data or overrides:
            raise UserError("--resume goes on with the run's own configuration; leave the other options out")
        args.run = args.run or Path("runs") / args.recipe
        recipe, config = configuration_of(args.run)
        if recipe.name != args.recipe:
            raise UserError(f"{args.run} is a run of {recipe.name}, not of {args.recipe}")
    else:
        recipe = find(args.recipe)
        config = load_config(recipe.config, args.config, overrides + _sources(args))
        args.run = args.run or Path(config.out) / config.name
    summary = train(recipe, config, args.run, resume=args.resume, as_json=args.json)
    if not args.json:
        dense, sparse = summary["dense"], summary["sparse"]
        print(
            f"\nHeld-out loss ({recipe.words.loss}): dense {dense['eval_loss']:.4f}, sparse {sparse['eval_loss']:.4f}, "
            f"gain {summary['gain']:.4f}\n"
            f"The sparse model took {sparse['seconds'] / dense['seconds']:.2f} times the seconds and "
            f"{sparse['peak_rss_bytes'] / dense['peak_rss_bytes']:.2f} times the memory.\n"
            f"Report: {args.run / 'report.html'}"
        )
    return 0


def _compare(args: argparse.Namespace) -> int:
    from ..recipes.compare import compare, parse_routers, resumed
    from ..recipes.config import load_config
    from ..recipes.registry import find
    from ..recipes.seeds import compare_seeds, parse_seeds, seeds_of

    args.run = args.run or Path("runs/compare")
    overrides = _overrides(args)
    if args.resume:
        if args.config or args.routers or args.data or args.seeds or overrides:
            raise UserError("--resume goes on with the comparison's own settings; leave the other options out")
        recipe, config, specs = resumed(args.run)
        if recipe.name != args.recipe:
            raise UserError(f"{args.run} is a comparison of {recipe.name}, not of {args.recipe}")
        seeds = seeds_of(args.run)
    else:
        specs, recipe = parse_routers(args.routers or ""), find(args.recipe)
        config = load_config(recipe.config, args.config, overrides + _sources(args))
        seeds = None if args.seeds is None else parse_seeds(args.seeds, config.seed)
    if seeds is None:
        compare(recipe, config, specs, args.run, resume=args.resume, as_json=args.json)
    else:
        compare_seeds(recipe, config, specs, args.run, seeds, resume=args.resume, as_json=args.json)
    if not args.json:
        print(f"\n{(args.run / 'compare.md').read_text(encoding='utf-8')}\nPicture: {args.run / 'compare.png'}")
    return 0


def _eval(args: argparse.Namespace) -> int:
    from ..recipes.run import evaluate_run, recipe_of, summarised

    found = evaluate_run(args.run, without_drops=args.dropless)
    for which, said in ({} if args.dropless else summarised(args.run)).items():
        if not math.isclose(found[which]["loss"], said, rel_tol=_SAME):
            now = found[which]["loss"]
            print(f"{which}: the loss is {now:.6f}, and {args.run / 'summary.json'} says {said:.6f}", file=sys.stderr)
    if args.json:
        print(json.dumps(found))
        return 0
    shown = recipe_of(args.run).words.shown
    print(f"{'':10} {'loss':>8}" + "".join(f" {unit.replace(' per ', '/'):>10}" for unit in shown.values()))
    for which, result in found.items():
        rows = {which: result, **{f"  {name}": value for name, value in result["domains"].items()}}
        for name, value in rows.items():
            print(f"{name:10} {value['loss']:8.4f}" + "".join(f" {value[key]:10.4f}" for key in shown))
    return 0


def _generate(args: argparse.Namespace) -> int:
    from ..recipes.text import generate

    print(generate(args.run, args.model, args.prompt, args.max_new_tokens, args.temperature, args.seed))
    return 0
