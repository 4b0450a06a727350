"""Where the matrices of a layer's router and experts lie in stored tensors: pieces, the middle between two formats.

A format of sparse models says where each piece of a layer is. Pieces are found by their names alone, never by shapes,
so that square matrices cannot be mistaken for their transposes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedConfig, PreTrainedModel

from ...errors import UserError
from ...experts import ACTIVATIONS, MixedExperts, ResidualExperts
from ...moe import MoE, moe_layers
from ...routers.split import Split

__all__ = [
    "SPLIT",
    "Form",
    "Key",
    "Piece",
    "Sizes",
    "layers_of",
    "must_be_blocks",
    "split_pieces",
    "stack",
    "stacked_pieces",
    "whole",
]

SPLIT = "experts.{e}: gate_proj.weight (f, d), up_proj.weight (f, d), down_proj.weight (d, f)"
"""The tag of `stacked_pieces` with each expert by itself."""

PROJECTIONS = ("gate", "up", "down")

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
    def of(cls, layer: MoE) -> Sizes:
        """Those of a layer.

        Raises:
            UserError: where its experts have no matrices of their own on disk, but a core and residuals.
        """
        experts, shared = layer.experts, layer.shared_experts
        if isinstance(experts, ResidualExperts):
            raise UserError(
                "the experts are a core and residuals; give a copy with plain ones, which shunter.plain_experts(model) "
                "and model.save_pretrained(folder) make"
            )
        parts = {
            "a residual branch": layer.shared_gate,
            "an extra MLP": layer.extra_mlp,
            "experts that differ": experts if isinstance(experts, MixedExperts) else None,
            "split experts": layer.decider if isinstance(layer.decider, Split) else None,
        }
        for what, part in parts.items():
            if part is not None:
                raise UserError(f"no other format has layers with {what}; keep Shunter's own")
        return cls(
            layer.num_experts,
            layer.dim,
            experts.hidden,
            ACTIVATIONS[experts.activation][1],
            bias=experts.bias,
            shared=0 if shared is None else shared.hidden,
            selection_bias=getattr(layer.decider, "selection_bias", None) is not None,
        )


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


Pieces = dict[str, dict[Key, Piece]]
"""Qualified name of a sparse layer in Shunter's form of the model -> where its matrices and vectors lie."""


@dataclass(frozen=True)
class Form:
    """A sparse model as a format has it.

    Args:
        format: its name.
        layout: the tag of how its experts lie.
        config: its configuration.
        pieces: where its layers lie.
        left_behind: options of its routers that the format has no field for; none of them changes the function.
    """

    format: str
    layout: str
    config: PreTrainedConfig
    pieces: Pieces
    left_behind: tuple[str, ...] = ()


def layers_of(model: PreTrainedModel) -> dict[str, MoE]:
    """The sparse layers of a model in Shunter's form, by their qualified names, in order."""
    return {name: layer for name, layer in moe_layers(model).items() if isinstance(layer, MoE)}


def must_be_blocks(model: PreTrainedModel) -> None:
    """Raises UserError where a sparse layer is no `MoE`: no other format knows of it."""
    for name, layer in moe_layers(model).items():
        if not isinstance(layer, MoE):
            raise UserError(f"no other format has {name}, a {type(layer).__name__}; keep Shunter's own")


def stacked_pieces(path: str, sizes: Sizes) -> dict[Key, Piece]:
    """Shunter's own layout of the layer at `path`: all experts in one tensor, the gate's rows before the up's."""
    found = {("router", 0): whole(f"{path}.router.weight", sizes.experts, sizes.dim)}
    if sizes.selection_bias:
        found["selection_bias", 0] = whole(f"{path}.router.selection_bias", sizes.experts)
    found |= stack(f"{path}.experts", "", sizes.experts, sizes.hidden, sizes)
    if sizes.shared:
        found |= stack(f"{path}.shared_experts", "shared_", 1, sizes.shared, sizes)
    return found


def split_pieces(path: str, sizes: Sizes) -> dict[Key, Piece]:
    """As `stacked_pieces`, but each expert's projections by themselves.

    So transformers saves stacked experts in models of the families for which it converts their names.
    """
    found = {key: piece for key, piece in stacked_pieces(path, sizes).items() if key[0] not in PROJECTIONS}
    paths = [f"{path}.experts.{e}" for e in range(sizes.experts)]
    return found | projections(paths, ("gate_proj", "up_proj", "down_proj"), sizes.hidden, sizes.dim)


def projections(paths: Sequence[str], names: Sequence[str], hidden: int, dim: int) -> dict[Key, Piece]:
    """The gate, up and down projection of the expert at each path, each a tensor by itself."""
    shapes = [(hidden, dim), (hidden, dim), (dim, hidden)]
    return {
        (part, e): whole(f"{path}.{name}.weight", *shape)
        for e, path in enumerate(paths)
        for part, name, shape in zip(PROJECTIONS, names, shapes, strict=True)
    }


def stack(path: str, prefix: str, experts: int, hidden: int, sizes: Sizes) -> dict[Key, Piece]:
    """Experts of a width in one tensor at `path`, the gate's rows before the up's; keys begin with the prefix."""
    ups, name = (("gate", "up"), "gate_up_proj") if sizes.gated else (("up",), "up_proj")
    dim, rows, found = sizes.dim, len(ups) * hidden, {}
    for e in range(experts):
        for i, part in enumerate(ups):
            row = e * rows + i * hidden
            found[f"{prefix}{part}", e] = Piece(f"{path}.{name}", (experts, rows, dim), row * dim, (hidden, dim))
            if sizes.bias:
                found[f"{prefix}{part}_bias", e] = Piece(f"{path}.{name}_bias", (experts, rows), row, (hidden,))
        down = (experts, dim, hidden)
        found[f"{prefix}down", e] = Piece(f"{path}.down_proj", down, e * dim * hidden, (dim, hidden))
        if sizes.bias:
            found[f"{prefix}down_bias", e] = Piece(f"{path}.down_proj_bias", (experts, dim), e * dim, (dim,))
    return found


def whole(name: str, *shape: int) -> Piece:
    """All of a tensor."""
    return Piece(name, shape, 0, shape)
