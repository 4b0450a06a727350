"""Fused kernels in Triton: the GPU backend.

What is made in the forward is the pre-activations, the hidden states and a row of output for each triple, nothing
gathered; what is kept is the pre-activations. Nothing waits for the device: how many tiles of rows there are is bounded
from shapes, and programs without one end at once. The order of every sum is fixed, so every run gives the same bits.
`kernels` needs the package `triton`, this file torch alone.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from ....routing import Routing
from ...activations import activate
from ...autograd import Gradients, Needs, Plan, differentiable
from ...choice import Backend, register
from ...quantised import NO_BACKWARD, Coding, QuantisedWeights
from ...weights import Weights
from . import blocks

__all__ = ["triton"]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# The first compute capability for which Triton compiles.
CAPABILITY = (8, 0)

INSTALLED = find_spec("triton") is not None

# The pointwise function of each gated activation; the others are named after theirs.
_POINTWISE = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu"}


def _kernels() -> ModuleType:
    from . import kernels

    return kernels


class _Triton:
    def plan(self, x: Tensor, weights: Weights, routing: Routing) -> Plan:
        rows = blocks.tile_rows(routing.token.numel(), routing.num_experts, x.dtype)
        return Plan(rows, (blocks.expert_tiles(routing, rows),))

    def forward(
        self, x: Tensor, weights: Weights, routing: Routing, plan: Plan, keep: bool
    ) -> tuple[Tensor, Tensor | None]:
        routing = _contiguous(routing)
        triples, (tiles,) = routing.token.numel(), plan.indices
        h = x.new_empty(triples, weights.up.shape[1]) if keep else None
        a = x.new_empty(triples, weights.down.shape[2])
        out = x.new_empty(x.shape)
        with torch.cuda.device_of(x):
            _hidden(x, weights, routing, plan, h, a)
            y = _kernels().products(a, weights.down.mT, weights.down_bias, tiles, plan.layout)
            _kernels().sum_by_token(y, routing.weight, routing, out)
        return out, h

    def backward(
        self, grad: Tensor, x: Tensor, weights: Weights, routing: Routing, plan: Plan, h: Tensor | None, needs: Needs
    ) -> Gradients:
        routing = _contiguous(routing)
        triples, (tiles,) = routing.token.numel(), plan.indices
        up, down, up_bias, down_bias = parameters = weights.up, weights.down, weights.up_bias, weights.down_bias
        grad_x = torch.empty_like(x) if needs.x else None
        grad_weight = None
        grad_up, grad_down, grad_up_bias, grad_down_bias = (
            torch.empty_like(value) if value is not None and need else None
            for value, need in zip(parameters, needs[2:], strict=True)
        )
        with torch.cuda.device_of(x):
            kernels = _kernels()
            if grad_down_bias is not None:
                kernels.sum_by_expert(grad, routing.token, routing.weight, routing, grad_down_bias)
            if needs.weight or needs.h or grad_down is not None:
                if h is None:
                    h = x.new_empty(triples, up.shape[1])
                    _hidden(x, weights, routing, plan, h, None)
                a = x.new_empty(triples, down.shape[2]) if grad_down is not None else None
                dh = torch.empty_like(h) if needs.h else None
                inner = kernels.down_backward(
                    grad, down, h, routing, tiles, plan.layout, *_function(weights), a, dh, needs.weight
                )
                if grad_down is not None:
                    kernels.outer(grad, routing.token, a, None, routing, grad_down)
                del a
                if grad_up is not None:
                    kernels.outer(dh, None, x, routing.token, routing, grad_up)
                if grad_up_bias is not None:
                    kernels.sum_by_expert(dh, None, None, routing, grad_up_bias)
                if grad_x is not None:
                    kernels.sum_by_token(kernels.products(dh, up, None, tiles, plan.layout), None, routing, grad_x)
                if inner is not None:
                    if down_bias is not None:
                        of_bias = grad.to(inner.dtype) @ down_bias.to(inner.dtype).T
                        inner += of_bias[routing.token, routing.expert]
                    grad_weight = inner.to(routing.weight.dtype)
        return Gradients(grad_x, grad_weight, grad_up, grad_down, grad_up_bias, grad_down_bias)


def _hidden(x: Tensor, weights: Weights, routing: Routing, plan: Plan, h: Tensor | None, a: Tensor | None) -> None:
    (tiles,) = plan.indices
    _kernels().hidden(x, weights.up, weights.up_bias, routing, tiles, plan.layout, *_function(weights), h, a)


def _contiguous(routing: Routing) -> Routing:
    """The same triples in memory as the kernels read them."""
    indices = [index.contiguous() for index in routing.indices()]
    return Routing.from_indices(indices, routing.weight.contiguous(), routing.num_tokens, routing.num_experts)


def _function(weights: Weights) -> tuple[str, bool]:
    """The pointwise function, and whether it gates."""
    return _POINTWISE.get(weights.activation, weights.activation), weights.gated


@lru_cache(maxsize=1024)
def _places(coding: Coding, rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Where the codes and the scales of each expert begin, and its bits, on a device."""
    first, second, third = (
        torch.tensor(numbers, dtype=torch.int64, device=device)
        for numbers in (*coding.starts(rows, columns), coding.bits)
    )
    return first, second, third


