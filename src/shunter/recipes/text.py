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

from ..analysis.ledger import ledger
from ..analysis.report import write_picture, write_report
from ..analysis.specialisation import specialisation
from ..hf import from_pretrained, sparsify
from ..routers import Router
from .config import TextConfig, load_config, save_config
from .data import EvalDomain, TextData, prepare
from .training import Metrics, train_model

__all__ = ["build_model", "evaluate", "evaluate_run", "generate", "load_model", "train"]

MODELS = ("dense", "sparse")
_TENSORS = "model.safetensors"


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
    hidden = s.hidden or expert_width(m.hidden, s.build_router(m.dim, vocab_size))
    set_seed(config.seed)
    model = AutoModelForCausalLM.from_config(shape)
    if which == "dense":
        return model
    options: dict[str, Any] = s.router_options(vocab_size) | {"allow_leak": s.allow_leak, "backend": s.backend}
    return sparsify(model, s.num_experts, s.router, every=s.every, hidden=hidden, **options)


def expert_width(hidden: int, router: Router) -> int:
    """The width f of one expert at which k experts and the router cost what one dense gated block does.

    3 d f k + router weights = 3 d hidden, rounded to the nearest whole unit; k is the mean number of experts a token
    asks for.
    """
    weights = sum(p.numel() for p in router.parameters() if p.dim() == 2)
    return max(1, round((3 * router.dim * hidden - weights) / (3 * router.dim * router.experts_per_token)))


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
    metrics = Metrics(run / "metrics.jsonl", sys.stdout if as_json else None)
    t = config.training
    costs: dict[str, dict[str, float]] = {}
    for which in MODELS:
        receipt = run / which / "training.json"
        if resume and receipt.exists():
            costs[which] = json.loads(receipt.read_text())
            continue
        model = build_model(config, which, len(data.tokenizer))
        costs[which] = train_model(
            which,
            model,
            data.train,
            lambda m: evaluate(m, data.eval),
            metrics,
            run / "checkpoints" / which,
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
        model.save_pretrained(run / which)
        data.tokenizer.save_pretrained(run / which)
        receipt.write_text(json.dumps(costs[which]))  # written last: from here on the model counts as trained
    summary = _summary(config, run, data, metrics, costs)
    (run / "summary.json").write_text(json.dumps(summary, indent=2), encoding="utf-8")
    found = specialisation(load_model(run, "sparse"), {d.name: d.input_ids for d in data.eval}, data.tokenizer)
    (run / "specialisation.json").write_text(json.dumps(found), encoding="utf-8")
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    write_report(run)
    write_picture(run, run / "picture.png")
    return summary


def _summary(
    config: TextConfig, run: Path, data: TextData, metrics: Metrics, costs: dict[str, dict[str, float]]
) -> dict[str, Any]:
    tokens = config.training.steps * config.training.batch_tokens
    summary: dict[str, Any] = {}
    evals = {which: [m for m in metrics.lines() if m["kind"] == "eval" and m["model"] == which] for which in MODELS}
    for which in MODELS:
        model = load_model(run, which)
        account = ledger(model, config.data.sequence_length)
        last = evals[which][-1]
        summary[which] = {
            "eval_loss": last["loss"],
            "bits_per_byte": last["bits_per_byte"],
            "flops_per_token": account.flops_per_token,
            "params_total": account.params_total,
            "params_active": account.params_active,
            "seconds": costs[which]["seconds"],
            "tokens": tokens,
            "peak_rss_bytes": costs[which]["peak_rss_bytes"],
            "domains": last["domains"],
        }
    return summary | {
        "gain": summary["dense"]["eval_loss"] - summary["sparse"]["eval_loss"],
        "steps_to_dense_loss": _share_of_steps(evals["sparse"], summary["dense"]["eval_loss"], config.training.steps),
        "tokens": tokens,
        "seed": config.seed,
        "licenses": [{key: d[key] for key in ("name", "license", "source")} for d in data.domains],
        "versions": _versions(),
    }


def _share_of_steps(evals: list[dict[str, Any]], target: float, steps: int) -> float | None:
    """The share of the steps after which the evaluations first reach a loss, linearly between two; None if never."""
    for before, after in zip(evals, evals[1:], strict=False):
        if after["loss"] <= target:
            fall = before["loss"] - after["loss"]
            part = (before["loss"] - target) / fall if fall > 0 else 1.0
            return float((before["step"] + part * (after["step"] - before["step"])) / steps)
    return None


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "platform": platform.platform()}
    for package in ("shunter", "torch", "transformers", "accelerate", "tokenizers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed as a package"
    return versions


def _say(quiet: bool, *lines: str) -> None:
    if not quiet:
        print("\n".join(lines), file=sys.stderr)


def load_model(run: Path, which: str) -> PreTrainedModel:
    """A trained model of a run folder, in evaluation mode.

    Raises:
        FileNotFoundError: where the run has no such model (yet).
    """
    hf_logging.disable_progress_bar()
    folder = run / which
    if not (folder / _TENSORS).exists():
        raise FileNotFoundError(f"{folder} holds no trained model; `shunter train text` leaves one in its run folder")
    loaded = from_pretrained(str(folder)) if which == "sparse" else AutoModelForCausalLM.from_pretrained(folder)
    return loaded.eval()


def evaluate_run(run: Path) -> dict[str, Any]:
    """Evaluate both models of a run folder again, on the run's own held-out text."""
    config = load_config(TextConfig, run / "config.yaml", [])
    data = prepare(config)
    recorded = json.loads((run / "data.json").read_text())["fingerprint"]
    if data.fingerprint != recorded:
        raise ValueError(
            f"the text has changed since this run: its fingerprint is {data.fingerprint[:12]}, the run's "
            f"{recorded[:12]}. Install the versions that the run's summary.json names"
        )
    return {which: evaluate(load_model(run, which), data.eval) for which in MODELS}


def generate(run: Path, which: str, prompt: str, max_new_tokens: int, temperature: float, seed: int) -> str:
    """Continue a prompt with one of a run's models; temperature 0 takes the likeliest token each time."""
    model: Any = load_model(run, which)
    tokenizer = AutoTokenizer.from_pretrained(run / which)
    set_seed(seed)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    if ids.numel() == 0:
        raise ValueError("the prompt is empty; give at least one character")
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    out = model.generate(ids.long(), max_new_tokens=max_new_tokens, pad_token_id=tokenizer.eos_token_id, **sampling)
    return str(tokenizer.decode(out[0], skip_special_tokens=True))
