"""Experts in attention: sparse layers that project tokens to queries, keys and values, and a mixture of heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import routers
from ..moe import RoutedLayer, must_not_leak
from ..routers import Router
from ..routing import Routing

__all__ = [
    "FusedProjection",
    "Heads",
    "HeadsOutput",
    "KeyValueProjection",
    "LinearExperts",
    "RoutedProjection",
    "Values",
]


class LinearExperts(nn.Module):
    """E linear maps: x (T, d) and a routing to (T, o), the sum over each token's experts of weight times W_e x + b_e.

    Args:
        num_experts: E.
        dim, out: d and o.
        bias: whether the maps have biases.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        num_experts: int,
        dim: int,
        out: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_experts, self.dim, self.out = num_experts, dim, out
        self.weight = nn.Parameter(torch.empty(num_experts, out, dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(num_experts, out, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self, std: float | None = None) -> None:
        """Draw the matrices from a normal distribution (default: of standard deviation 1/sqrt(d)); biases are zero."""
        nn.init.normal_(self.weight, std=self.dim**-0.5 if std is None else std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def rows(self, x: Tensor, routing: Routing) -> Tensor:
        """(N, o): what the expert of each triple makes of its row of x (N, d), without the weights."""
        parts, bounds = [], routing.offsets.tolist()
        for e, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
            if start < end:
                parts.append(F.linear(x[start:end], self.weight[e], None if self.bias is None else self.bias[e]))
        # Empty sums tie every parameter to the result: without a triple, gradients are zeros rather than missing.
        tie = sum(p.flatten()[:0].sum() for p in (x, routing.weight, *self.parameters()))
        return (torch.cat(parts) if parts else x.new_zeros(0, self.out)) + tie

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """x (T, d) -> (T, o); a token without an expert gets zeros."""
        return _add_up(self.rows(x[routing.token], routing), routing, routing.weight)


def _add_up(rows: Tensor, routing: Routing, weight: Tensor) -> Tensor:
    """(T, o): the sum of each token's rows (N, o) by weight (N,), in at least float32, rounded once."""
    exact = torch.promote_types(rows.dtype, torch.float32)
    out = torch.zeros(routing.num_tokens, rows.shape[1], dtype=exact, device=rows.device)
    return out.index_add(0, routing.token, (rows * weight[:, None]).to(exact)).to(rows.dtype)


class RoutedProjection(RoutedLayer):
    """A linear map with experts: x (..., d) to (..., o); a token without an expert gets zeros.

    Args:
        dim, out: d and o.
        num_experts: E.
        router: a name of `shunter.routers.names()`, or a `Router` subclass.
        bias: whether the experts have biases.
        causal: whether the layer is in a causal model: a router that lets later tokens change earlier ones is refused.
        device, dtype: of the parameters.
        **options: of the router.

    Raises:
        ValueError: as `MoE`, and for the router null_experts with identity=True: a token is no projection of itself.

    Source: Fedus et al. 2021 (Switch Transformers), appendix A: sparse layers in place of attention's matrices.

    >>> RoutedProjection(8, 12, 4, "switch")(torch.randn(2, 5, 8)).shape
    torch.Size([2, 5, 12])
    """

    def __init__(
        self,
        dim: int,
        out: int,
        num_experts: int,
        router: str | type[Router] = "switch",
        *,
        bias: bool = False,
        causal: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(_router(router, dim, num_experts, causal, place, options), self._experts(
            num_experts, dim, out, bias, place
        ))  # fmt: skip
        self.out = out

    def _experts(self, num_experts: int, dim: int, out: int, bias: bool, place: dict[str, Any]) -> nn.Module:
        return LinearExperts(num_experts, dim, out, bias, **place)

    def forward(self, x: Tensor, **known: Tensor | None) -> Tensor:
        """Route and project: x (..., d) -> (..., o). **known is as of `MoE`."""
        tokens, logits, routing, context = self.route(x, known)
        out = self.decider.compute(tokens, logits, routing, context, self.experts)
        return self.finish(out.reshape(*x.shape[:-1], self.out), tokens, logits, routing, context)


def _router(
    router: str | type[Router], dim: int, num_experts: int, causal: bool, place: dict[str, Any], options: dict[str, Any]
) -> Router:
    given = {key: value for key, value in place.items() if value is not None}
    made = routers.create(router, dim, num_experts, **given, **options)
    if causal:
        must_not_leak(made)
    if getattr(made, "identity", False):
        raise ValueError(f"{type(made).__name__}: identity=True adds tokens to projections; pass identity=False")
    return made


class KeyValueProjection(RoutedProjection):
    """Keys and values by one sparse layer: called with x it gives the keys, `Values` of it the values of the same x.

    Args:
        dim, num_experts, router, …: as of `RoutedProjection`; `out` is the width of keys and values together.
        keys: the width of the keys.

    Source: Fedus et al. 2022, section 5.1; Fedus et al. 2021 (Switch Transformers), appendix A.
    """

    def __init__(self, dim: int, keys: int, out: int, num_experts: int, *args: Any, **options: Any) -> None:
        super().__init__(dim, out, num_experts, *args, **options)
        self.keys = keys
        self._waiting: tuple[Tensor, int, Tensor] | None = None

    def forward(self, x: Tensor, **known: Tensor | None) -> Tensor:
        """x (..., d) to keys (..., keys)."""
        return self.give(x, 0, **known)

    def give(self, x: Tensor, which: int, **known: Tensor | None) -> Tensor:
        """The keys (0) or the values (1) of x; whoever asks second for the same x gets what was computed then."""
        waiting, self._waiting = self._waiting, None
        if waiting is not None and waiting[0] is x and waiting[1] == which:
            return waiting[2]
        both = super().forward(x, **known).split([self.keys, self.out - self.keys], -1)
        self._waiting = x, 1 - which, both[1 - which]
        return both[which]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_waiting": None}


class Values(nn.Module):
    """The values that a `KeyValueProjection` elsewhere computes; without parameters."""

    def __init__(self, of: KeyValueProjection) -> None:
        super().__init__()
        self._of = (of,)  # no child: its parameters have one name

    def forward(self, x: Tensor, **known: Tensor | None) -> Tensor:
        """x (..., d) to values (..., v)."""
        return self._of[0].give(x, 1, **known)


class FusedProjection(nn.Module):
    """Queries, keys and values side by side: x (..., d) to (..., q + k + v), by two sparse layers."""

    def __init__(self, queries: RoutedProjection, keys_values: RoutedProjection) -> None:
        super().__init__()
        self.queries, self.keys_values = queries, keys_values

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d) to queries, keys and values, in this order."""
        return torch.cat([self.queries(x), self.keys_values(x)], -1)


class _HeadExperts(nn.Module):
    """E heads, each a map to its queries (E, h, d) and one of what it attends to back (E, d, h)."""

    def __init__(self, num_experts: int, dim: int, out: int, bias: bool, place: dict[str, Any]) -> None:
        super().__init__()
        self.queries = LinearExperts(num_experts, dim, out, bias, **place)
        self.outputs = LinearExperts(num_experts, out, dim, bias, **place)


class Heads(RoutedProjection):
    """A mixture of attention heads: x (..., d) to the queries (..., k h) of the k heads that each token takes.

    Every head attends to the same keys and values; `HeadsOutput` of this layer, called with what the heads attended to,
    gives sum_i w_i W_i^o head_i, with w_i = p_i / sum p over the token's heads, through whose divisor no gradient
    flows. A choice that a token does not have gets queries of zeros, and adds nothing.

    Args:
        dim, num_experts, router, …: as of `RoutedProjection`; `out` is h, the width of a head.

    Raises:
        ValueError: as `RoutedProjection`, and for a router that gives tokens any number of experts.

    Source: Zhang et al. 2022 (Mixture of Attention Heads: Selecting Attention Heads Per Token), section 3.
    """

    experts: _HeadExperts

    def __init__(self, dim: int, out: int, num_experts: int, *args: Any, **options: Any) -> None:
        super().__init__(dim, out, num_experts, *args, **options)
        if self.decider.chooses in ("experts", "all", "slots"):
            raise ValueError(
                f"{type(self.decider).__name__} gives a token any number of heads; take a router with top_k heads"
            )
        self.num_heads = self.decider.top_k
        self.heads_before = 0
        self._waiting: tuple[Routing, Tensor] | None = None

    def _experts(self, num_experts: int, dim: int, out: int, bias: bool, place: dict[str, Any]) -> nn.Module:
        return _HeadExperts(num_experts, dim, out, bias, place)

    def forward(self, x: Tensor, **known: Tensor | None) -> Tensor:
        """x (..., d) to queries (..., k h), head by head."""
        tokens, logits, routing, context = self.route(x, known)
        column = _column(routing)
        if column.numel() and int(column.max()) >= self.num_heads:
            raise ValueError(
                f"{type(self.decider).__name__} gave a token {int(column.max()) + 1} heads; this layer has "
                f"top_k={self.num_heads}"
            )
        rows = self.experts.queries.rows(tokens[routing.token], routing)
        place = routing.token * self.num_heads + column
        out = rows.new_zeros(routing.num_tokens * self.num_heads, self.out).index_copy(0, place, rows)
        self._waiting = routing, place
        return self.finish(out.reshape(*x.shape[:-1], self.num_heads * self.out), tokens, logits, routing, context)

    def combine(self, heads: Tensor) -> Tensor:
        """What the heads attended to, (..., k h), to the output (..., d); once after each forward.

        Raises:
            RuntimeError: before a forward.
        """
        if self._waiting is None:
            raise RuntimeError("Heads: call the layer for queries before its output")
        (routing, place), self._waiting = self._waiting, None
        rows = self.experts.outputs.rows(heads.reshape(-1, self.out)[place], routing)
        total = routing.weight.new_zeros(routing.num_tokens).index_add(0, routing.token, routing.weight).detach()
        share = routing.weight / torch.where(total > 0, total, 1)[routing.token]
        return _add_up(rows, routing, share).reshape(*heads.shape[:-1], self.dim)

    def flops_per_token(self, sequence_length: int) -> dict[str, float]:
        """As in any layer; scores are of k heads in place of those that there were."""
        scores = 4.0 * sequence_length * (self.num_heads - self.heads_before) * self.out
        return {**super().flops_per_token(sequence_length), "attention": scores if self.heads_before else 0.0}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_waiting": None}


def _column(routing: Routing) -> Tensor:
    """(N,) int64, a different number from 0 for each of a token's triples."""
    rows, starts = routing.by_token
    column = torch.empty_like(routing.token)
    column[rows] = torch.arange(len(rows), device=rows.device) - starts[routing.token[rows]]
    return column


class HeadsOutput(nn.Module):
    """The output of the mixture of heads that a `Heads` elsewhere routes; without parameters."""

    def __init__(self, of: Heads) -> None:
        super().__init__()
        self._of = (of,)  # no child: its parameters have one name

    def forward(self, heads: Tensor) -> Tensor:
        """What the heads attended to, (..., k h), to (..., d)."""
        return self._of[0].combine(heads)
