"""MoE, the sparse layer: hidden states to hidden states by a router and its experts; the losses of a model of such."""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from . import context as contexts
from . import losses as loss_functions
from . import routers
from .context import Context
from .experts import Experts, MixedExperts, ResidualExperts, RoutedExperts
from .recomputation import recomputing, regions
from .routers import Router
from .routers.policy_gradient import Decision, PolicyRouter
from .routing import Routing, outside

__all__ = [
    "MoE",
    "RoutedLayer",
    "aux_loss",
    "dropless",
    "expect_steps",
    "give_reward",
    "mark",
    "moe_layers",
    "must_not_leak",
    "plain_experts",
    "tell",
    "update_routers",
]

_ORDER = count()


class _Note:
    """A hook of a tensor that lives as long as the tensor's graph."""

    def __init__(self, hook: Callable[[Tensor], None]) -> None:
        self.hook = hook

    def __call__(self, grad: Tensor) -> None:
        self.hook(grad)


class _Call:
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
        self._last: _Call | None = None
        self._calls: list[weakref.ref[_Call]] = []

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
                call = _Call(losses, Decision(tokens, logits, routing, context) if learns else None)
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

    def calls(self, since: int = -1) -> list[_Call]:
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


EXPERT_WEIGHTS: dict[str, type[Experts | ResidualExperts]] = {"separate": Experts, "residual": ResidualExperts}


