"""RoutedLayer, the base of every layer with a router: hidden states to a Routing, its losses and the layer's cost."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from .. import context as contexts
from ..context import Context
from ..recomputation import recomputing
from ..routers import Router
from ..routers.policy_gradient import Decision
from ..routing import Routing, outside
from .calls import Call


class RoutedLayer(nn.Module):
    """What every layer with a router shows: `aux_loss`, `tell`, `update_routers`, ledgers and taps know it by this.

    A subclass calls `route` on its input, computes with the routing, and returns what `finish` makes of its output.

    Args:
        router: decides.
        experts: takes the rows of a routing: (x (T, d), `Routing`) -> (T, d), as `shunter.experts.Experts`.

    Attributes:
        routing: the last forward's `Routing` (T, E), outside the graph; None before the first.
        updates: how often `update_routers` has advanced its router.
        experts_taken: how many experts a token asked for in the mean, where somebody counted; the layer's cost is then
            of these. None takes the router's own word.
    """

    router: nn.Module
    experts: nn.Module

    def __init__(self, router: Router, experts: nn.Module) -> None:
        super().__init__()
        self.router = router
        self.experts = experts
        self.dim, self.num_experts = router.dim, router.num_experts
        self.routing: Routing | None = None
        self._mask: Tensor | None = None
        self.experts_taken: float | None = None
        self.updates = 0
        self._last: Call | None = None
        self._calls: list[weakref.ref[Call]] = []

    def route(self, x: Tensor, told: dict[str, Tensor | None]) -> tuple[Tensor, Tensor, Routing, Context]:
        """What is decided for x (..., d): its rows (T, d), their logits (T, E), their routing, what is known of them.

        Rows of padding come back as zeros.

        Raises:
            ValueError: where x is not d wide, or a value does not fit x, or the router lacks what it needs.
            TypeError: for a name that is not a field of `Context`.
        """
        if x.shape[-1] != self.dim:
            raise ValueError(f"MoE: x has shape {tuple(x.shape)}; its last size must be {self.dim}")
        around, by_scope = contexts.known_in(self)
        if not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None:
            _refuse_vmap((x, *told.values(), *by_scope.values(), *self.router.parameters()))
        context = contexts.of_tokens(x, {**by_scope, **told}, around, self.decider.required)
        rows = x.reshape(-1, self.dim)
        logits, routing = self.router(rows, context)
        return context.real(rows), logits, routing, context

    def finish(self, out: Tensor, tokens: Tensor, logits: Tensor, routing: Routing, context: Context) -> Tensor:
        """The layer's output, after noting what its forward decided: its routing and, in training, its losses."""
        decided = routing.detach()
        if self.training:
            losses = self.decider.losses(logits, routing, context) | self.own_losses(logits, context)
            if not recomputing():
                with _outside_transforms():
                    self.decider.observe(outside(logits), decided, context)
                learns = self.decider.learns_by_reward
                call = Call(losses, Decision(tokens, logits, routing, context) if learns else None)
                if not torch.compiler.is_compiling():
                    call.follow(out)
                    self._calls = [ref for ref in self._calls if ref() is not None] + [weakref.ref(call)]
                self._last = call
        if not recomputing():
            self.routing, self._mask = decided, context.mask
        return out

    def own_losses(self, logits: Tensor, context: Context) -> dict[str, Tensor]:
        """Weighted losses of the layer besides its router's, by name."""
        return {}

    @property
    def tokens_routed(self) -> int:
        """How many tokens the last forward had, padding not among them; 0 before the first."""
        if self.routing is None:
            return 0
        return self.routing.num_tokens if self._mask is None else int(self._mask.sum())

    @property
    def decider(self) -> Router:
        """The `Router` in `router`, whose module may wrap it: an adapter, a compiled module, a copy to be trained.

        It is asked what it needs and told to update; to decide, the layer calls `router`.
        """
        if isinstance(self.router, Router):
            return self.router
        found = getattr(self.router, "itself", None)  # a wrapper that hands on attributes knows which one it calls
        return found or next(module for module in self.router.modules() if isinstance(module, Router))

    @property
    def losses(self) -> dict[str, Tensor]:
        """The last training forward's auxiliary losses by name, weighted; a forward in evaluation leaves them."""
        return {} if self._last is None else self._last.losses

    @property
    def decision(self) -> Decision | None:
        """What a router that learns by reward decided in the last training forward, until `give_reward`."""
        return None if self._last is None else self._last.decision

    def calls(self, since: int = -1) -> list[Call]:
        """What the training forwards from one on left that no backward has gone through, oldest first.

        Of compiled ones, which note neither their order nor a backward, the last counts.
        """
        if torch.compiler.is_compiling():
            return [] if self._last is None else [self._last]
        known = [call for ref in self._calls if (call := ref()) is not None]
        if self._last is not None and self._last not in known:
            known.append(self._last)
        if since >= 0:  # of a forward, which knows nothing of those of other threads
            known = [call for call in known if call.thread in (None, threading.get_ident())]
        return [call for call in known if not call.used and (call.order >= since or call.order < 0)]

    def drop_last(self, layers: Iterable[RoutedLayer]) -> bool:
        """Forget the last training forward, if no backward can come to it, but to a later one of these layers."""
        last = self._last
        if last is None or last.used or not last.dead():
            return False
        later = [call for layer in layers for call in layer.calls() if call.order > last.order]
        if all(call.dead() for call in later):
            return False
        self._last = None
        return True

    def forget(self, since: int) -> None:
        """Forget the training forwards from one on, as those of a model whose forward raised."""
        self._calls = [ref for ref in self._calls if (call := ref()) is not None and call.order < since]
        if self._last is not None and self._last.order >= since:
            self._last = self._calls[-1]() if self._calls else None

    def flops_per_token(self, sequence_length: int) -> dict[str, float]:
        """Forward FLOPs of a token's products by part, "routers" and "experts"; a multiply-add counts as 2."""
        products = sum(p.numel() for p in self.experts.parameters() if p.dim() == 3)
        return {"routers": self.decider.flops_per_token, "experts": 2 * self.share_used(sequence_length) * products}

    def inactive_parameters(self, sequence_length: int) -> float:
        """How many parameters of the experts a token of sequences of this length does not use, in the mean."""
        # Every token hears from all slots, however few rows the experts compute.
        used = 1.0 if self.decider.chooses == "slots" else self.share_used(sequence_length)
        return (1 - used) * sum(p.numel() for p in self.experts.parameters())

    def share_used(self, sequence_length: int) -> float:
        """The share of the experts' rows that a token of sequences of this length asks for."""
        taken = self.experts_taken
        return (self.decider.experts_for(sequence_length) if taken is None else taken) / self.num_experts

    def __getstate__(self) -> dict[str, Any]:
        # The last forward belongs to a graph, which can be neither copied nor pickled.
        return {**self.__dict__, "routing": None, "_mask": None, "_last": None, "_calls": []}


