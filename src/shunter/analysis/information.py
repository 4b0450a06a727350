"""How much a label of a token tells about its experts: entropy and mutual information in bits, against a null."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..metrics import load_entropy

__all__ = ["Information", "entropy", "information", "mutual_information"]

DENSE_TABLE = 1 << 22  # cells up to which counting in a table beats sorting
TOO_SPARSE = 0.9  # of the entropy: a null above it leaves nothing to measure


def entropy(counts: Tensor) -> float:
    """The entropy in bits of the distribution that non-negative counts or shares of any shape are proportional to."""
    return float(load_entropy(counts[counts > 0].to(torch.float64))) / math.log(2)


def mutual_information(joint: Tensor) -> float:
    """The mutual information in bits of rows and columns of a table (A, B) of counts or shares; 0 for an empty one."""
    return max(0.0, entropy(joint.sum(0)) + entropy(joint.sum(1)) - entropy(joint))


@dataclass(frozen=True)
class Information:
    """What a label tells about the expert, in bits an assignment.

    Args:
        bits: the mutual information of the sample, which chance alone makes positive.
        null: its mean where the labels are shuffled over the tokens.
        null_max: the largest of the shuffles.
        entropy: of the expert (given what is known already): the most that a label can tell.
        tokens: how many tokens have the label.
    """

    bits: float
    null: float
    null_max: float
    entropy: float
    tokens: int

    @property
    def adjusted(self) -> float | None:
        """The part that the label decides: 0 at the null, 1 where the label tells the expert.

        None where the sample cannot say: the experts carry no entropy, or the null is above nine tenths of it.
        """
        if self.entropy < 1e-9 or self.null > TOO_SPARSE * self.entropy:
            return None
        return (self.bits - self.null) / (self.entropy - self.null)

    @property
    def beyond_chance(self) -> bool:
        """Whether no shuffle tells as much."""
        return self.bits > self.null_max


def information(
    index: Tensor,
    label: Tensor,
    num_experts: int,
    *,
    given: Tensor | None = None,
    shuffles: int = 8,
    seed: int = 0,
) -> Information:
    """Mutual information of a token's label and its experts, each assignment counted once, with a shuffled null.

    Args:
        index: (T, k) integer experts of each token, -1 for none.
        label: (T,) integer label of each token, -1 where it is not known: the token is left out.
        num_experts: E.
        given: (T,) integer, what is known besides: the information is then conditional on it, and the shuffles stay
            within tokens that have it in common. -1 leaves the token out.
        shuffles: of the null.
        seed: of the shuffles, so that the same input gives the same null.

    Source: Fedus et al. 2022 (A Review of Sparse Expert Models), section 8 asks the question; the adjustment for chance
    is that of Vinh et al. 2010 (Information theoretic measures for clusterings comparison), with a sampled null.
    """
    keep = label >= 0 if given is None else (label >= 0) & (given >= 0)
    index, label = index[keep].to(torch.int64), _compact(label[keep])
    group = torch.zeros_like(label) if given is None else _compact(given[keep])
    chosen = index >= 0
    token, expert = chosen.nonzero()[:, 0], index[chosen]
    if not len(token):
        return Information(0.0, 0.0, 0.0, 0.0, int(keep.sum()))
    expert_in_group = group[token] * num_experts + expert
    fixed = _key_entropy(expert_in_group) - _key_entropy(group[token])
    cell = _compact(expert_in_group)
    cells, groups = int(cell.max()) + 1, int(group.max()) + 1

    def bits(label: Tensor) -> float:
        label_in_group = label * groups + group
        return fixed + _key_entropy(label_in_group[token]) - _key_entropy(label[token] * cells + cell)

    generator = torch.Generator().manual_seed(seed)
    home = group.argsort(stable=True)
    null = []
    for _ in range(shuffles):
        random = torch.randperm(len(label), generator=generator)
        shuffled = torch.empty_like(label)
        shuffled[home] = label[random[group[random].argsort(stable=True)]]
        null.append(bits(shuffled))
    mean = max(0.0, sum(null) / max(1, shuffles))
    return Information(max(0.0, bits(label)), mean, max([0.0, *null]), max(0.0, fixed), len(label))


def _compact(label: Tensor) -> Tensor:
    return label.unique(return_inverse=True)[1]


def _key_entropy(key: Tensor) -> float:
    """The entropy of the distribution of non-negative integers."""
    if int(key.max()) < DENSE_TABLE:
        return entropy(torch.bincount(key))
    return entropy(key.unique(return_counts=True)[1])
