"""Which experts each modality uses: from a layer's decisions and the modality of its tokens to shares and collapse."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..metrics import effective_experts
from .specialisation import label_counts, label_shares

__all__ = ["COLLAPSED", "ModalityUse", "modality_use"]

COLLAPSED = 1.5  # effective experts: fewer is a modality that has one expert to itself, or nearly


@dataclass(frozen=True)
class ModalityUse:
    """How one modality uses the experts of a layer.

    Args:
        shares: (E,) of its assignments those of each expert; zeros where it has none.
        effective: how many evenly used experts have the same entropy, 1 to E; 0 where it has no assignment.
        unserved: the share of its tokens that no expert takes.
    """

    shares: list[float]
    effective: float
    unserved: float

    @property
    def collapsed(self) -> bool:
        """Whether it is left with one expert, or nearly, or with none."""
        return self.effective < COLLAPSED


def modality_use(index: Tensor, modality: Tensor, num_experts: int, num_modalities: int) -> list[ModalityUse]:
    """How each modality uses the experts of a layer.

    Args:
        index: (T, k) integer experts of each token, -1 for none.
        modality: (T,) int64 in [0, num_modalities), -1 where it is not known.
        num_experts: E.
        num_modalities: how many there are.
    """
    counts = label_counts(index, modality, num_experts, num_modalities)
    shares = label_shares(counts)
    alone = (index < 0).all(-1)
    found = []
    for number in range(num_modalities):
        mine = modality == number
        served = bool(counts[number].any())
        effective = float(effective_experts(counts[number].to(torch.float64))) if served else 0.0
        unserved = float(alone[mine].double().mean()) if bool(mine.any()) else 0.0
        found.append(ModalityUse(shares[number].tolist(), effective, unserved))
    return found
