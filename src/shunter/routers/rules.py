"""The parts that top-k rules are made of: score functions and group limits. Pure functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from .base import largest

__all__ = ["SCORE_FUNCTIONS", "GroupScore", "ScoreFunction", "check_groups", "limit_to_groups"]

ScoreFunction = Literal["softmax", "sigmoid", "sqrt_softplus"]

GroupScore = Literal["max", "top2_sum"]


def _sqrt_softplus(logits: Tensor) -> Tensor:
    # Without the clamp a logit whose softplus underflows would have a gradient of 0 times infinity.
    return F.softplus(logits).clamp_min(torch.finfo(logits.dtype).tiny).sqrt()


# Logits (..., E) to scores (..., E).
SCORE_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
    "sqrt_softplus": _sqrt_softplus,
}


def check_groups(num_experts: int, top_k: int, groups: int, top_groups: int, group_score: str) -> None:
    """Raise ValueError where E experts cannot be limited to the best `top_groups` of `groups` runs for k choices."""
    if groups < 1 or num_experts % groups:
        raise ValueError(f"expert_groups {groups} must divide num_experts, {num_experts}")
    if not 1 <= top_groups <= groups:
        raise ValueError(f"top_groups {top_groups} must be between 1 and expert_groups, {groups}")
    if top_k > top_groups * (num_experts // groups):
        raise ValueError(
            f"top_k {top_k} is more than the {top_groups * (num_experts // groups)} experts of top_groups {top_groups}"
        )
    if group_score not in get_args(GroupScore):
        raise ValueError(f"group_score {group_score!r} is unknown; choose from {', '.join(get_args(GroupScore))}")


def limit_to_groups(
    ranked: Tensor, groups: int, top_groups: int, group_score: GroupScore, outside_score: float | None = None
) -> Tensor:
    """The scores ranked (T, E) with outside_score, None being -inf, outside the best `top_groups` of `groups` runs.

    Source: DeepSeek-AI 2024 (DeepSeek-V2, section 2.1.2) for "max"; DeepSeek-AI 2024 (DeepSeek-V3, section 2.1.2) for
    "top2_sum".
    """
    runs = ranked.unflatten(-1, (groups, -1))
    if group_score == "max":
        of_group = runs.amax(-1)
    else:
        of_group = runs.topk(min(2, runs.shape[-1]), dim=-1).values.sum(-1)
    allowed = torch.zeros_like(of_group, dtype=torch.bool).scatter(-1, largest(of_group, top_groups), True)
    outside = -torch.inf if outside_score is None else outside_score
    return runs.masked_fill(~allowed[..., None], outside).flatten(-2)
