"""The main job: a dense language model and its sparse twin, equal in FLOPs, on the same tokens in the same order."""

from __future__ import annotations

import json
import math
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, set_seed
from transformers.utils import logging as hf_logging

from ..analysis.inspect.inspecting import specialisation
from ..analysis.ledger import ledger
from ..analysis.pages.run_page import write_picture, write_report
from ..analysis.runs import Metrics
from ..data.windows import EvalDomain, TextData, prepare
from ..errors import one_line as line_of
from ..hf import sparsify
from ..hf.checkpoints.loading import load_folder
from ..hf.checkpoints.reading import read_json
from ..routers import Router
from ..training.loop import train_model
from .config import load_config, save_config
from .sections import TextConfig

__all__ = [
    "account",
    "begin",
    "build_model",
    "evaluate",
    "evaluate_run",
    "expert_width",
    "generate",
    "load_model",
    "train",
    "train_one",
    "versions",
]


MODELS = ("dense", "sparse")


def build_model(config: TextConfig, which: str, vocab_size: int) -> PreTrainedModel:
    """The dense model, or its sparse twin: the same initial weights outside the feed-forward blocks."""
    m = config.model
    shape = AutoConfig.for_model(
        m.family,
        vocab_size=vocab_size,
        hidden_size=m.dim,
        intermediate_size=m.hidden,
        num_hidden_layers=m.layers,
        num_attention_heads=m.heads,
        num_key_value_heads=m.kv_heads or m.heads,
        head_dim=m.dim // m.heads,
        max_position_embeddings=config.data.sequence_length,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    s = config.sparse
    hidden = s.hidden or expert_width(m.hidden, s.build_router(m.dim, vocab_size), config.data.sequence_length)
    set_seed(config.seed)
    model = AutoModelForCausalLM.from_config(shape)
    if which == "dense":
        return model
    options: dict[str, Any] = s.router_options(vocab_size) | {"allow_leak": s.allow_leak, "backend": s.backend}
    return sparsify(model, s.num_experts, s.router, every=s.every, hidden=hidden, **options)


def expert_width(hidden: int, router: Router, sequence_length: int) -> int:
    """The width f of one expert at which k experts and the router cost what one dense gated block does.

    6 d f k + router FLOPs = 6 d hidden, rounded to the nearest whole unit; k is the mean number of experts a token
    asks for.
    """
    unit = 6 * router.dim
    return max(1, round((unit * hidden - router.flops_per_token) / (unit * router.experts_for(sequence_length))))


@torch.no_grad()
def evaluate(model: PreTrainedModel, domains: list[EvalDomain], batch_size: int = 32) -> dict[str, Any]:
    """The held-out loss (nats per token) and bits per byte, in all and by domain.

    All domains count by their tokens. The mode of the model is restored.
    """
    was_training = model.training
    model.eval()
    found, nats, tokens, size = {}, 0.0, 0, 0
    for domain in domains:
        total, count = 0.0, 0
        for start in range(0, len(domain.input_ids), batch_size):
            ids = domain.input_ids[start : start + batch_size]
            logits = model(input_ids=ids).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(
                logits.reshape(-1, logits.shape[-1]).float(), ids[:, 1:].reshape(-1), reduction="sum"
            )
            total, count = total + float(loss), count + ids[:, 1:].numel()
        found[domain.name] = {"loss": total / count, "bits_per_byte": total / math.log(2) / domain.predicted_bytes}
        nats, tokens, size = nats + total, tokens + count, size + domain.predicted_bytes
    model.train(was_training)
    return {"loss": nats / tokens, "bits_per_byte": nats / math.log(2) / size, "domains": found}


def train(config: TextConfig, run: Path, *, resume: bool = False, as_json: bool = False) -> dict[str, Any]:
    """Train both models and leave the run folder complete: models, metrics, summary, report.

    Args:
        config: what to train.
        run: the folder; created.
        resume: go on with a run that was stopped; finished models are not trained again.
        as_json: metrics go to standard output, a JSON object a line, in place of the progress line.

    Returns:
        The summary.

    Raises:
        Interrupted: after Ctrl-C, when the checkpoint is written.
    """
    data, metrics = begin(config, run, as_json)
    costs = {which: train_one(which, config, run, data, metrics, resume=resume) for which in MODELS}
    summary = _summary(config, run, data, metrics, costs)
    (run / "summary.json").write_text(json.dumps(summary, indent=2), encoding="utf-8")
    found = specialisation(load_model(run, "sparse"), {d.name: d.input_ids for d in data.eval}, data.tokenizer)
    (run / "specialisation.json").write_text(json.dumps(found), encoding="utf-8")
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    write_report(run)
    write_picture(run, run / "picture.png")
    return summary


def begin(config: TextConfig, run: Path, as_json: bool) -> tuple[TextData, Metrics]:
    """Make the run folder, or find it again: configuration, data and its licences, tokenizer, metrics."""
    hf_logging.disable_progress_bar()
    if config.training.threads:
        torch.set_num_threads(config.training.threads)
    run.mkdir(parents=True, exist_ok=True)
    save_config(config, run / "config.yaml")
    data = prepare(config)
    _say(
        as_json,
        *(f"{d['name']}: {d['train_bytes']:,} bytes to train on, {d['source']}; {d['license']}" for d in data.domains),
    )
    (run / "data.json").write_text(json.dumps(data.describe(), indent=2), encoding="utf-8")
    data.tokenizer.save_pretrained(run / "tokenizer")
    return data, Metrics(run / "metrics.jsonl", sys.stdout if as_json else None)


def train_one(
    name: str, config: TextConfig, run: Path, data: TextData, metrics: Metrics, *, resume: bool
) -> dict[str, float]:
    """Train one model of a run into its folder `run / name`, unless it is resumed and finished already.

    Args:
        name: "dense", or whatever the sparse model is called.
        config: what to train.
        run: the run's folder.
        data, metrics: of `begin`.
        resume: go on from the newest checkpoint.

    Returns:
        What `train_model` measured.
    """
    receipt = run / name / "training.json"
    if resume and receipt.exists():
        found: dict[str, float] = json.loads(receipt.read_text())
        return found
    t = config.training
    model = build_model(config, "dense" if name == "dense" else "sparse", len(data.tokenizer))
    costs = train_model(
        name,
        model,
        data.train,
        lambda m: evaluate(m, data.eval),
        metrics,
        run / "checkpoints" / name,
        tokens_per_step=t.batch_tokens,
        eval_every=t.eval_every,
        log_every=t.log_every,
        resume=resume,
        max_steps=t.steps,
        per_device_train_batch_size=t.batch_tokens // config.data.sequence_length,
        learning_rate=t.learning_rate,
        warmup_steps=t.warmup,
        lr_scheduler_type=t.schedule,
        weight_decay=t.weight_decay,
        max_grad_norm=t.max_grad_norm,
        adam_beta2=t.beta2,
        save_strategy="steps",
        save_steps=t.save_every,
        seed=config.seed,
        use_cpu=not torch.cuda.is_available(),
    )
    model.save_pretrained(run / name)
    data.tokenizer.save_pretrained(run / name)
    receipt.write_text(json.dumps(costs))  # written last: from here on the model counts as trained
    return costs


def account(name: str, config: TextConfig, run: Path, metrics: Metrics, costs: dict[str, float]) -> dict[str, Any]:
    """What one trained model of a run reached and cost, as in the summary."""
    found = ledger(load_model(run, name), config.data.sequence_length)
    last = [m for m in metrics.lines() if m["kind"] == "eval" and m["model"] == name][-1]
    return {
        "eval_loss": last["loss"],
        "bits_per_byte": last["bits_per_byte"],
        "flops_per_token": found.flops_per_token,
        "params_total": found.params_total,
        "params_active": found.params_active,
        "seconds": costs["seconds"],
        "tokens": config.training.steps * config.training.batch_tokens,
        "peak_rss_bytes": costs["peak_rss_bytes"],
        "domains": last["domains"],
    }


def _summary(
    config: TextConfig, run: Path, data: TextData, metrics: Metrics, costs: dict[str, dict[str, float]]
) -> dict[str, Any]:
    summary: dict[str, Any] = {which: account(which, config, run, metrics, costs[which]) for which in MODELS}
    sparse = [m for m in metrics.lines() if m["kind"] == "eval" and m["model"] == "sparse"]
    return summary | {
        "gain": summary["dense"]["eval_loss"] - summary["sparse"]["eval_loss"],
        "steps_to_dense_loss": _share_of_steps(sparse, summary["dense"]["eval_loss"], config.training.steps),
        "tokens": summary["sparse"]["tokens"],
        "seed": config.seed,
        "licenses": [{key: d[key] for key in ("name", "license", "source")} for d in data.domains],
        "versions": versions(),
    }


def _share_of_steps(evals: list[dict[str, Any]], target: float, steps: int) -> float | None:
    """The share of the steps after which the evaluations first reach a loss, linearly between two; None if never."""
    for before, after in zip(evals, evals[1:], strict=False):
        if after["loss"] <= target:
            fall = before["loss"] - after["loss"]
            part = (before["loss"] - target) / fall if fall > 0 else 1.0
            return float((before["step"] + part * (after["step"] - before["step"])) / steps)
    return None


def versions() -> dict[str, str]:
    """Of Python, the platform and the packages that a result depends on."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in ("shunter", "torch", "transformers", "accelerate", "tokenizers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed as a package"
    return found


def _say(quiet: bool, *lines: str) -> None:
    if not quiet:
        print("\n".join(lines), file=sys.stderr)


def load_model(run: Path, which: str) -> PreTrainedModel:
    """A trained model of a run folder, in evaluation mode.

    Raises:
        FileNotFoundError: where the run has no such model (yet).
        ValueError: where its folder is damaged.
    """
    hf_logging.disable_progress_bar()
    folder = run / which
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} holds no trained model; `shunter train text` leaves one in its run folder")
    return load_folder(folder)


def evaluate_run(run: Path) -> dict[str, Any]:
    """Evaluate both models of a run folder again, on the run's own held-out text."""
    config = load_config(TextConfig, run / "config.yaml", [])
    models = {which: load_model(run, which) for which in MODELS}
    data = prepare(config)
    recorded = str(read_json(run / "data.json").get("fingerprint"))
    if data.fingerprint != recorded:
        raise ValueError(
            f"the text has changed since this run: its fingerprint is {data.fingerprint[:12]}, the run's "
            f"{recorded[:12]}. Install the versions that the run's summary.json names"
        )
    return {which: evaluate(model, data.eval) for which, model in models.items()}


def generate(run: Path, which: str, prompt: str, max_new_tokens: int, temperature: float, seed: int) -> str:
    """Continue a prompt with one of a run's models; temperature 0 takes the likeliest token each time."""
    model: Any = load_model(run, which)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(run / which, trust_remote_code=False)
    except Exception as error:  # a damaged file fails in as many ways as there are readers
        raise ValueError(f"{run / which}: its tokenizer cannot be loaded: {line_of(error)}") from None
    set_seed(seed)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    if ids.numel() == 0:
        raise ValueError("the prompt is empty; give at least one character")
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    out = model.generate(ids.long(), max_new_tokens=max_new_tokens, pad_token_id=tokenizer.eos_token_id, **sampling)
    return str(tokenizer.decode(out[0], skip_special_tokens=True))
