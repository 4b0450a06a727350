"""Attention of Hugging Face models whose projections become sparse: where they are, what replaces them, in words."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import UserError
from ..layers.attention import (
    FusedProjection,
    Heads,
    HeadsOutput,
    KeyValueProjection,
    LinearExperts,
    RoutedProjection,
    Values,
)
from ..moe import RoutedLayer

__all__ = ["KINDS", "Attention", "find_attentions", "initialise", "must_give_sequences", "put", "routed_in"]

KINDS = ("attention", "heads")
"""Sparse layers that project to queries, keys and values; mixtures of attention heads."""

_SEPARATE = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q", "k", "v"), ("q_lin", "k_lin", "v_lin"))
_FUSED = ("c_attn",)
_OTHERS = re.compile(r"[Cc]ross|EncDec|encoder_attn|encoder_decoder_att")


@dataclass(frozen=True)
class Attention:
    """A module that attends from tokens to those of the same sequence.

    Args:
        path: of the module, dotted.
        module: it.
        names: of its maps to queries, keys and values, or of the one for all three.
        widths: of queries, keys and values.
    """

    path: str
    module: nn.Module
    names: tuple[str, ...]
    widths: tuple[int, int, int]

    @property
    def maps(self) -> list[Any]:
        """Its linear maps."""
        return [getattr(self.module, name) for name in self.names]

    @property
    def matrix(self) -> Tensor:
        """(q + k + v, d), a view or a copy."""
        return torch.cat([m.weight.T if isinstance(m, Conv1D) else m.weight for m in self.maps])

    @property
    def bias(self) -> Tensor | None:
        """(q + k + v,), or None; zeros where one of the maps has none."""
        if all(m.bias is None for m in self.maps):
            return None
        return torch.cat(
            [
                m.weight.new_zeros(width) if m.bias is None else m.bias
                for m, width in zip(self.maps, self.widths if len(self.maps) > 1 else (sum(self.widths),), strict=True)
            ]
        )

    @property
    def dim(self) -> int:
        """d."""
        return self.matrix.shape[1]

    @property
    def head(self) -> int | None:
        """The width of a head, where the module can have any number of heads over the same keys; else None."""
        width, groups = getattr(self.module, "head_dim", None), getattr(self.module, "num_key_value_groups", None)
        output = getattr(self.module, "o_proj", None)
        if not isinstance(width, int) or not isinstance(groups, int) or type(output) is not nn.Linear:
            return None
        q, k, v = self.widths
        fits = len(self.names) == 3 and k == v and q == groups * k == output.in_features and k % width == 0
        return width if fits else None


def find_attentions(model: PreTrainedModel) -> list[list[Attention]]:
    """The self-attention modules of each stack of a model's layers, in order.

    Raises:
        UserError: where none is known, or the model already has experts.
    """
    stacks: dict[str, list[Attention]] = {}
    for path, module in model.named_modules():
        if hasattr(module, "experts"):
            raise UserError(
                f"sparsify: {type(model).__name__} already has experts, at {path}.experts; it is sparse. (Name all "
                'that is to be sparse in one call, as where="feed_forward, attention")'
            )
        number = next((i for i, part in enumerate(path.split(".")) if part.isdigit()), None)
        if number is None or _OTHERS.search(f"{path} {type(module).__name__}"):
            continue
        if (found := _attention(path, module)) is not None:
            stacks.setdefault(".".join(path.split(".")[:number]), []).append(found)
    if not stacks:
        raise UserError(
            f"sparsify: {type(model).__name__} has no attention that is known: a module with linear maps "
            f"{', '.join('/'.join(names) for names in _SEPARATE)}, or {_FUSED[0]} for all three"
        )
    return list(stacks.values())


def _attention(path: str, module: nn.Module) -> Attention | None:
    for names in _SEPARATE:
        maps = [getattr(module, name, None) for name in names]
        if all(type(m) is nn.Linear for m in maps):
            q, k, v = (m.out_features for m in maps)  # type: ignore[union-attr]
            same = len({m.in_features for m in maps}) == 1  # type: ignore[union-attr]
            return Attention(path, module, names, (q, k, v)) if same else None
    for name in _FUSED:
        fused = getattr(module, name, None)
        if isinstance(fused, Conv1D) and fused.nf == 3 * fused.nx == 3 * getattr(module, "split_size", 0):
            return Attention(path, module, (name,), (fused.nx,) * 3)
    return None


def must_give_sequences(model: PreTrainedModel, attentions: Sequence[Attention]) -> None:
    """Raises UserError where attention is given tokens as (S, B, d), place by place: padding is known as (B, S).

    A copy of the model that shares its weights is called with tokens (2, 3), and stopped at the first of its
    attentions: some models change themselves for good by what they are called with.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, shared)
    takes = set(inspect.signature(model.forward).parameters) & {"input_ids", "decoder_input_ids"}
    shapes: list[torch.Size] = []

    def stop(linear: nn.Module, args: tuple[Tensor, ...]) -> None:
        shapes.append(args[0].shape)
        raise StopIteration

    for attention in attentions:
        getattr(twin.get_submodule(attention.path), attention.names[0]).register_forward_pre_hook(stop)
    ids = torch.full((2, 3), 2, device=model.device)
    with torch.no_grad(), torch.random.fork_rng(), suppress(Exception):
        twin(**dict.fromkeys(takes, ids))
    if shapes and shapes[0][:2] == (3, 2):
        raise UserError(
            f"sparsify: {type(model).__name__} gives its attention tokens place by place, (S, B, d), which sparse "
            "attention does not take; sparsify the feed-forward blocks"
        )


