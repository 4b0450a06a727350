"""`shunter bench offload`: decoding with experts on disk next to all of them in memory and to the plain memory map.

Every contestant is a process of its own with the same Qwen3-MoE and the same tokens. They take turns, a block of
tokens each. The map's process is in a control group whose memory is limited, where the system lets one be made: without
a limit the whole file stays in the page cache.

The weights are random but for what makes the model's own gates, by its own hidden states, choose as a trace says
(`choices`, `_plant`), so that what a later layer chooses can be foreseen as far as it can in a trained model. What the
trace assumes:

* Popularity: Zipf's law with exponent 1 over each layer's experts, in an order of its own.
* Persistence: a choice stays from one token to the next with probability 0.6. That is more than in Mixtral 8x7B, where
  consecutive tokens share one of two experts in about two thirds of the cases halfway up (Jiang et al. 2024, section 5,
  table 5), and so kind to every cache.
* Lateness: each layer's output decides the choice of a later layer anew with probability 0.15. A router that is asked j
  layers ahead is then right with probability 0.85^j. Routers of trained models asked one layer ahead are right in 80
  to 90 % of the cases (Eliseev and Mazur 2023, section 3.2); that each layer more costs as much is assumed.
"""

from __future__ import annotations

import hashlib
import math
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
from ..experts.residency import HeldFile

__all__ = ["CONTESTANTS", "Setting", "bench", "markdown", "right"]

CONTESTANTS = {
    "all in memory": 1.0,
    "offload 2/3": 2 / 3,
    "offload 2/3, no prefetch": 2 / 3,
    "offload 1/3": 1 / 3,
    "offload 1/3, no prefetch": 1 / 3,
    "memory map 2/3": 2 / 3,
}
"""By name the share of the experts that the contestant has memory for."""

TARGETS = {"offload 2/3": 0.85, "offload 1/3": 0.5}
"""Of the speed of all in memory."""

SLACK = 8 * 2**20  # bytes of anonymous memory beside the experts: threads that read, and what they need

_GROUP = "shunter-bench-{}"  # of a process

_VOCABULARY = 1024  # tokens, each of which takes its own experts; a longer run begins again

_SIZE = 16.0  # of what a token says of one expert: far above what random weights add
_GATE = 8.0  # that opens a planted unit: where SiLU is the identity

_START_SECONDS = 300  # a process that has not answered by then has failed


@dataclass(frozen=True)
class Setting:
    """What is run.

    Args:
        layers, experts, top_k, dim, hidden: of the model; an expert has 3 d f numbers of float32.
        warm_up: tokens before the first block.
        tokens: of a block.
        persistence: the probability that a token takes the expert of the token before.
        late: the probability that a layer's output decides anew what a later layer chooses.
        seed: of the choices and of the weights.

    Raises:
        UserError: where the model is too narrow to hold what makes its gates choose as the trace says.
    """

    layers: int = 8
    experts: int = 32
    top_k: int = 2
    dim: int = 512
    hidden: int = 512
    warm_up: int = 60
    tokens: int = 40
    persistence: float = 0.6
    late: float = 0.15
    seed: int = 0

    def __post_init__(self) -> None:
        directions, units = self.directions, (self.layers - 1) * self.experts
        if directions > self.dim or units > self.hidden:
            raise UserError(
                f"bench offload: {self.layers} layers of {self.experts} experts need a width of at least {directions} "
                f"and experts of at least {units}, not {self.dim} and {self.hidden}"
            )

    @property
    def directions(self) -> int:
        """Of the hidden states, that mean something: experts, experts decided late, when, and what all tokens share."""
        return (2 * self.layers - 1) * self.experts + self.layers * (self.layers - 1) // 2 + 1

    @property
    def expert_bytes(self) -> int:
        """Of one expert."""
        return 3 * self.dim * self.hidden * 4

    @property
    def all_bytes(self) -> int:
        """Of all experts of all layers."""
        return self.layers * self.experts * self.expert_bytes


@dataclass(frozen=True)
class Choice:
    """What a layer chooses for a token.

    Args:
        experts: k different ones.
        decided: the layer whose output decides that, by number; -1: the token alone.
        before: k other experts, which the router would choose for earlier hidden states; none where the token decides.
    """

    experts: list[int]
    decided: int
    before: list[int]


