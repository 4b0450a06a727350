"""MoE, the sparse layer: hidden states to hidden states by a router and its experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import losses as loss_functions
from .. import routers
from ..context import Context
from ..experts import Experts, MixedExperts, ResidualExperts, RoutedExperts
from ..routers import Router
from ..routing import Routing
from .routed_layer import RoutedLayer, must_not_leak

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
            f"({router.capacity_formula} formula, {router.capacity_order} order); what does not fit is dropped.",
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


def _everyone(tokens: Tensor) -> Routing:
    index = torch.zeros(tokens.shape[0], 1, dtype=torch.int64, device=tokens.device)
    weight = torch.ones(index.shape, dtype=torch.promote_types(tokens.dtype, torch.float32), device=tokens.device)
    return Routing.from_topk(index, weight, 1, check=False)
