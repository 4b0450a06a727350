"""Fixed by chance: any expert with equal probability, and a consistency loss that makes experts agree."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from ..context import Context
from ..routing import Routing
from .fixed import Fixed

__all__ = ["Thor"]

Level = Literal["batch", "sentence", "token"]


class Thor(Fixed):
    """Stochastic experts: in training one random expert for the whole batch, in evaluation one for each token.

    Each step runs the model twice, each layer drawing anew, and the loss is that of both passes plus alpha times their
    disagreement, `shunter.losses.consistency_loss`. `shunter train` and `shunter compare` do so; elsewhere the training
    loop has to. Evaluation draws too: seed it, or average several passes.

    Args:
        consistency_loss: alpha; the paper's 5, which its code leaves at 1.
        level: what shares one draw in training: "batch" (the paper), "sentence" or "token".
        eval_level: the same in evaluation: "token" (the paper's code, by default) or "sentence" (its other mode), or
            "batch".
        **options: of `Router`, without a capacity.

    Raises:
        ValueError: for an unknown level, or a capacity, which a batch of one expert could not fit.

    Source: Zuo et al. 2021 (Taming Sparsely Activated Transformer with Stochastic Experts), section 3. It is two passes
    of one expert each, not two experts for each input as the review's section 4 has it.
    """

    source: ClassVar[str] = "Zuo et al. 2021"
    passes: ClassVar[int] = 2

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        level: Level = "batch",
        eval_level: Level = "token",
        consistency_loss: float = 5.0,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_experts, **options)
        for value in (level, eval_level):
            if value not in get_args(Level):
                raise ValueError(f"level {value!r} is unknown; choose from {', '.join(get_args(Level))}")
        if self.capacity_factor:
            raise ValueError("thor sends a whole batch to one expert: a capacity would drop it; leave it out")
        self.level = level
        self.consistency_loss = consistency_loss
        self.eval_level = eval_level

    @property
    def required(self) -> tuple[str, ...]:
        """The sequence of each token, where sentences draw."""
        return ("sequence",) if "sentence" in (self.level, self.eval_level) else ()

    def choose(self, logits: Tensor, context: Context) -> Routing:
        """One draw for the batch, for each sequence, or for each token."""
        level = self.level if self.training else self.eval_level
        if level == "token":
            index = self._draw(logits.shape[0], logits.device)
        elif level == "sentence":
            numbers, sequence = self.require(context, "sequence").unique(return_inverse=True)
            index = self._draw(numbers.numel(), logits.device)[sequence]
        else:
            index = self._draw(1, logits.device).expand(logits.shape[0])
        return Routing.from_topk(index[:, None], logits.new_ones(index.numel(), 1), self.num_experts, check=False)

    def _draw(self, number: int, device: torch.device) -> Tensor:
        return torch.randint(self.num_experts, (number,), device=device)
