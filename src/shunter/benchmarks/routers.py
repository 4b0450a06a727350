"""`shunter bench routers`: what deciding costs, score and assign of every router as a share of its layer's step.

Each router has its default options, so that layers of many experts a token and of one stand side by side; a router that
takes more experts than here has a smaller share. All layers compute with the same experts. Weights and hidden states
are random: a global assignment of trained scores may take more or less.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import routers
from ..environment import described, machine, versions
from ..experts import Experts, choose
from ..moe import MoE, aux_loss, give_reward
from .experts import Shape, _seconds, sizes_of

__all__ = ["LIMIT", "REASONS", "SHAPE", "bench", "markdown"]

SHAPE = Shape(4096, 512, 256, 64, 1)
"""T, d, f and E; how many experts a token takes is the router's own."""

LIMIT = 0.15
"""The share above which a router needs a reason."""

REASONS = {
    "base": "the exact assignment: some 20 passes over T x E scores for the prices, then a shortest path for each "
    "token left over; in training alone",
    "sinkhorn": "up to 100 passes over T x E scores, until the plan is balanced; in training alone",
    "soft_moe": "the layer itself is cheap: E rows a sequence, whatever its length, beside logits for T x E",
}

_LENGTH = 128


class _Layer:
    """One router's layer, its tokens, and the two things that are timed."""

    def __init__(self, name: str, shape: Shape, experts: Experts) -> None:
        router = routers.create(name, shape.dim, shape.experts, **routers.find(name).example_options)
        # The experts are everyone's: the layer's own would take memory that nothing reads.
        self.moe = MoE(shape.dim, shape.hidden, shape.experts, router, ready_experts=experts).train()
        self.known: dict[str, Any] = {key: _known(key, router, shape) for key in router.required}
        self.context = routers.Context(**self.known)
        self.x = torch.randn(shape.tokens, shape.dim, requires_grad=True)
        self.grad = torch.randn(shape.tokens, shape.dim)

    def decide(self) -> Tensor:
        """Score and assign, as in training."""
        router = self.moe.decider
        return router.assign(router.score(self.x, self.context), self.context).weight

    def step(self) -> tuple[Tensor, ...]:
        """Forward and backward of the layer and its losses; the reward, where the router learns by one."""
        out = self.moe(self.x, **self.known)
        if self.moe.decision is not None:
            give_reward(self.moe, -self.grad[:, 0])
        total = (out * self.grad).sum() + aux_loss(self.moe)
        return torch.autograd.grad(total, [self.x, *self.moe.parameters()], allow_unused=True)


def _known(name: str, router: nn.Module, shape: Shape) -> Tensor:
    """What is known of the tokens under a name of `Context`: sequences of 128, random ids that the router knows."""
    tokens = shape.tokens
    if name == "sequence":
        return torch.arange(tokens) // _LENGTH
    if name == "position":
        return torch.arange(tokens) % _LENGTH
    if name == "embedding":
        return torch.randn(tokens, int(getattr(router, "embedding_dim")))  # noqa: B009 (only some routers have it)
    if name == "experts":
        return torch.randint(shape.experts, (tokens, 1))
    sizes = {"token_ids": "table", "task": "num_tasks", "modality": "num_modalities", "domain": "experts"}
    of = getattr(router, sizes.get(name, "experts"))
    return torch.randint(of.shape[-1] if isinstance(of, Tensor) else of, (tokens,))


def bench(
    names: list[str] | None = None,
    shape: Shape = SHAPE,
    rounds: int = 11,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Time score and assign, and the forward and backward of the layer, of every router.

    Args:
        names: of `shunter.routers.names()`; None takes all.
        shape: T, d, f and E.
        rounds: each times every router once, in a rotating order; a first one warms up.
        seed: of the tensors.
        say: what is told of the progress, a line at a time.

    Returns:
        What was measured, for JSON: `machine`, `versions`, the sizes, `backend`, and `results` by router: either
        `refused`, why it could not run, or `router_ms` and `layer_ms` (medians), `share` (of the medians) and `experts`
        (the mean number of triples of a token).

    Raises:
        ValueError: for an unknown router.
    """
    for name in names or []:
        routers.find(name)
    torch.manual_seed(seed)
    experts = Experts(shape.experts, shape.dim, shape.hidden)
    probe = torch.empty(shape.tokens, shape.dim)
    found: dict[str, Any] = {
        "machine": machine(), "versions": versions(), "rounds": rounds, "seed": seed,
        "tokens": shape.tokens, "dim": shape.dim, "hidden": shape.hidden, "experts": shape.experts,
        "backend": choose("auto", probe, experts.weights)[0].name, "results": {},
    }  # fmt: skip
    layers: dict[str, _Layer] = {}
    for name in names or routers.names():
        say(f"{name} …")
        try:
            layers[name] = layer = _Layer(name, shape, experts)
            layer.step()
        except (RuntimeError, ValueError) as error:
            layers.pop(name, None)
            found["results"][name] = {"refused": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
            continue
        routing = layer.moe.routing
        assert routing is not None
        found["results"][name] = {"experts": routing.token.numel() / shape.tokens}
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in layers}
    order = list(layers)
    for number in range(rounds + 1):
        say(f"round {number} of {rounds}")
        start = number % max(len(order), 1)
        for name in order[start:] + order[:start]:
            seconds = _seconds(layers[name].decide), _seconds(layers[name].step)
            if number:
                for kept, value in zip(times[name], seconds, strict=True):
                    kept.append(value)
    for name, (deciding, whole) in times.items():
        router, layer_ = statistics.median(deciding), statistics.median(whole)
        found["results"][name] |= {"router_ms": router * 1e3, "layer_ms": layer_ * 1e3, "share": router / layer_}
    return found


def markdown(found: dict[str, Any]) -> str:
    """What `bench` found, as a page; a share above the limit stands with its reason, or with the lack of one."""
    lines = [
        "# What deciding costs",
        "",
        "Written by `shunter bench routers`; the numbers behind it are in the JSON file beside it.",
        "",
        f"{described(found)}. {sizes_of(found)}, float32, swiglu experts by `{found['backend']}`. Medians of "
        f"{found['rounds']} interleaved rounds, in training mode.",
        "",
        "Router: score and assign. Layer: forward and backward with the losses. Share: the one over the other. "
        "Experts: how many a token takes on average, by the router's default options; with more, the share is smaller.",
        "",
        "| router | experts | router ms | layer ms | share |",
        "|---|---:|---:|---:|---:|",
    ]
    above = []
    for name, row in found["results"].items():
        if "refused" in row:
            lines.append(f"| `{name}` | {row['refused']} | | | |")
            continue
        lines.append(
            f"| `{name}` | {row['experts']:.2f} | {row['router_ms']:.2f} | {row['layer_ms']:.1f} | {row['share']:.1%} |"
        )
        if row["share"] > LIMIT:
            above.append(f"| `{name}` | {row['share']:.1%} | {REASONS.get(name, 'none is known')} |")
    lines += ["", f"## Above {LIMIT:.0%}", ""]
    lines += ["| router | share | reason |", "|---|---:|---|", *above] if above else ["None."]
    return "\n".join(lines) + "\n"
