"""`shunter bench offload`: decoding with experts on disk next to all of them in memory and to the plain memory map.

Every contestant is a process of its own with the same random Qwen3-MoE, and takes the same tokens with the same choices
of experts: Zipf's law over each layer's experts, a choice staying with a probability from one token to the next. They
take turns, a block of tokens each. The map's process is in a control group whose memory is limited, where the system
lets one be made: without a limit the whole file stays in the page cache.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..environment import described, machine, versions
from ..errors import UserError

__all__ = ["CONTESTANTS", "Setting", "bench", "markdown", "right"]

CONTESTANTS = {"all in memory": 1.0, "offload 2/3": 2 / 3, "offload 1/3": 1 / 3, "memory map 2/3": 2 / 3}
"""By name the share of the experts that the contestant has memory for."""

TARGETS = {"offload 2/3": 0.85, "offload 1/3": 0.5}
"""Of the speed of all in memory."""

SLACK = 8 * 2**20  # bytes of anonymous memory beside the experts: threads that read, and what they need

_GROUP = "shunter-bench-{}"  # of a process

_START_SECONDS = 300  # a process that has not answered by then has failed


@dataclass(frozen=True)
class Setting:
    """What is run.

    Args:
        layers, experts, top_k, dim, hidden: of the model; an expert has 3 d f numbers of float32.
        warm_up: tokens before the first block.
        tokens: of a block.
        persistence: the probability that a token takes the expert of the token before.
        seed: of the choices.
    """

    layers: int = 8
    experts: int = 32
    top_k: int = 2
    dim: int = 512
    hidden: int = 512
    warm_up: int = 60
    tokens: int = 40
    persistence: float = 0.6
    seed: int = 0

    @property
    def expert_bytes(self) -> int:
        """Of one expert."""
        return 3 * self.dim * self.hidden * 4

    @property
    def all_bytes(self) -> int:
        """Of all experts of all layers."""
        return self.layers * self.experts * self.expert_bytes


def choices(setting: Setting, count: int) -> list[list[list[int]]]:
    """By token and layer the experts taken, k different ones."""
    draw = random.Random(setting.seed)
    ranks = [draw.sample(range(setting.experts), setting.experts) for _ in range(setting.layers)]
    likely = [1 / (rank + 1) for rank in range(setting.experts)]
    now: list[list[int]] = [[-1] * setting.top_k for _ in range(setting.layers)]
    found = []
    for _ in range(count):
        for layer, own in enumerate(now):
            for slot in range(setting.top_k):
                if own[slot] < 0 or draw.random() >= setting.persistence:
                    others = [e for i, e in enumerate(own) if i != slot]
                    while (new := ranks[layer][draw.choices(range(setting.experts), likely)[0]]) in others:
                        pass
                    own[slot] = new
        found.append([list(own) for own in now])
    return found


def bench(
    setting: Setting | None = None,
    rounds: int = 5,
    folder: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Time the contestants, block by block in turn.

    Args:
        setting: what is run.
        rounds: blocks of each contestant, in another order each round.
        folder: where the model's file is made, on the disk that is to be read; default: that of temporary files.
        say: what is told of the progress, a line at a time.

    Returns:
        What was measured, for JSON: `machine`, `versions`, `load` (the system's before), `setting`, and `results` by
        contestant: either `refused`, or `tokens_per_s` (the median of the rounds), `share` (of the speed of all in
        memory), `rss_anon_bytes` (the most that anonymous memory grew by since the first token, its experts included),
        `limit_bytes`, `read_bytes`, `hits`, `misses` and `same_bits` (of all logits, with all in memory).

    Raises:
        UserError: where there is no memory for the model, or a process fails.
    """
    setting = setting or Setting()
    found: dict[str, Any] = {
        "machine": machine(),
        "versions": versions("transformers", "safetensors", "numba"),
        "load": os.getloadavg()[0],
        "rounds": rounds,
        "setting": asdict(setting),
        "expert_bytes": setting.expert_bytes,
        "all_bytes": setting.all_bytes,
    }
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="shunter-bench-", dir=folder) as made:
        say(f"writing {setting.all_bytes / 2**20:.0f} MiB of experts …")
        _write_model(setting, Path(made))
        found["read_bytes_per_s"] = _disk_speed(Path(made), setting.expert_bytes)
        running: dict[str, tuple[Any, Any]] = {}
        results: dict[str, dict[str, Any]] = {}
        try:
            for name in CONTESTANTS:
                say(f"{name}: warming up …")
                here, there = context.Pipe()
                process = context.Process(target=_contestant, args=(name, setting, made, rounds, there), daemon=True)
                process.start()
                running[name] = process, here
                results[name] = _answer(name, process, here)
                if "refused" in results[name]:
                    del running[name]
            seconds: dict[str, list[float]] = {name: [] for name in running}
            for round_ in range(rounds):
                for name in random.Random(round_).sample(list(running), len(running)):
                    running[name][1].send("go")
                    seconds[name].append(_answer(name, *running[name])["seconds"])
            for name, (process, here) in running.items():
                here.send("end")
                results[name] |= _answer(name, process, here)
                results[name]["tokens_per_s"] = setting.tokens / statistics.median(seconds[name])
        finally:
            for process, _ in running.values():
                process.kill()
                process.join()
                _remove_group(process.pid)
    whole = results["all in memory"]
    for row in results.values():
        if "refused" not in row:
            row["share"] = row["tokens_per_s"] / whole["tokens_per_s"]
            row["same_bits"] = row["logits"] == whole["logits"]
    found["results"] = results
    return found