def choices(setting: Setting, count: int) -> list[list[Choice]]:
    """By token and layer what is chosen."""
    draw = random.Random(setting.seed)
    ranks = [draw.sample(range(setting.experts), setting.experts) for _ in range(setting.layers)]
    likely = [1 / (rank + 1) for rank in range(setting.experts)]

    def another(layer: int, than: list[int]) -> int:
        while (new := ranks[layer][draw.choices(range(setting.experts), likely)[0]]) in than:
            pass
        return new

    now: list[list[int]] = [[-1] * setting.top_k for _ in range(setting.layers)]
    found = []
    for _ in range(count):
        token = []
        for layer, own in enumerate(now):
            for slot in range(setting.top_k):
                if own[slot] < 0 or draw.random() >= setting.persistence:
                    own[slot] = another(layer, [e for i, e in enumerate(own) if i != slot])
            before: list[int] = []
            decided = next((n for n in reversed(range(layer)) if draw.random() < setting.late), -1)
            while decided >= 0 and len(before) < setting.top_k:
                before.append(another(layer, own + before))
            token.append(Choice(list(own), decided, before))
        found.append(token)
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
        `limit_bytes`, `same_bits` (of all logits, with all in memory), and of an offloaded one over the whole run, with
        the warming up, `tokens`, `read_bytes`, `hits`, `misses`, `ahead`, `waited_seconds`, and where it reads ahead
        `foreseen` and `foreseen_right`, by layers ahead: experts that were not in memory.

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
        vocab_size=_VOCABULARY, hidden_size=setting.dim, intermediate_size=setting.hidden,
        num_hidden_layers=setting.layers,
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
    _plant(model, setting, choices(setting, _VOCABULARY))
    model.save_pretrained(folder, save_original_format=False)
    for file in folder.glob("*.safetensors"):
        _forget(file)


@torch.no_grad()
def _plant(model: Any, setting: Setting, trace: list[list[Choice]]) -> None:
    """Have a random model's gates choose by the trace: its row for token i, at whatever place in a text.

    Directions that mean something are orthonormal: the rows of all routers; one for each expert that is decided late;
    one for each pair of a layer that decides and one that is decided; and a large one in every token, so that
    normalisation scales all alike. A token is the sum of what it chooses, large against what random weights add, and it
    persists down the layers. Where a layer's output decides, the token has the other experts by half, and all experts
    of that layer have units that add the router's rows of those which the token names: a gate opened by the pair,
    times the name.
    """
    layers, experts, top_k, hidden = setting.layers, setting.experts, setting.top_k, setting.hidden
    rows = torch.linalg.qr(torch.randn(setting.dim, setting.directions)).Q.T
    router, named, rest = rows.split([layers * experts, (layers - 1) * experts, len(rows) - (2 * layers - 1) * experts])
    router, named = router.view(layers, experts, -1), named.view(layers - 1, experts, -1)
    pairs = [(n, later) for later in range(layers) for n in range(later)]
    now, shared = dict(zip(pairs, rest, strict=False)), rest[-1]
    large = 4 * _SIZE * math.sqrt(layers * top_k)
    for token, chosen in zip(model.get_input_embeddings().weight, trace, strict=True):
        token.copy_(large * shared)
        for layer, choice in enumerate(chosen):
            if choice.decided < 0:
                token += _SIZE * router[layer, choice.experts].sum(0)
            else:
                token += _SIZE * (now[choice.decided, layer] + named[layer - 1, choice.experts].sum(0))
                token += _SIZE / 2 * router[layer, choice.before].sum(0)
    seen = _SIZE * math.sqrt(setting.dim) / large  # of what is _SIZE large, after normalisation
    for n, block in enumerate(model.model.layers):
        block.mlp.gate.weight.copy_(router[n])
        stacks = block.mlp.experts
        for later in range(n + 1, layers):
            start, end = (later - n - 1) * experts, (later - n) * experts
            stacks.gate_up_proj[:, start:end] = _GATE / seen * now[n, later]
            stacks.gate_up_proj[:, hidden + start : hidden + end] = named[later - 1] / seen
            stacks.down_proj[:, :, start:end] = _SIZE / _GATE * router[later].T


def _forget(file: Path) -> None:
    """Have the page cache forget a file, so that it is read from the disk."""
    with file.open("rb+") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _disk_speed(folder: Path, size: int) -> float:
    """Bytes a second in reads of an expert's size, out of order, from the disk, as offloaded experts are read."""
    file = max(folder.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    places = list(range(0, file.stat().st_size - size, size))[:40]
    random.Random(0).shuffle(places)
    held, target = HeldFile(file), memoryview(bytearray(size))
    held.read(0, target)
    start = time.perf_counter()
    for place in places:
        held.read(place, target)
    taken = time.perf_counter() - start
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
        model: Any = offload(folder, limit, prefetch="no prefetch" not in name)
    else:
        model = load_folder(folder)
        if name.startswith("memory map"):
            _map_experts(model, folder)
    use_experts(model)
    for file in folder.glob("*.safetensors"):
        _forget(file)
    trace = choices(setting, _VOCABULARY)
    chosen: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda gate, given, out: chosen.append(out[2]))
    step = 0
    memory = getattr(model, "expert_memory", None)
    base = peak = 0
    digest, cache = hashlib.sha256(), DynamicCache(config=model.config)

    def block(count: int) -> float:
        nonlocal peak, step
        start = time.perf_counter()
        for _ in range(count):
            logits = model(torch.tensor([[step % _VOCABULARY]]), past_key_values=cache, use_cache=True).logits
            digest.update(logits.numpy().tobytes())
            step += 1
            peak = max(peak, _rss_anon())
        taken = time.perf_counter() - start
        wanted = [choice.experts for i in range(step - count, step) for choice in trace[i % _VOCABULARY]]
        if [sorted(experts.flatten().tolist()) for experts in chosen] != [sorted(experts) for experts in wanted]:
            raise ValueError("the gates did not choose as planned")
        chosen.clear()
        return taken

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
    counted: dict[str, Any] = {}
    if memory is not None:
        counted = {key: getattr(memory, key) for key in ("hits", "misses", "ahead", "read_bytes", "waited_seconds")}
        counted["tokens"] = step
        if memory.foresight is not None:
            counted |= {"foreseen": memory.foresight.made[1:], "foreseen_right": memory.foresight.right[1:]}
    pipe.send({"rss_anon_bytes": peak - base, "logits": digest.hexdigest(), **counted})