class MoE(RoutedLayer):
    """A sparse feed-forward layer: each token is computed by the experts that the router gives it.

    Args:
        dim: d, the width of the hidden states.
        hidden: f, the width of one expert.
        num_experts: E.
        router: a name of `shunter.routers.names()`, a `Router` subclass, or a ready router.
        backend: "auto", or one of `shunter.experts.backend_names()`.
        activation: "swiglu", "geglu", "geglu_tanh", "reglu" (gated), "silu", "gelu", "gelu_tanh",
            "quick_gelu", "relu" or "relu2".
        bias: whether the experts' projections have biases.
        num_shared_experts: how many experts of width f every token passes through besides, with weight 1.
        recompute: whether the experts' backward computes their pre-activations again instead of keeping them.
        dropout: in training, the probability of dropping an entry of the layer's output.
        expert_dropout: likewise of the hidden units of its experts, which small data to fine-tune on want (Fedus et al.
            2021, Switch, table 4: 0.4); shared experts have none.
        causal: whether the layer is in a causal model: a router that lets later tokens change earlier ones is refused.
        expert_weights: "separate", each expert's own; "residual", the sum of a core that all share and a residual of
            each (`shunter.experts.ResidualExperts`).
        residual: whether the shared expert (one, where none is asked for) and the routed ones are two branches, which a
            softmax of two learned maps of each token mixes, instead of being added (Rajbhandari et al. 2022,
            DeepSpeed-MoE, section 4.1: the residual expert of PR-MoE).
        extra_mlp: whether a dense feed-forward network of width f follows the experts, with a norm and a residual of
            its own: y + mlp(norm(x + y)) of the experts' y (Zoph et al. 2022, ST-MoE; x, which the model around has
            normalised, stands for the residual stream).
        operations: what each expert computes, in words: "swiglu 64", "gelu 32 x2" (two networks deep), "identity",
            "zero", "constant"; see `shunter.experts.MixedExperts`. None makes all alike.
        cost_loss: coefficient of what a token is expected to spend, as a share of the dearest expert; 0 leaves it out
            (see `shunter.losses.cost_loss`).
        ready_experts: `RoutedExperts` to take, to which `hidden`, `activation`, `bias` … `recompute` do not apply.
        device, dtype: of the parameters.
        **options: of the router: `top_k=`, `capacity_factor=`, … (`shunter.routers.options(name)` lists them).

    Attributes:
        routing, losses, decision: of the last forward; see `RoutedLayer`.

    Raises:
        ValueError: for unknown names, impossible sizes, and a router that leaks in a causal model.

    Source: Fedus et al. 2022 (A Review of Sparse Expert Models in Deep Learning), equations 1 and 2.

    >>> moe = MoE(dim=64, hidden=128, num_experts=8, router="topk", top_k=2)
    >>> y = moe(torch.randn(4, 10, 64))
    >>> loss = y.square().mean() + aux_loss(moe)
    """

    experts: RoutedExperts

    def __init__(
        self,
        dim: int,
        hidden: int,
        num_experts: int,
        router: str | type[Router] | Router = "switch",
        backend: str = "auto",
        *,
        activation: str = "swiglu",
        bias: bool = False,
        num_shared_experts: int = 0,
        recompute: bool = False,
        dropout: float = 0.0,
        expert_dropout: float = 0.0,
        causal: bool = False,
        expert_weights: str = "separate",
        residual: bool = False,
        extra_mlp: bool = False,
        operations: Sequence[str] | None = None,
        cost_loss: float = 0.0,
        ready_experts: RoutedExperts | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        if isinstance(router, Router):
            if options:
                raise ValueError(f"MoE: a ready router takes no options; got {', '.join(options)}")
            if (router.dim, router.num_experts) != (dim, num_experts):
                raise ValueError(
                    f"MoE: the router is for dim {router.dim} and {router.num_experts} experts, the layer for dim "
                    f"{dim} and {num_experts}"
                )
        else:
            given = {key: value for key, value in place.items() if value is not None}
            router = routers.create(router, dim, num_experts, **given, **options)
        if causal:
            must_not_leak(router)
        alike: dict[str, Any] = {"activation": activation, "bias": bias, "backend": backend, "recompute": recompute}
        experts = ready_experts
        if expert_weights not in EXPERT_WEIGHTS:
            raise ValueError(f"expert_weights {expert_weights!r} is unknown; choose from {', '.join(EXPERT_WEIGHTS)}")
        if operations is not None:
            if experts is not None:
                raise ValueError("MoE: operations and ready_experts both say what the experts are; give one")
            if expert_weights != "separate":
                raise ValueError(f"MoE: experts that differ have no expert_weights={expert_weights!r}; leave one out")
            if len(operations) != num_experts:
                raise ValueError(f"MoE: {len(operations)} operations for {num_experts} experts; name one for each")
            experts = MixedExperts(dim, operations, hidden, dropout=expert_dropout, **alike, **place)
        elif experts is None:
            experts = EXPERT_WEIGHTS[expert_weights](num_experts, dim, hidden, dropout=expert_dropout, **alike, **place)
        elif (experts.num_experts, experts.dim) != (num_experts, dim):
            raise ValueError(
                f"MoE: the experts are {experts.num_experts} of dim {experts.dim}, the layer has {num_experts} of dim "
                f"{dim}"
            )
        super().__init__(router, experts)
        self.shared_experts: Experts | None = None
        if num_shared_experts or residual:
            width = hidden * max(num_shared_experts, 1)
            self.shared_experts = Experts(1, dim, width, **alike, **place)
        self.shared_gate = nn.Linear(dim, 2, **place) if residual else None
        self.extra_mlp = Experts(1, dim, hidden, **alike, **place) if extra_mlp else None
        self.extra_norm = nn.RMSNorm(dim, eps=1e-6, **place) if extra_mlp else None
        self.cost_loss = cost_loss
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, **known: Tensor | None) -> Tensor:
        """Route and compute: x (..., d) -> (..., d); a token without an expert gets zeros.

        Args:
            x: (..., d) hidden states; the leading dimensions together are the T tokens.
            **known: what is known of the tokens, the fields of `Context`: `mask=` (True or 1 at real tokens, False or 0
                at padding, which takes no slot and enters no loss), `token_ids=`, `task=`, … Each has the shape (...),
                or fewer leading dimensions: one value for each sequence. Default: what the model around set (see
                `shunter.sparsify`).

        Raises:
            ValueError: where x is not d wide, or a value does not fit x, or the router lacks what it needs.
            TypeError: for a name that is not a field of `Context`.
        """
        tokens, logits, routing, context = self.route(x, known)
        shared: list[Tensor] = []
        if self.shared_experts is not None and self.own_experts.waits:
            self.own_experts.meanwhile = lambda: shared.append(self._shared(tokens))
        out = self.decider.compute(tokens, logits, routing, context, self.experts)
        if self.shared_experts is not None:
            dense = shared.pop() if shared else self._shared(tokens)
            if self.shared_gate is None:
                out = out + dense
            else:
                share = self.shared_gate(tokens).softmax(-1, dtype=torch.promote_types(out.dtype, torch.float32))
                routed, always = share.to(out.dtype).split(1, -1)
                out = routed * out + always * dense
        if self.extra_mlp is not None and self.extra_norm is not None:
            stream = self.extra_norm((tokens + out).to(self.extra_norm.weight.dtype)).to(out.dtype)
            out = out + context.real(self.extra_mlp(stream, _everyone(stream)))
        return self.finish(self.dropout(out).reshape(x.shape), tokens, logits, routing, context)

    def _shared(self, tokens: Tensor) -> Tensor:
        assert self.shared_experts is not None
        out: Tensor = self.shared_experts(tokens, _everyone(tokens))
        return out

    @torch.no_grad()
    def init_as_in_paper(self) -> None:
        """Begin the experts as the router's paper does, where it says how: Switch, V-MoE and BASE. Biases stay.

        Raises:
            ValueError: for another router, and for experts that are not `Experts`.
        """
        if not isinstance(self.experts, Experts):
            raise ValueError(f"MoE: {type(self.experts).__name__} draws its own experts; init_as_in_paper cannot")
        self.decider.draw_experts(self.experts.weights.up, self.experts.weights.down)

    def own_losses(self, logits: Tensor, context: Context) -> dict[str, Tensor]:
        """What tokens are expected to spend, where it has a coefficient."""
        if not self.cost_loss:
            return {}
        probs = self.decider.probs(logits)
        cost = self.own_experts.costs
        cost = torch.nn.functional.pad(cost / cost.max().clamp_min(1), (0, probs.shape[1] - len(cost)))
        return {"cost_loss": self.cost_loss * loss_functions.cost_loss(probs, cost, context.mask)}

    def spent(self) -> Tensor:
        """(T,) float64 FLOPs that the routed experts made for each token of the last forward; dropped ones cost none.

        Raises:
            RuntimeError: before the first forward.
        """
        if self.routing is None:
            raise RuntimeError("MoE: nothing is spent before the first forward")
        token, expert = self.routing.token.cpu(), self.routing.expert.cpu()
        return torch.zeros(self.routing.num_tokens, dtype=torch.float64).index_add(
            0, token, self.own_experts.costs[expert]
        )

    @property
    def own_experts(self) -> RoutedExperts:
        """The `RoutedExperts` in `experts`, whose module may wrap it, as an adapter does; it is asked what it costs."""
        if isinstance(self.experts, RoutedExperts):
            return self.experts
        return next(module for module in self.experts.modules() if isinstance(module, RoutedExperts))

    def flops_per_token(self, sequence_length: int) -> dict[str, float]:
        """As in any layer, with the dense parts, which every token takes; experts that differ cost what was asked for.

        Experts that differ count by the last forward's choices, before the first as if all were chosen alike.
        """
        taken = self.share_used(sequence_length) * self.num_experts
        products = taken * self._mean_of_choice(self.own_experts.costs)
        for dense in (self.shared_experts, self.extra_mlp):
            if dense is not None:
                products += 2 * dense.matrix_numbers
        if self.shared_gate is not None:
            products += 2 * self.shared_gate.weight.numel()
        return {"routers": self.decider.flops_per_token, "experts": products}

    def inactive_parameters(self, sequence_length: int) -> float:
        """As in any layer, but for what all experts share, which every token uses.

        Of experts that differ, by the choices that `flops_per_token` counts.
        """
        if not isinstance(self.own_experts, MixedExperts):
            unused = 0.0 if self.decider.chooses == "slots" else 1 - self.share_used(sequence_length)
            return super().inactive_parameters(sequence_length) - unused * self.own_experts.shared_numbers
        sizes = self.own_experts.sizes
        taken = self.share_used(sequence_length) * self.num_experts
        return float(sizes.sum()) - taken * self._mean_of_choice(sizes)

    def _mean_of_choice(self, values: Tensor) -> float:
        """The mean of values (E,) over the choices of the last forward, or over the experts."""
        differ = isinstance(self.own_experts, MixedExperts) and self.routing is not None
        share = self.routing.counts.cpu().double() if differ and self.routing is not None else torch.ones(len(values))
        return float((share * values).sum() / share.sum()) if share.sum() > 0 else float(values.mean())

    def explain(self, num_tokens: int = 1024) -> str:
        """In words, what a forward of T = num_tokens would do: router, capacity, losses, the backend and why."""
        router, experts = self.decider, self.experts
        slots = router.capacity(num_tokens)
        mode = "training" if self.training else "evaluation"
        losses = ", ".join(f"{name} x {c}" for name, c in router.coefficients.items() if c) or "none"
        deciders = {
            "tokens": f"each token chooses {router.top_k} expert{'s' if router.top_k > 1 else ''}",
            "experts": "each expert chooses its tokens",
            "both": f"tokens apply to {router.top_k} experts each, experts choose among the applicants",
            "global": "one assignment of all tokens is solved",
            "fixed": "the expert is fixed in advance",
            "all": "every token takes every expert",
            "slots": "experts compute slots, mixtures of all tokens, and every token takes all slots",
        }[router.chooses]
        lines = [
            f"Router {router.kind.__name__} ({router.source}): {deciders}; E={self.num_experts}.",
            f"Capacity in {mode}: dropless, no token is dropped."
            if slots is None
            else f"Capacity in {mode}: {slots} slots an expert for {num_tokens} tokens "
            + ("" if router.capacity_shares is None else "in the mean, in proportion to capacity_shares, ")
            + f"({router.capacity_formula} formula, {router.capacity_order} order); what does not fit is dropped.",
            f"Losses: {losses}.",
            f"Causal-safe: {'no, ' + router.leak if router.leak else 'yes'}.",
            ("Experts that differ" if isinstance(experts, MixedExperts) else f"Experts: {experts.activation}")
            + f", d={self.dim}, f={experts.hidden}; shared experts: "
            + ("none." if self.shared_experts is None else f"width {self.shared_experts.hidden} in all.")
            + ("" if self.shared_gate is None else " A softmax of two mixes both branches.")
            + ("" if self.extra_mlp is None else " A dense network follows."),
            experts.explain(num_tokens),
        ]
        if router.learns_by_reward:
            lines.insert(3, "Learns by reward: call shunter.give_reward(model, reward) after each training forward.")
        return "\n".join(lines)


