"""The command line: verbs only, each a few lines that call the library."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["main"]


def main(argv: list[str] | None = None) -> int:
    """Run `shunter` with arguments; the exit code: 0 done, 1 failed, 2 bad input, 130 stopped with Ctrl-C."""
    args, rest = _parser().parse_known_args(argv)
    if rest and args.verb not in (_train, _compare):
        print(f"shunter: unknown argument {rest[0]!r}; see shunter {args.name} --help", file=sys.stderr)
        return 2
    args.overrides = rest
    verb: Callable[[argparse.Namespace], int] = args.verb
    try:
        return verb(args)
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="shunter", description="Sparse expert models: train, look, continue.")
    verbs = parser.add_subparsers(dest="name", required=True, metavar="verb")

    train = verbs.add_parser(
        "train",
        help="train a dense model and its sparse twin, and report what the sparsity bought",
        epilog="Anything in the configuration is set by its dotted name: shunter train text training.steps=500",
    )
    train.add_argument("recipe", choices=["text"], help="what to train")
    train.add_argument("--config", type=Path, help="YAML or TOML file")
    train.add_argument(
        "--data", nargs="+", help="your own text: files (text, JSONL, Parquet), folders, a datasets name"
    )
    train.add_argument("--run", type=Path, help="the run's folder (default: runs/<name>)")
    train.add_argument("--resume", action="store_true", help="go on with a run that was stopped")
    train.add_argument("--json", action="store_true", help="metrics to standard output, a JSON object a line")
    train.set_defaults(verb=_train)

    compare = verbs.add_parser(
        "compare",
        help="train one router after another on the same tokens, and report them in one table and one picture",
        epilog="Settings by dotted names as in train: shunter compare text --routers switch,base training.steps=300",
    )
    compare.add_argument("recipe", choices=["text"], help="what to train")
    compare.add_argument("--routers", help="as in switch,topk:top_k=1,hash; shunter routers lists them")
    compare.add_argument("--config", type=Path, help="YAML or TOML file")
    compare.add_argument("--run", type=Path, help="the comparison's folder (default: runs/compare)")
    compare.add_argument("--resume", action="store_true", help="go on with a comparison that was stopped")
    compare.add_argument("--json", action="store_true", help="metrics to standard output, a JSON object a line")
    compare.set_defaults(verb=_compare)

    evaluate = verbs.add_parser("eval", help="evaluate a run's models again")
    evaluate.add_argument("run", type=Path)
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

    upcycle = verbs.add_parser("upcycle", help="make a dense Hugging Face model a sparse one, its experts copies")
    upcycle.add_argument("model", help="the dense model's folder, its name on the Hub, or a GGUF file")
    upcycle.add_argument("--out", type=Path, required=True, help="the folder to make")
    upcycle.add_argument("--experts", type=int, help="default: 8, or one for each sibling")
    upcycle.add_argument("--top-k", type=int, default=2, help="experts of a token (default: 2)")
    upcycle.add_argument("--method", choices=["copy", "split", "noise", "drop", "siblings"], default="copy")
    upcycle.add_argument("--granularity", type=int, help="split: into how many parts (default: 2)")
    upcycle.add_argument("--noise", type=float, help="noise: in standard deviations of the weights (default: 0.01)")
    upcycle.add_argument("--drop", type=float, help="drop: share of hidden units drawn anew (default: 0.5)")
    upcycle.add_argument("--siblings", nargs="+", default=[], help="siblings: fine-tuned models, an expert each")
    upcycle.add_argument("--prompts", type=Path, help="siblings: JSON file, a list of texts for each, for the routers")
    upcycle.add_argument("--to", default="auto", help="a family of transformers, shunter, or auto (default)")
    upcycle.add_argument("--every", type=int, default=1, help="sparsify every n-th block")
    upcycle.add_argument("--seed", type=int, default=0)
    upcycle.add_argument("--no-check", action="store_true", help="do not load both models to compare their logits")
    upcycle.add_argument("--json", action="store_true", help="the receipt to standard output")
    upcycle.set_defaults(verb=_upcycle)

    export = verbs.add_parser("export", help="write a sparse model for plain transformers, or bring one of its here")
    export.add_argument("model", help="the folder of a sparse model of Shunter, Mixtral, Qwen3-MoE, OLMoE, DeepSeek-V3")
    export.add_argument("--out", type=Path, required=True, help="the folder to make")
    export.add_argument("--to", default="auto", help="a family of transformers, shunter, or auto (default)")
    export.add_argument("--no-check", action="store_true", help="do not load both models to compare their logits")
    export.add_argument("--json", action="store_true", help="the receipt to standard output")
    export.set_defaults(verb=_export)

    table = verbs.add_parser("routers", help="list every router: who decides, what it needs, where it comes from")
    table.add_argument("--format", choices=["text", "markdown", "json"], default="text")
    table.set_defaults(verb=_routers)

    inspect = verbs.add_parser(
        "inspect",
        help="see inside the experts of any mixture-of-experts model, or compare two checkpoints of one",
        epilog="Leaves inspect.html and inspect.json. Ctrl-C ends the work early and reports what there is.",
    )
    inspect.add_argument("models", nargs="+", metavar="MODEL", help="a model's folder; two: before and after")
    inspect.add_argument("--data", nargs="+", help="text as in train, or folders of images; none: the built-in text")
    inspect.add_argument("--out", type=Path, help="the report's folder (default: runs/inspect-MODEL)")
    inspect.add_argument("--tokens", type=int, default=16384, help="how many tokens to look at")
    inspect.add_argument("--length", type=int, default=128, help="tokens of a window")
    inspect.add_argument("--ablate", type=int, default=256, help="how many experts to remove in turn; 0: none")
    inspect.add_argument("--json", action="store_true", help="the findings to standard output too")
    inspect.set_defaults(verb=_inspect)

    bench = verbs.add_parser("bench", help="time Shunter side by side with a dense layer and with transformers")
    benches = bench.add_subparsers(dest="what", required=True, metavar="what")
    experts = benches.add_parser("experts", help="the backends next to a dense layer and to transformers' own experts")
    experts.add_argument("--shapes", nargs="+", help="of S1 to S6, or T,d,f,E,k (default: S1 to S6)")
    experts.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    experts.add_argument("--backends", nargs="+", help="besides auto (default: all that can run)")
    experts.add_argument("--peers", nargs="+", help="of transformers (default: eager batched_mm grouped_mm)")
    experts.set_defaults(rounds=11, measure=_bench_experts)
    finetune = benches.add_parser("finetune", help="steps of Trainer on a Qwen3-MoE, by experts_implementation")
    finetune.set_defaults(rounds=3, measure=_bench_finetune)
    gpu = benches.add_parser(
        "gpu", help="the Triton backend next to torch's grouped product and a dense layer, on a GPU"
    )
    gpu.add_argument("--shapes", nargs="+", help="of the named ones, or T,d,f,E,k (default: all the named ones)")
    gpu.add_argument("--backends", nargs="+", help="default: triton and grouped_mm")
    gpu.set_defaults(rounds=11, measure=_bench_gpu)
    deciding = benches.add_parser("routers", help="score and assign of every router, as a share of its layer's step")
    deciding.add_argument("--shape", help="T,d,f,E,1 (default: 4096,512,256,64,1); k is the router's own")
    deciding.add_argument("--routers", nargs="+", help="default: all")
    deciding.set_defaults(rounds=11, measure=_bench_routers)
    for each in (experts, finetune, gpu, deciding):
        each.add_argument("--rounds", type=int, help=f"of the interleaved run (default: {each.get_default('rounds')})")
        each.add_argument("--out", type=Path, help="a folder for bench-WHAT.json and bench-WHAT.md")
        each.add_argument("--json", action="store_true", help="JSON to standard output instead of the tables")
    bench.set_defaults(verb=_bench)
    return parser


def _train(args: argparse.Namespace) -> int:
    from ..data.documents import DataError
    from ..recipes.config import ConfigError, load_config
    from ..recipes.sections import TextConfig
    from ..recipes.text import train
    from ..training.loop import Interrupted

    run: Path | None = args.run
    try:
        if args.resume:
            if args.config or args.data or args.overrides:
                raise ConfigError("--resume goes on with the run's own configuration; leave the other options out")
            run = run or Path("runs/text")
            config = load_config(TextConfig, run / "config.yaml", [])
        else:
            overrides = args.overrides + ([f"data.source={json.dumps(args.data)}"] if args.data else [])
            config = load_config(TextConfig, args.config, overrides)
            run = run or Path(config.out) / config.name
            if (run / "metrics.jsonl").exists():
                raise ConfigError(
                    f"{run} holds a run already; go on with --resume --run {run}, or choose another name="
                )
    except ConfigError as error:
        print(f"shunter train: {error}", file=sys.stderr)
        return 2
    try:
        summary = train(config, run, resume=args.resume, as_json=args.json)
    except DataError as error:
        print(f"shunter train: {error}", file=sys.stderr)
        return 2
    except Interrupted as where:
        print(f"\nStopped at the {where}. Go on with: shunter train text --resume --run {run}", file=sys.stderr)
        return 130
    if not args.json:
        dense, sparse = summary["dense"], summary["sparse"]
        print(
            f"\nHeld-out loss (nats/token): dense {dense['eval_loss']:.4f}, sparse {sparse['eval_loss']:.4f}, "
            f"gain {summary['gain']:.4f}\n"
            f"The sparse model took {sparse['seconds'] / dense['seconds']:.2f} times the seconds and "
            f"{sparse['peak_rss_bytes'] / dense['peak_rss_bytes']:.2f} times the memory.\n"
            f"Report: {run / 'report.html'}"
        )
    return 0


def _compare(args: argparse.Namespace) -> int:
    from ..data.documents import DataError
    from ..recipes.compare import compare, parse_routers, resumed
    from ..recipes.config import ConfigError, load_config
    from ..recipes.sections import TextConfig
    from ..training.loop import Interrupted

    run: Path = args.run or Path("runs/compare")
    try:
        if args.resume:
            if args.config or args.routers or args.overrides:
                raise ConfigError("--resume goes on with the comparison's own settings; leave the other options out")
            config, specs = resumed(run)
        else:
            specs = parse_routers(args.routers or "")
            config = load_config(TextConfig, args.config, args.overrides)
            if (run / "metrics.jsonl").exists():
                raise ConfigError(
                    f"{run} holds a run already; go on with --resume --run {run}, or choose another --run"
                )
        compare(config, specs, run, resume=args.resume, as_json=args.json)
    except (ConfigError, DataError) as error:
        print(f"shunter compare: {error}", file=sys.stderr)
        return 2
    except Interrupted as where:
        print(f"\nStopped at the {where}. Go on with: shunter compare text --resume --run {run}", file=sys.stderr)
        return 130
    if not args.json:
        print(f"\n{(run / 'compare.md').read_text(encoding='utf-8')}\nPicture: {run / 'compare.png'}")
    return 0


def _eval(args: argparse.Namespace) -> int:
    from ..data.documents import DataError
    from ..recipes.config import ConfigError
    from ..recipes.text import evaluate_run

    try:
        found = evaluate_run(args.run)
    except (ConfigError, DataError, FileNotFoundError, ValueError) as error:
        print(f"shunter eval: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(found))
        return 0
    print(f"{'':10} {'loss':>8} {'bits/byte':>10}")
    for which, result in found.items():
        rows = {which: result, **{f"  {name}": value for name, value in result["domains"].items()}}
        for name, value in rows.items():
            print(f"{name:10} {value['loss']:8.4f} {value['bits_per_byte']:10.4f}")
    return 0


def _generate(args: argparse.Namespace) -> int:
    from ..recipes.text import generate

    try:
        text = generate(args.run, args.model, args.prompt, args.max_new_tokens, args.temperature, args.seed)
    except (FileNotFoundError, ValueError) as error:
        print(f"shunter generate: {error}", file=sys.stderr)
        return 2
    print(text)
    return 0


def _upcycle(args: argparse.Namespace) -> int:
    from transformers.utils import logging

    from ..hf.checkpoints.reading import read_texts
    from ..hf.checkpoints.upcycling import describe, upcycle

    logging.disable_progress_bar()
    try:
        prompts = None if args.prompts is None else read_texts(args.prompts)
        receipt = upcycle(
            args.model,
            args.out,
            args.experts,
            args.top_k,
            method=args.method,
            granularity=args.granularity,
            noise=args.noise,
            drop=args.drop,
            siblings=args.siblings,
            prompts=prompts,
            to=args.to,
            every=args.every,
            seed=args.seed,
            check=not args.no_check,
        )
    except (ValueError, OSError) as error:
        print(f"shunter upcycle: {error}", file=sys.stderr)
        return 2
    print(json.dumps(receipt) if args.json else f"{args.out}: {describe(receipt)}")
    return 0


def _export(args: argparse.Namespace) -> int:
    from transformers.utils import logging

    from ..hf.checkpoints.exporting import describe, export

    logging.disable_progress_bar()
    try:
        receipt = export(args.model, args.out, args.to, check=not args.no_check)
    except (ValueError, OSError) as error:
        print(f"shunter export: {error}", file=sys.stderr)
        return 2
    print(json.dumps(receipt) if args.json else f"{args.out}: {describe(receipt)}")
    return 0


def _routers(args: argparse.Namespace) -> int:
    from ..routers.taxonomy import markdown, plain, taxonomy

    rows = taxonomy()
    if args.format == "json":
        print(json.dumps([row._asdict() for row in rows], indent=2))
    else:
        sys.stdout.write(markdown(rows) if args.format == "markdown" else plain(rows) + "\n")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from ..data.documents import DataError
    from ..errors import UserError
    from ..recipes.inspection import inspect_models

    try:
        findings, page = inspect_models(
            args.models, args.data, args.out, args.tokens, args.length, args.ablate, quiet=args.json
        )
    except (DataError, UserError) as error:
        print(f"shunter inspect: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(findings))
    print(f"Report: {page}", file=sys.stderr)
    return 0 if findings["complete"] else 130


def _bench(args: argparse.Namespace) -> int:
    measure: Callable[[argparse.Namespace], tuple[dict[str, Any], str, bool]] = args.measure
    try:
        if args.rounds < 1:
            raise ValueError(f"--rounds {args.rounds} must be at least 1")
        found, page, right = measure(args)
    except ValueError as error:
        print(f"shunter bench: {error}", file=sys.stderr)
        return 2
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / f"bench-{args.what}.json").write_text(json.dumps(found, indent=1) + "\n")
        (args.out / f"bench-{args.what}.md").write_text(page)
    sys.stdout.write(json.dumps(found) + "\n" if args.json else page)
    return 0 if right else 1


def _bench_experts(args: argparse.Namespace) -> tuple[dict[str, Any], str, bool]:
    from ..benchmarks.experts import PEERS, SHAPES, bench, markdown, parse_shape
    from ..experts import backend_names

    shapes = {text: parse_shape(text, SHAPES) for text in args.shapes or SHAPES}
    backends, peers = args.backends or backend_names(), args.peers or PEERS
    found = bench(shapes, args.dtype, backends, peers, rounds=args.rounds, say=_progress)
    return found, markdown(found), True


def _bench_gpu(args: argparse.Namespace) -> tuple[dict[str, Any], str, bool]:
    from ..benchmarks.experts import parse_shape
    from ..benchmarks.gpu import BACKENDS, DTYPES, SHAPES, bench, markdown, right

    shapes = {text: parse_shape(text, SHAPES) for text in args.shapes or SHAPES}
    found = bench(shapes, list(DTYPES), args.backends or BACKENDS, rounds=args.rounds, say=_progress)
    return found, markdown(found), right(found)


def _bench_finetune(args: argparse.Namespace) -> tuple[dict[str, Any], str, bool]:
    from ..benchmarks.finetune import bench, markdown

    found = bench(rounds=args.rounds, say=_progress)
    return found, markdown(found), True


def _bench_routers(args: argparse.Namespace) -> tuple[dict[str, Any], str, bool]:
    from ..benchmarks.experts import parse_shape
    from ..benchmarks.routers import SHAPE, bench, markdown

    shape = parse_shape(args.shape, {}) if args.shape else SHAPE
    found = bench(args.routers, shape, rounds=args.rounds, say=_progress)
    return found, markdown(found), True


def _progress(line: str) -> None:
    print(line, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
