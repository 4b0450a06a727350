"""After the review: no token is sent anywhere; experts compute slots, each a mixture of all tokens of a sequence."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..context import NO_CONTEXT, Context
from ..routing import Routing
from .base import Router

__all__ = ["SoftMoE"]


class SoftMoE(Router):
    """Soft MoE: the one router whose matrix is dense.

    Every expert has S slots in every sequence. A slot's input is the mean of the sequence's tokens, weighted by a
    softmax over tokens (dispatch); a token's output is the mean of all slots' outputs, weighted by a softmax over slots
    (combine). The experts compute E S rows a sequence, however many tokens it has. The `Routing` of the layer is dense:
    every expert of every token, with the sum of the token's combine weights of its slots. It tells reports who is heard
    by whom; experts do not compute from it.

    Args:
        slots_per_expert: S.
        normalize: whether the hidden states and the slots' parameters are divided by their lengths, the latter then
            multiplied by a learned scale (section 2.3).
        **options: of `Router`, without a capacity.

    Raises:
        ValueError: for a capacity, or less than one slot.

    Source: Puigcerver et al. 2023 (From Sparse to Soft Mixtures of Experts), section 2.
    """

    chooses: ClassVar[str] = "slots"
    in_review: ClassVar[bool] = False
    source: ClassVar[str] = "Puigcerver et al. 2023"
    needs: ClassVar[tuple[str, ...]] = ("sequence",)

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        slots_per_expert: int = 1,
        normalize: bool = True,
        capacity_factor: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        if capacity_factor:
            raise ValueError(
                f"soft_moe: capacity_factor {capacity_factor} would drop tokens, and no token is sent to an expert; "
                "leave it out, and set slots_per_expert"
            )
        super().__init__(dim, num_experts, **options)
        if slots_per_expert < 1:
            raise ValueError(f"soft_moe: slots_per_expert {slots_per_expert} must be at least 1")
        self.slots_per_expert = slots_per_expert
        self.top_k = num_experts
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.randn(self.score_width, dim, **place) * dim**-0.5)
        self.scale = nn.Parameter(torch.ones(1, **place)) if normalize else None

    @property
    def score_width(self) -> int:
        """E S: expert e has the columns e S to e S + S - 1."""
        return self.num_experts * self.slots_per_expert

    def score(self, x: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        """The logits (T, E S) of x (T, d), for dispatch and combine alike, in at least float32, autocast off."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            weight = self.weight.to(x.dtype)
            if self.scale is not None:
                x, weight = F.normalize(x, dim=-1), F.normalize(weight, dim=-1) * self.scale.to(x.dtype)
            return F.linear(x, weight)

    def probs(self, logits: Tensor) -> Tensor:
        """The combine weights (T, E) of each token, summed over the slots of an expert."""
        return logits.softmax(-1).unflatten(-1, (self.num_experts, self.slots_per_expert)).sum(-1)

    def choose(self, logits: Tensor, context: Context) -> Routing:
        """Every expert of every token."""
        probs = self.probs(logits)
        return Routing.from_dense(probs, mask=torch.ones_like(probs, dtype=torch.bool), check=False)

    def compute(
        self,
        x: Tensor,
        logits: Tensor,
        routing: Routing,
        context: Context,
        experts: Callable[[Tensor, Routing], Tensor],
    ) -> Tensor:
        """The output (T, d): C experts(D^T x), for every sequence by itself; zeros at padding.

        D (T, E S) is the softmax of the logits over the real tokens of a sequence, C (T, E S) that over the slots. The
        mixtures are taken in the precision of the logits.
        """
        rows, real = _by_sequence(self.require(context, "sequence"), context)
        logits = logits[rows].masked_fill(~real[..., None], -torch.inf)  # (B, L, E S)
        tokens = torch.where(real[..., None], x[rows].to(logits.dtype), 0)
        with torch.autocast(x.device.type, enabled=False):
            dispatch = logits.softmax(1)
            # A sequence without a real token has slots of zeros.
            dispatch = torch.where(real.any(1)[:, None, None], dispatch, 0)
            slots = (dispatch.mT @ tokens).to(x.dtype)
        batch = slots.shape[0]
        expert = torch.arange(self.score_width, device=x.device) // self.slots_per_expert
        index = expert.repeat(batch)[:, None]
        one_each = Routing.from_topk(index, logits.new_ones(index.shape), self.num_experts, check=False)
        heard = experts(slots.flatten(0, 1), one_each)
        with torch.autocast(x.device.type, enabled=False):
            combine = torch.where(real[..., None], logits, 0).softmax(-1)
            mixed = combine @ heard.unflatten(0, (batch, self.score_width)).to(combine.dtype)
        # The padding of the grid goes to a row that is cut off.
        place = torch.where(real, rows, x.shape[0]).flatten()
        out = mixed.new_zeros(x.shape[0] + 1, mixed.shape[-1]).index_add(0, place, mixed.flatten(0, 1))
        return out[:-1].to(heard.dtype)

    @property
    def experts_per_token(self) -> float:
        """1, as where a sequence has as many slots as tokens; `experts_for` knows the length of the sequences."""
        return 1.0

    def experts_for(self, sequence_length: int) -> float:
        """E S / L: the rows that experts compute for a sequence of L tokens, over its tokens."""
        return self.score_width / sequence_length

    @property
    def flops_per_token(self) -> float:
        """Those of the logits, of the slots' inputs and of the tokens' outputs, which are as many each."""
        return 3 * super().flops_per_token

    @property
    def leak(self) -> str:
        """Always: a slot is a mixture of all tokens of its sequence."""
        return "every slot is a mixture of all tokens of its sequence, later ones included"

    def extra_repr(self) -> str:
        """d, E and S, for `print(model)`."""
        return f"dim={self.dim}, num_experts={self.num_experts}, slots_per_expert={self.slots_per_expert}"


def _by_sequence(sequence: Tensor, context: Context) -> tuple[Tensor, Tensor]:
    """The rows (B, L) int64 of the tokens of each sequence, in order, and where there is a real one (B, L) bool."""
    mask = context.mask
    if context.in_rows and context.shape is not None:  # B and L depend on no data, so that such a layer is exported
        count, *sizes = context.shape if len(context.shape) > 1 else (1, *context.shape)
        rows = torch.arange(sequence.shape[0], device=sequence.device).reshape(count, math.prod(sizes))
        return rows, torch.ones_like(rows, dtype=torch.bool) if mask is None else mask[rows]
    numbers, inverse = sequence.unique(return_inverse=True)
    order = inverse.argsort(stable=True)
    size = torch.bincount(inverse, minlength=numbers.numel())
    longest = int(size.max()) if size.numel() else 0
    column = torch.arange(longest, device=sequence.device)
    there = column < size[:, None]
    rows = torch.zeros(there.shape, dtype=torch.int64, device=sequence.device)
    rows[there] = order
    return rows, there if mask is None else there & mask[rows]
