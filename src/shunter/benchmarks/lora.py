"""`shunter bench lora`: what LoRA on all experts adds to a step of `Trainer`, computed by `peft` and by Shunter.

Every contestant is a process of its own, so that its peak of memory is; all start from the same weights and see the
same batches, in rotating order.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from ..environment import described, machine, peak_rss_bytes, versions
from .finetune import SIZES, Random, train_steps

__all__ = ["CONTESTANTS", "bench", "markdown", "right"]

CONTESTANTS = ["none", "peft", "shunter"]
MOST = 1 / 3
"""Of what peft's wrapper adds to a step, what ours may."""


def _steps(
    contestant: str, sizes: dict[str, Any], r: int, steps: int, batch: int, length: int, implementation: str
) -> dict[str, Any]:
    """The seconds and losses of the steps of one training, and the peak of its process."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, set_seed

    set_seed(0)
    data = Random(sizes["vocab_size"], batch, length)
    model: Any = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes))
    model.set_experts_implementation(implementation)
    rest = {id(p) for name, p in model.named_parameters() if ".experts." not in name}
    if contestant != "none":
        from peft.tuners.lora import layer

        from ..training.adapters import expert_lora

        model = expert_lora(model, r=r)
        for module in model.modules():
            if contestant == "peft" and isinstance(module, layer.ParamWrapper):
                module.__class__ = layer.ParamWrapper
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(id(parameter) in rest or "lora_" in name)
        if "lora_B" in name:  # else the first step has nothing to send back through it
            torch.nn.init.normal_(parameter, std=0.01)
    watch = train_steps(model, data, steps, batch)
    return {"seconds": watch.seconds[1:], "losses": watch.losses, "peak": peak_rss_bytes()}


def measured(*given: Any) -> dict[str, Any]:
    """What `_steps` finds, in a process of its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(_steps, *given).result()


def bench(
    r: int = 8,
    rounds: int = 3,
    steps: int = 6,
    sizes: dict[str, Any] = SIZES,
    batch: int = 8,
    length: int = 256,
    implementation: str = "grouped_mm",
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Time steps of a small Qwen3-MoE of which all but the experts is trained, without and with LoRA on its experts.

    Returns:
        For JSON: `machine`, `versions`, `model` and `results` by contestant: `ms` of a step (the median), `peak_mb` of
        the process (the median), `added_ms` and `added_mb` over the one without, `losses`.
    """
    taken: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTESTANTS}
    for round_ in range(rounds):
        turn = round_ % len(CONTESTANTS)
        for name in CONTESTANTS[turn:] + CONTESTANTS[:turn]:
            say(f"round {round_ + 1} of {rounds}: {name} …")
            taken[name].append(measured(name, sizes, r, steps, batch, length, implementation))
    results: dict[str, dict[str, Any]] = {}
    for name, runs in taken.items():
        results[name] = {
            "ms": statistics.median(second for run in runs for second in run["seconds"]) * 1e3,
            "peak_mb": statistics.median(run["peak"] for run in runs) / 1e6,
            "losses": runs[0]["losses"],
        }
    for row in results.values():
        row["added_ms"] = row["ms"] - results["none"]["ms"]
        row["added_mb"] = row["peak_mb"] - results["none"]["peak_mb"]
    return {
        "machine": machine(),
        "versions": versions("transformers", "peft", "accelerate"),
        "rounds": rounds,
        "steps": steps,
        "rank": r,
        "implementation": implementation,
        "model": {"family": "qwen3_moe", "dtype": "float32", "batch": batch, "length": length, **sizes},
        "results": results,
    }


def right(found: dict[str, Any]) -> bool:
    """Whether both trained alike: what their losses differ by is rounding."""
    peft, ours = (found["results"][name]["losses"] for name in ("peft", "shunter"))
    return max(abs(a - b) for a, b in zip(peft, ours, strict=True)) < 1e-3


def markdown(found: dict[str, Any]) -> str:
    """What `bench` found, as a page."""
    m, rows = found["model"], found["results"]
    lines = [
        "# LoRA on experts, by peft and by Shunter",
        "",
        "Written by `shunter bench lora`; the numbers behind it are in the JSON file beside it.",
        "",
        f"{described(found)}. Medians of {found['rounds']} interleaved rounds of {found['steps']} steps, each in a "
        f"process of its own. The model: Qwen3-MoE, {m['num_hidden_layers']} layers, d={m['hidden_size']}, "
        f"{m['num_experts']} experts of f={m['moe_intermediate_size']}, k={m['num_experts_per_tok']}, {m['dtype']}, "
        f"experts_implementation {found['implementation']}; {m['batch']} sequences of {m['length']} tokens a step. All "
        f"but the experts is trained, and of these adapters of rank {found['rank']}.",
        "",
        "| adapters | ms a step | added | peak MB | added |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, row in rows.items():
        lines.append(
            f"| {name} | {row['ms']:.0f} | {row['added_ms']:+.0f} | {row['peak_mb']:.0f} | {row['added_mb']:+.0f} |"
        )
    shares = {what: rows["shunter"][what] / rows["peft"][what] for what in ("added_ms", "added_mb")}
    difference = max(abs(a - b) for a, b in zip(rows["peft"]["losses"], rows["shunter"]["losses"], strict=True))
    lines += [
        "",
        f"Of what peft's wrapper adds, Shunter's adds {shares['added_ms']:.0%} of the time and "
        f"{shares['added_mb']:.0%} of the memory; the aim is at most {MOST:.0%} of each. The losses of the two differ "
        f"by {difference:.1e} at most.",
        "",
    ]
    return "\n".join(lines)
