"""A cluster's figures, with how little is known of them, to seconds of one exchange."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ..errors import UserError
from ..ranks import rows_to_ranks
from .files import described, read
from .volumes import rows_between_nodes, rows_leaving

__all__ = ["Bound", "Cluster", "Form", "Range", "load_cluster"]

Range = tuple[float, float, float]
"""A number as low, likely, high."""

Form = Literal["deduplicated", "flat", "two_level"]
"""How an exchange sends rows."""

Bound = Literal["best", "likely", "worst"]
"""With which ends of the ranges a time is predicted: those that make it short, or long."""


@dataclass(frozen=True)
class Cluster:
    """Devices and what is between them.

    Args:
        name, source: what it is, and where the figures come from.
        node: devices that a fast network joins.
        flops: peak FLOP/s of a device in the precision of training.
        efficiency: the share of the peak that large products and what is around them reach.
        memory, memory_bandwidth: of a device, bytes and bytes/s.
        intra, inter: bytes/s of a device to others of its node, and to other nodes.
        latency: seconds of an exchange without bytes.
        message: bytes of a message at half of the bandwidth, for flat exchanges, whose messages shrink with P.
        layer_seconds: of routing, permuting and launching in one pass of a sparse layer.
        expert_seconds: of an expert's products in one pass beside their arithmetic: each is launched by itself, and few
            rows fill a device badly; 0 where one kernel computes all experts.
        element_seconds: of dispatching an element of a row in one pass, where that is a product with a mask.
        overlap: the share of the computing time behind which exchanges can be hidden.
        torus: whether the network is a two-dimensional torus; bandwidths are then those of a device's links together,
            and an exchange of all with all takes sqrt(P) / 8 times longer where that is above 1.
    """

    name: str
    node: int
    flops: float
    efficiency: Range
    memory: float
    memory_bandwidth: float
    intra: Range
    inter: Range
    source: str = ""
    latency: Range = (0.0, 0.0, 0.0)
    message: float = 0.0
    layer_seconds: Range = (0.0, 0.0, 0.0)
    expert_seconds: Range = (0.0, 0.0, 0.0)
    element_seconds: Range = (0.0, 0.0, 0.0)
    overlap: Range = (0.0, 0.0, 0.0)
    torus: bool = False

    def of(self, name: str, bound: Bound = "likely") -> float:
        """A figure at a bound."""
        more_is_longer = name in ("latency", "layer_seconds", "expert_seconds", "element_seconds")
        place = 1 if bound == "likely" else 2 * int((bound == "worst") == more_is_longer)
        value: Range = getattr(self, name)
        return value[place]

    def exchange_seconds(
        self, tokens: float, top_k: float, experts: int, row_bytes: float, ranks: int, limit: int = 0,
        form: Form = "deduplicated", capacity_factor: float | None = None, bound: Bound = "likely",
    ) -> float:  # fmt: skip
        """Seconds of one all-to-all of T tokens of every one of P ranks, k rows each, to E experts.

        De-duplicated, a token's row crosses once to each node and once to each rank of it that it needs; between nodes
        and inside of them rows move at the same time, so the longer counts. Flat, each choice is a row of its own (F of
        them with a capacity factor), and messages shrink with P. In two levels rows are gathered inside of nodes first:
        messages between nodes are larger, and all rows pass the inner network too.
        """
        if ranks <= 1:
            return 0.0
        intra, inter = self.of("intra", bound), self.of("inter", bound)
        nodes = -(-ranks // self.node)
        if self.torus:
            rows = rows_leaving(tokens, top_k, ranks, capacity_factor)
            return self.of("latency", bound) + rows * row_bytes / intra * max(1.0, math.sqrt(ranks) / 8)
        if form == "deduplicated" and capacity_factor is None:
            k = round(top_k)
            between = tokens * rows_between_nodes(k, experts, nodes, limit)
            eligible = min(nodes, limit) * self.node if limit else None
            inside = tokens * rows_to_ranks(k, experts, ranks, eligible) * (1 - 1 / min(ranks, self.node))
            slowed = 1.0
        else:
            rows = (capacity_factor or 1) * tokens * top_k
            between, inside = rows * (1 - 1 / nodes), rows / nodes * (1 - 1 / min(ranks, self.node))
            message = rows * row_bytes / (ranks if form != "two_level" else nodes)
            slowed = (message + self.message) / message if message else 1.0
            if form == "two_level" and nodes > 1:
                within = rows * (1 - 1 / self.node) * row_bytes / intra
                return 2 * self.of("latency", bound) + slowed * between * row_bytes / inter + within
        return self.of("latency", bound) + slowed * max(between * row_bytes / inter, inside * row_bytes / intra)


def load_cluster(name: str) -> Cluster:
    """A cluster by its name in the package, or as a YAML file of `Cluster`'s fields.

    Raises:
        UserError: for a file that is none, and for figures of zero where something is divided by them.
    """
    path, values = read("clusters", name)
    cluster = described(Cluster, values, path)
    for field in ("node", "flops", "memory", "memory_bandwidth"):
        if not getattr(cluster, field):
            raise UserError(f"{path}: {field} must be above zero")
    for field in ("efficiency", "intra", "inter"):
        if not getattr(cluster, field)[0]:
            raise UserError(f"{path}: {field} must be above zero")
    if cluster.efficiency[2] > 1 or cluster.overlap[2] > 1:
        raise UserError(f"{path}: efficiency and overlap are shares, of at most 1")
    return cluster
