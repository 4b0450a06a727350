"""`shunter bench experts`: the backends next to a dense layer of equal FLOPs and transformers' own, interleaved.

All start from the same (x, top-k index, top-k weights): sorting by expert is part of what is timed. The dense layer is
a SwiGLU of width k f over the same T tokens, which multiplies and adds exactly as often.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..environment import described, machine, versions
from ..experts import Weights, backend_names, choose
from ..routing import Routing

__all__ = ["PEERS", "SHAPES", "Shape", "bench", "markdown", "parse_shape"]


@dataclass(frozen=True)
class Shape:
    """The sizes of one case.

    Args:
        tokens, dim, hidden, experts, top_k: T, d, f, E and k.
        backward: whether the backward is timed with the forward; else the forward alone, without autograd.
    """

    tokens: int
    dim: int
    hidden: int
    experts: int
    top_k: int
    backward: bool = True

    @property
    def flops(self) -> int:
        """Floating-point operations of the products: 6 T k d f forward, and twice that backward."""
        return (18 if self.backward else 6) * self.tokens * self.top_k * self.dim * self.hidden


SHAPES = {
    "S1": Shape(4096, 512, 1024, 8, 2),
    "S2": Shape(4096, 512, 256, 64, 8),
    "S3": Shape(4096, 256, 128, 128, 8),
    "S4": Shape(4096, 1024, 2048, 8, 1),
    "S5": Shape(16, 1024, 768, 64, 8, backward=False),
    "S6": Shape(2048, 128, 128, 32, 1),
}


def parse_shape(text: str, named: dict[str, Shape]) -> Shape:
    """The shape of a name, or of "T,d,f,E,k".

    Raises:
        ValueError: where it is neither.
    """
    if text in named:
        return named[text]
    sizes = [int(size) if size.isdecimal() else 0 for size in text.split(",")]
    if len(sizes) != 5 or min(sizes) < 1 or sizes[4] > sizes[3]:
        raise ValueError(f"shape {text!r} is neither of {', '.join(named)} nor T,d,f,E,k with k at most E")
    tokens, dim, hidden, experts, top_k = sizes
    return Shape(tokens, dim, hidden, experts, top_k)


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# A round repeats what takes less than this.
ROUND_SECONDS = 0.1

# What takes longer than this is timed once.
SLOW_SECONDS = 10

PEERS = ["eager", "batched_mm", "grouped_mm"]

Forward = Callable[[Tensor, Tensor], Tensor]


class CannotRunError(Exception):
    """Why a contestant is left out, in words."""


@dataclass(frozen=True)
class Contestant:
    """One way to compute the layer.

    Args:
        forward: (x (T, d), top-k weights (T, k)) -> (T, d).
        parameters: what its backward gives gradients to, besides those two.
        note: what it is, where its name does not say.
    """

    forward: Forward
    parameters: list[Tensor]
    note: str = ""


class _Case:
    """The tensors of one shape and dtype: hidden states, a random choice of experts, expert and dense weights."""

    def __init__(self, shape: Shape, dtype: torch.dtype, seed: int, device: str = "cpu") -> None:
        self.shape, self.dtype = shape, dtype
        generator = torch.Generator(device).manual_seed(seed)
        tokens, dim, hidden, wide = shape.tokens, shape.dim, shape.hidden, shape.top_k * shape.hidden

        def normal(*size: int, std: float = 1.0) -> Tensor:
            drawn = torch.randn(*size, generator=generator, device=device)
            return (drawn * std).to(dtype).requires_grad_(shape.backward)

        self.x = normal(tokens, dim)
        self.grad = normal(tokens, dim).detach()
        scores = torch.randn(tokens, shape.experts, generator=generator, device=device).softmax(-1)
        weight, self.index = scores.topk(shape.top_k, dim=-1)
        # transformers' batched_mm wants the weights in the dtype of the hidden states.
        self.weight = (weight / weight.sum(-1, keepdim=True)).to(dtype).requires_grad_(shape.backward)
        self.up = normal(shape.experts, 2 * hidden, dim, std=dim**-0.5)
        self.down = normal(shape.experts, dim, hidden, std=hidden**-0.5)
        self.dense_up = normal(2 * wide, dim, std=dim**-0.5)
        self.dense_down = normal(dim, wide, std=wide**-0.5)

    @property
    def touched(self) -> Tensor:
        """The experts that at least one token chose."""
        return self.index.unique()

    def read(self) -> None:
        """Read the weights of the touched experts once, as sums of their bits."""
        for weights in (self.up, self.down):
            for e in self.touched.tolist():
                weights[e].detach().view(-1).view(torch.float32).sum()

    def routing(self, weight: Tensor) -> Routing:
        return Routing.from_topk(self.index, weight, self.shape.experts, check=False)


def _contestants(case: _Case, backends: list[str], peers: list[str]) -> dict[str, Callable[[], Contestant]]:
    makers: dict[str, Callable[[], Contestant]] = {"dense": lambda: _dense(case)}
    for name in ["auto", *backends]:
        makers[name] = lambda name=name: _ours(case, name)  # type: ignore[misc]
    for name in peers:
        makers[f"transformers {name}"] = lambda name=name: _transformers(case, name)  # type: ignore[misc]
    return makers


def _dense(case: _Case) -> Contestant:
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        gate, up = F.linear(x, case.dense_up).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, case.dense_down)

    return Contestant(forward, [case.dense_up, case.dense_down], "a SwiGLU of width k f in plain PyTorch")


def _ours(case: _Case, name: str) -> Contestant:
    weights = Weights(case.up, case.down)
    try:
        with torch.set_grad_enabled(case.shape.backward):
            backend, why = choose(name, case.x, weights)
    except ValueError as error:
        raise CannotRunError(str(error)) from error

    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return backend.run(x, weights, case.routing(weight))

    return Contestant(forward, [case.up, case.down], f"{backend.name}: {why}" if name == "auto" else "")


def _transformers(case: _Case, name: str) -> Contestant:
    try:
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
    except ImportError as error:
        raise CannotRunError(f"transformers is not installed here ({error})") from error
    shape = case.shape
    if name == "batched_mm":
        # It copies an expert's matrices for every token and choice, and again for their gradients.
        copies = shape.tokens * shape.top_k * 3 * shape.hidden * shape.dim * case.dtype.itemsize
        need, free = copies * (2 if shape.backward else 1), _free_memory()
        if need > 0.8 * free:
            raise CannotRunError(f"it copies {need / 2**30:.0f} GiB of weights; {free / 2**30:.0f} GiB are free")
    config = Qwen3MoeConfig(
        hidden_size=shape.dim, moe_intermediate_size=shape.hidden, num_experts=shape.experts,
        num_experts_per_tok=shape.top_k, num_hidden_layers=1, num_attention_heads=1,
    )  # fmt: skip
    config._experts_implementation = name
    with torch.device("meta"):
        module = Qwen3MoeExperts(config)
    for key, value in (("gate_up_proj", case.up), ("down_proj", case.down)):
        delattr(module, key)
        module.register_parameter(key, nn.Parameter(value.detach(), requires_grad=shape.backward))

    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return module(x, case.index, weight)

    return Contestant(forward, list(module.parameters()), "Qwen3MoeExperts")


def _free_memory() -> int:
    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 2**34


def _pass(contestant: Contestant, case: _Case) -> tuple[Tensor, ...]:
    """One forward, and where the shape asks for it the gradients of x, the weights and the parameters."""
    with torch.set_grad_enabled(case.shape.backward):
        out = contestant.forward(case.x, case.weight)
    if not case.shape.backward:
        return (out,)
    wanted = [case.x, case.weight, *contestant.parameters]
    return (out.detach(), *torch.autograd.grad(out, wanted, case.grad, allow_unused=True))


def _saved_bytes(contestant: Contestant, case: _Case) -> int:
    """What a forward keeps for the backward besides its input, the weights and the parameters."""
    given = {t.untyped_storage().data_ptr() for t in (case.x, case.weight, case.index, *contestant.parameters)}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        contestant.forward(case.x, case.weight)
    return sum(kept.values())


def _errors(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """The largest relative Frobenius error over the output and the gradients."""
    pairs = zip(found, expected, strict=True)
    return max(((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-300)).item() for a, b in pairs)


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _steady_seconds(run: Callable[[], object]) -> float:
    """The mean of as many passes in a row as it takes to fill `ROUND_SECONDS`, as in a loop that does nothing else."""
    start, passes = time.perf_counter(), 0
    while (taken := time.perf_counter() - start) < ROUND_SECONDS or not passes:
        run()
        passes += 1
    return taken / passes


def _matmul_peak(dtype: torch.dtype) -> float:
    """FLOP/s of a large product, the best of several sizes and repetitions; no larger than a few seconds allow."""
    best = 0.0
    for size in (256, 512, 1024, 2048):
        a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        for _ in range(8):
            taken = _seconds(lambda a=a, b=b, out=out: torch.mm(a, b.T, out=out))  # type: ignore[misc]
            best = max(best, 2 * size**3 / taken)
        if taken > 0.1:
            break
    return best


def _copy_bandwidth() -> float:
    """Bytes/s read and written by copying 256 MiB, the best of several repetitions."""
    source = torch.zeros(2**26)
    target = torch.empty_like(source).copy_(source)
    return max(2 * 4 * source.numel() / _seconds(lambda: target.copy_(source)) for _ in range(8))


def _compulsory_bytes(case: _Case) -> int:
    """What any implementation moves: the touched experts' weights, x and y; backward also their gradients."""
    shape = case.shape
    weights = 3 * shape.dim * shape.hidden * case.touched.numel()
    states = 2 * shape.tokens * shape.dim
    forward = weights + states
    backward = weights + 3 * shape.dim * shape.hidden * shape.experts + 3 * shape.tokens * shape.dim
    return case.dtype.itemsize * (forward + (backward if shape.backward else 0))


