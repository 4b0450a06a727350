"""Tokens choose: the vision router, with fixed noise, raw weights and, where asked, batch priority."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import losses
from ..context import NO_CONTEXT, Context
from ..routing import Routing
from .topk import TopK

__all__ = ["VMoE"]


class VMoE(TopK):
    """V-MoE routing: softmax of noisy logits, then the top k, weighted by the raw probabilities.

    The logits are (T, 2 E): clean and noisy; noise is for training only. Batch prioritized routing is
    `capacity_order="batch"`: when slots are few, the tokens with the highest probability in the batch get them, which
    lets a capacity factor far below 1 serve in evaluation; it leaks in causal models.

    The experts of the authors' code all start from one draw: `sparsify(init="paper")` and `MoE.init_as_in_paper` draw
    them so, everything else each by itself.

    Args:
        top_k: k; the paper's 2.
        noise_std: standard deviation of the noise on the logits; None takes the paper's 1 / E.
        renormalize: of `TopK`; "no" is the paper's.
        capacity_factor, capacity_formula: of `Router`; the paper's 1.05, and its code's rounding.
        importance_loss: coefficient of the importance loss, on the clean probabilities; the paper's 0.005.
        load_loss: coefficient of the load loss; the paper's 0.005. Its threshold is the k-th largest noisy logit, the
            expert's own included, unlike Shazeer's. With `group_size` both are means over the groups, as the paper's.
        load_balancing_loss: of `Router`; the paper has none.
        init_scale: of `LinearRouter`; 1 is the code's, a standard deviation of 1 / sqrt(d).
        **options: of `TopK`, `LinearRouter` and `Router`.

    Raises:
        ValueError: for noise_std that is not positive.

    Source: Riquelme et al. 2021 (Scaling Vision with Sparse Mixture of Experts), sections 2 and 4, appendix A.
    """

    source: ClassVar[str] = "Riquelme et al. 2021"

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        top_k: int = 2,
        noise_std: float | None = None,
        capacity_factor: float | None = 1.05,
        capacity_formula: str = "vmoe",
        importance_loss: float = 0.005,
        load_loss: float = 0.005,
        load_balancing_loss: float = 0.0,
        init_scale: float = 1.0,
        **options: Any,
    ) -> None:
        if noise_std is not None and noise_std <= 0:
            raise ValueError(f"noise_std {noise_std} must be positive: the load loss divides by it")
        options.setdefault("renormalize", "no")
        options.update(importance_loss=importance_loss, load_balancing_loss=load_balancing_loss, init_scale=init_scale)
        options.update(capacity_factor=capacity_factor, capacity_formula=capacity_formula)
        super().__init__(dim, num_experts, top_k=top_k, **options)
        self.noise_std = 1 / num_experts if noise_std is None else noise_std
        self.coefficients["load_loss"] = load_loss

    @property
    def score_width(self) -> int:
        """2 E: clean and noisy logits."""
        return 2 * self.num_experts

    def score(self, x: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        """Clean and noisy logits (T, 2 E) of x (T, d), in at least float32."""
        clean = super().score(x, context)
        noisy = clean + self.noise_std * torch.randn_like(clean) if self.training else clean
        return torch.cat([clean, noisy], dim=-1)

    def draw_experts(self, up: Tensor, down: Tensor) -> None:
        """Every expert as the first."""
        for weight in (up, down):
            weight.copy_(weight[:1].clone())

    def probs(self, logits: Tensor) -> Tensor:
        """The softmax (T, E) of the noisy logits."""
        return logits.chunk(2, dim=-1)[1].softmax(-1)

    def choose(self, logits: Tensor, context: Context) -> Routing:
        """The k most probable experts of each row, with noise."""
        return super().choose(logits.chunk(2, dim=-1)[1], context)

    def loss_terms(self, logits: Tensor, routing: Routing, context: Context) -> dict[str, Callable[[], Tensor]]:
        """Importance and z-loss of the clean logits, the load, and the losses of `Router`."""
        clean, noisy = logits.chunk(2, dim=-1)
        return {
            **super().loss_terms(logits, routing, context),
            "importance_loss": lambda: losses.importance_loss(clean.softmax(-1), context.mask, self.groups(logits)),
            "load_loss": lambda: losses.load_loss(
                clean, noisy, self.noise_std, self.top_k, context.mask, False, self.groups(logits)
            ),
            "z_loss": lambda: losses.z_loss(clean, context.mask),
        }
