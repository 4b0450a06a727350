"""From a forward and a backward on plain tensors to a backend: the autograd around them, written once.

What is kept for the backward is x, the weights, the pre-activations and indices; with `recompute` not even the
pre-activations. The gathered input, the activations and the expert outputs are recomputed or never needed: the gradient
of a combine weight is <dy W_down, a>, not <dy, y>.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..routing import Routing
from .choice import Run, get
from .weights import Weights

__all__ = ["Gradients", "Kernel", "Needs", "Plan", "differentiable", "gradients_in_graph"]


class Needs(NamedTuple):
    """Which inputs want a gradient."""

    x: bool
    weight: bool
    up: bool
    down: bool
    up_bias: bool
    down_bias: bool

    @property
    def h(self) -> bool:
        """Whether the gradient of the pre-activations is on the way to one."""
        return self.x or self.up or self.up_bias


class Gradients(NamedTuple):
    """The gradients of the inputs that want one; None for the others."""

    x: Tensor | None = None
    weight: Tensor | None = None
    up: Tensor | None = None
    down: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None


class Plan(NamedTuple):
    """How a kernel goes through a routing: what it likes in plain Python, and index tensors."""

    layout: Any
    indices: tuple[Tensor, ...]


class Kernel(Protocol):
    """The two halves of a backend, without autograd."""

    def plan(self, x: Tensor, weights: Weights, routing: Routing) -> Plan:
        """What both halves need to know of the routing."""

    def forward(
        self, x: Tensor, weights: Weights, routing: Routing, plan: Plan, keep: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The output (T, d), and where `keep` asks for them the pre-activations (N, 2f) or (N, f)."""

    def backward(
        self, grad: Tensor, x: Tensor, weights: Weights, routing: Routing, plan: Plan, h: Tensor | None, needs: Needs
    ) -> Gradients:
        """The gradients, of the output's (T, d), contiguous; without h the pre-activations are computed again."""


_KERNELS: dict[str, Kernel] = {}


def differentiable(name: str, kernel: Kernel) -> Run:
    """The backend of a kernel; to `torch.compile` one operator, in a graph without breaks.

    Second derivatives are those of the reference.
    """
    _KERNELS[name] = kernel

    def run(x: Tensor, weights: Weights, routing: Routing, recompute: bool = False) -> Tensor:
        parts = (x, routing.weight, weights.up, weights.down, weights.up_bias, weights.down_bias)
        if torch.compiler.is_compiling():
            out: Tensor = _operator(*parts, list(routing.indices()), name, weights.activation, not recompute)[0]
            return out
        if torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in parts):
            return _Experts.apply(*parts, routing, weights.activation, kernel, recompute)
        return kernel.forward(x, weights, routing, kernel.plan(x, weights, routing), keep=False)[0]

    return run


def gradients_in_graph(
    function: Callable[..., Tensor], inputs: Sequence[Tensor | None], needs: Sequence[bool], grad: Tensor
) -> list[Tensor | None]:
    """The gradients of function(*inputs) in a graph of their own, for second derivatives; None where not needed.

    Args:
        function: in plain autograd.
        inputs: what it is given.
        needs: which inputs want a gradient.
        grad: of its output.
    """
    # Of views: one input may be made of another (the combine weights of x), whose gradient must not count there, too.
    inputs = [None if value is None else value.view_as(value) for value in inputs]
    wanted = [value for value, need in zip(inputs, needs, strict=True) if need and value is not None]
    found = iter(torch.autograd.grad(function(*inputs), wanted, grad, create_graph=True))
    return [next(found) if need and value is not None else None for value, need in zip(inputs, needs, strict=True)]


def _reference(places: Sequence[Tensor], size: tuple[int, int], activation: str) -> Callable[..., Tensor]:
    """The output (T, d) by the definition, as a function of x, the combine weights and the experts' matrices."""

    def run(
        x: Tensor, weight: Tensor, up: Tensor, down: Tensor, up_bias: Tensor | None, down_bias: Tensor | None
    ) -> Tensor:
        weights = Weights(up, down, up_bias, down_bias, activation)
        return get("reference").run(x, weights, Routing.from_indices(places, weight, *size))

    return run


