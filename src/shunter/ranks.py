"""Counts of this rank's tokens in, counts of all ranks' tokens out."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["is_first_rank", "num_ranks", "sum_over_ranks"]


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
