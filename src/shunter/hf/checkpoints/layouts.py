"""Where the matrices of a layer's router and experts are in stored tensors, as pieces, for each layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...experts import ACTIVATIONS

__all__ = ["SPLIT", "Key", "Piece", "Sizes", "split_pieces", "stacked_pieces"]

SPLIT = "experts.{e}: gate_proj.weight (f, d), up_proj.weight (f, d), down_proj.weight (d, f)"
"""The tag of the same with each expert by itself."""

Key = tuple[str, int]
"""What a piece is: "router", "selection_bias", "gate", "up", "down", …, and the number of the expert (0 where one)."""


@dataclass(frozen=True)
class Sizes:
    """A sparse layer's sizes.

    Args:
        experts: E.
        dim: d.
        hidden: f.
        gated: whether the activation gates.
        bias: whether the projections have biases.
        shared: the width of the shared experts together; 0 without.
        selection_bias: whether the router has a bias for the selection.
    """

    experts: int
    dim: int
    hidden: int
    gated: bool = True
    bias: bool = False
    shared: int = 0
    selection_bias: bool = False

    @classmethod
    def of(cls, experts: int, dim: int, hidden: int, activation: str, **options: Any) -> Sizes:
        """Sizes with `gated` read off an activation's name."""
        return cls(experts, dim, hidden, ACTIVATIONS[activation][1], **options)


@dataclass(frozen=True)
class Piece:
    """A matrix or vector as a run of elements of a stored tensor.

    Args:
        name: the tensor.
        tensor: its whole shape.
        offset: how many of its elements come before the piece.
        shape: the piece's shape.
    """

    name: str
    tensor: tuple[int, ...]
    offset: int
    shape: tuple[int, ...]


def stacked_pieces(path: str, sizes: Sizes) -> dict[Key, Piece]:
    """Shunter's own layout of the layer at `path`: all experts in one tensor, the gate's rows before the up's."""
    found = {("router", 0): _whole(f"{path}.router.weight", sizes.experts, sizes.dim)}
    if sizes.selection_bias:
        found["selection_bias", 0] = _whole(f"{path}.router.selection_bias", sizes.experts)
    found |= _stack(f"{path}.experts", "", sizes.experts, sizes.hidden, sizes)
    if sizes.shared:
        found |= _stack(f"{path}.shared_experts", "shared_", 1, sizes.shared, sizes)
    return found


def split_pieces(path: str, sizes: Sizes) -> dict[Key, Piece]:
    """As `stacked_pieces`, but each expert's projections by themselves.

    So transformers saves stacked experts in models of the families for which it converts their names.
    """
    found = {key: piece for key, piece in stacked_pieces(path, sizes).items() if key[0] not in ("gate", "up", "down")}
    for e in range(sizes.experts):
        for part, shape in (
            ("gate", (sizes.hidden, sizes.dim)),
            ("up", (sizes.hidden, sizes.dim)),
            ("down", (sizes.dim, sizes.hidden)),
        ):
            found[part, e] = _whole(f"{path}.experts.{e}.{part}_proj.weight", *shape)
    return found


def _stack(path: str, prefix: str, experts: int, hidden: int, sizes: Sizes) -> dict[Key, Piece]:
    up_name = "gate_up_proj" if sizes.gated else "up_proj"
    ups = ["gate", "up"] if sizes.gated else ["up"]
    found = {}
    for ending, inner in [("", (sizes.dim,)), ("_bias", ())] if sizes.bias else [("", (sizes.dim,))]:
        rows = len(ups) * hidden
        width = sizes.dim if inner else 1
        for e in range(experts):
            for i, part in enumerate(ups):
                place = (e * rows + i * hidden) * width
                key = (f"{prefix}{part}{ending}", e)
                found[key] = Piece(f"{path}.{up_name}{ending}", (experts, rows, *inner), place, (hidden, *inner))
    for e in range(experts):
        down = (experts, sizes.dim, hidden)
        found[f"{prefix}down", e] = Piece(f"{path}.down_proj", down, e * sizes.dim * hidden, (sizes.dim, hidden))
        if sizes.bias:
            name = f"{path}.down_proj_bias"
            found[f"{prefix}down_bias", e] = Piece(name, (experts, sizes.dim), e * sizes.dim, (sizes.dim,))
    return found


def _whole(name: str, *shape: int) -> Piece:
    return Piece(name, shape, 0, shape)
