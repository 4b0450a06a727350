"""`shunter bench layer`: a whole top-k layer part by part, as experts become more and narrower at equal operations.

Router, sort, experts, losses and backward are timed in the layer's own step, dispatch and combine also by themselves,
since the compiled backends do both inside of their loops. Beside each case stands its floor: the larger of what its
operations take at the measured peak, and what its weights, their gradients and its states take at that of copying.

The optimizer's step belongs to the cost of many experts: AdamW moves the moments and the weights of an expert without
tokens, too, so that none can be left out of an exact step. What is exact and cheaper is to read each once (fused).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..environment import described, machine, versions
from ..errors import UserError
from ..experts.combine import sum_by_token
from ..moe import MoE, aux_loss
from ..routers import Context
from .experts import DTYPES, Shape, _copy_bandwidth, _matmul_peak, _medians, _steady_seconds

__all__ = ["EXPERTS", "TOKENS", "bench", "markdown"]

EXPERTS = [8, 32, 128, 512, 1024]

TOKENS = [256, 8192, 65536]

PARTS = ["router", "sort", "dispatch", "experts", "combine", "losses", "forward", "step"]

ADAMW = ["AdamW", "AdamW fused", "AdamW floor"]


class _Layer:
    """A layer of a shape, its tokens, and each part of a step as a function."""

    def __init__(self, shape: Shape, dtype: torch.dtype, backend: str) -> None:
        self.moe = MoE(
            shape.dim, shape.hidden, shape.experts, "topk", backend, top_k=shape.top_k, load_balancing_loss=0.01,
            dtype=dtype,
        ).train()  # fmt: skip
        self.x = torch.randn(shape.tokens, shape.dim, dtype=dtype, requires_grad=True)
        self.grad = torch.randn(shape.tokens, shape.dim, dtype=dtype)
        self.context = Context()
        with torch.no_grad():
            self.logits = self.moe.decider.score(self.x, self.context)
            self.routing = self.moe.decider.assign(self.logits, self.context)
            self.rows = self.x.index_select(0, self.routing.token)

    def parts(self) -> dict[str, Callable[[], object]]:
        """The parts by name, those before `forward` without a graph."""
        router, routing, x = self.moe.decider, self.routing, self.x.detach()
        alone: dict[str, Callable[[], object]] = {
            "router": lambda: router.score(x, self.context),
            "sort": lambda: router.assign(self.logits, self.context),
            "dispatch": lambda: x.index_select(0, routing.token),
            "experts": lambda: self.moe.experts(x, routing),
            "combine": lambda: sum_by_token(self.rows, routing, routing.weight),
            "losses": lambda: router.losses(self.logits, routing, self.context),
        }
        return {name: torch.no_grad()(run) for name, run in alone.items()} | {
            "forward": self.forward,
            "step": self.step,
        }

    def forward(self) -> Tensor:
        """The output with its graph, and the losses."""
        out: Tensor = self.moe(self.x)
        return (out * self.grad).sum() + aux_loss(self.moe)

    def step(self) -> tuple[Tensor, ...]:
        """Forward and backward."""
        return torch.autograd.grad(self.forward(), [self.x, *self.moe.parameters()])

    def optimizers(self) -> dict[str, Callable[[], object]]:
        """A step of AdamW by torch's default and fused, on the gradients of one step."""
        self.forward().backward()
        parameters = list(self.moe.parameters())
        options: dict[str, dict[str, Any]] = {"AdamW": {}, "AdamW fused": {"fused": True}}
        return {name: torch.optim.AdamW(parameters, lr=1e-6, **option).step for name, option in options.items()}


def _floor(shape: Shape, itemsize: int, peak: float, bandwidth: float) -> dict[str, float]:
    """Milliseconds of a step by its operations and by its bytes: each weight is read twice and gets a gradient.

    The optimizer's by its bytes: it reads weight, gradient and two moments, and writes all but the gradient.
    """
    operations = shape.flops + 6 * shape.tokens * shape.dim * shape.experts
    weights = 3 * shape.experts * shape.dim * shape.hidden + shape.dim * shape.experts
    states = 5 * shape.tokens * shape.dim
    moved = {"bytes_ms": 3 * weights + states, "optimizer_ms": 7 * weights}
    times = {name: itemsize * numbers / bandwidth * 1e3 for name, numbers in moved.items()}
    return {"operations_ms": operations / peak * 1e3, **times}


