"""After the review: tokens choose by angle, so that no expert wins by the length of its vector."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..context import Context
from .topk import TopK

__all__ = ["Cosine"]


class Cosine(TopK):
    """Cosine router: h_e = cos(P x, w_e) / tau, in a space of few dimensions, with a learned temperature.

    Args:
        top_k: of `TopK`; the paper's 1.
        projection_dim: the width of the space; None takes the paper's E / 2, at least 2.
        temperature: tau at first, learned through its logarithm.
        min_temperature: what the learned temperature may not fall below.
        **options: of `TopK`, without router_bias.

    Raises:
        ValueError: for impossible temperatures or widths.

    Source: Chi et al. 2022 (On the Representation Collapse of Sparse Mixture of Experts), section 3.2.
    """

    in_review: ClassVar[bool] = False
    source: ClassVar[str] = "Chi et al. 2022"

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        top_k: int = 1,
        projection_dim: int | None = None,
        temperature: float = 0.07,
        min_temperature: float = 0.01,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        if not 0 < min_temperature <= temperature:
            raise ValueError(f"min_temperature {min_temperature} must be positive and at most {temperature}")
        if options.get("router_bias"):
            raise ValueError("cosine: a cosine takes no router_bias; use topk")
        if projection_dim is not None and projection_dim < 1:
            raise ValueError(f"projection_dim {projection_dim} must be at least 1")
        self.projection_dim = max(2, num_experts // 2) if projection_dim is None else projection_dim
        super().__init__(dim, num_experts, top_k=top_k, device=device, dtype=dtype, **options)
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(num_experts, self.projection_dim, **place))
        self.projection = nn.Parameter(torch.empty(self.projection_dim, dim, **place))
        self.log_temperature = nn.Parameter(torch.full((1,), math.log(temperature), **place))
        self.min_temperature = min_temperature
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw orthogonal directions of the experts and of the space."""
        with torch.no_grad():
            for weight in (self.weight, getattr(self, "projection", None)):
                if weight is not None:
                    weight.copy_(nn.init.orthogonal_(torch.empty_like(weight, dtype=torch.float32)))

    def project(self, x: Tensor, context: Context) -> Tensor:
        """The cosines (T, E) of projected tokens and experts, divided by the temperature."""
        x = F.normalize(F.linear(self.prepare(x), self.projection.to(x.dtype)), dim=-1)
        experts = F.normalize(self.weight.to(x.dtype), dim=-1)
        temperature = self.log_temperature.to(x.dtype).exp().clamp_min(self.min_temperature)
        return F.linear(x, experts) / temperature
