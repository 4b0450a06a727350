"""A number of rows and of those to train on to an order: random, pass after pass, a function of a seed."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["passes"]


def passes(rows: int, count: int, generator: torch.Generator) -> Tensor:
    """(count,) int64: the numbers of all rows in random order, again in another, until there are as many.

    All memory is taken at first: where it does not suffice, that is an error then, and not a process that grows.

    Args:
        rows: how many there are.
        count: how many are wanted; the last pass is drawn whole.
        generator: of the orders.
    """
    found = torch.empty(-(-count // rows), rows, dtype=torch.int64)
    for one in found:
        one.copy_(torch.randperm(rows, generator=generator))
    return found.flatten()[:count]
