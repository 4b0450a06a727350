"""The one data type: a routing is a sparse T x E matrix.

A router decides it, capacity thins it, losses and reports read it, experts multiply by it.
Nothing outside this file knows how the triples are stored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

__all__ = ["Routing", "outside"]

Value = TypeVar("Value")


def outside(value: Tensor) -> Tensor:
    """The values of a tensor outside the autograd graph and the transforms of torch.func, which outlive both."""
    while not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(value):
        value = torch._C._functorch.get_unwrapped(value)
    return value.detach()


class _computed_once(Generic[Value]):
    """As functools.cached_property, but without the lock that it has before Python 3.12: torch.compile traces this."""

    def __init__(self, function: Callable[[Any], Value]) -> None:
        self.function, self.__doc__ = function, function.__doc__

    def __get__(self, instance: Any, owner: type) -> Value:
        value = instance.__dict__[self.function.__name__] = self.function(instance)
        return value


@dataclass(frozen=True, eq=False)
class Routing:
    """Which expert computes which token, and with which weight: a list of N triples, sorted by expert, then by token.

    Args:
        token: (N,) int64, the row of each triple, in [0, T).
        expert: (N,) int64, the column of each triple, in [0, E).
        weight: (N,) floating point, the combine weight of each triple; gradients flow through it.
        num_tokens: T.
        num_experts: E.
        choice: (N,) int64, the rank of the expert among the choices of its token, 0 first; None where the router
            does not rank (every triple then counts as a first choice).
        dropped: the triples that capacity took away, or None.
        check: whether to check the values (a pass over the triples); shapes, dtypes and devices are always checked.

    Raises:
        ValueError: naming the fault: shapes or devices that differ, an expert or token out of range, triples unsorted
            or repeated, a weight that is not finite.
    """

    token: Tensor
    expert: Tensor
    weight: Tensor
    num_tokens: int
    num_experts: int
    choice: Tensor | None = None
    dropped: Routing | None = None
    check: bool = True

    def __post_init__(self) -> None:
        shape = self.token.shape
        where = self.token.device
        for name in ("token", "expert", "weight", "choice"):
            value = getattr(self, name)
            if value is None:
                continue
            if value.dim() != 1 or value.shape != shape:
                raise ValueError(f"Routing: {name} has shape {tuple(value.shape)}, token {tuple(shape)}; all are (N,)")
            if value.device != where:
                raise ValueError(f"Routing: {name} is on {value.device}, token on {where}; move them together")
            if name == "weight":
                if not value.is_floating_point():
                    raise ValueError(f"Routing: weight has dtype {value.dtype}; it must be floating point")
            elif value.dtype != torch.int64:
                raise ValueError(f"Routing: {name} has dtype {value.dtype}; it must be torch.int64")
        if self.check:
            self.check_values()

    def check_values(self) -> None:
        """Raise ValueError where a value breaks the invariants: range, order, uniqueness, finite weights."""
        if self.token.numel() == 0:
            return
        for name, value, size in (("expert", self.expert, self.num_experts), ("token", self.token, self.num_tokens)):
            low, high = int(value.min()), int(value.max())
            if low < 0 or high >= size:
                bad = low if low < 0 else high
                raise ValueError(f"Routing: {name} {bad} is out of range; {name}s are 0 to {size - 1}")
        step = (self.expert * self.num_tokens + self.token).diff()
        if bool((step <= 0).any()):
            at = int((step <= 0).nonzero()[0]) + 1
            pair = f"token {int(self.token[at])} with expert {int(self.expert[at])}"
            if int(step[at - 1]) == 0:
                raise ValueError(f"Routing: {pair} appears twice (triple {at}); add the weights up or drop one")
            raise ValueError(f"Routing: unsorted at triple {at} ({pair}); sort by expert, then by token")
        finite = self.weight.detach().isfinite()
        if not bool(finite.all()):
            at = int((~finite).nonzero()[0])
            raise ValueError(
                f"Routing: weight {float(self.weight[at])} of token {int(self.token[at])} with expert "
                f"{int(self.expert[at])} is not finite; look at the router's logits"
            )

    @classmethod
    def from_topk(
        cls, index: Tensor, weight: Tensor, num_experts: int, *, keep: Tensor | None = None, check: bool = True
    ) -> Routing:
        """The routing of k choices a token: index (T, k) integer experts, best first, and weight (T, k).

        Args:
            index: (T, k) integers in [0, E), different within a row.
            weight: (T, k) floating point.
            num_experts: E.
            keep: (T,) or (T, k) bool; False leaves the token or the choice out (padding, null experts).
            check: whether to check the values.

        Raises:
            ValueError: as `Routing`, and where index and weight do not have one shape (T, k).
        """
        if index.dim() != 2 or index.shape != weight.shape:
            raise ValueError(
                f"Routing.from_topk: index {tuple(index.shape)} and weight {tuple(weight.shape)} must both be (T, k)"
            )
        if check and index.numel() and (int(index.min()) < 0 or int(index.max()) >= num_experts):
            bad = int(index[(index < 0) | (index >= num_experts)][0])
            raise ValueError(f"Routing.from_topk: expert {bad} is out of range; experts are 0 to {num_experts - 1}")
        num_tokens, k = index.shape
        expert, order = _sort_by_expert(index.reshape(-1), num_experts)
        if keep is not None:
            keep = keep.to(torch.bool)
            keep = (keep if keep.dim() == 2 else keep[:, None].expand(num_tokens, k)).reshape(-1)[order]
            expert, order = expert[keep], order[keep]
        routing = cls(
            token=order // k if k > 1 else order,
            expert=expert.to(torch.int64),
            weight=weight.reshape(-1).index_select(0, order),
            num_tokens=num_tokens,
            num_experts=num_experts,
            choice=order % k if k > 1 else torch.zeros_like(order),
            check=check,
        )
        if keep is None:
            # Every token has k triples, so the way back from token order to rows needs no second sort.
            rows = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
            routing.__dict__["by_token"] = (rows, torch.arange(0, num_tokens * k + 1, k, device=order.device))
        return routing

    @classmethod
    def from_dense(cls, matrix: Tensor, *, mask: Tensor | None = None, check: bool = True) -> Routing:
        """The routing whose triples are the entries of a (T, E) matrix where mask is True (default: the non-zeros).

        Raises:
            ValueError: for another shape.
        """
        if matrix.dim() != 2:
            raise ValueError(f"Routing.from_dense: matrix has shape {tuple(matrix.shape)}; it must be (T, E)")
        chosen = matrix != 0 if mask is None else mask
        expert, token = chosen.T.nonzero(as_tuple=True)
        num_tokens, num_experts = matrix.shape
        return cls(token, expert, matrix[token, expert], num_tokens, num_experts, check=check)

    @_computed_once
    def counts(self) -> Tensor:
        """(E,) int64: how many tokens each expert computes."""
        return self.offsets.diff()

    @_computed_once
    def offsets(self) -> Tensor:
        """(E + 1,) int64: the triples of expert e are offsets[e] to offsets[e + 1]."""
        experts = torch.arange(self.num_experts + 1, device=self.expert.device)
        return torch.searchsorted(self.expert, experts)

    @_computed_once
    def demand(self) -> Tensor:
        """(E,) int64: how many tokens asked for each expert, those that capacity dropped included."""
        return self.counts if self.dropped is None else self.counts + self.dropped.counts

    @_computed_once
    def by_token(self) -> tuple[Tensor, Tensor]:
        """(N,) int64 rows and (T + 1,) int64 offsets: the triples of token t are rows[offsets[t]:offsets[t + 1]]."""
        tokens = torch.arange(self.num_tokens + 1, device=self.token.device)
        rows = self.token.argsort(stable=True)
        return rows, torch.searchsorted(self.token[rows], tokens)

    def indices(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Where the triples are, without their weights, for `from_indices`: all that the experts compute from."""
        return self.token, self.expert, self.offsets, *self.by_token

    @classmethod
    def from_indices(cls, indices: Sequence[Tensor], weight: Tensor, num_tokens: int, num_experts: int) -> Routing:
        """The routing of `indices` of another, with weights (N,); unchecked, without ranks."""
        token, expert, offsets, rows, starts = indices
        routing = cls(token, expert, weight, num_tokens, num_experts, check=False)
        routing.__dict__.update(offsets=offsets, by_token=(rows, starts))
        return routing

    @property
    def first_choices(self) -> Tensor:
        """(E,) int64: how many tokens asked for each expert first, those that capacity dropped included."""
        parts = [self] if self.dropped is None else [self, self.dropped]
        counts = torch.zeros_like(self.counts)
        for part in parts:
            first = part.expert if part.choice is None else part.expert[part.choice == 0]
            counts = counts + torch.bincount(first, minlength=self.num_experts)
        return counts

    def dense(self) -> Tensor:
        """(T, E): the matrix itself, zero where there is no triple; differentiable in the weights."""
        matrix = self.weight.new_zeros(self.num_tokens, self.num_experts)
        return matrix.index_put((self.token, self.expert), self.weight)

    def select(self, keep: Tensor) -> Routing:
        """The triples where keep (N,) bool is True; the others join what was `dropped` before."""
        kept, lost = self.masked(keep), self.masked(~keep)
        if self.dropped is not None:
            lost = lost.merged(self.dropped)
        return replace(kept, dropped=lost)

    def with_weight(self, weight: Tensor) -> Routing:
        """The same triples with other weights (N,)."""
        routing = replace(self, weight=weight)
        for name in ("counts", "offsets", "demand", "by_token"):
            if name in self.__dict__:
                routing.__dict__[name] = self.__dict__[name]
        return routing

    def detach(self) -> Routing:
        """The same routing outside the autograd graph and the transforms of torch.func."""
        dropped = None if self.dropped is None else self.dropped.detach()
        choice = None if self.choice is None else outside(self.choice)
        token, expert, weight = outside(self.token), outside(self.expert), outside(self.weight)
        return replace(self, token=token, expert=expert, weight=weight, choice=choice, dropped=dropped, check=False)

    def by_choice(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """As index (T, k), weight (T, k) and dropped (T, k) bool, a column for each rank of choice; -1 for none."""
        parts = [self] if self.dropped is None else [self, self.dropped]
        token = torch.cat([part.token for part in parts])
        expert = torch.cat([part.expert for part in parts])
        lost = torch.cat([torch.full_like(part.token, i, dtype=torch.bool) for i, part in enumerate(parts)])
        weight = torch.cat([part.weight for part in parts]).masked_fill(lost, 0)
        ranks = [part.choice for part in parts]
        if any(rank is None for rank in ranks):
            order = token.argsort(stable=True)
            first = torch.searchsorted(token[order], torch.arange(self.num_tokens, device=token.device))
            column = torch.empty_like(token)
            column[order] = torch.arange(token.numel(), device=token.device) - first[token[order]]
        else:
            column = torch.cat([rank for rank in ranks if rank is not None])
        k = int(column.max()) + 1 if column.numel() else 1
        shape = (self.num_tokens, k)
        index = torch.full(shape, -1, dtype=torch.int64, device=token.device)
        index[token, column] = expert
        weights = weight.new_zeros(shape)
        weights[token, column] = weight
        if self.dropped is None:
            return index, weights, None
        dropped = torch.zeros(shape, dtype=torch.bool, device=token.device)
        dropped[token, column] = lost
        return index, weights, dropped

    def masked(self, keep: Tensor) -> Routing:
        """The triples where keep (N,) bool is True; the others, and what was dropped before, are forgotten."""
        choice = None if self.choice is None else self.choice[keep]
        token, expert, weight = self.token[keep], self.expert[keep], self.weight[keep]
        return replace(self, token=token, expert=expert, weight=weight, choice=choice, dropped=None, check=False)

    def merged(self, other: Routing) -> Routing:
        """These triples and those of another routing of the same tokens and experts, which shares none with this."""
        token, expert = torch.cat([self.token, other.token]), torch.cat([self.expert, other.expert])
        order = (expert * self.num_tokens + token).argsort()
        choice = None
        if self.choice is not None and other.choice is not None:
            choice = torch.cat([self.choice, other.choice])[order]
        weight = torch.cat([self.weight, other.weight])[order]
        return replace(self, token=token[order], expert=expert[order], weight=weight, choice=choice)


def _sort_by_expert(expert: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """The experts (N,) sorted, equal ones in place, and their order (N,); small keys sort several times faster."""
    small = torch.int16 if num_experts <= torch.iinfo(torch.int16).max else expert.dtype
    return expert.to(small).sort(stable=True)
