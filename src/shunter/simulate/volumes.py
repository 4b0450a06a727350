"""What an exchange of expert parallelism moves: rows, elements and bytes of a rank, in closed form.

Sizes: T tokens of a rank, d their width, k experts a token, P ranks that hold different experts, F the capacity factor.
"""

from __future__ import annotations

from ..ranks import rows_to_ranks

__all__ = ["elements", "exchanges", "rows_between_nodes", "rows_leaving"]


def exchanges(shuffle: bool = False) -> tuple[int, int]:
    """All-to-alls of a sparse layer in (forward, backward): 2 + 2; 4 + 4 with BASE's shuffle of tokens between ranks.

    Fedus et al., arXiv 2209.01667, footnote 2.
    """
    return (4, 4) if shuffle else (2, 2)


def elements(tokens: int, dim: int, top_k: float = 1, capacity_factor: float | None = None) -> float:
    """Elements of a rank in the two exchanges of a forward together, rows that stay on the rank included: 2 F T k d.

    Without a capacity factor (dropless) F is 1 in the mean.
    """
    return 2 * (capacity_factor or 1) * tokens * top_k * dim


def rows_leaving(tokens: float, top_k: float, ranks: int, capacity_factor: float | None = None) -> float:
    """Rows that a rank sends to others in one exchange, a row for each choice: F T k (1 - 1/P)."""
    return (capacity_factor or 1) * tokens * top_k * (1 - 1 / ranks)


def rows_between_nodes(top_k: int, experts: int, nodes: int, limit: int = 0) -> float:
    """How many other nodes a token's row crosses to, once each, in the mean: D (1 - 1/n), of D different ones.

    A token may go to at most `limit` nodes; 0: to any.
    """
    if nodes <= 1:
        return 0.0
    return rows_to_ranks(top_k, experts, nodes, min(nodes, limit) if limit else None) * (1 - 1 / nodes)
