"""Counts of this rank's tokens in, counts of all ranks' tokens out; and how many ranks a token's experts are on."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["is_first_rank", "num_ranks", "rows_to_ranks", "sum_over_ranks"]


def sum_over_ranks(*counts: Tensor, group: dist.ProcessGroup | None = None) -> None:
    """Add up counts over the ranks that hold other tokens, in place and in one reduction; alone it does nothing.

    Args:
        counts: tensors of one dtype and device, of the same shapes on every rank.
        group: the ranks whose tokens are different ones: with tensor, pipeline or expert parallelism not all of them;
            None for all ranks.
    """
    if not counts or not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return
    flat = torch.cat([count.reshape(-1) for count in counts])
    dist.all_reduce(flat, group=group)
    for count, total in zip(counts, flat.split([count.numel() for count in counts]), strict=True):
        count.copy_(total.reshape(count.shape))


def num_ranks() -> int:
    """W, how many processes work together; 1 for one that is alone."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first_rank() -> bool:
    """Whether this process speaks for all: it is the first, or alone."""
    return not (dist.is_available() and dist.is_initialized() and dist.get_rank())


def rows_to_ranks(top_k: int, experts: int, ranks: int, eligible: int | None = None) -> float:
    """How many different ranks the k different choices of a token are on, in the mean, where all are equally likely.

    n (1 - p), where p is the chance that no choice is among the E / P experts of a rank: drawn without repetition from
    those of n ranks.

    Args:
        top_k: k.
        experts: E, which the ranks hold in equal parts.
        ranks: P.
        eligible: n, how many ranks the token may choose from; None: all.
    """
    n = min(ranks, eligible or ranks)
    held = experts / ranks
    missed = math.prod(max(0.0, 1 - held / (n * held - i)) for i in range(min(top_k, math.ceil(n * held))))
    return n * (1 - missed)
