"""Predictions with their outcomes to how far a model's confidence is its accuracy: reliability by bin, and its error.

Naeini et al. 2015; Fedus et al. 2022, section 3.2.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["BINS", "Calibration", "calibrations"]

BINS = 15


@dataclass(frozen=True)
class Calibration:
    """Sums over the predictions of each of B bins of equal width in confidence, float64 (B,).

    Bin b holds the confidences in (b/B, (b+1)/B], the first 0 too.

    Args:
        count: how many predictions.
        confidence: the sum of their confidences.
        correct: how many were right.
        variance: the sum of p (1 - p) over the confidences p: the variance of `correct`, were p its probability.
    """

    count: Tensor
    confidence: Tensor
    correct: Tensor
    variance: Tensor

    @classmethod
    def of(cls, confidence: Tensor, correct: Tensor, bins: int = BINS) -> Calibration:
        """From predictions: confidence (N,) in [0, 1] and whether each was right (N,).

        Raises:
            ValueError: for a confidence that is no probability, and shapes that differ.
        """
        if confidence.shape != correct.shape or confidence.dim() != 1:
            raise ValueError(
                f"Calibration.of: confidence and correct must be (N,) alike, not {tuple(confidence.shape)} and "
                f"{tuple(correct.shape)}"
            )
        p, right = confidence.detach().double().cpu(), correct.detach().double().cpu()
        if not bool(((p >= 0) & (p <= 1)).all()):
            raise ValueError("Calibration.of: a confidence must be between 0 and 1")
        place = ((p * bins).ceil().long() - 1).clamp(0, bins - 1)
        sums = [torch.zeros(bins, dtype=torch.float64) for _ in range(4)]
        for total, values in zip(sums, (torch.ones_like(p), p, right, p * (1 - p)), strict=True):
            total.index_add_(0, place, values)
        return cls(*sums)

    def __add__(self, other: Calibration) -> Calibration:
        return Calibration(
            self.count + other.count,
            self.confidence + other.confidence,
            self.correct + other.correct,
            self.variance + other.variance,
        )

    @property
    def error(self) -> float:
        """The expected calibration error, sum_b n_b / n |accuracy_b - confidence_b|; NaN without predictions."""
        total = float(self.count.sum())
        return float((self.correct - self.confidence).abs().sum()) / total if total else math.nan

    @property
    def noise(self) -> float:
        """What `error` is on average of as many predictions whose confidences are right, by the normal approximation.

        An error near it is no sign of bad calibration.
        """
        total = float(self.count.sum())
        return float((self.variance * 2 / math.pi).sqrt().sum()) / total if total else math.nan

    def as_json(self) -> dict[str, Any]:
        """Numbers for people and pictures: of all predictions, and by bin, None in a bin without any."""
        total = float(self.count.sum())
        known = [
            (float(n), float(p), float(k)) for n, p, k in zip(self.count, self.confidence, self.correct, strict=True)
        ]
        return {
            "predictions": int(total),
            "error": self.error,
            "noise": self.noise,
            "confidence": float(self.confidence.sum()) / total,
            "accuracy": float(self.correct.sum()) / total,
            "bins": [
                {"predictions": int(n), "confidence": p / n if n else None, "accuracy": k / n if n else None}
                for n, p, k in known
            ],
        }


def calibrations(parts: Iterable[tuple[str, Tensor, Tensor]], bins: int = BINS) -> dict[str, Calibration]:
    """The calibration of a classifier's likeliest class, by group.

    Args:
        parts: of the predictions, in any order: the group's name, logits (N, V), and labels (N,) int64, negative where
            there is none.
        bins: B.
    """
    found: dict[str, Calibration] = {}
    for name, logits, labels in parts:
        known = labels >= 0
        confidence, guess = logits[known].float().softmax(-1).max(-1)
        part = Calibration.of(confidence.clamp(0, 1), guess == labels[known], bins)
        found[name] = found[name] + part if name in found else part
    return found
