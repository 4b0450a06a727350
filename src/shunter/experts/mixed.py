"""Experts of different width, depth and operation in one layer, those that compute nothing included."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..routing import Routing
from .activations import ACTIVATIONS
from .module import Experts, RoutedExperts, _must_fit

__all__ = ["MixedExperts", "Operation"]

FREE = ("identity", "zero", "constant")
"""Operations without a feed-forward network: x, 0, and a mixture of x and a learned vector."""


class Operation(NamedTuple):
    """What one expert computes.

    Args:
        name: an activation of `shunter.experts.ACTIVATIONS`, whose feed-forward network it is, or one of `FREE`.
        hidden: f of that network; 0 for the others.
        depth: how many networks come one after the other.
    """

    name: str
    hidden: int = 0
    depth: int = 1

    @classmethod
    def parse(cls, text: str, hidden: int) -> Operation:
        """An operation of its words: "swiglu", "gelu 64", "relu 64 x3", "identity", "zero", "constant".

        Args:
            text: an activation, maybe its width and how many one after the other, or the name of one of the others.
            hidden: the width where none is named.

        Raises:
            ValueError: for other words.
        """
        found = re.fullmatch(r"(\w+)(?: (\d+))?(?: x(\d+))?", text.strip())
        if found is None or found[1] not in (*ACTIVATIONS, *FREE):
            raise ValueError(
                f'operation {text!r} is unknown; say an activation, its width and its depth, as "gelu 64 x2" (of '
                f"{', '.join(ACTIVATIONS)}), or one of {', '.join(FREE)}"
            )
        if found[1] in FREE:
            if found[2] or found[3]:
                raise ValueError(f"operation {text!r}: {found[1]} has neither width nor depth")
            return cls(found[1])
        width, depth = int(found[2] or hidden), int(found[3] or 1)
        if min(width, depth) < 1:
            raise ValueError(f"operation {text!r}: width {width} and depth {depth} must be at least 1")
        return cls(found[1], width, depth)

    def products(self, dim: int) -> int:
        """How many numbers its matrices have at the width d."""
        if self.name in FREE:
            return 2 * dim if self.name == "constant" else 0
        return self.depth * (3 if ACTIVATIONS[self.name][1] else 2) * dim * self.hidden

    def __str__(self) -> str:
        return self.name if self.name in FREE else f"{self.name} {self.hidden} x{self.depth}"


class MixedExperts(RoutedExperts):
    """E experts, each with an operation of its own: x (T, d) and a routing to (T, d), as `Experts`.

    A network of depth L adds each of its first L - 1 blocks to what that block is given; the last gives the output. The
    constant expert is a x + b v, with (a, b) = softmax(W x) and a learned v.

    Args:
        dim: d.
        operations: of each expert, in order; words of `Operation.parse`, or ready.
        hidden: the width of networks whose words name none.
        activation: of the dense parts beside them, with that width: what a saved model is made with.
        bias, backend, recompute, dropout, device, dtype: of the networks, as of `Experts`.

    Raises:
        ValueError: for unknown words, and where there is no expert.

    Source: Ramachandran and Le 2018 (Diversity and Depth in Per-Example Routing Models): routed architectures that
        differ, identity among them; Fedus et al. 2022, section 9; the constant expert: Jin et al. 2024 (MoE++),
        section 3.1, equation 5.
    """

    def __init__(
        self,
        dim: int,
        operations: Sequence[str | Operation],
        hidden: int,
        *,
        activation: str = "swiglu",
        bias: bool = False,
        backend: str = "auto",
        recompute: bool = False,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not operations:
            raise ValueError("MixedExperts: operations is empty; name what each expert computes")
        self.operations = [op if isinstance(op, Operation) else Operation.parse(op, hidden) for op in operations]
        self.num_experts, self.dim = len(operations), dim
        self.bias, self.backend, self.recompute, self.dropout = bias, backend, recompute, dropout
        self.hidden, self.activation = hidden, activation
        self.each = nn.ModuleList()
        for op in self.operations:
            blocks = nn.ModuleList()
            if op.name == "constant":
                blocks.append(_Constant(dim, device=device, dtype=dtype))
            elif op.name not in FREE:
                for _ in range(op.depth):
                    blocks.append(
                        Experts(
                            1,
                            dim,
                            op.hidden,
                            activation=op.name,
                            bias=bias,
                            backend=backend,
                            recompute=recompute,
                            dropout=dropout,
                            device=device,
                            dtype=dtype,
                        )  # fmt: skip
                    )
            self.each.append(blocks)

    @property
    def costs(self) -> Tensor:
        """(E,) float64 forward FLOPs of the products that each expert makes of one row; a multiply-add counts as 2."""
        return torch.tensor([2.0 * op.products(self.dim) for op in self.operations], dtype=torch.float64)

    @property
    def sizes(self) -> Tensor:
        """(E,) float64 how many parameters each expert has."""
        return torch.tensor([sum(p.numel() for p in each.parameters()) for each in self.each], dtype=torch.float64)

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """Sum over each token's experts of weight times expert output: x (T, d) -> (T, d).

        Raises:
            ValueError: where x is not (T, d) of this layer's width and the routing's number of tokens, or its dtype or
                device differs from the parameters'.
        """
        _must_fit(self, x, routing)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        out = torch.zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        # Empty sums tie every parameter to the result, as in the backend `reference`.
        out = out + sum(part.flatten()[:0].sum() for part in (x, routing.weight, *self.parameters()))
        bounds = routing.offsets.tolist()
        for e, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
            op = self.operations[e]
            if start == end or op.name == "zero":
                continue
            token = routing.token[start:end]
            y = self._of(e, x[token])
            out = out.index_add(0, token, (y * routing.weight[start:end, None]).to(out.dtype))
        return out.to(x.dtype)

    def _of(self, e: int, rows: Tensor) -> Tensor:
        """What expert e makes of rows (N, d)."""
        blocks = list(self.each[e].children())
        if not blocks:
            return rows
        if self.operations[e].name == "constant":
            return blocks[0](rows)
        index = torch.zeros(len(rows), 1, dtype=torch.int64, device=rows.device)
        weight = torch.ones(index.shape, dtype=torch.promote_types(rows.dtype, torch.float32), device=rows.device)
        all_rows = Routing.from_topk(index, weight, 1, check=False)
        for block in blocks[:-1]:
            rows = rows + block(rows, all_rows)
        return blocks[-1](rows, all_rows)

    def reset_parameters(self, up_std: float | None = None, down_std: float | None = None) -> None:
        """Draw the networks as `Experts` does."""
        for module in self.modules():
            if isinstance(module, Experts):
                module.reset_parameters(up_std, down_std)

    def explain(self, num_tokens: int) -> str:
        """The operations, and that each expert's network chooses its backend by itself."""
        words = ", ".join(map(str, self.operations))
        return f"Experts one after the other, each with a backend of its own: {words}."

    def extra_repr(self) -> str:
        """The operations, for `print(model)`."""
        return f"dim={self.dim}, operations={[str(op) for op in self.operations]}"


class _Constant(nn.Module):
    """x (N, d) to a x + b v, (a, b) = softmax(W x)."""

    def __init__(self, dim: int, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))
        self.mix = nn.Linear(dim, 2, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        share = self.mix(x).softmax(-1, dtype=torch.promote_types(x.dtype, torch.float32)).to(x.dtype)
        return share[:, :1] * x + share[:, 1:] * self.value.to(x.dtype)
