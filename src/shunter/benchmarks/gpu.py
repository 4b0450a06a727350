"""`shunter bench gpu`: the Triton backend next to torch's grouped product and a dense layer of equal FLOPs, on a GPU.

First each backend's error is compared with the reference's, both against float64, then all are timed in turns. The
routing starts from top-k indices, so that sorting by expert is part of what is timed.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch

from ..environment import described, machine, versions
from ..experts import backend_names
from .experts import CannotRunError, Contestant, Shape, _Case, _dense, _medians, _ours, _pass, sizes_of

__all__ = ["BACKENDS", "DTYPES", "GOALS", "SHAPES", "bench", "markdown", "right"]

# By the size of the model whose layer it is and the width of an expert: experts from coarse to fine at equal FLOPs.
SHAPES = {
    "1.4B-256": Shape(40960, 768, 256, 128, 8),
    "1.4B-512": Shape(40960, 768, 512, 64, 4),
    "1.4B-1024": Shape(40960, 768, 1024, 32, 2),
    "7B-256": Shape(24576, 1536, 256, 128, 8),
    "7B-512": Shape(24576, 1536, 512, 64, 4),
    "7B-1024": Shape(24576, 1536, 1024, 32, 2),
    "30B-256": Shape(32768, 4096, 256, 256, 16),
    "30B-512": Shape(32768, 4096, 512, 128, 8),
    "30B-1024": Shape(32768, 4096, 1024, 64, 4),
    "120B-512": Shape(32768, 4096, 512, 256, 16),
    "120B-1024": Shape(32768, 4096, 1024, 128, 8),
    "120B-2048": Shape(32768, 4096, 2048, 64, 4),
    "qwen3-30B": Shape(32768, 2048, 768, 128, 8),
}

# What the Triton backend must reach on an H100, in TFLOP/s forward and both ways, and what it aims at.
GOALS = {"qwen3-30B": {"must": (340, 270), "aim": (440, 390)}}

DTYPES = {"bfloat16": torch.bfloat16}

BACKENDS = ["triton", "grouped_mm"]

# The reference in float64 keeps every expert's values: as many tokens fit, and fill the same tiles.
CHECKED_TOKENS = 4096

# A backend may be this much further from float64 than the reference in the same dtype.
MAX_ERROR_RATIO = 1.5

# Passes between two readings of the clock, so that launches queue up as they do in training.
PASSES = 4


def bench(
    shapes: dict[str, Shape],
    dtypes: list[str],
    backends: list[str],
    rounds: int = 11,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
    device: str = "cuda",
) -> dict[str, Any]:
    """Check and time backends on a device.

    Args:
        shapes: by name.
        dtypes: of `DTYPES`.
        backends: of `shunter.experts.backend_names()`.
        rounds: of the interleaved run; each times every contestant once, in another order.
        seed: of the tensors and the routing.
        say: what is told of the progress, a line at a time.
        device: where; a CPU has no peak memory.

    Returns:
        What was found, for JSON: `machine`, `versions`, and `cases`, each with its `results` by contestant: either
        `refused`, why it could not run, or for "forward" and "both" ways `ms` (the median), `tflops` (10^12 FLOP/s) and
        `share` (of the dense layer's), `peak_bytes` (allocated during a pass, above what the inputs take), and for
        backends `errors` (by the scale of x and by output and gradient, its own and the reference's) and `right`.

    Raises:
        ValueError: for an unknown dtype or backend, and where there is no CUDA device.
    """
    for given, known in ((dtypes, list(DTYPES)), (backends, backend_names())):
        for name in given:
            if name not in known:
                raise ValueError(f"bench: {name!r} is unknown; choose from {', '.join(known)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"bench gpu needs an NVIDIA GPU; torch {torch.__version__} finds none on this machine")
    found: dict[str, Any] = {"machine": machine(), "versions": versions("triton"), "rounds": rounds, "seed": seed}
    found["cases"] = []
    for name, shape in shapes.items():
        for dtype in dtypes:
            say(f"{name} {dtype} …")
            results: dict[str, dict[str, Any]] = {"dense": {}, **{backend: {} for backend in backends}}
            small = replace(shape, tokens=min(shape.tokens, CHECKED_TOKENS))
            _check(_Case(small, DTYPES[dtype], seed, device), backends, results)
            _time(_Case(shape, DTYPES[dtype], seed, device), rounds, results)
            found["cases"].append({"name": name, "dtype": dtype, **asdict(shape), "results": results})
    return found


def right(found: dict[str, Any]) -> bool:
    """Whether every backend that ran was as near to float64 as it must be."""
    return all(row.get("right", True) for case in found["cases"] for row in case["results"].values())


def _check(case: _Case, backends: list[str], results: dict[str, dict[str, Any]]) -> None:
    """Relative Frobenius errors against float64, also with a small x; a backend that cannot run says why."""
    floor = torch.finfo(case.dtype).eps / 8
    for scale in (1.0, 1e-3):
        scaled = copy.copy(case)
        scaled.x = (case.x.detach() * scale).requires_grad_()
        exact = _pass_of("reference", _to_float64(scaled))
        reference = _relative_errors(_pass_of("reference", scaled), exact)
        for name in backends:
            try:
                ours = _relative_errors(_pass_of(name, scaled), exact)
            except (CannotRunError, RuntimeError) as why:
                results[name]["refused"] = str(why).splitlines()[0]
                continue
            row = results[name]
            row.setdefault("errors", {})[str(scale)] = {key: [ours[key], reference[key]] for key in ours}
            near = all(ours[key] <= MAX_ERROR_RATIO * reference[key] + floor for key in ours)
            row["right"] = near and row.get("right", True)


def _pass_of(name: str, case: _Case) -> dict[str, torch.Tensor]:
    parts = ("y", "x", "weight", "up", "down")
    return dict(zip(parts, _pass(_ours(case, name), case), strict=True))


def _to_float64(case: _Case) -> _Case:
    exact = copy.copy(case)
    exact.dtype = torch.float64
    exact.x, exact.weight, exact.up, exact.down = (
        part.detach().double().requires_grad_() for part in (case.x, case.weight, case.up, case.down)
    )
    exact.grad = case.grad.double()
    return exact


def _relative_errors(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> dict[str, float]:
    errors = {}
    for name, value in exact.items():
        error = (found[name].double() - value).norm() / value.norm().clamp_min(1e-300)
        errors[name] = float("inf") if error.isnan() else error.item()
    return errors


def _time(case: _Case, rounds: int, results: dict[str, dict[str, Any]]) -> None:
    """Milliseconds, rates and peak memory of whatever can run."""
    running: dict[str, Contestant] = {}
    for name, row in results.items():
        if "refused" in row:
            continue
        try:
            contestant = _dense(case) if name == "dense" else _ours(case, name)
            row["peak_bytes"] = _peak_bytes(contestant, case)
        except (CannotRunError, RuntimeError) as why:
            row["refused"] = str(why).splitlines()[0]
            continue
        running[name] = contestant
    ways: dict[str, Callable[[Contestant], object]] = {
        "forward": lambda contestant: contestant.forward(case.x, case.weight),
        "both": lambda contestant: _pass(contestant, case),
    }
    for way, run in ways.items():
        flops = replace(case.shape, backward=way == "both").flops
        runs = {name: lambda run=run, it=contestant: run(it) for name, contestant in running.items()}
        times = _medians(runs, rounds, lambda once: _seconds(once, case.x.device))  # type: ignore[arg-type]
        for name, seconds in times.items():
            share = times["dense"] / seconds if "dense" in times else None
            results[name][way] = {"ms": seconds * 1e3, "tflops": flops / seconds / 1e12, "share": share}


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one pass, the mean of `PASSES`, by the device's own clock."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(PASSES):
            run()
        return (time.perf_counter() - start) / PASSES
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(PASSES):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / PASSES


def _peak_bytes(contestant: Contestant, case: _Case) -> int | None:
    """The most that a pass forward and backward had allocated, above what was allocated before it."""
    _pass(contestant, case)  # what is compiled or kept once is none of it
    if not case.x.is_cuda:
        return None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    _pass(contestant, case)
    return torch.cuda.max_memory_allocated() - before


def markdown(found: dict[str, Any]) -> str:
    """What `bench` found, as a page."""
    lines = [
        "# Experts on a GPU",
        "",
        "Written by `shunter bench gpu`; the numbers behind it are in the JSON file beside it.",
        "",
        f"{described(found)}. Medians of {found['rounds']} interleaved rounds.",
        "",
        "TFLOP/s count the products, 6 T k d f forward and 18 T k d f both ways. Share: of the rate of a dense SwiGLU "
        "of equal FLOPs. Peak: memory that a pass allocates at most, above its inputs and parameters. Error: the "
        "largest over output and gradients, against float64, and times the reference's; at most "
        f"{MAX_ERROR_RATIO} is right.",
    ]
    for case in found["cases"]:
        lines += ["", f"## {case['name']} {case['dtype']}: {sizes_of(case)}", ""]
        lines += ["| | forward TFLOP/s | share | both TFLOP/s | share | peak GiB | error | times | right |"]
        lines += ["|---|---:|---:|---:|---:|---:|---:|---:|---|"]
        for name, row in case["results"].items():
            if "refused" in row:
                lines.append(f"| {name} | {row['refused']} |" + " |" * 7)
            else:
                lines.append(f"| {name} | {' | '.join(_cells(row))} |")
        lines += _goals(case, found["machine"].get("gpu", {}).get("name", ""))
    return "\n".join(lines) + "\n"


def _cells(row: dict[str, Any]) -> list[str]:
    cells = []
    for way in ("forward", "both"):
        share = row[way]["share"]
        cells += [f"{row[way]['tflops']:.1f}", "" if share is None else f"{share:.2f}"]
    cells.append("" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.2f}")
    if "errors" not in row:
        return [*cells, "", "", ""]
    pairs = [pair for errors in row["errors"].values() for pair in errors.values()]
    ratio = max(ours / max(theirs, 1e-300) for ours, theirs in pairs)
    return [*cells, f"{max(ours for ours, _ in pairs):.1e}", f"{ratio:.2f}", "yes" if row["right"] else "NO"]


def _goals(case: dict[str, Any], device: str) -> list[str]:
    """A line on each goal that this case has on this device."""
    row = case["results"].get("triton", {"refused": ""})
    if case["name"] not in GOALS or "H100" not in device or "refused" in row:
        return []
    lines = [""]
    for what, (forward, both) in GOALS[case["name"]].items():
        reached = row["forward"]["tflops"] >= forward and row["both"]["tflops"] >= both
        lines.append(f"- {what}: {forward} forward, {both} both ways: {'reached' if reached else 'missed'}")
    return lines
