"""The verbs of runs and of training: train, compare, finetune, eval, generate."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..recipes.registry import names
from .arguments import seed
from .domains import evaluate, evaluate_mixing, train_branch

__all__ = ["add_verbs"]

_SAME = 1e-4  # relatively: what another machine's rounding may change
_OVERRIDE = re.compile(r"-*[A-Za-z_]+(\.[A-Za-z_0-9]+)*=")


def add_verbs(verbs: Any) -> None:
    """Add the verbs to the parser of the command line."""
    train = verbs.add_parser(
        "train",
        help="train a dense model and its sparse twin, and report what the sparsity bought",
        epilog="Settings by their dotted names, as shunter settings lists them: shunter train text training.steps=500",
    )
    train.add_argument("recipe", choices=names(), help="what to train")
    train.add_argument("--config", type=Path, help="YAML or TOML file")
    kinds = "of text: decoder, encoder or encoder-decoder, short for model.kind="
    own = "your own text, images (of classes, IDX files, with captions), sounds or table, or a datasets name"
    train.add_argument("--data", nargs="+", help=own)
    train.add_argument("--model", help=kinds)
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
    compare.add_argument(
        "--routers",
        help="as in switch,topk:top_k=1,hash+topk (blocks take these two in turn); shunter routers lists them",
    )
    compare.add_argument("--config", type=Path, help="YAML or TOML file")
    compare.add_argument("--data", nargs="+", help=own)
    compare.add_argument("--model", help=kinds)
    compare.add_argument(
        "--seeds", help="repeat with so many seeds, or with those of a list as 0,7,9; errors are shown"
    )
    compare.add_argument("--run", type=Path, help="the comparison's folder (default: runs/compare)")
    compare.add_argument("--resume", action="store_true", help="go on with a comparison that was stopped")
    compare.add_argument("--json", action="store_true", help="metrics to standard output, a JSON object a line")
    compare.set_defaults(verb=_compare)

    finetune = verbs.add_parser(
        "finetune", help="fine-tune a sparse model and its dense twin on labelled text, over rates, batches and parts"
    )
    finetune.add_argument(
        "model", metavar="MODEL", help="a sparse model's folder, or a run of train with its two models"
    )
    finetune.add_argument("--dense", type=Path, help="the dense twin, of the same tokenizer (default: a run's own)")
    labels = "files or folders, each a label, or one with several languages; none: the language of built-in text"
    finetune.add_argument("--data", nargs="+", help=labels)
    finetune.add_argument("--rates", type=float, nargs="+", default=[3e-4, 1e-3], help="learning rates to try")
    finetune.add_argument("--batches", type=int, nargs="+", default=[16, 64], help="examples of a step, to try")
    finetune.add_argument("--train", nargs="+", default=["all", "non_moe", "moe"], help="roles: see shunter roles")
    finetune.add_argument("--capacities", type=float, nargs="+", default=[], help="factors in evaluation to try too")
    finetune.add_argument("--expert-dropout", type=float, default=0.0, help="of the experts' hidden units")
    finetune.add_argument("--examples", type=int, default=2048, help="that a fine-tuning sees, whatever its batch")
    finetune.add_argument("--length", type=int, default=16, help="tokens of a window")
    finetune.add_argument("--windows", type=int, default=200, help="of a label; a fifth is held out")
    finetune.add_argument("--out", type=Path, default=Path("runs/finetune"), help="for finetune.json, .md and .png")
    finetune.add_argument("--seed", type=seed, default=0, help="of the classifier and of the order of examples")
    finetune.add_argument(
        "--seeds", help="repeat each cell with so many seeds from --seed on, or with those of a list; errors are shown"
    )
    finetune.set_defaults(verb=_finetune)

    evaluate = verbs.add_parser("eval", help="evaluate a run's models again")
    evaluate.add_argument("run", type=Path, help="a run's folder; with --calibration a model's too")
    evaluate.add_argument(
        "--calibration",
        action="store_true",
        help="how far confidence is accuracy: calibration error and reliability diagram, in a folder of their own",
    )
    evaluate.add_argument("--data", nargs="+", default=[], help="with --calibration of a model: text or images")
    evaluate.add_argument("--out", type=Path, help="with --calibration: the folder (default: runs/calibration-NAME)")
    evaluate.add_argument(
        "--dropless", action="store_true", help="drop no token, whatever the capacity was in training"
    )
    within = "what the sparse model's experts may take of memory, as 8GiB; the others stay in their file"
    evaluate.add_argument("--memory", help=within)
    evaluate.add_argument(
        "--mixing", action="store_true", help="by way of mixing the experts of domains (sparse.router=domain)"
    )
    evaluate.add_argument("--json", action="store_true", help="JSON to standard output instead of the table")
    evaluate.set_defaults(verb=_eval)

    generate = verbs.add_parser("generate", help="continue a prompt with a run's model")
    generate.add_argument("run", type=Path, help="a run's folder, a forest's, or one that merge made")
    generate.add_argument("--prompt", default="In the beginning", help="the text to continue")
    generate.add_argument("--language", help="of a run of translation: translate the prompt into it")
    generate.add_argument(
        "--model", help="dense or sparse (default); of a forest: ensemble (default), average, seed, together, a domain"
    )
    generate.add_argument("--domain", help="whose experts continue; default: all, mixed by what the text tells")
    generate.add_argument("--max-new-tokens", type=int, default=100, help="at most so many")
    generate.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token each time")
    generate.add_argument("--seed", type=seed, default=0, help="of the sampling")
    generate.add_argument("--memory", help=within)
    generate.set_defaults(verb=_generate)


def _overrides(args: argparse.Namespace) -> list[str]:
    """The settings among the arguments, wherever they stand: `--data` takes all words behind it, settings too."""
    given = args.data or []
    settings = [word for word in given if _OVERRIDE.match(word) and not Path(word).exists()]
    args.data = [word for word in given if word not in settings]
    return [*args.overrides, *settings]


def _short_forms(args: argparse.Namespace) -> list[str]:
    """The settings that options stand for."""
    sources = [f"data.source={json.dumps(args.data)}"] if args.data else []
    return sources + ([f"model.kind={json.dumps(args.model)}"] if args.model else [])


def _train(args: argparse.Namespace) -> int:
    from ..durable import sealed
    from ..parallel.processes import launch
    from ..ranks import is_first_rank
    from ..recipes.config import load_config
    from ..recipes.registry import find
    from ..recipes.run import BRANCH, check_processes, configuration_of, train

    overrides = _overrides(args)
    if args.resume:
        if args.config or args.data or args.model or overrides:
            raise UserError("--resume goes on with the run's own configuration; leave the other options out")
        args.run = args.run or Path("runs") / args.recipe
        recipe, config = configuration_of(args.run)
        if recipe.name != args.recipe:
            raise UserError(f"{args.run} is a run of {recipe.name}, not of {args.recipe}")
        if (args.run / BRANCH).exists():
            return train_branch(args)
    else:
        recipe = find(args.recipe)
        config = load_config(recipe.config, args.config, overrides + _short_forms(args))
        args.run = args.run or Path(config.out) / config.name
    processes = config.parallel.processes or 1
    if processes > 1 and "RANK" not in os.environ:
        check_processes(recipe, config, processes)
        again = ["train", args.recipe, "--resume", "--run", str(args.run), *(["--json"] if args.json else [])]
        other = sealed(args.run)  # a run from before, which will be refused or is to be resumed

        def command() -> list[str]:
            return ["-m", "shunter", *(again if sealed(args.run) and not other else sys.argv[1:])]

        return launch(processes, command, timeout=config.parallel.timeout, restarts=config.parallel.restarts)
    summary = train(recipe, config, args.run, resume=args.resume, as_json=args.json)
    if not args.json and is_first_rank():
        dense, sparse = summary["dense"], summary["sparse"]
        print(
            f"\nHeld-out loss ({recipe.words_of(config).loss}): dense {dense['eval_loss']:.4f}, "
            f"sparse {sparse['eval_loss']:.4f}, gain {summary['gain']:.4f}\n"
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
        if args.config or args.routers or args.data or args.model or args.seeds or overrides:
            raise UserError("--resume goes on with the comparison's own settings; leave the other options out")
        recipe, config, specs = resumed(args.run)
        if recipe.name != args.recipe:
            raise UserError(f"{args.run} is a comparison of {recipe.name}, not of {args.recipe}")
        seeds = seeds_of(args.run)
    else:
        specs, recipe = parse_routers(args.routers or ""), find(args.recipe)
        config = load_config(recipe.config, args.config, overrides + _short_forms(args))
        seeds = None if args.seeds is None else parse_seeds(args.seeds, config.seed)
    if seeds is None:
        compare(recipe, config, specs, args.run, resume=args.resume, as_json=args.json)
    else:
        compare_seeds(recipe, config, specs, args.run, seeds, resume=args.resume, as_json=args.json)
    if not args.json:
        print(f"\n{(args.run / 'compare.md').read_text(encoding='utf-8')}\nPicture: {args.run / 'compare.png'}")
    return 0


def _finetune(args: argparse.Namespace) -> int:
    from ..analysis.inspect.inspecting import load
    from ..analysis.pages.style import PAPER, style
    from ..data.documents import built_in_domains, read_domains
    from ..durable import make_folder, write, writing
    from ..hf.checkpoints.loading import load_folder
    from ..recipes.seeds import parse_seeds
    from ..training.sweeping import labelled_windows, markdown, picture, sweep

    seeds = [args.seed] if args.seeds is None else parse_seeds(args.seeds, args.seed)
    for name, least in (("examples", 1), ("length", 2), ("windows", 10)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} {getattr(args, name)} must be at least {least}")
    subject = load(args.model)
    models = {"sparse": subject.model}
    twin = args.dense or Path(args.model) / "dense"
    if args.dense or (twin / "config.json").is_file():
        models["dense"] = load_folder(twin)
        subject.must_share_words(models["dense"], twin)
    built_in = max(built_in_domains(), key=lambda domain: len(set(domain.languages)))
    domains = read_domains(args.data) if args.data else [built_in]
    data = labelled_windows(domains, subject.tokenizer(), args.length, args.windows)
    make_folder(args.out)
    found = sweep(
        models,
        data,
        rates=args.rates,
        batches=args.batches,
        train=args.train,
        capacities=args.capacities,
        dropout=args.expert_dropout,
        examples=args.examples,
        seeds=seeds,
        say=lambda line: print(line, file=sys.stderr),
    )
    write(args.out / "finetune.json", json.dumps(found, indent=1) + "\n")
    write(args.out / "finetune.md", markdown(found))
    with style(PAPER), writing(args.out / "finetune.png") as part:
        picture(found).savefig(part, format="png", metadata={"Software": None})
    print(f"{markdown(found)}\nPicture: {args.out / 'finetune.png'}")
    return 0


def _eval(args: argparse.Namespace) -> int:
    from ..recipes.compare import compared
    from ..recipes.run import configuration_of, evaluate_run, summarised
    from .calibrate import calibrate

    if args.calibration:
        if args.memory:
            raise UserError("--memory is not for --calibration, which loads the whole model")
        return calibrate(args)
    if args.data or args.out:
        raise UserError("--data and --out are for --calibration; a run is evaluated on its own data")
    if (forest := (args.run / "branches").is_dir()) or args.mixing:
        if args.memory or args.dropless or (forest and args.mixing):
            raise UserError("--memory and --dropless are not for --mixing, and none of the three is for a forest")
        return evaluate(args) if forest else evaluate_mixing(args)
    found = evaluate_run(args.run, without_drops=args.dropless, memory=args.memory)
    results: dict[str, dict[str, float]] = (
        {} if args.dropless else {"summary.json": summarised(args.run), "compare.json": compared(args.run)}
    )
    for name, losses in results.items():
        for which, said in losses.items():
            now = found[which]["loss"] if which in found else said
            if not math.isclose(now, said, rel_tol=_SAME):
                print(f"{which}: the loss is {now:.6f}, and {args.run / name} says {said:.6f}", file=sys.stderr)
    if args.json:
        print(json.dumps(found))
        return 0
    recipe, config = configuration_of(args.run)
    shown = recipe.words_of(config).shown
    width = max(10, *map(len, found))
    print(f"{'':{width}} {'loss':>8}" + "".join(f" {unit.replace(' per ', '/'):>10}" for unit in shown.values()))
    for which, result in found.items():
        rows = {which: result, **{f"  {name}": value for name, value in result["domains"].items()}}
        for name, value in rows.items():
            print(f"{name:{width}} {value['loss']:8.4f}" + "".join(f" {value[key]:10.4f}" for key in shown))
    return 0


def _generate(args: argparse.Namespace) -> int:
    from ..recipes import forest
    from ..recipes.text import generate
    from ..recipes.translation import translate

    how = (args.prompt, args.max_new_tokens, args.temperature, args.seed)
    if forest.is_forest(args.run) or forest.is_merged(args.run):
        if args.memory or args.domain or args.language:
            raise UserError("--memory, --domain and --language are for a run; of a forest, --model names the model")
        print(forest.generate(args.run, args.model, *how))
        return 0
    if args.model not in (None, "dense", "sparse"):
        raise UserError(f"--model {args.model!r} is unknown; a run has dense and sparse")
    if args.language is not None:
        print(translate(args.run, args.model or "sparse", args.prompt, args.language, args.memory))
        return 0
    print(generate(args.run, args.model or "sparse", *how, args.memory, args.domain))
    return 0
