"""Layers that read few of their weights for each token: one unit of each block, and queries and keys of few weights."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["MultiplicativeDense", "Projected", "SparseFF", "SparseQKV"]


class SparseFF(nn.Module):
    """A ReLU feed-forward network of which a low-rank controller leaves one unit in each block: (..., d) to (..., d).

    The f units are blocks of N. The controller's logits are x C1 C2 + b, and p their softmax within each block. In
    evaluation a block's unit of the highest logit is kept, and y = W2 (relu(W1 x) * mask) + b2. In training the unit is
    drawn (the argmax of log p plus the temperature times Gumbel noise); the mask is that unit's with probability
    `hard_probability`, one draw for a whole forward, with the gradient of p (straight-through), and else p itself.

    Args:
        dim: d.
        hidden: f, a multiple of N.
        block: N.
        rank: of the controller.
        temperature: of the noise in training; 0 leaves it out.
        hard_probability: how likely a training forward keeps one unit a block; else it weights all by p.
        device, dtype: of the parameters.

    Raises:
        ValueError: where N does not divide f, and for impossible sizes.

    Source: Jaszczur et al. 2021 (Sparse is Enough in Scaling Transformers), section 3.1; the defaults and the draw for
        a whole forward are of the authors' code.

    >>> SparseFF(16, 64, block=8, rank=4)(torch.randn(2, 5, 16)).shape
    torch.Size([2, 5, 16])
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        block: int = 32,
        rank: int = 64,
        *,
        temperature: float = 0.1,
        hard_probability: float = 0.3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if min(dim, hidden, block, rank) < 1 or hidden % block:
            raise ValueError(
                f"SparseFF: dim {dim}, hidden {hidden}, block {block} and rank {rank} must be at least 1, and "
                "block must divide hidden"
            )
        if temperature < 0 or not 0 <= hard_probability <= 1:
            raise ValueError(
                f"SparseFF: temperature {temperature} must be at least 0, hard_probability {hard_probability} in [0, 1]"
            )
        self.dim, self.hidden, self.block, self.rank = dim, hidden, block, rank
        self.temperature, self.hard_probability = temperature, hard_probability

        def matrix(rows: int, columns: int) -> nn.Parameter:
            return nn.Parameter(nn.init.xavier_uniform_(torch.empty(rows, columns, device=device, dtype=dtype)))

        self.controller_in, self.controller_out = matrix(rank, dim), matrix(hidden, rank)
        self.controller_bias = nn.Parameter(torch.zeros(hidden, device=device, dtype=dtype))
        self.up, self.down = matrix(hidden, dim), matrix(hidden, dim)  # a unit is a row of each
        self.bias = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))

    def logits(self, x: Tensor) -> Tensor:
        """The controller's, (..., f / N, N), in at least float32."""
        with torch.autocast(x.device.type, enabled=False):
            exact = torch.promote_types(x.dtype, torch.float32)
            inner = F.linear(x.to(exact), self.controller_in.to(exact))
            logits = F.linear(inner, self.controller_out.to(exact), self.controller_bias.to(exact))
        return logits.unflatten(-1, (-1, self.block))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d) to (..., d). In evaluation, fewer than N tokens read their own units alone, more all of them."""
        if not self.training:
            return self.read_chosen(x) if x[..., 0].numel() < self.block else self.read_all(x)
        log_probs = self.logits(x).log_softmax(-1)
        mask = log_probs.exp()
        if float(torch.rand(())) < self.hard_probability:
            noisy = log_probs.detach()
            if self.temperature:
                noisy = noisy - self.temperature * torch.empty_like(noisy).exponential_().log()
            hard = F.one_hot(noisy.argmax(-1), self.block).to(mask.dtype)
            mask = hard + mask - mask.detach()
        return self._masked(x, mask)

    def read_all(self, x: Tensor) -> Tensor:
        """The output of evaluation by whole matrices, of which a mask leaves the chosen units."""
        logits = self.logits(x)
        return self._masked(x, F.one_hot(logits.argmax(-1), self.block).to(logits.dtype))

    def read_chosen(self, x: Tensor) -> Tensor:
        """The same by the f / N chosen rows of both matrices alone."""
        rows = x.reshape(-1, self.dim)
        starts = torch.arange(0, self.hidden, self.block, device=x.device)
        chosen = self.logits(rows).argmax(-1) + starts  # (T, f / N)
        up, down = self.up[chosen], self.down[chosen]  # (T, f / N, d)
        units = F.relu(up @ rows[..., None])
        return ((units.mT @ down)[:, 0] + self.bias).reshape(x.shape)

    def _masked(self, x: Tensor, mask: Tensor) -> Tensor:
        units = F.linear(x, self.up)
        units = F.relu(units * mask.flatten(-2).to(units.dtype))
        return F.linear(units, self.down.T, self.bias)

    @property
    def flops_per_token(self) -> float:
        """Forward FLOPs of the products that evaluation needs for one token; a multiply-add counts as 2."""
        return 2.0 * (self.rank * (self.dim + self.hidden) + 2 * self.dim * self.hidden // self.block)

    def extra_repr(self) -> str:
        """The sizes, for `print(model)`."""
        return f"dim={self.dim}, hidden={self.hidden}, block={self.block}, rank={self.rank}"


class MultiplicativeDense(nn.Module):
    """A map with S d + d o / S weights instead of d o: y_sm = sum_i x_i D_si E_im + b_sm, S modules of o / S numbers.

    It can be any permutation of its input, for every S.

    Args:
        dim, out: d and o; o is a multiple of S.
        modules: S.
        bias: whether b is there.
        device, dtype: of the parameters.

    Raises:
        ValueError: where S does not divide o.

    Source: Jaszczur et al. 2021, section 3.2, equation 3 and theorem 1.
    """

    def __init__(
        self,
        dim: int,
        out: int,
        modules: int,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if min(dim, out, modules) < 1 or out % modules:
            raise ValueError(
                f"MultiplicativeDense: dim {dim}, out {out} and modules {modules} must be at least 1, and modules must "
                "divide out"
            )
        self.dim, self.out, self.num_modules = dim, out, modules
        self.gate = nn.Parameter(torch.empty(modules, dim, device=device, dtype=dtype).normal_(std=0.5))
        self.projection = nn.Parameter(
            nn.init.xavier_uniform_(torch.empty(dim, out // modules, device=device, dtype=dtype))
        )
        self.bias = nn.Parameter(torch.zeros(out, device=device, dtype=dtype)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d) to (..., o)."""
        out = ((x[..., None, :] * self.gate) @ self.projection).flatten(-2)
        return out if self.bias is None else out + self.bias

    def extra_repr(self) -> str:
        """The sizes, for `print(model)`."""
        return f"dim={self.dim}, out={self.out}, modules={self.num_modules}"


