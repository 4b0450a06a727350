"""A parameter to memory for its gradient: that of a gradient which nothing holds any more, else fresh.

A training loop drops the gradients of a step and asks for as many bytes in the next one. Fresh memory of this size
comes from the kernel page by page, which for many experts takes longer than their products. So what was lent stays
here and is lent again once the gradient in it is gone, to any parameter of that size: gradients that live one after
the other, as where each layer's are reduced and dropped, share memory. It goes with the parameter that it was last
lent for.
"""

from __future__ import annotations

import threading
import weakref

import numpy as np
import torch
from torch import Tensor

from ...cpu import with_huge_pages

__all__ = ["gradient_of"]

# From so many bytes on memory comes from the kernel and goes back there at once; glibc keeps what is smaller.
_MAPPED = 2**25


class _Block:
    def __init__(self, size: int) -> None:
        self.memory = with_huge_pages(torch.empty(size, dtype=torch.uint8)).numpy()
        self.lent: weakref.ref[np.ndarray] | None = None  # lives as long as any tensor with this memory
        self.owner: weakref.ref[Tensor] | None = None

    def free(self) -> bool:
        return self.lent is None or self.lent() is None


_BLOCKS: list[_Block] = []
_LOCK = threading.RLock()  # a collection of garbage inside of it may drop an owner


def gradient_of(parameter: Tensor) -> Tensor:
    """Uninitialised memory, contiguous, of the parameter's shape and dtype, which no other tensor shares."""
    size = parameter.nbytes
    if size < _MAPPED or not parameter.is_leaf:
        return with_huge_pages(torch.empty_like(parameter, memory_format=torch.contiguous_format))
    with _LOCK:
        block = next((block for block in _BLOCKS if block.memory.nbytes == size and block.free()), None)
        if block is None:
            _BLOCKS.append(block := _Block(size))
        lent = block.memory[:]
        block.lent = weakref.ref(lent)
        block.owner = weakref.ref(parameter, lambda _: _forget(block))
    return torch.from_numpy(lent).view(parameter.dtype).view(parameter.shape)


def _forget(block: _Block) -> None:
    with _LOCK:
        _BLOCKS.remove(block)
