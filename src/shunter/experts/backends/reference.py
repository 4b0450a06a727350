"""The definition: a loop over experts in plain autograd, in any dtype. Every fast backend must equal it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ...routing import Routing
from ..activations import activate
from ..choice import Backend, register
from ..weights import ExpertWeights

__all__ = ["reference"]


def reference(
    x: Tensor, weights: ExpertWeights, routing: Routing, recompute: bool = False, dropout: float = 0.0
) -> Tensor:
    """y_t = sum over the experts e of token t of w_te (down_e act(up_e x_t)); x and y are (T, d).

    The weighted sum runs in at least float32 and is rounded once, to x's dtype. Of act(up_e x_t) each entry is dropped
    with probability `dropout`.
    """
    if recompute and torch.is_grad_enabled():
        return checkpoint(reference, x, weights, routing, dropout=dropout, use_reentrant=False)
    out = torch.zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    # Empty sums tie every parameter to the result: without a triple, gradients are zeros rather than missing.
    out = out + sum(part[:0].sum() for part in (x, routing.weight, *weights.learned()))
    bounds = routing.offsets.tolist()
    for e, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        if start == end:
            continue
        token = routing.token[start:end]
        up, down, up_bias, down_bias = weights.expert(e)
        hidden = activate(F.linear(x[token], up, up_bias), weights.activation)
        y = F.linear(F.dropout(hidden, dropout) if dropout else hidden, down, down_bias)
        out = out.index_add(0, token, (y * routing.weight[start:end, None]).to(out.dtype))
    return out.to(x.dtype)


register(
    Backend(
        "reference",
        reference,
        lambda x, weights: None,
        "a loop over experts in plain autograd",
        takes=(ExpertWeights,),
        reason=lambda x, weights: "it runs on anything",
    )
)
