"""How the work is cut into programs: sizes of tiles from the sizes of the problem, never from timings at run time.

So results have the same bits in every run, and nothing is timed, allocated or awaited in a first call.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ....routing import Routing

__all__ = ["Blocks", "expert_tiles", "product_blocks", "tile_rows"]

# The largest tile (rows, columns of all its accumulators, depth of a step) by the bytes of an element. Accumulators of
# two bytes' tile take half of the registers of 8 warps; wider elements are multiplied without tensor cores.
LARGEST = {2: (128, 256, 64), 4: (64, 128, 32), 8: (32, 64, 16)}

# The least that Triton's dot takes in each direction.
SMALLEST = 16

# An H100's shared memory, for the interpreter, which has none.
SHARED_MEMORY = 227 * 1024


class Blocks(NamedTuple):
    """A program's tile of a product: m rows, n columns in each accumulator, steps of k; and how it is launched."""

    m: int
    n: int
    k: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, int]:
        """The launch's keyword arguments."""
        sizes = {"BLOCK_M": self.m, "BLOCK_N": self.n, "BLOCK_K": self.k}
        return sizes | {"num_warps": self.warps, "num_stages": self.stages}


def tile_rows(triples: int, experts: int, dtype: torch.dtype) -> int:
    """The rows of a tile: about what an expert has on average, so that few are empty and few weights are read twice."""
    return _fit(-(-triples // experts), LARGEST[dtype.itemsize][0])


def product_blocks(m: int, n: int, like: Tensor, accumulators: int = 1) -> Blocks:
    """The blocks of a product with m rows (of a tile, or in all) and n columns, with operands like a tensor.

    Args:
        like: of the operands' dtype and device.
        accumulators: how many products with the same rows a program computes.
    """
    size = like.element_size()
    most_m, most_n, k = LARGEST[size]
    m, n = _fit(m, most_m), _fit(n, most_n // accumulators)
    step = (m + accumulators * n) * k * size
    # What the pipeline takes besides its operands fits into the eighth that is left.
    stages = min(4, max(1, _shared_memory(like.device) * 7 // 8 // step))
    return Blocks(m, n, k, warps=8 if m * n * accumulators >= 128 * 128 else 4, stages=stages)


def expert_tiles(routing: Routing, rows: int) -> Tensor:
    """(3, M) int64: each tile's expert, and its triples [start, end); a tile has `rows`, an expert's last one fewer.

    How many tiles there are is known to the device alone. M = N // rows + min(E, N) is enough for any routing; the
    tiles that are not needed come last, and have a start that is not before their end.
    """
    triples, experts = routing.token.numel(), routing.num_experts
    first = routing.offsets[:-1]
    tiles = (routing.counts + (rows - 1)) // rows
    ends = tiles.cumsum(0)
    tile = torch.arange(triples // rows + min(experts, triples), device=first.device)
    expert = torch.searchsorted(ends, tile, right=True).clamp_(max=experts - 1)
    start = first[expert] + rows * (tile - (ends - tiles)[expert])
    return torch.stack([expert, start, routing.offsets[expert + 1]])


def _fit(size: int, most: int) -> int:
    """The power of two that holds a size, within what a tile may have."""
    return min(most, max(SMALLEST, 1 << (size - 1).bit_length() if size > 0 else 0))


def _shared_memory(device: torch.device) -> int:
    if device.type != "cuda":
        return SHARED_MEMORY
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)
