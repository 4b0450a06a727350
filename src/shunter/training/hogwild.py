"""Asynchronous training: processes that share a model's parameters and update them without locks, or with a set delay.

Recht et al. 2011, Hogwild; Fedus et al. 2022, section 9. Updates of experts are sparse: a batch touches those alone
that its tokens were sent to, and two processes rarely the same ones at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError

__all__ = ["delayed", "hogwild"]

Loss = Callable[[nn.Module, Any], Tensor]
_TIME_LIMIT = 3600.0  # seconds


def hogwild(
    model: nn.Module, loss: Loss, batches: Sequence[Any], *, workers: int = 2, learning_rate: float = 0.1
) -> list[int]:
    """Plain gradient descent by several processes at once, which read and write the same parameters without locks.

    Worker w takes the batches w, w + W, w + 2W, … in this order. A parameter of rank 3 is taken for a stack of experts:
    the experts without a gradient are not written. With one worker the parameters end with the same bits as when the
    batches are taken one after the other here, by as many threads.

    Args:
        model: on the CPU; its parameters move to shared memory, and are trained in place. Buffers are each
            worker's own, and stay as they are here.
        loss: of the model on a batch, a scalar.
        batches: of the training, in order.
        workers: W processes, forked.
        learning_rate: of every update.

    Returns:
        The staleness of each update, by worker: how many updates others made between its forward and itself.

    Raises:
        UserError: for no workers, or a model that is not on the CPU.
        RuntimeError: where a worker failed or did not end.
    """
    if workers < 1:
        raise UserError(f"hogwild: workers {workers} must be at least 1")
    if any(p.device.type != "cpu" for p in model.parameters()):
        raise UserError("hogwild: the parameters must be on the CPU, where processes share memory")
    for parameter in model.parameters():
        parameter.data.share_memory_()
    clock = torch.zeros(workers, dtype=torch.int64).share_memory_()  # updates of each worker: nobody writes another's
    stale = torch.zeros(len(batches), dtype=torch.int64).share_memory_()
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    context: Any = torch.multiprocessing.get_context("fork")

    def work(worker: int) -> None:
        torch.set_num_threads(threads)
        torch.set_rng_state(state)
        if worker:
            torch.manual_seed(torch.initial_seed() + worker)
        for place in range(worker, len(batches), workers):
            before = int(clock.sum())
            _update(model, _gradients(model, loss, batches[place]), learning_rate)
            stale[place] = int(clock.sum()) - before
            clock[worker] += 1

    processes = [context.Process(target=work, args=(worker,)) for worker in range(workers)]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(_TIME_LIMIT)
            if process.exitcode != 0:
                raise RuntimeError(f"hogwild: a worker ended with {process.exitcode}")
    finally:
        for process in processes:
            process.kill()
    return [int(value) for worker in range(workers) for value in stale[worker::workers]]


def delayed(
    model: nn.Module, loss: Loss, batches: Sequence[Any], *, staleness: int = 0, learning_rate: float = 0.1
) -> None:
    """Plain gradient descent whose gradients are taken at the parameters of so many updates ago.

    w_{t+1} = w_t - lr grad(w_{t-s}): what asynchronous workers do, with a delay that is the same each time and set. Of
    the first s updates the gradients are taken at the first parameters. Arguments are as of `hogwild`.

    Raises:
        UserError: for a negative staleness.
    """
    if staleness < 0:
        raise UserError(f"delayed: staleness {staleness} must not be negative")
    parameters = list(model.parameters())
    past: deque[list[Tensor]] = deque(maxlen=staleness + 1)
    for batch in batches:
        now = [p.detach().clone() for p in parameters]
        past.append(now)
        _put(parameters, past[0])
        gradients = _gradients(model, loss, batch)
        _put(parameters, now)
        _update(model, gradients, learning_rate)


@torch.no_grad()
def _put(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def _gradients(model: nn.Module, loss: Loss, batch: Any) -> list[Tensor | None]:
    parameters = list(model.parameters())
    return list(torch.autograd.grad(loss(model, batch), parameters, allow_unused=True))


@torch.no_grad()
def _update(model: nn.Module, gradients: Sequence[Tensor | None], learning_rate: float) -> None:
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        if gradient is None:
            continue
        if parameter.dim() == 3:
            touched = gradient.flatten(1).any(1).nonzero().flatten()
            for expert in touched.tolist():
                parameter[expert].sub_(gradient[expert], alpha=learning_rate)
        else:
            parameter.sub_(gradient, alpha=learning_rate)
