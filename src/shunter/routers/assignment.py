"""Balanced assignment of tokens to experts, exact and entropic: pure functions of a score matrix, without gradients."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["balanced_assignment", "transport_plan"]

_ROUNDS = 20


@torch.no_grad()
def balanced_assignment(scores: Tensor) -> Tensor:
    """The expert (T,) of each token that maximises the sum of scores (T, E), at most ceil(T / E) tokens an expert.

    Exact, and deterministic. Near-optimal prices of the experts come from the entropic dual at a falling temperature;
    each token takes the expert with the best score less price, which is optimal but for the counts; then the tokens
    that an expert has too many are passed on along shortest paths in the graph of experts (successive shortest paths
    with potentials, here the prices), which keeps optimality. At T = 4096 and E = 64 some 60 paths remain of 4096.

    Where E does not divide T, tokens of score zero everywhere fill the experts up. A score that is not finite counts as
    the smallest finite one. Runs on the CPU in float64, wherever the scores are: a GPU waits for it.

    Source: Lewis et al. 2021 (BASE Layers), section 3.1, equation 1, which solves it approximately by an auction;
    Ahuja, Magnanti and Orlin 1993 (Network Flows), section 9.7, for the paths.
    """
    num_tokens, num_experts = scores.shape
    if num_tokens == 0:
        return torch.zeros(0, dtype=torch.int64, device=scores.device)
    slots = -(-num_tokens // num_experts)
    h = _scaled(_finite(scores).to("cpu", torch.float64))
    h = torch.cat([h, h.new_zeros(slots * num_experts - num_tokens, num_experts)])
    expert, price = _start(h, _dual_prices(h, slots), slots)
    count = torch.bincount(expert, minlength=num_experts)
    # What moving its cheapest token from one expert to another would lose, and which token that is.
    loss = h.new_full((num_experts, num_experts), math.inf)
    cheapest = torch.zeros_like(loss, dtype=torch.int64)

    def refresh(e: int) -> None:
        own = (expert == e).nonzero()[:, 0]
        if own.numel() == 0:
            loss[e] = math.inf
            return
        loss[e], place = (h[own, e, None] - h[own]).min(0)
        cheapest[e] = own[place]

    for e in range(num_experts):
        refresh(e)
    for _ in range(int((count - slots).clamp_min(0).sum())):  # each path takes one token from an expert with too many
        distance, before = _shortest_paths(loss - price[:, None] + price, count > slots)
        target = int(distance.where(count < slots, math.inf).argmin())
        price += (distance[target] - distance).clamp_min(0)
        path = [target]
        while (e := int(before[path[-1]])) >= 0:
            path.append(e)
        moved = [(int(cheapest[e, f]), f) for f, e in zip(path, path[1:], strict=False)]
        for token, f in moved:
            expert[token] = f
        count[path[-1]] -= 1
        count[target] += 1
        for e in path:
            refresh(e)
    return expert[:num_tokens].to(scores.device)


def _start(h: Tensor, price: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """The expert of each row of h that is best for it by score less price, and those prices.

    Rows that score all experts alike, as those that fill up, would all take the cheapest one. So the cheapest are made
    equally dear, as many as have slots left for such rows, which these then fill.
    """
    alike = (h == h[:, :1]).all(-1)
    rows = int(alike.sum())
    if rows == 0:
        return (h - price).argmax(-1), price

    def left(price: Tensor) -> tuple[Tensor, Tensor]:
        expert = (h - price).argmax(-1)
        return expert, (slots - torch.bincount(expert[~alike], minlength=len(price))).clamp_min(0)

    order = price.argsort(stable=True)
    enough = left(price)[1][order].cumsum(0) >= rows
    price = price.clamp_min(float(price[order[int(enough.int().argmax())]]))
    expert, free = left(price)
    cheapest = (price == price.min()).nonzero()[:, 0]
    places = cheapest.repeat_interleave(free[cheapest])[:rows]
    expert[alike] = torch.cat([places, cheapest[:1].expand(rows - len(places))])
    return expert, price


def _dual_prices(h: Tensor, slots: int) -> Tensor:
    """Prices (E,) at which about `slots` rows of h prefer each expert: the dual of the entropic problem, annealed."""
    spread = float(h.std()) if h.numel() > 1 else 0.0
    price = h.new_zeros(h.shape[1], dtype=torch.float32)
    if spread == 0 or not math.isfinite(spread):
        return price.double()
    shifted = (h - h.amax(-1, keepdim=True)).float()
    for i in range(_ROUNDS):
        temperature = spread * 0.02 ** (i / (_ROUNDS - 1))
        load = ((shifted - price) / temperature).softmax(-1).sum(0)
        price += temperature * (load / slots).clamp_min(1e-30).log()
    return price.double()


def _shortest_paths(cost: Tensor, sources: Tensor) -> tuple[Tensor, Tensor]:
    """Bellman and Ford: the distance (E,) of each node from the nearest source, and the node before it."""
    cost = cost.clamp_min(0)  # below zero by rounding alone
    distance = torch.where(sources, 0.0, math.inf).to(cost.dtype)
    before = torch.full(sources.shape, -1)
    while True:
        through, node = (distance[:, None] + cost).min(0)
        shorter = through < distance
        if not bool(shorter.any()):
            return distance, before
        distance = torch.where(shorter, through, distance)
        before = torch.where(shorter, node, before)


@torch.no_grad()
def transport_plan(scores: Tensor, epsilon: float = 1.0, iterations: int = 100, tolerance: float = 1e-4) -> Tensor:
    """The plan P (T, E) of the largest <P, scores> + epsilon * H(P) with rows summing to 1/T and columns to 1/E.

    Sinkhorn's alternate scaling, in logarithms, at least in float32. Rows are exact; it stops once every column is
    within `tolerance` of 1/E, relatively, or after `iterations` rounds. A score that is not finite counts as the
    smallest finite one.

    Source: Cuturi 2013 (Sinkhorn Distances), algorithm 1; Clark et al. 2022 (Unified Scaling Laws for Routed Language
    Models), section 3.1.
    """
    num_tokens, num_experts = scores.shape
    h = _finite(scores.to(torch.promote_types(scores.dtype, torch.float32))) / epsilon
    of_expert = h.new_zeros(num_experts)
    plan = h.softmax(-1) / max(num_tokens, 1)
    for _ in range(iterations):
        column = plan.sum(0) * num_experts
        if num_tokens == 0 or bool(((column - 1).abs() <= tolerance).all()):
            break
        of_expert = of_expert - column.clamp_min(torch.finfo(h.dtype).tiny).log()
        plan = (h + of_expert).softmax(-1) / num_tokens
    return plan


def _scaled(h: Tensor) -> Tensor:
    """The scores h times a power of two, which is exact, so that the largest is about 1: none is at float32's ends."""
    return h * math.ldexp(1.0, min(-math.frexp(float(h.abs().max()))[1], 1000))


def _finite(scores: Tensor) -> Tensor:
    finite = scores.isfinite()
    lowest = scores.where(finite, math.inf).amin() if scores.numel() else scores.new_zeros(())
    return scores.where(finite, lowest.where(lowest.isfinite(), 0.0))