def must_not_leak(router: Router) -> None:
    """Raise ValueError where a router of a causal model lets later tokens change what earlier ones get."""
    if router.leak:
        raise ValueError(
            f"{type(router).__name__} in a causal model: {router.leak}. Choose another router, or pass "
            "causal=False (sparsify: allow_leak=True) if you insist"
        )


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


def _everyone(tokens: Tensor) -> Routing:
    index = torch.zeros(tokens.shape[0], 1, dtype=torch.int64, device=tokens.device)
    weight = torch.ones(index.shape, dtype=torch.promote_types(tokens.dtype, torch.float32), device=tokens.device)
    return Routing.from_topk(index, weight, 1, check=False)


def moe_layers(model: nn.Module) -> dict[str, RoutedLayer]:
    """The layers of a model that have a router of Shunter's (`MoE` and others), by qualified name, in order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, RoutedLayer)}


@contextmanager
def tell(model: nn.Module, **known: Tensor) -> Iterator[None]:
    """Within the block, every `MoE` layer of a model knows of the tokens what its forward can be told.

    For what a model around the layers does not hand down itself: with tell(model, domain=labels): model(input_ids).

    Args:
        model: any module.
        **known: fields of `Context` (`domain=`, `language=`, `task=`, …) in the shape of the layers' tokens (...), or
            with fewer leading sizes: one value for each sequence, or a single one () for all tokens.

    Raises:
        TypeError: for a name that is not a field of `Context`.
    """
    unknown = [name for name in known if name not in contexts.KNOWN]
    if unknown:
        raise TypeError(f"tell: {', '.join(unknown)} is not known of tokens; the names are {', '.join(contexts.KNOWN)}")

    scope = contexts.Scope(told=known, layers=frozenset(moe_layers(model).values()))
    with contexts.within(scope):
        yield


def aux_loss(model: nn.Module, *, since: int = -1) -> Tensor:
    """The sum over a model's layers of their weighted losses from the training forwards that await a backward; scalar.

    Add it to the loss of the same forwards. A layer counts once for each time it ran since a backward went through it,
    as long as somebody holds what it returned; what nobody holds counts for a layer's last time, until another layer
    has run whose output somebody holds. Where no layer has a loss it is zero; after a backward it is that of the last
    forward, without a gradient.

    Args:
        model: any module.
        since: count only forwards from `mark()` on.

    Raises:
        RuntimeError: where gradients are wanted but the losses were computed without them, as under reentrant
            activation checkpointing, or where a router that learns by reward has none: they would silently train
            nothing.
    """
    layers = moe_layers(model)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        while any(layer.drop_last(layers.values()) for layer in layers.values()):
            pass  # the losses of one may have kept the output of another
    waiting = [(name, layer, call) for name, layer in layers.items() for call in layer.calls(since)]
    terms = []
    for name, layer, call in waiting:
        if call.decision is not None and layer.training and torch.is_grad_enabled():
            raise RuntimeError(
                f"the router of {name or 'the layer'} learns by reward and has none for this forward: call "
                "shunter.give_reward(model, reward) before aux_loss(model)"
            )
        for loss, value in call.losses.items():
            learns = any(p.requires_grad for p in layer.router.parameters())
            if torch.is_grad_enabled() and learns and not value.requires_grad:
                raise RuntimeError(
                    f"{loss} of {name or 'the layer'} carries no gradient: its forward ran without autograd. Under "
                    "activation checkpointing pass use_reentrant=False; for an evaluation call model.eval() first"
                )
            terms.append(value)
    if not waiting and since < 0:
        terms = [value.detach() for layer in layers.values() for value in layer.losses.values()]
    if not terms:
        device = next(model.parameters(), torch.zeros(())).device
        return torch.zeros((), device="cpu" if device.type == "meta" else device)  # offloaded parameters are elsewhere
    return torch.stack([term.to(terms[0].device) for term in terms]).sum()


def mark() -> int:
    """A mark between the forwards before and after it, for `aux_loss(model, since=…)`."""
    return next(_ORDER)


def give_reward(model: nn.Module, reward: Tensor, mask: Tensor | None = None) -> None:
    """Tell the routers that learn by reward how well the last training forward went; `aux_loss` then has their losses.

    The return of a layer's action is this reward and what `PolicyRouter.action_reward` gives to its own action and to
    those of later layers.

    Args:
        model: whose layers decided; layers without such a router are left alone.
        reward: floating point, larger is better, as minus the loss of each token's prediction, or +1 and -1 for right
            and wrong. Its shape is that of the layers' tokens, (...) or (T,), or has fewer leading sizes: one value for
            each sequence. No gradient flows through it.
        mask: bool, in such a shape, True at tokens that have a reward; padding has none in any case.

    Raises:
        RuntimeError: where no layer awaits a reward.
        ValueError: where reward or mask do not fit a layer's tokens.
    """
    waiting = [
        (layer.decider, call)
        for layer in moe_layers(model).values()
        for call in (layer.calls() or ([] if layer._last is None else [layer._last]))
        if call.decision is not None
    ]
    if not waiting:
        raise RuntimeError(
            "give_reward: no layer awaits a reward; call it once after each training forward of a model whose router "
            "learns by reward"
        )
    decisions = Counter(call.decision.shape for _, call in waiting if call.decision is not None)
    earned: dict[torch.Size, Tensor] = {}
    for router, call in sorted(waiting, key=lambda entry: entry[1].order, reverse=True):
        decision = call.decision
        assert decision is not None and isinstance(router, PolicyRouter)
        shape, device = decision.shape, decision.logits.device
        value = _for_tokens("reward", reward.detach().to(device), shape)
        real = decision.context.mask
        if mask is not None:
            rewarded = _for_tokens("mask", mask.to(device, torch.bool), shape)
            real = rewarded if real is None else real & rewarded
        own = router.action_reward(decision, decisions[shape])
        if own is not None:
            earned[shape] = earned.get(shape, torch.zeros_like(own)) + own.to(device)
        if shape in earned:
            value = value + earned[shape].to(device)
        if real is not None:
            value = value.masked_fill(~real, 0)
        call.losses = {**call.losses, **router.reward_losses(decision, value, real)}
        call.decision, call.used = None, False


def _for_tokens(name: str, value: Tensor, shape: torch.Size) -> Tensor:
    """A value for each of the T tokens of a layer whose input has these leading sizes, (T,)."""
    if value.shape == (shape.numel(),):
        return value
    if value.shape != shape[: value.dim()]:
        raise ValueError(
            f"give_reward: {name} has shape {tuple(value.shape)}; the tokens of a layer are {tuple(shape)}: give one "
            "value for each token, or for each sequence"
        )
    return value.reshape(*value.shape, *[1] * (len(shape) - value.dim())).expand(shape).reshape(-1)


def update_routers(model: nn.Module) -> None:
    """Advance the state of every router of a model that no gradient moves; call it once after each optimizer step."""
    for layer in moe_layers(model).values():
        layer.decider.update()
        layer.updates += 1


def dropless(model: nn.Module) -> None:
    """Have every layer of a model drop no token in evaluation, whatever its capacity: then a sequence's output does not
    depend on what else is in its batch.

    Each router takes `eval_capacity_factor="dropless"`, as a layer can be made with; training is as it was.

    Raises:
        ValueError: where a router decides by its capacity (expert_choice); no layer is changed then.
    """
    layers = moe_layers(model)
    limited = {name: layer.decider for name, layer in layers.items() if layer.decider.capacity_factor}
    for name, router in limited.items():
        if router.chooses == "experts":
            raise ValueError(f"dropless: in {name or 'the layer'} experts choose their tokens, by a capacity")
    for router in limited.values():
        router.eval_capacity_factor = router.options["eval_capacity_factor"] = "dropless"


def plain_experts(model: nn.Module) -> None:
    """Replace, in place, experts that are a core and residuals by experts of their own that compute the same.

    What reads experts one by one, as exporting, quantising and pruning do, knows these.
    """
    for layer in moe_layers(model).values():
        if isinstance(layer.experts, ResidualExperts):
            layer.experts = layer.experts.plain()


def expect_steps(model: nn.Module, steps: int) -> None:
    """Tell every router of a model how many optimizer steps a training will have in all, before it begins or goes on.

    Schedules that are given no length of their own, as the temperature of `dense_to_sparse`, go by it.
    """
    for layer in moe_layers(model).values():
        layer.decider.expect_steps(steps)