def put(
    attention: Attention, kind: str, queries: dict[str, Any], keys_values: dict[str, Any] | None, causal: bool
) -> None:
    """Replace the maps of an attention by sparse layers.

    Args:
        attention: where.
        kind: of `KINDS`.
        queries, keys_values: "num_experts", "router" and "options" of the layer; a mixture of heads has but the first.
        causal: whether the model is.

    Raises:
        UserError: where the module cannot have another number of heads.
    """
    module, first = attention.module, attention.maps[0]
    place = {"device": first.weight.device, "dtype": first.weight.dtype}
    dim, (q, k, v) = attention.dim, attention.widths
    biased = attention.bias is not None

    def make(layer: Callable[..., Any], *widths: int, num_experts: int, router: str, options: dict[str, Any]) -> Any:
        return layer(dim, *widths, num_experts, router, bias=biased, causal=causal, **place, **options).train(
            module.training
        )

    # T5 and others draw the maps of their attention by name when they load, though all of them are in the file.
    module._is_hf_initialized = True  # type: ignore[assignment]
    if kind == "heads":
        width = attention.head
        if width is None:
            raise UserError(
                f"sparsify: {attention.path}, a {type(module).__name__}, has a fixed number of heads; a mixture of "
                'heads needs head_dim, num_key_value_groups and o_proj, as Llama has. Take where="attention"'
            )
        heads = make(Heads, width, **queries)
        heads.heads_before = q // width
        module.num_key_value_groups = heads.num_heads
        module.q_proj, module.o_proj = heads, HeadsOutput(heads)
        for name in ("k_proj", "v_proj"):
            setattr(module, name, nn.Linear(dim, width, bias=getattr(module, name).bias is not None, **place))
        return
    assert keys_values is not None
    if len(attention.names) == 1:
        fused = FusedProjection(make(RoutedProjection, q, **queries), make(RoutedProjection, k + v, **keys_values))
        setattr(module, attention.names[0], fused)
        return
    shared = make(KeyValueProjection, k, k + v, **keys_values)
    for name, part in zip(attention.names, (make(RoutedProjection, q, **queries), shared, Values(shared)), strict=True):
        setattr(module, name, part)


def routed_in(module: nn.Module) -> tuple[str, dict[str, RoutedLayer]] | None:
    """The kind of an attention with sparse layers and these, "queries" and "keys_values"; None where it has none."""
    parts: dict[str, RoutedLayer] = {}
    for child in module.children():
        if isinstance(child, Heads):
            return "heads", {"queries": child}
        if isinstance(child, FusedProjection):
            return "attention", {"queries": child.queries, "keys_values": child.keys_values}
        if isinstance(child, RoutedProjection):
            parts["keys_values" if isinstance(child, KeyValueProjection) else "queries"] = child
    return ("attention", parts) if "keys_values" in parts and not isinstance(module, FusedProjection) else None


@torch.no_grad()
def initialise(module: nn.Module, matrix: Tensor, bias: Tensor | None, widths: tuple[int, int, int], init: str) -> None:
    """Begin the sparse layers of an attention by its dense matrix (q + k + v, d): as copies, or of its deviation."""
    found = routed_in(module)
    if found is None or matrix.is_meta:
        return
    q, k, v = widths
    for name, layer in found[1].items():
        rows = slice(0, q) if name == "queries" else slice(q, q + k + v)
        for experts in layer.modules():
            if not isinstance(experts, LinearExperts):
                continue
            if init == "copy":
                experts.weight.copy_(matrix[rows])
                if experts.bias is not None and bias is not None:
                    experts.bias.copy_(bias[rows])
            else:
                experts.reset_parameters(float(matrix.float().std()))
    if found[0] == "heads":
        for name in ("k_proj", "v_proj"):
            linear = module.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            nn.init.normal_(linear.weight, std=float(matrix.float().std()))
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
