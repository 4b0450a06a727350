"""LinearRouter: logits as a linear map of the hidden state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..context import NO_CONTEXT, Context
from .base import Router

__all__ = ["LinearRouter"]


class LinearRouter(Router):
    """A router whose logits are a linear map of the hidden state, h = W_r x (the review's equation 1).

    Args:
        jitter: in training, multiply the router's input by uniform noise in [1 - jitter, 1 + jitter] (Switch, 2.4).
        init_scale: the initial weights are drawn from a truncated normal of standard deviation sqrt(init_scale / d)
            (Switch, section 2.4: 0.1).
        router_bias: whether a learned bias (E,), zero at first, is added to the logits (gpt-oss).
        input_norm: whether the input is divided by its root mean square and by sqrt(d), and multiplied by a learned
            scale (d,), one at first (Gemma 4).
        logit_scale: what the logits are multiplied by.
        logit_cap: c > 0 bounds the logits smoothly, c tanh(h / c); None leaves them.

    Raises:
        ValueError: for a jitter outside of [0, 1), and for a logit_cap that is not positive.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        jitter: float = 0.0,
        init_scale: float = 0.1,
        router_bias: bool = False,
        input_norm: bool = False,
        logit_scale: float = 1.0,
        logit_cap: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_experts, **options)
        if not 0 <= jitter < 1:
            raise ValueError(f"jitter {jitter} must be in [0, 1)")
        if logit_cap is not None and logit_cap <= 0:
            raise ValueError(f"logit_cap {logit_cap} must be positive, or None for no cap")
        self.jitter = jitter
        self.init_scale = init_scale
        self.logit_scale = logit_scale
        self.logit_cap = logit_cap
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(self.num_rows, dim, **place))
        self.bias = nn.Parameter(torch.zeros(self.num_rows, **place)) if router_bias else None
        self.input_scale = nn.Parameter(torch.ones(dim, **place)) if input_norm else None
        self.reset_parameters()

    @property
    def num_rows(self) -> int:
        """How many outputs the linear map has: E, unless the logits are made of others."""
        return self.num_experts

    def reset_parameters(self) -> None:
        """Draw the initial weights (see `init_scale`)."""
        std = (self.init_scale / self.dim) ** 0.5
        nn.init.trunc_normal_(self.weight, std=std, a=-2 * std, b=2 * std)

    def score(self, x: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        """The logits (T, E) of x (T, d), scaled and capped, in at least float32, autocast off."""
        with torch.autocast(x.device.type, enabled=False):
            logits = self.project(x.to(torch.promote_types(x.dtype, torch.float32)), context)
            if self.logit_scale != 1:
                logits = logits * self.logit_scale
            if self.logit_cap is not None:
                logits = self.logit_cap * torch.tanh(logits / self.logit_cap)
            return logits

    def project(self, x: Tensor, context: Context) -> Tensor:
        """The linear map (T, rows) of x (T, d), which is in the precision of the logits: x W_r^T, and the bias."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(self.prepare(x), self.weight.to(x.dtype), bias)

    def prepare(self, x: Tensor) -> Tensor:
        """The input (T, d) of the linear map: with jitter in training, normalised where asked."""
        if self.jitter and self.training:
            x = x * torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)
        if self.input_scale is not None:
            x = F.rms_norm(x, (self.dim,), eps=1e-6) * self.input_scale.to(x.dtype) * self.dim**-0.5
        return x

    def extra_repr(self) -> str:
        """d and E, for `print(model)`."""
        return f"dim={self.dim}, num_experts={self.num_experts}"
