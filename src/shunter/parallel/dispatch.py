"""A routing over E experts in, the rows that this rank's E / P experts compute out; and their outputs back.

A rank sends the rows of its triples, in the order that `Routing` has them in, to the ranks of their experts: there they
are a routing of their own, one triple a row, of weight 1. The sender weighs and sums what comes back, so that the
router's gradient needs no exchange of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import LostRank
from ..experts.combine import rows_of, weighted_sum
from ..routing import Routing
from .exchange import exchange, exchange_numbers

__all__ = ["Dispatch", "Sender", "received"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Sender:
    """What a rank says of itself with its counts, so that ranks that do not fit together find out before they block.

    Args:
        layer: the number of the layer.
        name: its name, for errors.
        group: the ranks among which the experts are.
    """

    layer: int
    name: str
    group: dist.ProcessGroup

    def __deepcopy__(self, memo: Any) -> Sender:
        return self  # a copied model is at the same place, among the same ranks

    def header(self, x: Tensor) -> list[int]:
        """The layer's number, and how its input x is computed with."""
        return [self.layer, _DTYPES.index(x.dtype), int(torch.is_grad_enabled()), int(x.requires_grad)]

    def compare(self, own: list[int], heads: list[list[int]]) -> None:
        """Raise LostRank where another rank of the group is not where this one is."""
        for other, head in enumerate(heads):
            if head == own:
                continue
            rank = dist.get_global_rank(self.group, other)
            raise LostRank(
                f"{self.name}: rank {dist.get_rank()} is at {_said(own)}, and rank {rank} at {_said(head)}: every rank "
                "runs the same forwards alike, evaluation included"
            )


def _said(head: list[int]) -> str:
    layer, dtype, grad, learns = head
    graph = ("without" if not grad else "with") + " gradients" + ("" if learns or not grad else " but for its input's")
    return f"sparse layer {layer} in {str(_DTYPES[dtype]).removeprefix('torch.')} {graph}"


@dataclass(frozen=True)
class Dispatch:
    """Where the rows of one forward go.

    Args:
        routing: over all E experts, of this rank's T tokens.
        local: over the experts of this rank, of the R rows that come to it.
        send, recv: how many rows go to each rank, and come from it.
        sender: this rank.
    """

    routing: Routing
    local: Routing
    send: list[int]
    recv: list[int]
    sender: Sender

    @classmethod
    def of(cls, x: Tensor, routing: Routing, sender: Sender) -> Dispatch:
        """Exchange counts: one all-to-all of E integers, with a header for each rank, and one wait for the device.

        Args:
            x: (T, d).
            routing: of its tokens, over E experts, which the ranks have in equal parts, in order.
            sender: this rank.

        Raises:
            LostRank: where a rank is elsewhere, or does not come.
        """
        size = dist.get_world_size(sender.group)
        own = sender.header(x)
        counts = routing.counts.view(size, -1)
        head = torch.tensor(own, device=counts.device).expand(size, -1)
        came = exchange_numbers(torch.cat([head, counts], 1), sender.group, f"the counts of {sender.name}")
        heads, theirs = came[:, : len(own)], came[:, len(own) :]
        # The one wait for the device of the layer.
        numbers = torch.cat([counts.sum(1, keepdim=True), theirs.sum(1, keepdim=True), heads], 1).tolist()
        sender.compare(own, [row[2:] for row in numbers])
        local = received(theirs, torch.promote_types(x.dtype, torch.float32))
        return cls(routing, local, [row[0] for row in numbers], [row[1] for row in numbers], sender)

    def rows(self, x: Tensor) -> Tensor:
        """The rows (R, d) that this rank's experts compute, of all ranks' tokens x (T, d)."""
        place = f"the dispatch of {self.sender.name}"
        return exchange(rows_of(x, self.routing), self.send, self.recv, self.sender.group, place)

    def combined(self, y: Tensor) -> Tensor:
        """The outputs (T, d) of this rank's tokens, of all ranks' rows y (R, d)."""
        place = f"the combine of {self.sender.name}"
        return weighted_sum(exchange(y, self.recv, self.send, self.sender.group, place), self.routing)


def received(counts: Tensor, dtype: torch.dtype) -> Routing:
    """The routing of the rows that ranks sent, each sorted by expert: one triple a row, of weight 1.

    Args:
        counts: (P, e) int64, how many rows rank p sent for each of e experts.
        dtype: of the weights.
    """
    ranks, num_experts = counts.shape
    expert = torch.arange(num_experts, device=counts.device).repeat(ranks).repeat_interleave(counts.reshape(-1))
    expert, token = expert.sort(stable=True)
    weight = torch.ones(expert.shape, dtype=dtype, device=counts.device)
    return Routing(token, expert, weight, expert.numel(), num_experts, check=False)
