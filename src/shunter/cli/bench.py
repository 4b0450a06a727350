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
    experts.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], help="of weights and inputs")
    experts.add_argument("--backends", nargs="+", help="besides auto (default: all that can run)")
    experts.add_argument("--peers", nargs="+", help="of transformers (default: eager batched_mm grouped_mm)")
    experts.set_defaults(rounds=11, measure=_bench_experts)
    finetune = benches.add_parser("finetune", help="steps of Trainer on a Qwen3-MoE, by experts_implementation")
    finetune.set_defaults(rounds=3, measure=_bench_finetune)
    generate = benches.add_parser(
        "generate", help="prefill and decoding of whole models by transformers, with Shunter, by llama.cpp"
    )
    generate.add_argument("--models", nargs="+", help="of smollm2-8, smollm2-32 and qwen3-moe (default: all)")
    generate.add_argument("--precisions", nargs="+", help='of float32, bfloat16 and "8 bits" (default: all)')
    generate.add_argument(
        "--contestants", nargs="+", help="of eager, grouped_mm, torchao, shunter, llama.cpp (default: all)"
    )
    generate.add_argument("--layers", type=int, help="fewer than the models have, for a look")
    generate.add_argument("--minutes", type=float, default=8.0, help="in which all should end (default: 8)")
    generate.set_defaults(rounds=5, measure=_bench_generate)
    gpu = benches.add_parser(
        "gpu", help="the Triton backend next to torch's grouped product and a dense layer, on a GPU"
    )
    gpu.add_argument("--shapes", nargs="+", help="of the named ones, or T,d,f,E,k (default: all the named ones)")
    gpu.add_argument("--backends", nargs="+", help="default: triton and grouped_mm")
    gpu.set_defaults(rounds=11, measure=_bench_gpu)
    lora = benches.add_parser("lora", help="what LoRA on all experts adds to a step, by peft and by Shunter")
    lora.add_argument("--rank", type=int, default=8, help="of the adapters")
    lora.set_defaults(rounds=3, measure=_bench_lora)
    deciding = benches.add_parser("routers", help="score and assign of every router, as a share of its layer's step")
    deciding.add_argument("--shape", help="T,d,f,E,1 (default: 4096,512,256,64,1); k is the router's own")
    deciding.add_argument("--routers", nargs="+", help="default: all")
    deciding.set_defaults(rounds=11, measure=_bench_routers)
    quantised = benches.add_parser("quantised", help="a run's held-out loss by the bits of its experts")
    quantised.add_argument("run", type=Path, help="the folder of a run of shunter train text")
    quantised.add_argument("--windows", type=int, default=64, help="of training text that calibrate (default: 64)")
    quantised.set_defaults(rounds=1, measure=_bench_quantised)
    layer = benches.add_parser("layer", help="a layer part by part, as its experts become more and narrower")
    layer.add_argument("--experts", type=int, nargs="+", help="E (default: 8 32 128 512 1024)")
    layer.add_argument("--tokens", type=int, nargs="+", help="T (default: 256 8192 65536)")
    layer.add_argument("--dim", type=int, default=256, help="d (default: 256)")
    layer.add_argument("--width", type=int, default=512, help="k f, the hidden units of a token (default: 512)")
    layer.add_argument("--top-k", type=int, default=2, help="k (default: 2)")
    layer.add_argument("--dtype", default="float32", help="of weights and inputs")
    layer.set_defaults(rounds=11, measure=_bench_layer)
    several = benches.add_parser(
        "parallel", help="a layer on several processes, by experts or by data, and transformers"
    )
    several.add_argument("--shapes", nargs="+", help="of S1 to S6, or T,d,f,E,k (default: S1 to S3)")
    several.add_argument("--processes", type=int, default=2, help="which share the experts (default: 2)")
    several.set_defaults(rounds=11, measure=_bench_parallel)
    offload = benches.add_parser("offload", help="decoding with experts on disk, next to all in memory and to a map")
    offload.add_argument("--folder", type=Path, help="where the model's file is made (default: with temporary files)")
    offload.set_defaults(rounds=5, measure=_bench_offload)
    for each in (experts, finetune, generate, gpu, deciding, layer, lora, offload, quantised, several):
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


def _bench_generate(args: argparse.Namespace) -> tuple[dict[str, Any], str, bool]:
    from transformers.utils import logging

    from ..benchmarks.generate import CONTESTANTS, MODELS, PRECISIONS, bench, markdown, right

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    models, precisions = args.models or list(MODELS), args.precisions or list(PRECISIONS)
    contestants = args.contestants or list(CONTESTANTS)
    found = bench(models, precisions, contestants, args.layers, args.minutes, args.rounds, say=_progress)
    return found, markdown(found), right(found)


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


def _bench_lora(args: argparse.Namespace) -> tuple[dict[str, Any], str, bool]:
    from ..benchmarks.lora import bench, markdown, right

    if args.rank < 1:
        raise UserError(f"--rank {args.rank} must be at least 1")
    found = bench(args.rank, rounds=args.rounds, say=_progress)
    return found, markdown(found), right(found)


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


def _bench_layer(args: argparse.Namespace) -> tuple[dict[str, Any], str, bool]:
    from ..benchmarks.layer import EXPERTS, TOKENS, bench, markdown

    sizes = {"dim": args.dim, "width": args.width, "top_k": args.top_k}
    experts, tokens = args.experts or EXPERTS, args.tokens or TOKENS
    found = bench(experts, tokens, **sizes, dtype=args.dtype, rounds=args.rounds, say=_progress)
    return found, markdown(found), True


def _bench_quantised(args: argparse.Namespace) -> tuple[dict[str, Any], str, bool]:
    from ..benchmarks.quantised import bench, markdown

    if args.windows < 1:
        raise UserError(f"--windows {args.windows} must be at least 1")
    found = bench(args.run, args.windows, say=_progress)
    return found, markdown(found), True


def _bench_parallel(args: argparse.Namespace) -> tuple[dict[str, Any], str, bool]:
    from ..benchmarks.experts import SHAPES, parse_shape
    from ..benchmarks.parallel import TARGETS, bench, markdown

    shapes = {text: parse_shape(text, SHAPES) for text in args.shapes or TARGETS}
    for name, shape in shapes.items():
        if args.processes < 1 or shape.experts % args.processes or shape.tokens % args.processes:
            raise UserError(f"--processes {args.processes} must divide the experts and tokens of {name}")
    found = bench(shapes, args.processes, rounds=args.rounds, say=_progress)
    return found, markdown(found), True


def _progress(line: str) -> None:
    print(line, file=sys.stderr)
