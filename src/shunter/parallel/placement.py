"""Measured loads of experts in, experts moved to the ranks where these loads are even, or whose tokens take them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import UserError
from ..moe import moe_layers
from ..routers.assignment import balanced_assignment
from .experts import ShardedExperts
from .watch import named_errors

__all__ = ["even", "place"]

By = Literal["load", "tokens"]


class Recorded(Protocol):
    """What of a `shunter.record` is read: `experts` (N, L, k) integers, -1 for none, and the names of the L layers."""

    experts: Tensor
    layers: list[str] | None


def place(
    model: nn.Module,
    record: Recorded | Mapping[str, Tensor],
    *,
    by: By = "load",
    optimizer: torch.optim.Optimizer | None = None,
) -> dict[str, list[int]]:
    """Move the experts of a sharded model among the ranks by how often tokens took them; what it computes stays.

    Every rank calls it with what it has measured of its own tokens. Each rank keeps E / P experts a layer. Parameters
    move, their gradients and an optimizer's moments too; routers, experts' numbers, `state_dict` and checkpoints do
    not know of it. From then on `state_dict` exchanges, so every rank calls it.

    Args:
        model: of `shard_experts` or `shard_model`, between two steps.
        record: of `shunter.record`, or by the name of a layer how many tokens took each expert (E,); a layer that it
            does not name stays.
        by: "load" makes the ranks' loads even; "tokens" puts an expert on the rank whose own tokens take it most, so
            that fewer rows travel where each rank has a language or a domain of its own.
        optimizer: of the model's parameters.

    Returns:
        By layer, the experts (E,) in the order of their places: the first E / P are on the first rank.

    Raises:
        UserError: where nothing is sharded, or the record is of other layers or numbers of experts.
        ValueError: for another `by`.
    """
    if by not in ("load", "tokens"):
        raise ValueError(f'place: by={by!r} is unknown; choose "load" or "tokens"')
    layers = {name: module.experts for name, module in moe_layers(model).items()}
    sharded = {name: experts for name, experts in layers.items() if isinstance(experts, ShardedExperts)}
    if not sharded:
        raise UserError("place: no layer has sharded experts; call shard_experts or shard_model first")
    loads = _loads(record, sharded)
    orders = {}
    for name, own in loads.items():
        experts = sharded[name]
        by_rank = _by_place(own, experts)
        if by == "load":
            to = even(by_rank.sum(0), experts.size)
        else:
            to = balanced_assignment(by_rank.T)
        orders[name] = to.argsort(stable=True).tolist()
        experts.reorder(orders[name], optimizer)
    return orders


def _loads(record: Recorded | Mapping[str, Tensor], sharded: dict[str, ShardedExperts]) -> dict[str, Tensor]:
    """By layer, how many of this rank's tokens took each expert (E,)."""
    if isinstance(record, Mapping):
        given = {name: value.to(torch.float64).cpu() for name, value in record.items()}
    else:
        if record.layers is None:
            raise UserError("place: the record does not name its layers; pass loads by the name of a layer")
        given = {}
        for i, name in enumerate(record.layers):
            if name in sharded:
                taken = record.experts[:, i].long().reshape(-1)
                given[name] = torch.bincount(taken[taken >= 0], minlength=sharded[name].num_experts).double()
    for name, load in given.items():
        if name not in sharded:
            raise UserError(f"place: {name!r} is no layer with sharded experts; these are {', '.join(sharded)}")
        if load.shape != (sharded[name].num_experts,) or not bool((load >= 0).all()):
            raise UserError(
                f"place: the load of {name!r} has shape {tuple(load.shape)}; it must be ({sharded[name].num_experts},) "
                "and of numbers of at least 0"
            )
    return {name: given[name] for name in sharded if name in given}  # in one order on all ranks


def _by_place(own: Tensor, experts: ShardedExperts) -> Tensor:
    """(P, E): how often the tokens of the ranks of each place took each expert."""
    every = own.new_zeros(dist.get_world_size(), len(own))
    every[dist.get_rank()] = own
    places = torch.zeros(len(every), dtype=torch.int64)
    places[dist.get_rank()] = experts.place
    with named_errors():
        dist.all_reduce(every)
        dist.all_reduce(places)
    return every.new_zeros(experts.size, len(own)).index_add(0, places, every)


def even(load: Tensor, ranks: int) -> Tensor:
    """The rank (E,) of each expert, E / P each, so that the fullest rank's load is near the least possible.

    The largest load first to the emptiest rank that has room; then experts of the fullest rank change places with
    others' as long as that helps.

    Args:
        load: (E,), how many tokens take each expert.
        ranks: P, which divides E.

    Source: Graham 1969 (Bounds on multiprocessing timing anomalies), section 4, with room for E / P experts each.
    """
    room, total = [len(load) // ranks] * ranks, [0.0] * ranks
    values = load.tolist()
    to = [0] * len(values)
    for expert in sorted(range(len(values)), key=lambda e: (-values[e], e)):
        rank = min((r for r in range(ranks) if room[r]), key=lambda r: (total[r], r))
        to[expert], room[rank], total[rank] = rank, room[rank] - 1, total[rank] + values[expert]
    while (swap := _best_swap(values, to, total)) is not None:
        one, other = swap
        change = values[one] - values[other]
        total[to[one]] -= change
        total[to[other]] += change
        to[one], to[other] = to[other], to[one]
    return torch.tensor(to)


def _best_swap(values: list[float], to: list[int], total: list[float]) -> tuple[int, int] | None:
    """The expert of the fullest rank and one of another whose change of places lowers the larger load of both most."""
    full = max(range(len(total)), key=lambda r: total[r])
    best, found = total[full] * (1 - 1e-9), None
    for one in (e for e in range(len(values)) if to[e] == full):
        for other in (e for e in range(len(values)) if to[e] != full and values[e] < values[one]):
            change = values[one] - values[other]
            highest = max(total[full] - change, total[to[other]] + change)
            if highest < best:
                best, found = highest, (one, other)
    return found
