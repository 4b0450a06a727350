"""Fixed: the expert of a token is a function of its vocabulary id, decided before training."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..routing import Routing
from .base import NO_CONTEXT, Context, Router

__all__ = ["Hash"]


class Hash(Router):
    """Hash layer: a fixed table sends each vocabulary id to one expert, with weight 1; nothing is learned.

    The table is a buffer: it is saved, loaded and moved with the layer.

    Args:
        vocab_size: the number of ids.
        frequencies: (vocab_size,) how often each id occurs in the training text. Given, the table is balanced: ids are
            dealt out by falling frequency to the expert with the least so far, which balances tokens, not ids. Left
            out, the table is random.
        seed: of the random table.
        **options: of `Router`.

    Raises:
        ValueError: where vocab_size is missing, or frequencies do not fit it.

    Source: Roller et al. 2021 (Hash Layers for Large Sparse Models), section 3.
    """

    chooses: ClassVar[str] = "fixed"
    needs: ClassVar[tuple[str, ...]] = ("token_ids",)
    source: ClassVar[str] = "Roller et al. 2021"
    unsaved_options: ClassVar[tuple[str, ...]] = ("frequencies",)

    table: Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        vocab_size: int | None = None,
        frequencies: Tensor | Sequence[float] | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_experts, **options)
        if vocab_size is None or vocab_size < 1:
            raise ValueError(f"hash needs vocab_size=, the number of token ids; got {vocab_size}")
        if frequencies is None:
            generator = torch.Generator("cpu").manual_seed(seed)
            table = torch.randint(num_experts, (vocab_size,), generator=generator, device="cpu")
        else:
            table = _balanced_table(torch.as_tensor(frequencies, dtype=torch.float64), num_experts)
            if table.numel() != vocab_size:
                raise ValueError(f"hash: {table.numel()} frequencies for {vocab_size} token ids; give one for each id")
        self.register_buffer("table", table.to(device))

    def score(self, x: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        """Zeros (T, E): nothing is learned."""
        return x.new_zeros(x.shape[0], self.num_experts, dtype=torch.promote_types(x.dtype, torch.float32))

    def choose(self, logits: Tensor, context: Context) -> Routing:
        """The table's expert of each token id, with weight 1."""
        ids = context.token_ids
        assert ids is not None
        if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= self.table.numel()):
            bad = int(ids[(ids < 0) | (ids >= self.table.numel())][0])
            raise ValueError(f"hash: token id {bad} is outside the table; ids are 0 to {self.table.numel() - 1}")
        index = self.table[ids.reshape(-1)]
        return Routing.from_topk(index[:, None], torch.ones_like(logits[:, :1]), self.num_experts, check=False)

    def extra_repr(self) -> str:
        """E and the size of the table, for `print(model)`."""
        return f"num_experts={self.num_experts}, vocab_size={self.table.numel()}"


def _balanced_table(frequencies: Tensor, num_experts: int) -> Tensor:
    if frequencies.dim() != 1 or not bool((frequencies >= 0).all()):
        raise ValueError("hash: frequencies must be one non-negative number for each token id")
    table = torch.empty(frequencies.numel(), dtype=torch.int64)
    loads = [(0.0, expert) for expert in range(num_experts)]
    for token in frequencies.argsort(descending=True, stable=True).tolist():
        load, expert = heapq.heappop(loads)
        table[token] = expert
        heapq.heappush(loads, (load + float(frequencies[token]), expert))
    return table
