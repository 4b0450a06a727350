"""What the experts of a layer serve: from the experts and a label of each token to shares and characteristic labels."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["characteristic", "label_counts", "label_shares"]

TOP = 8  # labels of an expert
MIN_COUNT = 5  # times that an expert was sent a label, or two experts met: less is left to chance


def label_counts(index: Tensor, label: Tensor, num_experts: int, num_labels: int) -> Tensor:
    """(L, E) int64: how many assignments the tokens of each label have with each expert.

    Args:
        index: (T, k) integer experts of each token, -1 for none.
        label: (T,) int64 label of each token in [0, L), -1 where it is not known.
        num_experts: E.
        num_labels: L.
    """
    known = (label >= 0)[:, None] & (index >= 0)
    cell = (label[:, None] * num_experts + index)[known]
    return torch.bincount(cell, minlength=num_labels * num_experts).reshape(num_labels, num_experts)


def label_shares(counts: Tensor) -> Tensor:
    """(L, E) float64: of the assignments of each label the share of each expert; a row without any is zero.

    Args:
        counts: (L, E), of `label_counts`.
    """
    return counts.to(torch.float64) / counts.sum(1, keepdim=True).clamp_min(1)


def characteristic(counts: Tensor, text: Tensor, top: int = TOP) -> list[list[tuple[int, float, float]]]:
    """The labels that are most each expert's own: the largest terms of the divergence of what it is sent from the text.

    Args:
        counts: (L, E) int64, of `label_counts`.
        text: (L,) int64, how often each label is in the text.
        top: how many labels of an expert at most.

    Returns:
        For each expert (label, share of what the expert is sent, lift = that share over the label's share of the text),
        the first the most characteristic. Labels that an expert saw fewer than `MIN_COUNT` times, or not above their
        share of the text, are left out.
    """
    expected = text / text.sum().clamp_min(1)
    counts = counts.T
    share = counts / counts.sum(1, keepdim=True).clamp_min(1)
    lift = torch.where(counts >= MIN_COUNT, share / expected.clamp_min(1e-12), 0)
    terms = share * lift.clamp_min(1).log()
    found = []
    for e, row in enumerate(terms):
        best = row.argsort(descending=True, stable=True)[:top].tolist()
        found.append([(t, float(share[e, t]), float(lift[e, t])) for t in best if row[t] > 0])
    return found
