"""Experts' parameters, found by shape in any model: how alike two experts are, how far one moved, one removed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["cosine_similarity", "expert_parameters", "gram_similarity", "moved", "removed"]

COLUMNS = 1 << 20  # of the flattened weights, taken at once
COORDINATES = 256  # of the d that a Gram matrix is taken over


def expert_parameters(layer: nn.Module, num_experts: int) -> list[dict[str, Tensor]]:
    """For each expert of a layer its parameters by name, as views: what is written there changes the model.

    Experts are stacked, (E, ...) with three or more dimensions and biases (E, n) beside them, or a list of E modules.

    Args:
        layer: the module that holds router and experts.
        num_experts: E.

    Returns:
        E dictionaries with the same keys; empty ones where the layer keeps its experts in another way.
    """
    stacks: dict[str, Tensor] = {}
    for path, module in layer.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if any(p.dim() >= 3 and p.shape[0] == num_experts for p in own.values()):
            prefix = f"{path}." if path else ""
            stacks |= {prefix + name: p for name, p in own.items() if p.dim() >= 2 and p.shape[0] == num_experts}
    if stacks:
        return [{name: p.detach()[e] for name, p in stacks.items()} for e in range(num_experts)]
    for module in layer.modules():
        children = [child for child in module.children() if any(True for _ in child.parameters())]
        if isinstance(module, nn.ModuleList | nn.ModuleDict) and len(children) == num_experts:
            found = [{name: p.detach() for name, p in child.named_parameters()} for child in children]
            if found[0] and all(list(one) == list(found[0]) for one in found):
                return found
    return [{} for _ in range(num_experts)]


@contextmanager
def removed(parameters: dict[str, Tensor]) -> Iterator[None]:
    """Within the context an expert gives zeros: its parameters, of `expert_parameters`, are zero, and then restored.

    The tokens that it had keep their other experts with the weights that they had.
    """
    kept = {name: value.clone() for name, value in parameters.items()}
    try:
        for value in parameters.values():
            value.zero_()
        yield
    finally:
        for name, value in parameters.items():
            value.copy_(kept[name])


@torch.no_grad()
def cosine_similarity(experts: Sequence[dict[str, Tensor]]) -> Tensor:
    """(E, E) float64: the cosine of every two experts' parameters, all of them as one vector.

    1 for copies; about 0 for experts that were drawn apart, even where they compute the same in another order.
    """
    products = torch.zeros(len(experts), len(experts), dtype=torch.float64)
    for name in experts[0]:
        for columns in zip(*(expert[name].flatten().split(COLUMNS) for expert in experts), strict=True):
            part = torch.stack(columns).to(torch.float32)
            products += (part @ part.T).to(torch.float64).cpu()
    return _normalised(products)


@torch.no_grad()
def gram_similarity(experts: Sequence[dict[str, Tensor]], dim: int, transposed: bool = False) -> Tensor:
    """(E, E) float64: how alike two experts are whatever the order of their hidden units.

    The cosine of the Gram matrices W^T W over the model's width, their mean diagonal taken out, averaged over the
    matrices of an expert: 1 for copies with permuted hidden units, about 0 for experts drawn apart. Over more than
    `COORDINATES` widths, evenly spaced ones stand for all.

    Args:
        experts: of `expert_parameters`.
        dim: d.
        transposed: whether weights are (in, out) rather than (out, in); it matters for square ones alone.
    """
    kept = torch.linspace(0, dim - 1, min(dim, COORDINATES)).round().to(torch.int64)
    total, matrices = torch.zeros(len(experts), len(experts), dtype=torch.float64), 0
    for name, first in experts[0].items():
        if first.dim() != 2 or dim not in first.shape:
            continue
        axis = list(first.shape).index(dim)
        if first.shape[0] == first.shape[1]:
            gives = any(part in name for part in ("down", "w2", "wo", "fc2", "c_proj", "output"))
            axis = int(gives == transposed)
        grams = []
        for expert in experts:
            rows = expert[name].movedim(axis, 1)[:, kept.to(first.device)].to(torch.float32)
            gram = rows.T @ rows
            gram = gram - gram.diagonal().mean() * torch.eye(len(gram), device=gram.device)
            grams.append(gram.flatten())
        stacked = torch.stack(grams)
        total += _normalised((stacked @ stacked.T).to(torch.float64).cpu())
        matrices += 1
    return total / max(1, matrices)


@torch.no_grad()
def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    """How far an expert's parameters moved between two checkpoints, over their size before: 0 for the same.

    NaN where the two do not have the same parameters.
    """
    if {n: p.shape for n, p in before.items()} != {n: p.shape for n, p in after.items()} or not before:
        return float("nan")
    change = sum(float((after[n].double() - before[n].double()).square().sum()) for n in before)
    size = sum(float(before[n].double().square().sum()) for n in before)
    return (change / size) ** 0.5 if size else float("nan")


def _normalised(products: Tensor) -> Tensor:
    size = products.diagonal().clamp_min(torch.finfo(torch.float64).tiny).sqrt()
    return products / size[:, None] / size
