"""Sparse Mixer: an encoder whose tokens are mixed by fixed or linear maps in most layers, with attention in a few."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..moe import MoE

__all__ = ["FourierMixing", "LinearMixing", "Mixing", "SparseMixer"]

Mixing = Literal["fourier", "linear"]


class FourierMixing(nn.Module):
    """The real part of the Fourier transform over tokens and over the width: no parameters, each token hears all.

    Source: Lee-Thorp et al. 2021 (FNet), equation 3.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Mix x (B, S, d), in at least float32; padding must be zero."""
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        return torch.fft.fft2(exact, dim=(-2, -1)).real.to(x.dtype)


class LinearMixing(nn.Module):
    """A learned map over tokens and one over the width, W x V: each token hears all.

    Args:
        length: the longest sequence; a shorter one has the map's first rows and columns.
        dim: d.

    Source: Lee-Thorp and Ainslie 2022 (Sparse Mixers), section 3.1.
    """

    def __init__(self, length: int, dim: int) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(length, length) * length**-0.5)
        self.width = nn.Parameter(torch.randn(dim, dim) * dim**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Mix x (B, S, d); padding must be zero."""
        length = x.shape[1]
        return self.tokens[:length, :length] @ x @ self.width


class SparseMixer(nn.Module):
    """Token ids to hidden states by layers that mix tokens, each followed by a feed-forward block, dense or sparse.

    Both parts of a layer are added to what they get and normalised. It is an encoder: every token hears of every other.

        encoder = SparseMixer(vocab_size=32000, dim=512, hidden=2048, num_layers=14, length=512,
                              attention=[10, 11, 12, 13], experts=[5, 6, 7, 8], num_experts=16)
        loss = task(encoder(ids, mask)) + shunter.aux_loss(encoder)

    Args:
        vocab_size: of the token ids.
        dim: d.
        hidden: f, of dense blocks and of each expert.
        num_layers: L.
        length: the longest sequence.
        attention: the layers, from 0, that mix by attention.
        experts: the layers whose feed-forward block is an `MoE`.
        mixing: how the others mix: "fourier" or "linear".
        num_heads: of attention; it divides d.
        num_experts, router: of the sparse blocks.
        dropout: of what each part of a layer adds.
        **options: of the router.

    Raises:
        ValueError: for an unknown mixing, and layers that are not there.

    Source: Lee-Thorp and Ainslie 2022 (Sparse Mixers: Combining MoE and Mixing to build a more efficient BERT).
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        hidden: int,
        num_layers: int,
        length: int,
        *,
        attention: Sequence[int],
        experts: Sequence[int],
        mixing: Mixing = "linear",
        num_heads: int = 8,
        num_experts: int = 16,
        router: str = "switch",
        dropout: float = 0.1,
        **options: Any,
    ) -> None:
        super().__init__()
        if mixing not in get_args(Mixing):
            raise ValueError(f"SparseMixer: mixing {mixing!r} is unknown; choose {' or '.join(get_args(Mixing))}")
        for name, chosen in (("attention", attention), ("experts", experts)):
            if wrong := [number for number in chosen if not 0 <= number < num_layers]:
                raise ValueError(f"SparseMixer: {name} names layer {wrong[0]}; the layers are 0 to {num_layers - 1}")
        if dim % num_heads and attention:
            raise ValueError(f"SparseMixer: num_heads {num_heads} must divide dim, {dim}")
        self.length = length
        self.tokens, self.positions = nn.Embedding(vocab_size, dim), nn.Embedding(length, dim)
        self.norm = nn.LayerNorm(dim)

        def mixer(number: int) -> nn.Module:
            if number in attention:
                return nn.MultiheadAttention(dim, num_heads, batch_first=True)
            return FourierMixing() if mixing == "fourier" else LinearMixing(length, dim)

        def block(number: int) -> nn.Module:
            if number in experts:
                return MoE(dim, hidden, num_experts, router, activation="gelu", bias=True, **options)
            return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

        self.mixers = nn.ModuleList(mixer(number) for number in range(num_layers))
        self.feed_forward = nn.ModuleList(block(number) for number in range(num_layers))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2 * num_layers))
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """The hidden states (B, S, d) of token ids (B, S).

        Args:
            ids: int64.
            mask: (B, S), True or 1 at real tokens; what stands elsewhere changes nothing for them.

        Raises:
            ValueError: for another shape, and for more tokens than the model is for.
        """
        if ids.dim() != 2 or ids.shape[1] > self.length:
            raise ValueError(
                f"SparseMixer: ids have shape {tuple(ids.shape)}; they must be (B, S), S up to {self.length}"
            )
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.to(torch.bool)
        x = self.norm(self.tokens(ids) + self.positions.weight[: ids.shape[1]])
        for number, (mixer, block) in enumerate(zip(self.mixers, self.feed_forward, strict=True)):
            x = x * real[..., None]
            if isinstance(mixer, nn.MultiheadAttention):
                mixed, _ = mixer(x, x, x, key_padding_mask=~real, need_weights=False)
            else:
                mixed = mixer(x)
            x = self.norms[2 * number](x + self.dropout(mixed))
            made = block(x, mask=real) if isinstance(block, MoE) else block(x)
            x = self.norms[2 * number + 1](x + self.dropout(made))
        return x * real[..., None]
