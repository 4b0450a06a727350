"""What an expert keeps: how many slots it has, and which tokens get them.

A token that finds no slot is dropped by that expert: its triple leaves the routing (and is remembered as `dropped`),
the block's residual connection carries it on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from .routing import Routing

__all__ = ["FORMULAS", "ORDERS", "capacity", "limit"]


class _Share(NamedTuple):
    """A number p / q, exact in integers, in which torch.compile can follow a T that varies."""

    p: int
    q: int

    def times(self, n: int) -> _Share:
        return _Share(self.p * n, self.q)

    def over(self, n: int) -> _Share:
        return _Share(self.p, self.q * n)

    def floor(self) -> int:
        return self.p // self.q

    def ceil(self) -> int:
        return -(-self.p // self.q)

    def round(self) -> int:
        """To the nearest, halves to the even."""
        twice = 2 * self.p + self.q
        nearest = twice // (2 * self.q)
        return nearest - (nearest % 2 if twice % (2 * self.q) == 0 else 0)


def _up_to_multiple_of_4(n: int) -> int:
    return -(-n // 4) * 4


# What the code bases compute from T tokens, E experts, k choices and the capacity factor F. They differ in whether k
# counts, in rounding and in the least number of slots, and so in what they drop. Where a code base gives short inputs
# no slot, which would leave a decoding step without experts, `capacity` gives one.
FORMULAS: dict[str, Callable[[int, int, int, _Share], int]] = {
    "review": lambda t, e, k, f: f.times(t).over(e).ceil(),
    "mesh": lambda t, e, k, f: max(4, min(t, f.times(t).over(e).floor())),
    "flaxformer": lambda t, e, k, f: max(4, f.times(t).over(e).round()),
    "gshard": lambda t, e, k, f: _up_to_multiple_of_4(max(1, f.times(t).over(e).floor())),
    "vmoe": lambda t, e, k, f: _up_to_multiple_of_4(f.times(t * k).over(e).ceil()),
    "deepspeed": lambda t, e, k, f: max(4, f.times(k * t).over(e).ceil()),
    "fairseq": lambda t, e, k, f: f.times(-(-t // e)).floor() if k == 1 else 2 * -(-t // e),
    "tutel": lambda t, e, k, f: k * f.times(-(-t // e)).floor(),
    "fastmoe": lambda t, e, k, f: f.times(t).over(e).ceil() if k == 1 else f.times(t).ceil() * k // e,
}

ORDERS = ("position", "random", "batch", "probability")


def capacity(num_tokens: int, num_experts: int, top_k: int, capacity_factor: float, formula: str = "review") -> int:
    """The number of slots C of one expert for T tokens, at least 1.

    Args:
        num_tokens: T, without padding.
        num_experts: E.
        top_k: k, the number of choices of a token. The review's formula leaves it out: C = ceil(F * T / E).
        capacity_factor: F > 0; 1.0 is an even share of the first choices.
        formula: a key of `FORMULAS`: "review", or the code base whose rounding to follow.

    Raises:
        ValueError: for an unknown formula, or a factor that is not a positive number.

    Source: Fedus et al. 2022, section 2.2 (expert batch size = capacity factor * B / E).
    """
    if formula not in FORMULAS:
        raise ValueError(f"capacity: formula {formula!r} is unknown; choose from {', '.join(FORMULAS)}")
    if not (math.isfinite(capacity_factor) and capacity_factor > 0):
        raise ValueError(f"capacity: capacity_factor {capacity_factor} must be a positive number, or None for dropless")
    return max(1, FORMULAS[formula](num_tokens, num_experts, top_k, _share(float(capacity_factor))))


@torch.compiler.assume_constant_result
def _share(factor: float) -> _Share:
    """The factor as written in decimal: 1.1 * 10 / 1 is 11 slots, not the 12 that binary rounding would make of it."""
    return _Share(*Fraction(repr(factor)).as_integer_ratio())


def limit(
    routing: Routing,
    slots: int | Tensor,
    order: str = "position",
    score: Tensor | None = None,
    group: Tensor | None = None,
) -> Routing:
    """Keep at most `slots` triples of each expert; all first choices come before any second choice.

    Args:
        routing: the demand.
        slots: C, the capacity of each expert (in each group), or int64 that broadcasts to (G, E): a capacity each.
        order: who comes first among equal choices: "position" (the earlier token), "random" (any order with equal
            chance; Kim et al. 2021, section 3), "batch" (the token with the highest score in the batch; V-MoE, Riquelme
            et al. 2021, section 4.1, batch prioritized routing), "probability" (for each expert, the tokens that score
            it highest; switch_max of Mesh TensorFlow).
        score: floating point; for order "batch" (T,), the priority of each token: its highest probability; for order
            "probability" (T, E), the probabilities.
        group: (T,) int64, the group of each token, in [0, G): groups do not compete for slots (GShard).

    Returns:
        The routing that fits, its `dropped` holding the rest.

    Raises:
        ValueError: for an unknown order, or an order that lacks its score.
    """
    if order not in ORDERS:
        raise ValueError(f"limit: order {order!r} is unknown; choose from {', '.join(ORDERS)}")
    rank = _rank(routing, order, score)
    if routing.choice is not None:
        rank = routing.choice * max(routing.num_tokens, routing.token.numel()) + rank
    queue = rank.argsort(stable=True)
    line = routing.expert if group is None else _lines(routing, group)
    queue = queue[line[queue].argsort(stable=True)]
    line = line[queue]
    slot = torch.arange(queue.numel(), device=queue.device) - torch.searchsorted(line, line)
    keep = torch.empty_like(queue, dtype=torch.bool)
    if isinstance(slots, Tensor):
        token, expert = routing.token[queue], routing.expert[queue]
        slots = slots.expand(-1, routing.num_experts)[0 if group is None else group[token], expert]
    keep[queue] = slot < slots
    return routing.select(keep)


def _rank(routing: Routing, order: str, score: Tensor | None) -> Tensor:
    """The place (N,) of each triple in the queue, before the choices' ranks count."""
    if order == "position":
        return routing.token
    if order == "random":
        return torch.randperm(routing.num_tokens, device=routing.token.device)[routing.token]
    if score is None:
        raise ValueError(
            "limit: order 'batch' needs score (T,), the priority of each token"
            if order == "batch"
            else "limit: order 'probability' needs score (T, E), the probabilities"
        )
    score = score.detach()
    if order == "batch":
        return _places(score)[routing.token]
    return _places(score[routing.token, routing.expert])


def _places(score: Tensor) -> Tensor:
    """The place (n,) of each of n scores in falling order, ties to the first."""
    best_first = score.argsort(descending=True, stable=True)
    place = torch.empty_like(best_first)
    place[best_first] = torch.arange(place.numel(), device=place.device)
    return place


def _lines(routing: Routing, group: Tensor) -> Tensor:
    """The number (N,) of the queue of each triple: one queue for each expert and group, by expert first."""
    groups = int(group.max()) + 1 if group.numel() else 1
    return routing.expert * groups + group[routing.token]