def _map_experts(model: Any, folder: Path) -> None:
    """The stacks of a model as maps of its file."""
    from safetensors import safe_open

    for file in folder.glob("*.safetensors"):
        stored = safe_open(file, "pt")
        for key in stored.keys():
            if key.endswith(("experts.gate_up_proj", "experts.down_proj")):
                model.get_parameter(key).data = stored.get_tensor(key)


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
        f"{found['all_bytes'] / 2**20:.0f} MiB in all, {setting['top_k']} a token; one sequence, one thread. Gates "
        f"choose by planted hidden states: by Zipf's law, staying with probability {setting['persistence']} from one "
        f"token to the next, and decided anew by each layer's output with probability {setting['late']}: a router "
        f"asked j layers ahead is right with probability {1 - setting['late']:.2f}^j. The disk reads "
        f"{found['read_bytes_per_s'] / 1e6:.0f} MB/s in reads of one expert. Medians of {found['rounds']} blocks of "
        f"{setting['tokens']} tokens in turn, after {setting['warm_up']} tokens each.",
        "",
        "Share: of the speed of all in memory. Grown: the most that anonymous memory (RssAnon) grew by since the first "
        "token, with the experts of that one: what experts take, and the cache of keys and values. Bits: whether every "
        "logit of the run is the same, bit for bit, as with all in memory. Hits: of the experts that layers chose, "
        "those in memory when they did. Ahead: those whose reading had begun before. Waits: a token, for experts.",
        "",
        "| | memory for experts | tokens/s | share | target | grown | hits | ahead | read | waits | bits |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for name, row in found["results"].items():
        if "refused" in row:
            lines.append(f"| {name} | not run: {row['refused']} |" + " |" * 9)
            continue
        asked = row.get("hits", 0) + row.get("misses", 0)
        target = f"{TARGETS[name]:.2f}" if name in TARGETS else ""
        counted = [""] * 4
        if asked:
            counted = [f"{row['hits'] / asked:.1%}", f"{row['ahead'] / asked:.1%}"]
            counted += [f"{row['read_bytes'] / 2**20:.0f} MiB", f"{row['waited_seconds'] * 1e3 / row['tokens']:.1f} ms"]
        lines.append(
            f"| {name} | {row['limit_bytes'] / 2**20:.0f} MiB | {row['tokens_per_s']:.1f} | {row['share']:.2f} | "
            f"{target} | {row['rss_anon_bytes'] / 2**20:.0f} MiB | {' | '.join(counted)} | "
            f"{'same' if row['same_bits'] else 'OTHER'} |"
        )
    foreseeing = {name: row for name, row in found["results"].items() if "foreseen" in row}
    if foreseeing:
        count = len(next(iter(foreseeing.values()))["foreseen"])
        lines += [
            "",
            "Of the experts that were foreseen and not in memory, the share that was then chosen, by layers ahead. "
            "Less are right than of all that are foreseen: what stays from token to token is in memory.",
            "",
            "| | " + " | ".join(str(j) for j in range(1, count + 1)) + " |",
            "|---|" + "---:|" * count,
        ]
        for name, row in foreseeing.items():
            pairs = zip(row["foreseen_right"], row["foreseen"], strict=True)
            lines.append(
                f"| {name} | " + " | ".join(f"{right / max(1, made):.0%} of {made}" for right, made in pairs) + " |"
            )
    return "\n".join(lines) + "\n"


def right(found: dict[str, Any]) -> bool:
    """Whether every contestant gave the same bits, and offloaded experts kept within their memory and `SLACK`."""
    ran = {name: row for name, row in found["results"].items() if "refused" not in row}
    offloaded = [row for name, row in ran.items() if name.startswith("offload")]
    bounded = all(row["rss_anon_bytes"] <= row["limit_bytes"] + SLACK for row in offloaded)
    return bounded and all(row["same_bits"] for row in ran.values())
