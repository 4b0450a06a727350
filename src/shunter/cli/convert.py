"""The verbs of models on disk: upcycle, export, quantize, prune, extract, distill."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ..errors import UserError
from .arguments import seed

__all__ = ["add_verbs"]


def add_verbs(verbs: Any) -> None:
    """Add the verbs to the parser of the command line."""
    upcycle = verbs.add_parser("upcycle", help="make a dense Hugging Face model a sparse one, its experts copies")
    upcycle.add_argument("model", help="the dense model's folder, its name on the Hub, or a GGUF file")
    upcycle.add_argument("--out", type=Path, required=True, help="the folder to make")
    upcycle.add_argument("--experts", type=int, help="default: 8, or one for each sibling")
    upcycle.add_argument("--top-k", type=int, default=2, help="experts of a token (default: 2)")
    upcycle.add_argument(
        "--method",
        choices=["copy", "split", "noise", "drop", "siblings"],
        default="copy",
        help="how experts come from the block: equal copies, parts of copies, copies with noise or with units drawn "
        "anew, or a block of each sibling",
    )
    upcycle.add_argument("--granularity", type=int, help="split: into how many parts (default: 2)")
    upcycle.add_argument("--noise", type=float, help="noise: in standard deviations of the weights (default: 0.01)")
    upcycle.add_argument("--drop", type=float, help="drop: share of hidden units drawn anew (default: 0.5)")
    upcycle.add_argument("--siblings", nargs="+", default=[], help="siblings: fine-tuned models, an expert each")
    upcycle.add_argument("--prompts", type=Path, help="siblings: JSON file, a list of texts for each, for the routers")
    upcycle.add_argument("--to", default="auto", help="a family of transformers, shunter, or auto (default)")
    upcycle.add_argument("--every", type=int, default=1, help="sparsify every n-th block")
    upcycle.add_argument("--placement", default="", help='the same in words: "every 2, last 3, pyramid"')
    upcycle.add_argument("--seed", type=seed, default=0, help="of routers, noise and drops")
    upcycle.add_argument("--no-check", action="store_true", help="do not load both models to compare their logits")
    upcycle.add_argument("--json", action="store_true", help="the receipt to standard output")
    upcycle.set_defaults(verb=_upcycle)

    export = verbs.add_parser("export", help="write a sparse model for transformers or llama.cpp, or bring one here")
    export.add_argument("model", help="the folder of a sparse model of Shunter, Mixtral, Qwen3-MoE, OLMoE, DeepSeek-V3")
    export.add_argument("--out", type=Path, required=True, help="the folder to make, or a file NAME.gguf")
    export.add_argument("--to", default="auto", help="a family of transformers, shunter, gguf, or auto (default)")
    export.add_argument("--no-check", action="store_true", help="do not load both models to compare their logits")
    export.add_argument("--json", action="store_true", help="the receipt to standard output")
    export.set_defaults(verb=_export)

    quantize = verbs.add_parser("quantize", help="write a sparse model with its experts in 8 or 4 bits, for inference")
    quantize.add_argument("model", help="the folder of a sparse model, Shunter's or of a family of transformers")
    quantize.add_argument("--out", type=Path, required=True, help="the folder to make")
    quantize.add_argument("--bits", type=int, default=4, help="8: by row; 4: by groups of a row (default: 4)")
    quantize.add_argument("--group", type=int, default=32, help="4 bits: 32 or 64 neighbours of a row")
    quantize.add_argument("--zero-point", action="store_true", help="4 bits: a zero of its own for each group")
    quantize.add_argument("--calibrate", nargs="+", metavar="DATA", help="text as in train, to weigh errors by")
    quantize.add_argument("--tokens", type=int, default=16384, help="how many tokens calibrate (default: 16384)")
    quantize.add_argument("--json", action="store_true", help="the report to standard output")
    quantize.set_defaults(verb=_quantize)

    prune = verbs.add_parser("prune", help="write a sparse model with fewer experts, and measure what that costs")
    prune.add_argument("model", metavar="MODEL", help="the folder of a mixture of experts, of transformers or Shunter")
    prune.add_argument("--out", type=Path, required=True, help="the folder to make")
    prune.add_argument("--keep", type=int, required=True, help="how many experts stay in each layer")
    prune.add_argument("--method", default="reap", help="random, use, reap (default) or merge")
    prune.add_argument("--data", nargs="+", help="held-out text as in train, or images; none: the built-in text")
    prune.add_argument("--tokens", type=int, default=16384, help="how many of the data; half of them choose")
    prune.add_argument("--length", type=int, default=128, help="tokens of a window")
    prune.add_argument("--seed", type=seed, default=0, help="of the method random")
    prune.add_argument("--offload", action="store_true", help="weights from disk, a module at a time (slow)")
    prune.add_argument("--no-check", action="store_true", help="do not measure the loss before and after")
    prune.add_argument("--json", action="store_true", help="the receipt to standard output")
    prune.set_defaults(verb=_prune)

    extract = verbs.add_parser("extract", help="write the dense model that a sparse one is for one task or language")
    extract.add_argument("model", metavar="MODEL", help="a model with the router task, domain or language")
    extract.add_argument("--out", type=Path, required=True, help="the folder to make")
    which = extract.add_mutually_exclusive_group(required=True)
    for kind in ("task", "domain", "language"):
        which.add_argument(f"--{kind}", help=f"the number of the {kind}, or its name in a run of train")
    extract.add_argument("--json", action="store_true", help="the receipt to standard output")
    extract.set_defaults(verb=_extract)

    distill = verbs.add_parser("distill", help="train a smaller model on what a sparse one knows, and say what is kept")
    distill.add_argument("teacher", metavar="TEACHER", help="the folder of a sparse model, or of a run of train")
    distill.add_argument("--out", type=Path, required=True, help="the student's folder")
    distill.add_argument("--student", type=Path, help="a model that is to learn, such as a pruned one (default: dense)")
    distill.add_argument("--layers", type=int, help="a student of the teacher's kind with so many layers")
    own = "none: what a run's models learned from, or the built-in text"
    distill.add_argument("--data", nargs="+", help=f"text as in train, or images; {own}")
    distill.add_argument(
        "--baseline",
        type=Path,
        help="a model to count the gain from (default: the student's twin of as many steps without a teacher: a run's "
        "own dense model, or one that is trained)",
    )
    distill.add_argument("--steps", type=int, help="of training (default: those of the run, or 300)")
    distill.add_argument("--learning-rate", type=float, help="at its highest (default: that of the run, or 1e-3)")
    distill.add_argument("--soft", type=float, default=0.25, help="the teacher's weight in the loss")
    distill.add_argument("--stop", type=float, default=1.0, help="the share of the steps with a teacher")
    distill.add_argument("--tokens", type=int, default=500_000, help="how many of --data; a tenth is held out")
    distill.add_argument("--length", type=int, default=128, help="tokens of a window")
    distill.add_argument("--seed", type=seed, default=0, help="of drawn weights and of the order of the data")
    distill.add_argument("--json", action="store_true", help="the receipt to standard output")
    distill.set_defaults(verb=_distill)


def _upcycle(args: argparse.Namespace) -> int:
    from transformers.utils import logging

    from ..hf.checkpoints.reading import read_texts
    from ..hf.checkpoints.upcycling import describe, upcycle

    logging.disable_progress_bar()
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
        placement=args.placement,
        seed=args.seed,
        check=not args.no_check,
    )
    print(json.dumps(receipt) if args.json else f"{args.out}: {describe(receipt)}")
    return 0


def _export(args: argparse.Namespace) -> int:
    from transformers.utils import logging

    from ..hf.checkpoints.exporting import describe, export

    logging.disable_progress_bar()
    receipt = export(args.model, args.out, args.to, check=not args.no_check)
    print(json.dumps(receipt) if args.json else f"{args.out}: {describe(receipt)}")
    return 0


def _quantize(args: argparse.Namespace) -> int:
    from transformers.utils import logging

    from ..analysis.inspect.material import text_material
    from ..data.documents import read_domains
    from ..durable import new_folder
    from ..hf.checkpoints.folders import load_tokenizer, local_folder
    from ..hf.checkpoints.loading import load_folder
    from ..hf.checkpoints.writing import copy_companions
    from ..hf.quantising import describe, quantize

    logging.disable_progress_bar()
    if args.tokens < 2:
        raise UserError(f"--tokens {args.tokens} must be at least 2")
    folder = local_folder(args.model)
    with new_folder(args.out) as made:
        model = load_folder(folder)
        batches = None
        if args.calibrate:
            material = text_material(model, load_tokenizer(folder), read_domains(args.calibrate), tokens=args.tokens)
            batches = [batch.inputs for batch in material.batches]
        report = quantize(model, args.bits, group=args.group, zero_point=args.zero_point, calibrate=batches)
        model.save_pretrained(made)
        copy_companions(folder, made)
        (made / "receipt.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report) if args.json else f"{args.out}: {describe(report)}")
    return 0


def _prune(args: argparse.Namespace) -> int:
    from transformers.utils import logging

    from ..training.pruning import describe, prune

    logging.disable_progress_bar()
    receipt = prune(
        args.model,
        args.out,
        args.keep,
        args.method,
        data=args.data,
        tokens=args.tokens,
        length=args.length,
        seed=args.seed,
        check=not args.no_check,
        offload=args.offload or None,
    )
    print(json.dumps(receipt) if args.json else f"{args.out}: {describe(receipt)}")
    return 0


def _extract(args: argparse.Namespace) -> int:
    from transformers.utils import logging

    from ..hf.checkpoints.extracting import describe, extract

    logging.disable_progress_bar()
    kind = next(kind for kind in ("task", "domain", "language") if getattr(args, kind) is not None)
    receipt = extract(args.model, args.out, kind, _numbered(args.model, kind, getattr(args, kind)))
    print(json.dumps(receipt) if args.json else f"{args.out}: {describe(receipt)}")
    return 0


def _numbered(model: str, kind: str, given: str) -> int:
    """The number of a task, domain or language: as given, or that of its name in the data of a model's run.

    Raises:
        UserError: for a name that is not known there.
    """
    from ..hf.checkpoints.folders import local_folder
    from ..hf.checkpoints.reading import read_json

    if given.isdecimal():
        return int(given)
    data = local_folder(model).parent / "data.json"
    if not data.is_file():
        raise UserError(f"--{kind} {given}: names are known of a run's model alone; give a number")
    found = read_json(data)
    languages = found.get("languages") or []
    known = [d.get("name") for d in found.get("domains") or []] if kind == "domain" else languages
    if given not in known:
        raise UserError(f"--{kind} {given}: the run has {', '.join(map(str, known)) or 'none'}")
    return known.index(given)


def _distill(args: argparse.Namespace) -> int:
    from transformers.utils import logging

    from ..hf.checkpoints.folders import local_folder
    from ..training.distilling import LEARNING_RATE, STEPS, describe, distill

    logging.disable_progress_bar()
    options: dict[str, Any] = {"steps": STEPS, "learning_rate": LEARNING_RATE, "baseline": args.baseline}
    run = local_folder(args.teacher).parent
    if args.data is None and (run / "recipe.json").is_file() and (run / "dense").is_dir():
        from ..recipes.lesson import lesson_of

        lesson = lesson_of(run)
        options |= {"material": lesson.material, "held_out": lesson.held_out}
        options |= {"steps": lesson.steps, "learning_rate": lesson.learning_rate}
        twins = args.student is None and args.layers is None and args.steps in (None, lesson.steps)
        if twins and args.baseline is None:
            options["baseline"] = run / "dense"
    options |= {key: value for key in ("steps", "learning_rate") if (value := getattr(args, key)) is not None}
    receipt = distill(
        args.teacher,
        args.out,
        student=args.student,
        layers=args.layers,
        data=args.data,
        soft=args.soft,
        stop=args.stop,
        tokens=args.tokens,
        length=args.length,
        seed=args.seed,
        say=lambda line: print(line, file=sys.stderr),
        **options,
    )
    print(json.dumps(receipt) if args.json else f"{args.out}: {describe(receipt)}")
    return 0
