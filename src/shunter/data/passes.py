"""A number of items and of those to train on to an order: pass after pass, each in an order of its own."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["in_passes"]


def in_passes(items: int, count: int, generator: torch.Generator) -> Tensor:
    """(count,) int64: the numbers of all items in random order, again in another, until there are as many."""
    passes = -(-count // items)
    return torch.cat([torch.randperm(items, generator=generator) for _ in range(passes)])[:count]
