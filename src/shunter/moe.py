"""MoE: a router and its experts as one module, in place of a feed-forward block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import routers
from .experts import Experts, choose
from .routers import NO_CONTEXT, Context, Router
from .routing import Routing

__all__ = ["MoE", "aux_loss", "moe_layers"]


class MoE(nn.Module):
    """A sparse feed-forward layer: each token is computed by the experts that the router gives it.

    Args:
        dim: d, the width of the hidden states.
        hidden: f, the width of one expert.
        num_experts: E.
        router: a name of `shunter.routers.names()`, a `Router` subclass, or a ready router.
        backend: "auto", or one of `shunter.experts.backend_names()`.
        activation: "swiglu", "geglu", "geglu_tanh", "reglu" (gated), "silu", "gelu", "gelu_tanh" or "relu".
        bias: whether the experts' projections have biases.
        num_shared_experts: how many experts of width f every token passes through besides, with weight 1.
        causal: whether the layer is in a causal model: a router that lets later tokens change earlier ones is refused.
        device, dtype: of the parameters.
        **options: of the router: `top_k=`, `capacity_factor=`, … (`shunter.routers.options(name)` lists them).

    Attributes:
        routing: the last forward's `Routing` (T, E), outside the graph; None before the first.
        losses: the last training forward's auxiliary losses by name, weighted; a forward in evaluation leaves them.

    Raises:
        ValueError: for unknown names, impossible sizes, and a router that leaks in a causal model.

    Source: Fedus et al. 2022 (A Review of Sparse Expert Models in Deep Learning), equations 1 and 2.

    >>> moe = MoE(dim=64, hidden=128, num_experts=8, router="topk", top_k=2)
    >>> y = moe(torch.randn(4, 10, 64))
    >>> loss = y.square().mean() + aux_loss(moe)
    """

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
        causal: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        if isinstance(router, Router):
            if options:
                raise ValueError(f"MoE: a ready router takes no options; got {', '.join(options)}")
            if (router.dim, router.num_experts) != (dim, num_experts):
                raise ValueError(
                    f"MoE: the router is for dim {router.dim} and {router.num_experts} experts, the layer for dim "
                    f"{dim} and {num_experts}"
                )
            self.router = router
        else:
            given = {key: value for key, value in place.items() if value is not None}
            self.router = routers.create(router, dim, num_experts, **given, **options)
        if causal and self.router.leak:
            raise ValueError(
                f"{type(self.router).__name__} in a causal model: {self.router.leak}. Choose another router, or pass "
                "causal=False if you insist"
            )
        self.experts = Experts(num_experts, dim, hidden, activation=activation, bias=bias, backend=backend, **place)
        self.shared_experts: Experts | None = None
        if num_shared_experts:
            width = hidden * num_shared_experts
            self.shared_experts = Experts(1, dim, width, activation=activation, bias=bias, backend=backend, **place)
        self.dim = dim
        self.num_experts = num_experts
        self.context: Context | None = None
        self.routing: Routing | None = None
        self.losses: dict[str, Tensor] = {}

    def forward(self, x: Tensor, *, mask: Tensor | None = None, token_ids: Tensor | None = None) -> Tensor:
        """Route and compute: x (..., d) -> (..., d); a token without an expert gets zeros.

        Args:
            x: (..., d) hidden states; the leading dimensions together are the T tokens.
            mask: (...) True or 1 at real tokens, False or 0 at padding, which takes no slot and enters no loss.
                Default: what the model around set (see `shunter.sparsify`), else all real.
            token_ids: (...) int64, for routers that need them; same default.

        Raises:
            ValueError: where x is not d wide, or mask or token_ids do not fit x.
        """
        if x.shape[-1] != self.dim:
            raise ValueError(f"MoE: x has shape {tuple(x.shape)}; its last size must be {self.dim}")
        tokens = x.reshape(-1, self.dim)
        context = self._context(x, mask, token_ids)
        logits = self.router.score(tokens, context)
        routing = self.router.assign(logits, context)
        out = self.experts(tokens, routing)
        if self.shared_experts is not None:
            out = out + self.shared_experts(tokens, _everyone(tokens))
        if self.training:
            self.losses = self.router.losses(logits, routing, context)
        self.routing = routing.detach()
        return out.reshape(x.shape)

    def _context(self, x: Tensor, mask: Tensor | None, token_ids: Tensor | None) -> Context:
        around = self.context or NO_CONTEXT
        mask = around.mask if mask is None else mask
        token_ids = around.token_ids if token_ids is None else token_ids
        for name, value in (("mask", mask), ("token_ids", token_ids)):
            if value is not None and value.shape != x.shape[:-1]:
                shape, needed = tuple(value.shape), tuple(x.shape[:-1])
                raise ValueError(f"MoE: {name} has shape {shape}; x {tuple(x.shape)} needs {needed}")
        return Context(
            mask=None if mask is None else mask.reshape(-1).to(torch.bool),
            token_ids=None if token_ids is None else token_ids.reshape(-1),
        )

    def explain(self, num_tokens: int = 1024) -> str:
        """In words, what a forward of T = num_tokens would do: router, capacity, losses, the backend and why."""
        router, experts = self.router, self.experts
        weights = experts.weights
        probe = torch.empty(num_tokens, self.dim, dtype=weights.up.dtype, device=weights.up.device)
        backend, why = choose(experts.backend, probe, weights)
        slots = router.capacity(num_tokens)
        mode = "training" if self.training else "evaluation"
        losses = ", ".join(f"{name} x {c}" for name, c in router.coefficients.items() if c) or "none"
        deciders = {
            "tokens": f"each token chooses {router.top_k} expert{'s' if router.top_k > 1 else ''}",
            "experts": "each expert chooses its tokens",
            "global": "one assignment of all tokens is solved",
            "fixed": "the expert is fixed in advance",
        }[router.chooses]
        lines = [
            f"Router {type(router).__name__} ({router.source}): {deciders}; E={self.num_experts}.",
            f"Capacity in {mode}: dropless, no token is dropped."
            if slots is None
            else f"Capacity in {mode}: {slots} slots an expert for {num_tokens} tokens "
            f"({router.capacity_formula} formula, {router.capacity_order} order); what does not fit is dropped.",
            f"Losses: {losses}.",
            f"Causal-safe: {'no, ' + router.leak if router.leak else 'yes'}.",
            f"Experts: {experts.activation}, d={self.dim}, f={experts.hidden}; shared experts: "
            + ("none." if self.shared_experts is None else f"width {self.shared_experts.hidden} in all."),
            f"Backend {backend.name}: {backend.summary}; chosen because {why}.",
        ]
        return "\n".join(lines)


def _everyone(tokens: Tensor) -> Routing:
    index = torch.zeros(tokens.shape[0], 1, dtype=torch.int64, device=tokens.device)
    weight = torch.ones(index.shape, dtype=torch.promote_types(tokens.dtype, torch.float32), device=tokens.device)
    return Routing.from_topk(index, weight, 1, check=False)


def moe_layers(model: nn.Module) -> dict[str, MoE]:
    """The `MoE` layers of a model, by their qualified names, in order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MoE)}


def aux_loss(model: nn.Module) -> Tensor:
    """The sum over a model's `MoE` layers of their weighted losses from the last training forward; a scalar.

    Add it to the loss of the same forward. Where no layer has a loss it is zero.

    Raises:
        RuntimeError: where gradients are wanted but the losses were computed without them, as under reentrant
            activation checkpointing: they would silently train nothing.
    """
    terms = []
    for name, layer in moe_layers(model).items():
        for loss, value in layer.losses.items():
            learns = any(p.requires_grad for p in layer.router.parameters())
            if torch.is_grad_enabled() and learns and not value.requires_grad:
                raise RuntimeError(
                    f"{loss} of {name or 'the layer'} carries no gradient: its forward ran without autograd. Under "
                    "activation checkpointing pass use_reentrant=False; for an evaluation call model.eval() first"
                )
            terms.append(value)
    if not terms:
        parameter = next(model.parameters(), torch.zeros(()))
        return torch.zeros((), device=parameter.device)
    return torch.stack([term.to(terms[0].device) for term in terms]).sum()