_BATCHED = torch._C._dispatch_key_parse("Batched")


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        up: Tensor,
        down: Tensor,
        up_bias: Tensor | None,
        down_bias: Tensor | None,
        routing: Routing,
        activation: str,
        kernel: Kernel,
        recompute: bool,
    ) -> Tensor:
        weights = Weights(up, down, up_bias, down_bias, activation)
        plan = kernel.plan(x, weights, routing)
        out, h = kernel.forward(x, weights, routing, plan, keep=not recompute)
        places = routing.indices()
        ctx.save_for_backward(x, weight, up, down, up_bias, down_bias, h, *places, *plan.indices)
        ctx.size, ctx.places = (routing.num_tokens, routing.num_experts), len(places)
        ctx.activation, ctx.kernel, ctx.layout = activation, kernel, plan.layout
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, up, down, up_bias, down_bias, h, *indices = ctx.saved_tensors
        places = indices[: ctx.places]
        batched = torch._C._dispatch_keys(grads[0]).has(_BATCHED)  # under is_grads_batched=True
        if torch.is_grad_enabled() or batched:  # under create_graph=True
            parts, needs = (x, weight, up, down, up_bias, down_bias), ctx.needs_input_grad[:6]
            with torch.enable_grad():
                outer = gradients_in_graph(_reference(places, ctx.size, ctx.activation), parts, needs, grads[0])
            return (*outer, None, None, None, None)
        routing = Routing.from_indices(places, weight, *ctx.size)
        plan = Plan(ctx.layout, tuple(indices[ctx.places :]))
        weights = Weights(up, down, up_bias, down_bias, ctx.activation)
        needs = Needs(*ctx.needs_input_grad[:6])
        found = ctx.kernel.backward(grads[0].contiguous(), x, weights, routing, plan, h, needs)
        return (*found, None, None, None, None)


@torch.library.custom_op(
    "shunter::experts",
    mutates_args=(),
    schema=(
        "(Tensor x, Tensor weight, Tensor up, Tensor down, Tensor? up_bias, Tensor? down_bias, Tensor[] indices, "
        "str kernel, str activation, bool keep) -> (Tensor, Tensor)"
    ),
)
def _operator(
    x: Tensor,
    weight: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    indices: list[Tensor],
    kernel: str,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """The output and the pre-activations, empty where they are not kept."""
    weights = Weights(up, down, up_bias, down_bias, activation)
    routing = Routing.from_indices(indices, weight, x.shape[0], up.shape[0])
    plan = _KERNELS[kernel].plan(x, weights, routing)
    out, h = _KERNELS[kernel].forward(x, weights, routing, plan, keep)
    return out, x.new_empty(0, up.shape[1]) if h is None else h


@_operator.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    indices: list[Tensor],
    kernel: str,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(weight.shape[0] if keep else 0, up.shape[1])


@torch.library.custom_op(
    "shunter::experts_backward",
    mutates_args=(),
    schema=(
        "(Tensor grad, Tensor x, Tensor weight, Tensor up, Tensor down, Tensor? up_bias, Tensor? down_bias, "
        "Tensor[] indices, Tensor? h, str kernel, str activation, bool[] needs) -> Tensor[]"
    ),
)
def _backward_operator(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    indices: list[Tensor],
    h: Tensor | None,
    kernel: str,
    activation: str,
    needs: list[bool],
) -> list[Tensor]:
    """The gradients that are needed, in the order of `Gradients`."""
    weights = Weights(up, down, up_bias, down_bias, activation)
    routing = Routing.from_indices(indices, weight, x.shape[0], up.shape[0])
    plan = _KERNELS[kernel].plan(x, weights, routing)
    found = _KERNELS[kernel].backward(grad.contiguous(), x, weights, routing, plan, h, Needs(*needs))
    return [gradient for gradient in found if gradient is not None]


@_backward_operator.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    indices: list[Tensor],
    h: Tensor | None,
    kernel: str,
    activation: str,
    needs: list[bool],
) -> list[Tensor]:
    parts = (x, weight, up, down, up_bias, down_bias)
    return [torch.empty_like(part) for part, need in zip(parts, needs, strict=True) if part is not None and need]


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *parts, indices, kernel, activation, keep = inputs
    ctx.save_for_backward(*parts, output[1] if keep else None, *indices)
    ctx.how = kernel, activation
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    x, weight, up, down, up_bias, down_bias, h, *indices = ctx.saved_tensors
    parts = (x, weight, up, down, up_bias, down_bias)
    needs = [part is not None and need for part, need in zip(parts, ctx.needs_input_grad, strict=False)]
    found = iter(_backward_operator(grad, *parts, indices, h, *ctx.how, needs))
    return *(next(found) if need else None for need in needs), [None] * len(indices), None, None, None


_operator.register_autograd(_backward, setup_context=_keep_for_backward)
