"""What the tests of several processes share: small models, what their layers are told, and data parallelism to compare.

The reference of every test is data parallelism written out: each rank has all experts, and gradients are averaged.
"""

import copy

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import shunter
from shunter import MoE, routers

DIM, HIDDEN, EXPERTS = 8, 12, 8

OPTIONS = {
    "topk": {"top_k": 3, "load_balancing_loss": 0.1, "z_loss": 0.01},
    "switch": {"capacity_factor": 0.75, "load_balancing_loss": 0.1},
    "deepseek": {"top_k": 2, "selection_bias": True},
    "base": {},
    "expert_choice": {"capacity_factor": 2.0},
}


def layer(name, dtype=torch.float64, backend="reference", experts=EXPERTS, **options):
    """A layer whose parameters are the same on every rank, as long as their random states are."""
    given = {**routers.find(name).example_options, **(OPTIONS.get(name, {})), **options}
    made = MoE(DIM, HIDDEN, experts, name, backend, bias=True, dtype=dtype, **given)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made


SIZES = {"token_ids": 200, "task": 4, "domain": EXPERTS, "language": EXPERTS, "modality": 2, "position": 50}


def told(name, shape):
    """Random values of what a router needs to be told of tokens."""
    known = {}
    for need in routers.find(name).needs:
        if need in SIZES:
            known[need] = torch.randint(SIZES[need], shape)
        elif need == "embedding":
            known[need] = torch.randn(*shape, 8)
        elif need == "experts":
            known[need] = torch.rand(*shape, EXPERTS).argsort(-1)[..., :2]
    return known


class Block(nn.Module):
    def __init__(self, moe):
        super().__init__()
        self.norm = nn.LayerNorm(DIM, dtype=next(moe.parameters()).dtype)
        self.moe = moe

    def forward(self, x):
        return x + self.moe(self.norm(x))


class Model(nn.Module):
    """An input map, blocks with sparse layers, an output map of the input's weight."""

    def __init__(self, names, dtype=torch.float64, **options):
        super().__init__()
        self.inner = nn.Linear(DIM, DIM, dtype=dtype)
        self.outer = nn.Linear(DIM, DIM, dtype=dtype)
        self.outer.weight = self.inner.weight
        self.blocks = nn.ModuleList(Block(layer(name, dtype, **options)) for name in names)

    def forward(self, x):
        x = self.inner(x)
        for block in self.blocks:
            x = block(x)
        return self.outer(x)


class Exchanges(TorchDispatchMode):
    """Counts the all-to-alls that reach the processes, so none that a policy of checkpointing has kept."""

    done = rows = of_rows = 0
    """Of rows, those of the first exchange of floating point; and how many exchanges are of floating point."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        operators = torch.ops._c10d_functional
        brought = {operators.all_to_all_single.default, operators.all_gather_into_tensor.default}
        if func in brought | {operators.reduce_scatter_tensor.default}:
            self.done += 1
            self.of_rows += args[0].is_floating_point()
            if func in brought and args[0].is_floating_point() and not self.rows:
                self.rows = len(args[0])
        return func(*args, **(kwargs or {}))


def loss_of(model, x):
    return model(x).square().mean() + shunter.aux_loss(model)


def whole(value):
    return value.full_tensor() if isinstance(value, DTensor) else value


def gradients(model, averaged=False):
    """The gradients of a model by name, whole; averaged over the ranks where they are each rank's own."""
    found = {}
    for name, parameter in model.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        grad = whole(grad.detach()).clone()
        if averaged:
            dist.all_reduce(grad)
            grad /= dist.get_world_size()
        found[name] = grad
    return found


def difference(found, expected):
    """The largest difference of tensors by name, relative to the largest value of each; a name too few is infinite."""
    if found.keys() != expected.keys():
        return float("inf")
    worst = 0.0
    for name, value in expected.items():
        scale = float(value.abs().max()) if value.numel() else 0.0
        gap = float((found[name] - value).abs().max()) if value.numel() else 0.0
        worst = max(worst, gap if scale < 1e-6 else gap / scale, 0.0 if torch.isfinite(found[name]).all() else 1e9)
    return worst


def twins(model):
    """A model and its copy."""
    return model, copy.deepcopy(model)