def must_not_leak(router: Router) -> None:
    """Raise ValueError where a router of a causal model lets later tokens change what earlier ones get."""
    if router.leak:
        raise ValueError(
            f"{type(router).__name__} in a causal model: {router.leak}. Choose another router, or pass "
            "causal=False (sparsify: allow_leak=True) if you insist"
        )


def moe_layers(model: nn.Module) -> dict[str, RoutedLayer]:
    """The layers of a model that have a router of Shunter's (`MoE` and others), by qualified name, in order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, RoutedLayer)}


def _outside_transforms() -> AbstractContextManager[Any]:
    """Where state may be written: a transform of torch.func lets no function write to what it did not make."""
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is None:
        return nullcontext()
    return temporarily_clear_interpreter_stack()


def _refuse_vmap(values: Iterable[Tensor | None]) -> None:
    """Raise ValueError where torch.func.vmap goes over one of these."""
    for value in values:
        while value is not None and torch._C._functorch.is_functorch_wrapped_tensor(value):
            if torch._C._functorch.is_batchedtensor(value):
                raise ValueError(
                    "MoE: torch.func.vmap cannot go over a layer, as how many rows an expert has depends on the data; "
                    "loop over the samples (gradients of each: torch.func.grad in the loop)"
                )
            value = torch._C._functorch.get_unwrapped(value)
