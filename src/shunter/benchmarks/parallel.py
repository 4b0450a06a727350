"""`shunter bench parallel`: a layer on several processes by expert parallelism, data parallelism and transformers' own.

All start from the same (x, top-k index, top-k weights), a share of the tokens on each rank, and time a forward and
backward between two barriers; the slowest rank counts.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..environment import described, machine, versions
from ..experts import Experts
from ..parallel import mesh as make_mesh
from ..parallel.dispatch import Dispatch, choose_form, rows_sent
from ..parallel.experts import ShardedExperts
from ..routing import Routing
from .experts import SHAPES, Shape, _Case

__all__ = ["TARGETS", "bench", "markdown"]

TARGETS = {"S1": 1.15, "S2": 1.35, "S3": 1.35}
"""What expert parallelism may take, as a multiple of data parallelism without its all-reduce."""
FASTER = 1.3
"""How many times slower than expert parallelism transformers' own should be on S2 and S3."""
PLAIN, REDUCED, SHARDED, PEER = (
    "data parallel", "data parallel with its all-reduce", "expert parallel", "transformers all_to_all grouped_mm",
)  # fmt: skip

Layer = Callable[[Tensor, Tensor, Tensor], Tensor]


class _Contestant:
    """One way to compute the layer on this rank: x (T, d), index (T, k), weights (T, k) to (T, d).

    Args:
        forward: the layer.
        parameters: what its backward gives gradients to.
        reduce: whether their mean over the ranks is taken as well.
    """

    def __init__(self, forward: Layer, parameters: list[Tensor], reduce: bool = False) -> None:
        self.forward, self.parameters, self.reduce = forward, parameters, reduce

    def run(self, case: _Case) -> list[Tensor]:
        """A forward and backward: the output, and the gradients of x, of the weights and of the parameters."""
        x, weight = (value.detach().requires_grad_() for value in (case.x, case.weight))
        out = self.forward(x, case.index, weight)
        grads = list(torch.autograd.grad(out, [x, weight, *self.parameters], case.grad))
        if self.reduce:
            for grad in grads[2:]:
                dist.all_reduce(grad)
                grad /= dist.get_world_size()
        return [out.detach(), *grads]

    @property
    def state_bytes(self) -> int:
        """Of the experts' parameters, gradients and two moments on this rank."""
        local = (p.to_local() if hasattr(p, "to_local") else p for p in self.parameters)
        return 4 * sum(p.numel() * p.element_size() for p in local)


def _whole(case: _Case) -> Experts:
    shape = case.shape
    experts = Experts(shape.experts, shape.dim, shape.hidden)
    experts.gate_up_proj, experts.down_proj = (nn.Parameter(value.detach()) for value in (case.up, case.down))
    return experts


