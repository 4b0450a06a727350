"""After the review: tokens choose by sigmoids, and a bias that no gradient moves keeps the experts balanced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor

from .. import losses
from ..context import Context
from ..routing import Routing
from . import rules
from .base import largest
from .topk import TopK

__all__ = ["DeepSeek"]


class DeepSeek(TopK):
    """DeepSeek-V3 routing: sigmoid scores, a selection bias, groups, renormalised and scaled weights.

    The layer's `num_shared_experts` adds the shared experts of the paper.

    Args:
        top_k: k; the paper's 8 of 256.
        expert_groups, top_groups: of `TopK`; the paper's 8 and 4. 1 does not divide.
        scaling_factor: of `TopK`; the paper's 2.5.
        bias_update_rate: of `TopK`; the paper's 0.001. `update` moves the bias once a step.
        sequence_balance_loss: coefficient of the load balancing loss within each sequence; the paper's 1e-4. It counts
            the top k of the scores alone, without bias and groups, whatever is chosen (equation 18). It is in force
            where the context says the sequences; the layer does so for inputs (batch, length, d).
        load_balancing_loss: of `Router`; the paper has none over the batch.
        **options: of `TopK`.

    Source: DeepSeek-AI 2024 (DeepSeek-V3), section 2.1.2, equations 12 to 20; Wang et al. 2024 (auxiliary-loss-free
    load balancing).
    """

    in_review: ClassVar[bool] = False
    needs: ClassVar[tuple[str, ...]] = ("sequence",)
    source: ClassVar[str] = "DeepSeek-AI 2024"

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        top_k: int = 8,
        expert_groups: int = 1,
        top_groups: int | None = None,
        scaling_factor: float = 2.5,
        bias_update_rate: float = 0.001,
        sequence_balance_loss: float = 1e-4,
        load_balancing_loss: float = 0.0,
        **options: Any,
    ) -> None:
        options = {
            "score_function": "sigmoid",
            "selection_bias": True,
            "group_score": "top2_sum",
            "norm_eps": 1e-20,
            "renormalize": "before_drop",
            **options,
        }
        super().__init__(
            dim,
            num_experts,
            top_k=top_k,
            expert_groups=expert_groups,
            top_groups=top_groups,
            scaling_factor=scaling_factor,
            bias_update_rate=bias_update_rate,
            load_balancing_loss=load_balancing_loss,
            **options,
        )
        self.coefficients["sequence_balance_loss"] = sequence_balance_loss

    def loss_terms(self, logits: Tensor, routing: Routing, context: Context) -> dict[str, Callable[[], Tensor]]:
        """The balance within sequences, and the losses of `TopK`."""

        def sequence_balance() -> Tensor:
            scores = rules.SCORE_FUNCTIONS[self.score_function](logits.detach())
            index = largest(scores, self.top_k)
            bare = Routing.from_topk(index, scores.gather(1, index), self.num_experts, check=False)
            if context.mask is not None:
                bare = bare.masked(context.mask[bare.token])
            sequence = self.require(context, "sequence")
            return losses.load_balancing_loss(self.probs(logits), bare, context.mask, "mean", sequence)

        return {**super().loss_terms(logits, routing, context), "sequence_balance_loss": sequence_balance}