def bench(
    shapes: dict[str, Shape],
    dtypes: list[str],
    backends: list[str],
    peers: list[str] = PEERS,
    rounds: int = 11,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Time every contestant on every shape and dtype.

    Args:
        shapes: by name.
        dtypes: of "float32" and "bfloat16".
        backends: of `shunter.experts.backend_names()`; "auto" always runs.
        peers: transformers' `experts_implementation`s, of `PEERS`.
        rounds: of the interleaved run; each times every contestant once, in another order.
        seed: of the tensors and the routing.
        say: what is told of the progress, a line at a time.

    Returns:
        What was measured, for JSON: `machine`, `versions`, `roofline` by dtype, and `cases`, each with its `results` by
        contestant: either `refused`, why it could not run, or `ms` (the median), `ratio` (dense's time over its time),
        `gflops` (10^9 FLOP/s), `roofline` (the share of the fastest time that the measured peaks allow), `saved_bytes`
        and `error` (the largest relative difference from `reference`, over the output and the gradients).

    Raises:
        ValueError: for an unknown dtype, backend or peer.
    """
    for given, known in ((dtypes, DTYPES), (backends, backend_names()), (peers, PEERS)):
        for name in given:
            if name not in known:
                raise ValueError(f"bench: {name!r} is unknown; choose from {', '.join(known)}")
    found: dict[str, Any] = {
        "machine": machine(),
        "versions": versions("transformers", "numba"),
        "rounds": rounds,
        "seed": seed,
    }
    found["copy_gb_per_s"], found["matmul_gflops"], found["cases"] = 0.0, dict.fromkeys(dtypes, 0.0), []
    bytes_moved = []
    for name, shape in shapes.items():
        for dtype in dtypes:
            say(f"{name} {dtype} …")
            case = _Case(shape, DTYPES[dtype], seed)
            # Again before each case, for the best of all: others may be busy on this machine.
            found["copy_gb_per_s"] = max(found["copy_gb_per_s"], _copy_bandwidth() / 1e9)
            found["matmul_gflops"][dtype] = max(found["matmul_gflops"][dtype], _matmul_peak(DTYPES[dtype]) / 1e9)
            results, reading = _results(case, _contestants(case, backends, peers), rounds)
            entry = {"name": name, "dtype": dtype, **asdict(shape), "results": results}
            if reading is not None:
                entry["read_ms"] = reading * 1e3
            found["cases"].append(entry)
            bytes_moved.append(_compulsory_bytes(case))
    for entry, moved in zip(found["cases"], bytes_moved, strict=True):
        flops = shapes[entry["name"]].flops
        fastest = max(flops / found["matmul_gflops"][entry["dtype"]], moved / found["copy_gb_per_s"]) / 1e6
        entry["roofline_ms"] = fastest
        for row in entry["results"].values():
            if "ms" in row:
                row["roofline"] = fastest / row["ms"]
    return found


def _results(
    case: _Case, makers: dict[str, Callable[[], Contestant]], rounds: int
) -> tuple[dict[str, dict[str, Any]], float | None]:
    """The results by contestant, and for a forward alone the seconds that reading its weights takes."""
    running: dict[str, Contestant] = {}
    results: dict[str, dict[str, Any]] = {}
    expected = _pass(_ours(case, "reference"), case)
    for name, make in makers.items():
        try:
            contestant = make()
            values = _pass(contestant, case)
        except CannotRunError as why:
            results[name] = {"refused": str(why)}
            continue
        except (RuntimeError, ValueError, KeyError) as error:
            results[name] = {"refused": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
            continue
        running[name] = contestant
        results[name] = {"note": contestant.note} if contestant.note else {}
        if name != "dense":
            results[name]["error"] = _errors(values, expected)
        results[name]["saved_bytes"] = _saved_bytes(contestant, case) if case.shape.backward else 0
        del values
    del expected
    passes: dict[str, Callable[[], object]] = {
        name: partial(_pass, contestant, case) for name, contestant in running.items()
    }
    if not case.shape.backward:
        passes["reading"] = case.read
    times = _medians(passes, rounds, _steady_seconds)
    reading = times.pop("reading", None)
    for name, seconds in times.items():
        results[name] |= {
            "ms": seconds * 1e3,
            "ratio": times["dense"] / seconds,
            "gflops": case.shape.flops / seconds / 1e9,
        }
    return results, reading


def _medians(
    runs: dict[str, Callable[[], object]], rounds: int, stopwatch: Callable[[Callable[[], object]], float]
) -> dict[str, float]:
    """Seconds of each run, medians over rounds that run them all, in another order each: what ran before matters.

    The slow ones run in the first round alone.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    shuffle = random.Random(0).sample
    for round_ in range(rounds + 1):
        for name in shuffle(list(runs), len(runs)):
            if times[name] and times[name][0] > SLOW_SECONDS:
                continue
            seconds = stopwatch(runs[name])
            if round_ or seconds > SLOW_SECONDS:  # the first one warms up
                times[name].append(seconds)
    return {name: statistics.median(taken) for name, taken in times.items()}


def sizes_of(case: dict[str, Any]) -> str:
    """The sizes of a result by their letters: T, d, f, E and, where it has one, k."""
    letters = {"T": "tokens", "d": "dim", "f": "hidden", "E": "experts", "k": "top_k"}
    return ", ".join(f"{letter} {case[name]}" for letter, name in letters.items() if name in case)


def markdown(found: dict[str, Any]) -> str:
    """What `bench` found, as a page."""
    rates = ", ".join(f"{rate:.0f} GFLOP/s in {dtype}" for dtype, rate in found["matmul_gflops"].items())
    lines = [
        "# Experts against a dense layer",
        "",
        "Written by `shunter bench experts`; the numbers behind it are in the JSON file beside it.",
        "",
        f"{described(found)}. Large products reach {rates}; copying moves {found['copy_gb_per_s']:.0f} GB/s (read and "
        f"written). Medians of {found['rounds']} interleaved rounds, each of a pass or of {ROUND_SECONDS} s of them; "
        f"what takes longer than {SLOW_SECONDS} s is timed once.",
        "",
        "Ratio: the time of a dense SwiGLU of equal FLOPs over this time (above 1: faster than dense). Roofline: the "
        "share of what the peaks above allow (above 1 where a backend multiplies in a faster dtype). Saved: what is "
        "kept for the backward besides x and the parameters. Error: the largest relative difference from `reference`, "
        "over the output and every gradient.",
    ]
    for case in found["cases"]:
        what = "forward and backward" if case["backward"] else "forward alone"
        lines += ["", f"## {case['name']} {case['dtype']}: {sizes_of(case)}, {what}", ""]
        if "read_ms" in case:
            lines += [f"Reading the touched experts' weights once takes {case['read_ms']:.2f} ms.", ""]
        columns = ["", "ms", "ratio", "GFLOP/s", "roofline"]
        columns += ["saved MiB"] if case["backward"] else ["times reading"]
        lines += [f"| {' | '.join([*columns, 'error'])} |", f"|---|{'---:|' * len(columns)}"]
        for name, row in case["results"].items():
            if "refused" in row:
                lines.append(f"| {name} | {row['refused']} |" + " |" * (len(columns) - 1))
                continue
            last = f"{row['saved_bytes'] / 2**20:.1f}" if case["backward"] else f"{row['ms'] / case['read_ms']:.2f}"
            error = f"{row['error']:.1e}" if "error" in row else ""
            lines.append(
                f"| {name} | {row['ms']:.2f} | {row['ratio']:.2f} | {row['gflops']:.0f} | {row['roofline']:.2f} | "
                f"{last} | {error} |"
            )
        lines += [f"\n`auto` is {case['results']['auto']['note']}."] if "note" in case["results"]["auto"] else []
    return "\n".join(lines) + "\n"
