"""Decided globally: one assignment of all tokens, balanced by construction."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..context import Context
from ..routing import Routing
from .assignment import balanced_assignment, transport_plan
from .base import largest
from .linear import LinearRouter

__all__ = ["Base", "Sinkhorn"]


class _Balanced(LinearRouter):
    """In training an assignment of all tokens, in evaluation each token's own best experts."""

    chooses: ClassVar[str] = "global"
    top_k: int

    def choose(self, logits: Tensor, context: Context) -> Routing:
        """The assignment of the real tokens in training; the best experts of each row in evaluation."""
        if self.training:
            real = logits.detach() if context.mask is None else logits.detach()[context.mask]
            index = self.solve(real)
            if context.mask is not None:
                index = index.new_zeros(logits.shape[0], self.top_k).masked_scatter(context.mask[:, None], index)
        else:
            index = largest(logits.detach(), self.top_k)
        scores = logits.sigmoid() if self.top_k == 1 else logits.softmax(-1)
        return Routing.from_topk(index, scores.gather(1, index), self.num_experts, check=False)

    def solve(self, logits: Tensor) -> Tensor:
        """The experts (T, k) of real tokens with logits (T, E)."""
        raise NotImplementedError

    @property
    def leak(self) -> str | None:
        """In training, always: the tokens are assigned together. In evaluation a token decides by itself."""
        if self.training:
            return "in training all tokens are assigned together, so later tokens decide on earlier ones"
        return super().leak


class Base(_Balanced):
    """BASE layer: in training the assignment of tokens to experts with the largest sum of scores, all experts equal.

    The assignment is exact (`shunter.routers.assignment.balanced_assignment`); each expert gets T / E tokens, at most
    one less or none where E does not divide T. In evaluation each token takes its best expert. There is no balance
    loss. The weight is sigmoid(h): the paper's sigma f(x) + (1 - sigma) x with its residual experts f(x) = x + g(x) is
    x + sigma g(x), which is what a layer in a residual block computes.

    In the paper g starts at zero, and so the layer as the identity: `sparsify(init="paper")` and `MoE.init_as_in_paper`
    begin so, everything else with experts as of any router.

    Args:
        centroid_gain: the expert centroids begin orthogonal, with this norm; the paper's code 0.1.
        **options: of `LinearRouter` and `Router`.

    Raises:
        ValueError: for a centroid_gain that is not positive.

    Source: Lewis et al. 2021 (BASE Layers: Simplifying Training of Large, Sparse Models), section 3.
    """

    source: ClassVar[str] = "Lewis et al. 2021"

    def __init__(self, dim: int, num_experts: int, *, centroid_gain: float = 0.1, **options: Any) -> None:
        if centroid_gain <= 0:
            raise ValueError(f"centroid_gain {centroid_gain} must be positive")
        self.centroid_gain = centroid_gain
        super().__init__(dim, num_experts, **options)

    def draw_experts(self, up: Tensor, down: Tensor) -> None:
        """The map down begins at zero."""
        down.zero_()

    def reset_parameters(self) -> None:
        """Draw orthogonal centroids."""
        with torch.no_grad():
            start = torch.empty_like(self.weight, dtype=torch.float32)
            self.weight.copy_(nn.init.orthogonal_(start, gain=self.centroid_gain))

    def solve(self, logits: Tensor) -> Tensor:
        """The exact balanced assignment."""
        return balanced_assignment(logits)[:, None]


class Sinkhorn(_Balanced):
    """S-BASE routing: in training the experts with the most mass in an entropic optimal transport plan.

    The plan is balanced exactly, its largest entries only nearly. In evaluation each token takes its best logits. The
    weights are sigmoids for k = 1, the softmax over all experts for more.

    Args:
        top_k: k.
        epsilon: the strength of the entropy term, in units of the logits.
        iterations: the most rounds of Sinkhorn's scaling.
        tolerance: rounds end once every expert's share is within this of 1/E, relatively.
        **options: of `LinearRouter` and `Router`.

    Raises:
        ValueError: for top_k outside of 1 to E, epsilon or tolerance that is not positive, less than 1 iteration.

    Source: Clark et al. 2022 (Unified Scaling Laws for Routed Language Models), section 3.1; the weights are those of
    public code, as the paper does not give them.
    """

    source: ClassVar[str] = "Clark et al. 2022"

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        top_k: int = 1,
        epsilon: float = 1.0,
        iterations: int = 100,
        tolerance: float = 0.01,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_experts, **options)
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k {top_k} must be between 1 and num_experts, {num_experts}")
        if epsilon <= 0 or tolerance <= 0 or iterations < 1:
            raise ValueError(
                f"epsilon {epsilon} and tolerance {tolerance} must be positive, iterations {iterations} at least 1"
            )
        self.top_k = top_k
        self.epsilon, self.iterations, self.tolerance = epsilon, iterations, tolerance

    def solve(self, logits: Tensor) -> Tensor:
        """The k largest entries of each row of the transport plan."""
        return largest(transport_plan(logits, self.epsilon, self.iterations, self.tolerance), self.top_k)
