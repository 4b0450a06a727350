"""What a training forward of a layer leaves behind, its losses above all, until a backward has gone through it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from itertools import count

import torch
from torch import Tensor

from ..recomputation import regions
from ..routers.policy_gradient import Decision

_ORDER = count()


def mark() -> int:
    """A mark between the forwards before and after it, for `aux_loss(model, since=…)`."""
    return next(_ORDER)


class _Note:
    """A hook of a tensor that lives as long as the tensor's graph."""

    def __init__(self, hook: Callable[[Tensor], None]) -> None:
        self.hook = hook

    def __call__(self, grad: Tensor) -> None:
        self.hook(grad)


class Call:
    """What one training forward of a layer left, until a backward has gone through it.

    Args:
        losses: weighted auxiliary losses by name.
        decision: what a router that learns by reward decided, until its reward is known.

    Attributes:
        dead: whether no backward can come to the layer's output any more, for nobody holds it or it has no graph.
    """

    def __init__(self, losses: dict[str, Tensor], decision: Decision | None) -> None:
        self.losses, self.decision = losses, decision
        self.used = False
        self.order = -1
        self.thread: int | None = None
        self.dead: Callable[[], bool] = bool
        self._reached: list[bool] = []
        self._lost: Callable[[], None] | None = None

    def follow(self, out: Tensor) -> None:
        """Live as long as the graph of the layer's output does, and note when a backward goes through it."""
        self.order, self.thread = next(_ORDER), threading.get_ident()
        if out.requires_grad:
            note = _Note(self._pass)
            out.register_hook(note)
            held = weakref.ref(note)
            self.dead = lambda: held() is None
        elif not torch.is_grad_enabled() and not regions().first:
            self.dead = lambda: True

    def watch(self, lost: Callable[[], None]) -> None:
        """Call lost() at the end of a backward that goes through the layer's output, but through none of its losses."""
        reached, learned = self._reached, [loss for loss in self.losses.values() if loss.requires_grad]
        for loss in learned:
            loss.register_hook(lambda grad: reached.append(True))  # holds neither the call nor its graph
        self._lost = lost if learned else None

    def _pass(self, grad: Tensor) -> None:
        # A backward that keeps the graph, as of a penalty on a gradient, is not the last to go through it.
        self.used = not torch._C._autograd._get_current_graph_task_keep_graph()
        if self._lost is not None:
            torch.autograd.Variable._execution_engine.queue_callback(self._check)

    def _check(self) -> None:
        if self._lost is not None and not self._reached:
            self._lost()
