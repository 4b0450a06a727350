"""Router saturation: the share of routing decisions that two checkpoints have in common."""

from __future__ import annotations

from torch import Tensor

from ...metrics import expert_load

__all__ = ["chance_saturation", "saturation"]


def saturation(before: Tensor, after: Tensor) -> float:
    """Of the experts that tokens have after, the share that the same tokens had before, 1 for the same checkpoint.

    Args:
        before: (T, k) experts of each token at the earlier checkpoint, different within a row, -1 for none.
        after: (T, k) of the same tokens at the later one.

    Raises:
        ValueError: where the two are not of the same tokens.

    Source: Muennighoff et al. 2024 (OLMoE), section 4.1, "router saturation".
    """
    if len(before) != len(after):
        raise ValueError(f"saturation: {len(before)} tokens before and {len(after)} after; they must be the same")
    same = (after[:, :, None] == before[:, None, :]) & (after >= 0)[:, :, None]
    return float(same.sum()) / max(1, int((after >= 0).sum()))


def chance_saturation(before: Tensor, after: Tensor, num_experts: int) -> float:
    """The saturation of two checkpoints that send as much to each expert, but choose independently of each other."""
    had, has = expert_load(before, num_experts), expert_load(after, num_experts)
    return float((had * has).sum() / (len(before) * has.sum()).clamp_min(1))