class Projected(NamedTuple):
    """What `SparseQKV` makes of tokens.

    Args:
        queries, keys, values: (B, L, d) each.
        past: (B, F - 1, d), what a later call needs of these tokens.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    past: Tensor


class SparseQKV(nn.Module):
    """Queries, keys and values by one multiplicative dense layer and a convolution over tokens and modules for each.

    Args:
        dim: d, a multiple of S.
        modules: S; usually as many as heads.
        kernel: F, how many neighbouring modules, and how many of the last tokens, a convolution sees; odd.
        device, dtype: of the parameters.

    Raises:
        ValueError: where S does not divide d, or F is even.

    Source: Jaszczur et al. 2021, section 3.2, figure 4.
    """

    def __init__(
        self,
        dim: int,
        modules: int,
        kernel: int = 3,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"SparseQKV: kernel {kernel} must be odd, so that a module is in the middle")
        self.kernel = kernel
        self.shared = MultiplicativeDense(dim, dim, modules, device=device, dtype=dtype)
        width = dim // modules
        self.convolutions = nn.ModuleList(
            nn.Conv2d(width, width, kernel, padding=(0, kernel // 2), device=device, dtype=dtype) for _ in range(3)
        )

    def forward(self, x: Tensor, past: Tensor | None = None) -> Projected:
        """x (B, L, d), the tokens that follow those of `past` (of an earlier call; None at a sequence's beginning)."""
        mixed = self.shared(x)
        before = mixed.new_zeros(len(x), self.kernel - 1, mixed.shape[-1]) if past is None else past
        mixed = torch.cat([before, mixed], 1)
        image = mixed.unflatten(-1, (self.shared.num_modules, -1)).permute(0, 3, 1, 2)  # (B, d / S, L, S)
        queries, keys, values = (conv(image).permute(0, 2, 3, 1).flatten(2) for conv in self.convolutions)
        return Projected(queries, keys, values, mixed[:, mixed.shape[1] - self.kernel + 1 :])