def _by(experts: Experts) -> Layer:
    def forward(x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        out: Tensor = experts(x, Routing.from_topk(index, weight, experts.num_experts, check=False))
        return out

    return forward


def _transformers(case: _Case, mesh: Any) -> _Contestant:
    """transformers' own exchange around its grouped product, on this rank's part of the experts."""
    from transformers import Qwen3MoeConfig
    from transformers.distributed.expert_parallel import AllToAllEP
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    shape, size, place = case.shape, mesh["ep"].size(), mesh["ep"].get_local_rank()
    config = Qwen3MoeConfig(
        hidden_size=shape.dim, moe_intermediate_size=shape.hidden, num_experts=shape.experts,
        num_experts_per_tok=shape.top_k, num_hidden_layers=1, num_attention_heads=1,
    )  # fmt: skip
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        module = Qwen3MoeExperts(config)
    e = shape.experts // size
    for key, value in (("gate_up_proj", case.up), ("down_proj", case.down)):
        delattr(module, key)
        module.register_parameter(key, nn.Parameter(value.detach()[place * e : (place + 1) * e].clone()))
    module.num_experts = e
    return _Contestant(AllToAllEP(module, mesh["ep"], mesh["edp"]), list(module.parameters()))


def _contestants(case: _Case, mesh: Any) -> dict[str, _Contestant]:
    whole = _whole(case)
    sharded = ShardedExperts(whole, mesh, top_k=case.shape.top_k)
    return {
        PLAIN: _Contestant(_by(whole), list(whole.parameters())),
        REDUCED: _Contestant(_by(whole), list(whole.parameters()), reduce=True),
        SHARDED: _Contestant(_by(sharded), list(sharded.parameters())),
        PEER: _transformers(case, mesh),
    }


def _share(shape: Shape, seed: int) -> _Case:
    """This rank's part of the tokens of a shape, with the experts of all."""
    rank, size = dist.get_rank(), dist.get_world_size()
    case = _Case(shape, torch.float32, seed)
    rows = slice(rank * shape.tokens // size, (rank + 1) * shape.tokens // size)
    for name in ("x", "grad", "weight", "index"):
        setattr(case, name, getattr(case, name).detach()[rows].clone())
    return case


def _error(found: list[Tensor], exact: list[Tensor], mesh: Any) -> float:
    """The largest relative difference from data parallelism in float64, over output and gradients of this rank."""
    size, place = mesh["ep"].size(), mesh["ep"].get_local_rank()
    worst = 0.0
    for number, (value, whole) in enumerate(zip(found, exact, strict=True)):
        value = value.to_local() if hasattr(value, "to_local") else value
        if number > 1 and value.shape != whole.shape:
            whole = whole.chunk(size)[place]
        worst = max(worst, float((value.double() - whole).norm() / whole.norm()))
    return worst


def _exact(case: _Case) -> list[Tensor]:
    double = _whole(case).double()
    double.backend = "reference"
    copied = _Case.__new__(_Case)
    copied.__dict__ = {**case.__dict__, **{name: getattr(case, name).double() for name in ("x", "weight", "grad")}}
    return _Contestant(_by(double), list(double.parameters()), reduce=True).run(copied)


def _seconds(contestant: _Contestant, case: _Case) -> float:
    """Of the slowest rank."""
    dist.barrier()
    start = time.perf_counter()
    contestant.run(case)
    seconds = torch.tensor(time.perf_counter() - start)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return float(seconds)


def _dispatch_seconds(experts: ShardedExperts, rounds: int) -> float:
    """The median of a dispatch and combine of T = 64 rows with nobody to wait for, each rank by itself."""
    x = torch.randn(64, experts.dim)
    index = torch.rand(64, experts.num_experts).argsort(-1)[:, :2]
    routing = Routing.from_topk(index, torch.ones(64, 2), experts.num_experts, check=False)
    times = []
    for _ in range(10 * rounds):
        start = time.perf_counter()
        dispatch = Dispatch(x, routing, experts.sender)
        dispatch.combined(dispatch.rows(x))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _on_rank(rank: int, size: int, port: int, shapes: dict[str, Shape], rounds: int, seed: int, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    mesh, alone = make_mesh(size), make_mesh(1)
    found: dict[str, Any] = {"cases": []}
    for name, shape in shapes.items():
        case = _share(shape, seed)
        contestants = _contestants(case, mesh)
        exact = _exact(case)
        errors = {}
        for key, contestant in contestants.items():
            got = contestant.run(case)
            if key == PLAIN:  # whose gradients are its rank's own
                got, exact_here = got[:3], exact[:3]
            elif key == PEER:  # sums over the ranks, which its FSDP divides
                got, exact_here = [*got[:3], *(grad / size for grad in got[3:])], exact
            else:
                exact_here = exact
            errors[key] = _error(got, exact_here, mesh)
        times: dict[str, list[float]] = {key: [] for key in contestants}
        order = random.Random(seed)
        for _ in range(rounds):
            for key in order.sample(list(contestants), len(contestants)):
                times[key].append(_seconds(contestants[key], case))
        rows = {}
        for key, contestant in contestants.items():
            ratios = [own / plain for own, plain in zip(times[key], times[PLAIN], strict=True)]
            rows[key] = {
                "ms": statistics.median(times[key]) * 1e3, "ratio": statistics.median(ratios), "error": errors[key],
                "state_bytes": contestant.state_bytes,
            }  # fmt: skip
        reduced, sharded = rows[REDUCED]["ms"], rows[SHARDED]["ms"]
        entry = {"name": name, **asdict(shape), "results": rows, "of_reduced": sharded / reduced}
        entry["peer"] = rows[PEER]["ms"] / sharded
        form, _ = choose_form(shape.top_k, shape.experts, size)
        entry["dispatch"] = form
        leaving = shape.tokens // size * rows_sent(form, shape.top_k, shape.experts, size)
        entry["bytes_sent"] = round(4 * leaving * shape.dim * 4)
        found["cases"].append(entry)
    small = ShardedExperts(Experts(8, 64, 64), alone)
    found["dispatch_ms"] = _dispatch_seconds(small, rounds) * 1e3
    if rank == 0:
        results.put(found)
    dist.barrier()
    dist.destroy_process_group()


def bench(
    shapes: dict[str, Shape] | None = None,
    processes: int = 2,
    rounds: int = 11,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Time a layer on processes of one thread each, in one interleaved run.

    Args:
        shapes: by name; the tokens are shared among the processes. None takes S1 to S3.
        processes: how many, which share the experts.
        rounds: each times every contestant once, in another order.
        seed: of the tensors and the order.
        say: what is told of the progress, a line at a time.

    Returns:
        What was measured, for JSON: `machine`, `versions`, `processes`, `dispatch_ms` (T = 64, one process alone), and
        `cases`, each with its `results` by contestant: `ms` (the median of the slowest rank), `ratio` (the median of
        its time over data parallelism's in the same round), `error` (from float64), `state_bytes` (of the experts'
        parameters, gradients and moments on a rank); `of_reduced` and `peer`, the ratios that have targets; and
        `bytes_sent`, by a rank in the four exchanges of rows, for evenly loaded experts.
    """
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    say(f"{processes} processes …")
    arguments = (processes, port, shapes or {name: SHAPES[name] for name in TARGETS}, rounds, seed, results)
    started = [context.Process(target=_on_rank, args=(rank, *arguments)) for rank in range(processes)]
    for process in started:
        process.start()
    try:
        while results.empty() and all(process.exitcode in (None, 0) for process in started):
            time.sleep(0.2)
        if results.empty():
            raise RuntimeError("a process of the benchmark ended with an error; it is above")
        found = results.get()
        for process in started:
            process.join(60)
    finally:
        for process in started:
            process.kill()
    facts = {"machine": machine(), "versions": versions("transformers"), "rounds": rounds, "seed": seed}
    return {**facts, "processes": processes, **found}


def markdown(found: dict[str, Any]) -> str:
    """What `bench` found, as a page."""
    lines = [
        "# A layer on several processes",
        "",
        "Written by `shunter bench parallel`; the numbers behind it are in the JSON file beside it.",
        "",
        f"{described(found)}. {found['processes']} processes of one thread, float32, forward and backward; medians of "
        f"{found['rounds']} interleaved rounds, the slowest rank counts. Ratio: to data parallelism without its "
        "all-reduce. State: the experts' parameters, gradients and moments on a rank.",
        "",
        f"Dispatch and combine of 64 rows, one process alone: {found['dispatch_ms']:.2f} ms (target: 1).",
    ]
    for case in found["cases"]:
        sizes = ", ".join(f"{k} {case[k]}" for k in ("tokens", "dim", "hidden", "experts", "top_k"))
        lines += [
            "",
            f"## {case['name']}: {sizes}",
            "",
            "| | ms | ratio | state MiB | error |",
            "|---|---:|---:|---:|---:|",
        ]
        for key, row in case["results"].items():
            state = row["state_bytes"] / 2**20
            lines.append(f"| {key} | {row['ms']:.1f} | {row['ratio']:.2f} | {state:.1f} | {row['error']:.1e} |")
        forms = {"choices": "a row for each choice", "ranks": "a row once to a rank", "all": "every row to every rank"}
        sent = f"{case['bytes_sent'] / 2**20:.1f} MiB, {forms[case.get('dispatch', 'choices')]}"
        lines += ["", f"Rows sent by a rank: {sent}."]
        own, limit = case["results"][SHARDED]["ratio"], TARGETS.get(case["name"])
        if limit is not None:
            lines[-1] += (
                f" Targets: expert parallel {own:.2f} of data parallel (at most {limit}), {case['of_reduced']:.2f} of "
                f"it with its all-reduce (at most 1)"
                + (f", transformers' {case['peer']:.2f} times slower (at least {FASTER})." if limit > 1.2 else ".")
            )
    return "\n".join(lines) + "\n"
