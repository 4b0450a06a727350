"""The verb that times: bench."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..durable import make_folder, write
from ..errors import UserError

__all__ = ["add_verbs"]


def add_verbs(verbs: Any) -> None:
    """Add the verbs to the parser of the command line."""
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
    offload = benches.add_parser("offload", help="decoding with experts on disk, next to all in memory and to a map")
    offload.add_argument("--folder", type=Path, help="where the model's file is made (default: with temporary files)")
    offload.set_defaults(rounds=5, measure=_bench_offload)
    for each in (experts, finetune, gpu, deciding, offload):
        each.add_argument("--rounds", type=int, help=f"of the interleaved run (default: {each.get_default('rounds')})")
        each.add_argument("--out", type=Path, help="a folder for bench-WHAT.json and bench-WHAT.md")
        each.add_argument("--json", action="store_true", help="JSON to standard output instead of the tables")
    bench.set_defaults(verb=_bench)


def _bench(args: argparse.Namespace) -> int:
    measure: Callable[[argparse.Namespace], tuple[dict[str, Any], str, bool]] = args.measure
    if args.rounds < 1:
        raise UserError(f"--rounds {args.rounds} must be at least 1")
    if args.out:
        make_folder(args.out)
    found, page, right = measure(args)
    if args.out:
        write(args.out / f"bench-{args.what}.json", json.dumps(found, indent=1) + "\n")
        write(args.out / f"bench-{args.what}.md", page)
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


def _bench_offload(args: argparse.Namespace) -> tuple[dict[str, Any], str, bool]:
    from ..benchmarks.offload import bench, markdown, right

    found = bench(rounds=args.rounds, folder=args.folder, say=_progress)
    return found, markdown(found), right(found)


def _bench_routers(args: argparse.Namespace) -> tuple[dict[str, Any], str, bool]:
    from ..benchmarks.experts import parse_shape
    from ..benchmarks.routers import SHAPE, bench, markdown

    shape = parse_shape(args.shape, {}) if args.shape else SHAPE
    found = bench(args.routers, shape, rounds=args.rounds, say=_progress)
    return found, markdown(found), True


def _progress(line: str) -> None:
    print(line, file=sys.stderr)