def _coded(x: Tensor, weights: QuantisedWeights, routing: Routing) -> Tensor:
    """The output (T, d), each tile of a matrix decoded by the program that multiplies it."""
    routing = _contiguous(routing)
    rows = blocks.tile_rows(routing.token.numel(), routing.num_experts, x.dtype)
    tiles = blocks.expert_tiles(routing, rows)
    out = x.new_empty(x.shape)
    with torch.cuda.device_of(x):
        kernels = _kernels()
        (up, down), of = (weights.up, weights.down), weights.device
        places = [_places(each.coding, each.rows, each.columns, of) for each in (up, down)]
        h = kernels.coded_products(x, routing.token, up, places[0], weights.up_bias, tiles, rows)
        a = activate(h, weights.activation)
        y = kernels.coded_products(a, None, down, places[1], weights.down_bias, tiles, rows)
        kernels.sum_by_token(y, routing.weight, routing, out)
    return out


def _refuses(x: Tensor, weights: Weights | QuantisedWeights) -> str | None:
    if isinstance(weights, QuantisedWeights) and torch.is_grad_enabled() and x.requires_grad:
        return NO_BACKWARD
    if x.dtype not in DTYPES:
        return f"its kernels compute in float32, float64, bfloat16 and float16, not in {x.dtype}"
    return _missing(x.device.type, x.device.index, x.dtype == torch.bfloat16)


@torch.compiler.assume_constant_result  # torch.compile need not trace a look at the machine
def _missing(device: str, index: int | None, bfloat16: bool) -> str | None:
    """What this machine lacks to run the kernels on a device, in words."""
    if device not in ("cpu", "cuda"):
        return f"its kernels run on CUDA devices, not on {device}"
    if not INSTALLED:
        return "the package triton is not installed; pip install triton"
    if _kernels().INTERPRETED:
        return "Triton's interpreter computes bfloat16 wrongly; use another dtype there" if bfloat16 else None
    if device == "cpu":
        return "its kernels run on CUDA devices; on a CPU only in Triton's interpreter, with TRITON_INTERPRET=1 set"
    if torch.version.hip is not None:
        return "its tiles are made for NVIDIA's devices, and this torch is built for AMD's"
    if (capability := torch.cuda.get_device_capability(index)) < CAPABILITY:
        return f"Triton compiles for compute capability 8.0 and later, not for {'.'.join(map(str, capability))}"
    return None


def _unsuited(x: Tensor, weights: Weights | QuantisedWeights) -> str | None:
    """Why cuBLAS is faster on what these kernels could run; None where it is not."""
    if isinstance(weights, QuantisedWeights):  # which cuBLAS does not multiply
        return None
    if x.element_size() != 2:
        return f"without tensor cores, in {x.dtype}, its products are slower than cuBLAS's"
    if any(width % 8 for width in weights.down.shape[1:]):
        return f"widths {tuple(weights.down.shape[1:])} that are not multiples of 8 make it load single elements"
    return None


_stacked = differentiable("triton", _Triton())


def triton(x: Tensor, weights: Weights | QuantisedWeights, routing: Routing, recompute: bool = False) -> Tensor:
    """The output (T, d)."""
    if isinstance(weights, QuantisedWeights):
        return _coded(x, weights, routing)
    return _stacked(x, weights, routing, recompute)


register(
    Backend(
        "triton",
        triton,
        _refuses,
        "fused kernels: no gathered copies, nothing that waits for the device",
        _unsuited,
        lambda x, weights: "its fused kernels move the least memory on a GPU",
        takes=(Weights, QuantisedWeights),
    )
)
