"""`shunter bench finetune`: steps of Hugging Face's `Trainer` on a mixture-of-experts model, by experts implementation.

Every contestant starts from the same weights and sees the same batches; the steps of all are timed in one run, in turn.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedConfig, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from ..environment import described, machine, versions

__all__ = ["IMPLEMENTATIONS", "SIZES", "Random", "bench", "finetune", "markdown", "train_steps"]

IMPLEMENTATIONS = ["eager", "grouped_mm", "shunter"]

SIZES: dict[str, Any] = {
    "vocab_size": 1024, "hidden_size": 256, "moe_intermediate_size": 128, "intermediate_size": 256,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64,
    "num_experts": 64, "num_experts_per_tok": 8,
}  # fmt: skip


class Random(Dataset[dict[str, torch.Tensor]]):
    """The same random tokens over and over: a batch that a model learns."""

    def __init__(self, vocab_size: int, size: int, length: int) -> None:
        self.ids = torch.randint(vocab_size, (size, length))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, item: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[item], "labels": self.ids[item]}


class _Watch(TrainerCallback):
    """The loss and the seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self.began)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in (logs or {}):
            self.losses.append(logs["loss"])


def finetune(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    implementations: list[str],
    *,
    steps: int,
    batch: int,
    length: int,
    rounds: int = 1,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, dict[str, list[float]]]:
    """Fine-tune a model with `Trainer`, once with each experts implementation in each round.

    Args:
        model_class, config: of the model; its weights are drawn from the seed.
        implementations: names for `set_experts_implementation`.
        steps: of the optimizer, in each training.
        batch, length: sequences of a step and tokens of a sequence.
        rounds: how often all are trained, in rotating order.
        seed: of the weights and the tokens.
        say: what is told of the progress, a line at a time.

    Returns:
        By implementation: `losses` of the steps of the first round, and `seconds` of the steps of all rounds but for
        each training's first.
    """
    set_seed(seed)
    data = Random(config.get_text_config().vocab_size, batch, length)
    found: dict[str, dict[str, list[float]]] = {name: {"losses": [], "seconds": []} for name in implementations}
    for round_ in range(rounds):
        turn = round_ % len(implementations)
        for name in implementations[turn:] + implementations[:turn]:
            say(f"round {round_ + 1} of {rounds}: {name} …")
            set_seed(seed)
            model: Any = model_class(config)
            model.set_experts_implementation(name)
            watch = train_steps(model, data, steps, batch)
            found[name]["losses"] = found[name]["losses"] or watch.losses
            found[name]["seconds"] += watch.seconds[1:]
    return found


def train_steps(model: PreTrainedModel, data: Random, steps: int, batch: int) -> _Watch:
    """Train a model with `Trainer`; the seconds and the loss of each step."""
    watch = _Watch()
    with TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=batch,
                learning_rate=1e-3,
                logging_steps=1,
                logging_nan_inf_filter=False,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=not torch.cuda.is_available(),
            ),
            train_dataset=data,
            callbacks=[watch],
        )
        trainer.remove_callback(PrinterCallback)  # the table is what is printed
        trainer.train()
    return watch


def bench(rounds: int = 3, steps: int = 6, say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Time `Trainer`'s steps on a small Qwen3-MoE by experts implementation, and compare the losses with eager's.

    Returns:
        For JSON: `machine`, `versions`, `model` and `results` by implementation: `ms` of a step (the median), `speedup`
        over eager, `loss_difference` (the largest from eager's loss at the same step), `losses`.
    """
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    batch, length = 8, 256
    config = Qwen3MoeConfig(**SIZES, output_router_logits=True)
    found = finetune(
        Qwen3MoeForCausalLM, config, IMPLEMENTATIONS, steps=steps, batch=batch, length=length, rounds=rounds, say=say
    )
    eager = found["eager"]
    results = {
        name: {
            "ms": statistics.median(taken["seconds"]) * 1e3,
            "speedup": statistics.median(eager["seconds"]) / statistics.median(taken["seconds"]),
            "loss_difference": max(abs(a - b) for a, b in zip(taken["losses"], eager["losses"], strict=True)),
            "losses": taken["losses"],
        }
        for name, taken in found.items()
    }
    return {
        "machine": machine(),
        "versions": versions("transformers", "accelerate", "numba"),
        "rounds": rounds,
        "steps": steps,
        "model": {"family": "qwen3_moe", "dtype": "float32", "batch": batch, "length": length, **SIZES},
        "results": results,
    }


def markdown(found: dict[str, Any]) -> str:
    """What `bench` found, as a page."""
    m = found["model"]
    lines = [
        "# Fine-tuning steps of a Qwen3-MoE with Trainer",
        "",
        "Written by `shunter bench finetune`; the numbers behind it are in the JSON file beside it.",
        "",
        f"{described(found)}. Medians of {found['rounds']} interleaved rounds of {found['steps']} steps. The model: "
        f"{m['num_hidden_layers']} layers, d={m['hidden_size']}, {m['num_experts']} experts of f="
        f"{m['moe_intermediate_size']}, k={m['num_experts_per_tok']}, {m['dtype']}; {m['batch']} sequences of "
        f"{m['length']} tokens a step. A step is all of it: attention, experts, head, backward and AdamW.",
        "",
        "| experts_implementation | ms a step | speed-up over eager | largest difference from eager's loss |",
        "|---|---:|---:|---:|",
    ]
    for name, row in found["results"].items():
        lines.append(f"| {name} | {row['ms']:.0f} | {row['speedup']:.2f} | {row['loss_difference']:.1e} |")
    first, last = found["results"]["eager"]["losses"][0], found["results"]["eager"]["losses"][-1]
    return "\n".join([*lines, "", f"The loss falls from {first:.4f} to {last:.4f}.", ""])