def bench(
    experts: list[int],
    tokens: list[int],
    dim: int = 256,
    width: int = 512,
    top_k: int = 2,
    dtype: str = "float32",
    rounds: int = 11,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Time each part of a layer and its step, Shunter's and with `grouped_mm`, interleaved.

    Args:
        experts: E of each layer.
        tokens: T of each step.
        dim: d.
        width: k f, the hidden units that a token meets; f is this over k.
        top_k: k.
        dtype: "float32" or "bfloat16".
        rounds: of the interleaved run.
        seed: of the tensors.
        say: what is told of the progress, a line at a time.

    Returns:
        For JSON: `machine`, `versions`, the sizes, the peaks, and `cases` with T, E, `ms` of each part by contestant,
        `parameters` and the `floor`.

    Raises:
        UserError: for impossible sizes or another dtype.
    """
    if dtype not in DTYPES:
        raise UserError(f"bench: dtype {dtype!r} is unknown; choose from {', '.join(DTYPES)}")
    if min([*experts, *tokens, dim, width, top_k]) < 1 or width % top_k or top_k > min(experts):
        raise UserError(f"bench: sizes must be at least 1, k at most E, and the width {width} a multiple of k {top_k}")
    torch.manual_seed(seed)
    kind = DTYPES[dtype]
    peak, bandwidth = _matmul_peak(kind), _copy_bandwidth()
    found: dict[str, Any] = {
        "machine": machine(), "versions": versions("numba"), "rounds": rounds, "seed": seed, "dim": dim, "width": width,
        "top_k": top_k, "dtype": dtype, "matmul_gflops": peak / 1e9, "copy_gb_per_s": bandwidth / 1e9, "cases": [],
    }  # fmt: skip
    for count in tokens:
        for number in experts:
            say(f"T {count}, E {number} …")
            shape = Shape(count, dim, width // top_k, number, top_k)
            layers = {name: _Layer(shape, kind, name) for name in ("auto", "grouped_mm")}
            runs = {
                f"{name} {part}": run
                for name, layer in layers.items()
                for part, run in layer.parts().items()
                if name == "auto" or part in ("experts", "forward", "step")
            }
            times = _medians(runs, rounds, _steady_seconds)
            times |= _medians(layers["auto"].optimizers(), rounds, _steady_seconds)
            moe = layers["auto"].moe
            found["cases"].append(
                {
                    "tokens": count,
                    "experts": number,
                    "backend": moe.experts.explain(count).split(":")[0].removeprefix("Backend "),
                    "ms": {name: seconds * 1e3 for name, seconds in times.items()},
                    "parameters": sum(p.numel() for p in moe.parameters()),
                    "floor": _floor(shape, kind.itemsize, peak, bandwidth),
                }
            )
    return found


def markdown(found: dict[str, Any]) -> str:
    """What `bench` found, as a page."""
    lines = [
        "# A layer, part by part",
        "",
        "Written by `shunter bench layer`; the numbers behind it are in the JSON file beside it.",
        "",
        f"{described(found)}. d {found['dim']}, k {found['top_k']}, k f {found['width']}, {found['dtype']}. Large "
        f"products reach {found['matmul_gflops']:.0f} GFLOP/s, copying {found['copy_gb_per_s']:.0f} GB/s. Medians of "
        f"{found['rounds']} interleaved rounds, in milliseconds.",
        "",
        "Experts: the forward of the backend, dispatch and combine in it; both also by themselves. Backward: the step "
        "but for its forward. Floor: by operations and by bytes of weights and their gradients. Ratio: the step over "
        "that of the first row with as many tokens. AdamW: a step of the optimizer, by torch's default and fused, as "
        "`Trainer` and the recipes take it, and its floor by bytes; experts without tokens move, too.",
    ]
    first: dict[int, float] = {}
    for case in found["cases"]:
        ms, floor, count = case["ms"], case["floor"], case["tokens"]
        if count not in first:
            columns = [*PARTS[:-2], "backward", "step", "ratio", "grouped_mm", "floor ops", "floor bytes", *ADAMW]
            lines += ["", f"## {count} tokens", "", f"| E | {' | '.join(columns)} |", "|---:|" + "---:|" * len(columns)]
        step = ms["auto step"]
        numbers = [*(ms[f"auto {part}"] for part in PARTS[:-2]), step - ms["auto forward"], step]
        shown = [f"{number:.2f}" for number in [*numbers, step / first.setdefault(count, step)]]
        last = ms["grouped_mm step"], floor["operations_ms"], floor["bytes_ms"], ms["AdamW"], ms["AdamW fused"]
        shown += [f"{number:.2f}" for number in (*last, floor["optimizer_ms"])]
        lines.append(f"| {case['experts']} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"
