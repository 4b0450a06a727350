"""Rows to other ranks and back: an all-to-all, whose gradient is the one the other way; or all rows to all ranks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as functional

from .watch import at, named_errors

__all__ = ["begin", "exchange", "exchange_numbers", "exchange_weights", "gather", "scatter"]


def exchange(
    rows: Tensor,
    send: list[int],
    recv: list[int],
    group: dist.ProcessGroup,
    place: str,
    meanwhile: Callable[[], object] | None = None,
) -> Tensor:
    """The rows that the ranks of a group send this one, in the order of the ranks; differentiable, twice too.

    Args:
        rows: (N, …), those for rank 0 first.
        send: how many go to each rank; they sum to N.
        recv: how many come from each; what each of them has in `send` for this one.
        group: the ranks.
        place: what is exchanged, for errors.
        meanwhile: what to do while they are under way. In the backward, the backward of what it did comes between the
            start of the exchange back and the wait for it.

    Returns:
        (R, …), R the sum of recv.

    Raises:
        ValueError: where send and rows differ.
        LostRank: where a rank does not come within the group's timeout.
    """
    if meanwhile is not None:
        arrive = begin(rows, send, recv, group, place)
        meanwhile()
        return arrive()
    _must_sum_to(rows, send)
    out: Tensor = _Exchange.apply(rows, send, recv, group, place)
    return out


def begin(rows: Tensor, send: list[int], recv: list[int], group: dist.ProcessGroup, place: str) -> Callable[[], Tensor]:
    """Let rows set out as in `exchange`; returns what waits for those that come, (R, …), and is called once.

    What runs in between does so while they are under way, and its backward while the gradients are.
    """
    _must_sum_to(rows, send)
    back = _Back()
    under_way = _Start.apply(rows, back, send, recv, group, place)
    return partial(_Finish.apply, under_way, back, send, recv, group, place)


def _must_sum_to(rows: Tensor, send: list[int]) -> None:
    if sum(send) != rows.shape[0]:
        raise ValueError(f"exchange: {rows.shape[0]} rows, and send sums to {sum(send)}")


def exchange_numbers(numbers: Tensor, group: dist.ProcessGroup, place: str) -> Tensor:
    """Row p of the result (P, n) is what rank p has in its row for this rank; integers, without a gradient."""
    return _all_to_all(numbers, [1] * numbers.shape[0], [1] * numbers.shape[0], group, place)


def exchange_weights(
    weight: Tensor, number: Tensor, send: list[int], recv: list[int], group: dist.ProcessGroup, place: str
) -> tuple[Tensor, Tensor]:
    """Weights (N,) and a number (N,) int64 beside each, to other ranks in one exchange: (R,) and (R,).

    Differentiable in the weights. The other arguments, and what is raised, are those of `exchange`.
    """
    weights, numbers = _Weights.apply(weight, number, send, recv, group, place)
    return weights, numbers


def gather(rows: Tensor, group: dist.ProcessGroup, place: str) -> Tensor:
    """The rows (P T, …) of all ranks, of which each has as many, (T, …); the gradient is their sum, `scatter`."""
    out: Tensor = _Gather.apply(rows, group, place)
    return out


def scatter(rows: Tensor, group: dist.ProcessGroup, place: str) -> Tensor:
    """The sum over the ranks of their rows (P T, …), of which each keeps its part, (T, …); the gradient is `gather`."""
    out: Tensor = _Scatter.apply(rows, group, place)
    return out


def _all_to_all(rows: Tensor, send: list[int], recv: list[int], group: dist.ProcessGroup, place: str) -> Tensor:
    return _wait(_start(rows, send, recv, group, place))


def _start(rows: Tensor, send: list[int], recv: list[int], group: dist.ProcessGroup, place: str) -> Tensor:
    at(place)
    with named_errors():
        # The functional form: a policy of activation checkpointing can keep its result, and waits for it.
        started: Tensor = torch.ops._c10d_functional.all_to_all_single(rows.contiguous(), recv, send, group.group_name)
    return started


def _wait(started: Tensor) -> Tensor:
    with named_errors():
        return functional.wait_tensor(started)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, send: list[int], recv: list[int], group: dist.ProcessGroup, place: str
    ) -> Tensor:
        ctx.how = recv, send, group, f"the backward of {place}"
        return _all_to_all(rows, send, recv, group, place)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _Exchange.apply(grads[0], *ctx.how), None, None, None, None


class _Back:
    """The gradients that are on their way back, from the start of that exchange to the wait for it."""

    grads: Tensor | None = None
    sent: Tensor | None = None


class _Start(torch.autograd.Function):
    """Rows that set out: what comes out is not filled yet."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, back: _Back, send: list[int], recv: list[int], group: dist.ProcessGroup, place: str
    ) -> Tensor:
        ctx.back = back
        return _start(rows, send, recv, group, place)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        back = ctx.back
        assert back.grads is not None
        arrived, back.grads = back.grads, None
        if back.sent is not None:
            arrived, back.sent = _wait(arrived), None
        return arrived, None, None, None, None, None


class _Finish(torch.autograd.Function):
    """Rows that arrive. The gradient that it hands on has their shape alone; the true one is on its way back."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, back: _Back, send: list[int], recv: list[int], group: dist.ProcessGroup, place: str
    ) -> Tensor:
        ctx.back, ctx.how = back, (recv, send, group, f"the backward of {place}")
        return _wait(rows).view_as(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        if torch.is_grad_enabled():  # whose own gradient is asked for: one exchange, in the graph
            ctx.back.grads = _Exchange.apply(grads[0], *ctx.how)
        else:
            ctx.back.sent = grads[0].contiguous()
            ctx.back.grads = _start(ctx.back.sent, *ctx.how)
        return grads[0], None, None, None, None, None


class _Weights(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, number: Tensor, send: list[int], recv: list[int], group: dist.ProcessGroup, place: str
    ) -> tuple[Tensor, Tensor]:
        ctx.how = recv, send, group, f"the backward of {place}"
        both = torch.stack([number, weight.double().view(torch.int64)], 1)
        came = _all_to_all(both, send, recv, group, place)
        numbers = came[:, 0].contiguous()
        ctx.mark_non_differentiable(numbers)
        return came[:, 1].contiguous().view(torch.float64).to(weight.dtype), numbers

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _Exchange.apply(grads[0], *ctx.how), None, None, None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup, place: str) -> Tensor:
        ctx.how = group, f"the backward of {place}"
        at(place)
        with named_errors():
            size = dist.get_world_size(group)
            return functional.wait_tensor(
                torch.ops._c10d_functional.all_gather_into_tensor(rows.contiguous(), size, group.group_name)
            )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _Scatter.apply(grads[0], *ctx.how), None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup, place: str) -> Tensor:
        ctx.how = group, f"the backward of {place}"
        at(place)
        with named_errors():
            size = dist.get_world_size(group)
            return functional.wait_tensor(
                torch.ops._c10d_functional.reduce_scatter_tensor(rows.contiguous(), "sum", size, group.group_name)
            )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _Gather.apply(grads[0], *ctx.how), None, None