def _answer(name: str, process: Any, pipe: Any) -> dict[str, Any]:
    if not pipe.poll(_START_SECONDS):
        raise UserError(f"bench offload: the process of {name!r} did not answer within {_START_SECONDS} s")
    try:
        answer: dict[str, Any] = pipe.recv()
    except EOFError:
        process.join(10)
        raise UserError(f"bench offload: the process of {name!r} ended with code {process.exitcode}") from None
    if "error" in answer:
        raise UserError(f"bench offload: {name}: {answer['error']}")
    return answer


def _config(setting: Setting) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=1024, hidden_size=setting.dim, intermediate_size=setting.hidden, num_hidden_layers=setting.layers,
        moe_intermediate_size=setting.hidden, num_experts=setting.experts, num_experts_per_tok=setting.top_k,
        num_attention_heads=8, num_key_value_heads=4, head_dim=64, max_position_embeddings=4096,
        norm_topk_prob=True, tie_word_embeddings=True,
    )  # fmt: skip


def _write_model(setting: Setting, folder: Path) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(setting.seed)
    model = AutoModelForCausalLM.from_config(_config(setting), dtype=torch.float32)
    model.save_pretrained(folder, save_original_format=False)
    for file in folder.glob("*.safetensors"):
        _forget(file)


def _forget(file: Path) -> None:
    """Have the page cache forget a file, so that it is read from the disk."""
    with file.open("rb+") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _disk_speed(folder: Path, size: int) -> float:
    """Bytes a second in reads of an expert's size, out of order, from the disk."""
    file = max(folder.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    places = list(range(0, file.stat().st_size - size, size))[:40]
    random.Random(0).shuffle(places)
    target = bytearray(size)
    with file.open("rb", buffering=0) as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        os.preadv(stream.fileno(), [target], 0)
        start = time.perf_counter()
        for place in places:
            os.preadv(stream.fileno(), [target], place)
        taken = time.perf_counter() - start
    _forget(file)
    return len(places) * size / taken


def _contestant(name: str, setting: Setting, folder: str, rounds: int, pipe: Any) -> None:
    try:
        _run(name, setting, Path(folder), rounds, pipe)
    except EOFError:  # the other side has ended
        pass
    except Exception as error:
        pipe.send({"error": f"{type(error).__name__}: {error}"})


@torch.no_grad()
def _run(name: str, setting: Setting, folder: Path, rounds: int, pipe: Any) -> None:
    """One process: load, warm up, a block whenever asked for, and the account at the end."""
    from transformers import DynamicCache
    from transformers.utils import logging

    from ..hf.backend import use_experts
    from ..hf.checkpoints.loading import load_folder
    from ..hf.offloading import offload

    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(1)
    limit = int(CONTESTANTS[name] * setting.all_bytes)
    if name.startswith("offload"):
        model: Any = offload(folder, limit)
    else:
        model = load_folder(folder)
        if name.startswith("memory map"):
            _map_experts(model, folder)
    use_experts(model)
    for file in folder.glob("*.safetensors"):
        _forget(file)
    script = choices(setting, 1 + setting.warm_up + rounds * setting.tokens)
    step = [0]
    for number, layer in enumerate(model.model.layers):
        layer.mlp.gate.forward = _scripted(script, step, number, setting)
    memory = getattr(model, "expert_memory", None)
    base = peak = 0
    digest, cache = hashlib.sha256(), DynamicCache(config=model.config)

    def block(count: int) -> float:
        nonlocal peak
        start = time.perf_counter()
        for _ in range(count):
            logits = model(torch.tensor([[step[0] % 1024]]), past_key_values=cache, use_cache=True).logits
            digest.update(logits.numpy().tobytes())
            step[0] += 1
            peak = max(peak, _rss_anon())
        return time.perf_counter() - start

    with _limited(limit if name.startswith("memory map") else None) as refused:
        if refused is not None:
            pipe.send({"refused": refused})
            return
        block(1)  # with what is made once
        base = peak - (0 if memory is None else memory.used)
        block(setting.warm_up)
        pipe.send({"limit_bytes": limit})
        while pipe.recv() == "go":
            pipe.send({"seconds": block(setting.tokens)})
    counted = {} if memory is None else {key: getattr(memory, key) for key in ("hits", "misses", "read_bytes")}
    pipe.send({"rss_anon_bytes": peak - base, "logits": digest.hexdigest(), **counted})


def _map_experts(model: Any, folder: Path) -> None:
    """The stacks of a model as maps of its file."""
    from safetensors import safe_open

    for file in folder.glob("*.safetensors"):
        stored = safe_open(file, "pt")
        for key in stored.keys():
            if key.endswith(("experts.gate_up_proj", "experts.down_proj")):
                model.get_parameter(key).data = stored.get_tensor(key)


def _scripted(script: list[list[list[int]]], step: list[int], number: int, setting: Setting) -> Any:
    """A gate that chooses by the script: logits, weights and experts of one token."""
    weight = torch.full((1, setting.top_k), 1 / setting.top_k)
    logits = torch.zeros(1, setting.experts)
    return lambda hidden: (logits, weight, torch.tensor([script[step[0]][number]]))


def _rss_anon() -> int:
    """The anonymous memory of this process in bytes."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


@contextmanager
def _limited(more: int | None) -> Iterator[str | None]:
    """Within the block this process may take so many bytes more, page cache included; or why it cannot be limited.

    It is moved to a control group inside of its own, which is removed afterwards.
    """
    if more is None:
        yield None
        return
    try:
        own, limit, used = _group()
        inner = own / _GROUP.format(os.getpid())
        inner.mkdir()
    except (OSError, StopIteration) as error:
        yield f"no control group can be made to limit memory with ({error})"
        return
    try:
        (inner / "cgroup.procs").write_text(str(os.getpid()))
        # What was charged before stays with the group around this one.
        (inner / limit).write_text(str(int((inner / used).read_text()) + more + SLACK))
        yield None
    except OSError as error:
        yield f"a control group cannot limit memory here ({error})"
    finally:
        (own / "cgroup.procs").write_text(str(os.getpid()))
        inner.rmdir()


def _remove_group(process: int) -> None:
    """Remove the control group of a process that was killed in it."""
    try:
        (_group()[0] / _GROUP.format(process)).rmdir()
    except (OSError, StopIteration):  # it had none, or removed it itself
        pass


def _group() -> tuple[Path, str, str]:
    """This process's control group of memory, and what the files of its limit and its use are called."""
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    first = next((path for _, kinds, path in lines if "memory" in kinds.split(",")), None)
    if first is not None:
        return Path("/sys/fs/cgroup/memory") / first.lstrip("/"), "memory.limit_in_bytes", "memory.usage_in_bytes"
    path = next(path for _, kinds, path in lines if not kinds)
    return Path("/sys/fs/cgroup") / path.lstrip("/"), "memory.max", "memory.current"


def markdown(found: dict[str, Any]) -> str:
    """What `bench` found, as a page."""
    setting = found["setting"]
    lines = [
        "# Experts larger than memory",
        "",
        "Written by `shunter bench offload`; the numbers behind it are in the JSON file beside it.",
        "",
        f"{described(found)}; load {found['load']:.1f} at the start. A Qwen3-MoE of {setting['layers']} layers of "
        f"{setting['experts']} experts, {found['expert_bytes'] / 2**20:.1f} MiB each in float32 and "
        f"{found['all_bytes'] / 2**20:.0f} MiB in all, {setting['top_k']} a token; one sequence, one thread. Choices "
        f"follow Zipf's law and stay with probability {setting['persistence']}. The disk reads "
        f"{found['read_bytes_per_s'] / 1e6:.0f} MB/s in reads of one expert. Medians of {found['rounds']} blocks of "
        f"{setting['tokens']} tokens in turn, after {setting['warm_up']} tokens each.",
        "",
        "Share: of the speed of all in memory. Grown: the most that anonymous memory (RssAnon) grew by since the first "
        "token, with the experts of that one: what experts take, and the cache of keys and values. Bits: whether every "
        "logit of the run is the same, bit for bit, as with all in memory.",
        "",
        "| | memory for experts | tokens/s | share | target | grown | hits | read | bits |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for name, row in found["results"].items():
        if "refused" in row:
            lines.append(f"| {name} | not run: {row['refused']} |" + " |" * 7)
            continue
        asked = row.get("hits", 0) + row.get("misses", 0)
        target = f"{TARGETS[name]:.2f}" if name in TARGETS else ""
        counted = (f"{row['hits'] / asked:.1%}", f"{row['read_bytes'] / 2**20:.0f} MiB") if asked else ("", "")
        lines.append(
            f"| {name} | {row['limit_bytes'] / 2**20:.0f} MiB | {row['tokens_per_s']:.1f} | {row['share']:.2f} | "
            f"{target} | {row['rss_anon_bytes'] / 2**20:.0f} MiB | {counted[0]} | {counted[1]} | "
            f"{'same' if row['same_bits'] else 'OTHER'} |"
        )
    return "\n".join(lines) + "\n"


def right(found: dict[str, Any]) -> bool:
    """Whether every contestant gave the same bits, and offloaded experts kept within their memory and `SLACK`."""
    ran = {name: row for name, row in found["results"].items() if "refused" not in row}
    bounded = all(row["rss_anon_bytes"] <= row["limit_bytes"] + SLACK for name, row in ran.items() if name in TARGETS)
    return bounded and all(row["same_bits"] for row in ran.values())
