"""The forwards of a generation: where in its sequences each begins, and whether its rows stay the same sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..tokens import arguments, takes_tokens

__all__ = ["Starts", "noting_starts"]

# What a cache does when rows become others: beams, a choice of rows, each several times.
_REORDERING = ("reorder_cache", "batch_select_indices", "batch_repeat_interleave")


class Starts:
    """Where the forwards under way begin.

    Attributes:
        exchanged: whether rows were seen to become other sequences, or may have become (beam search).
    """

    def __init__(self) -> None:
        self.exchanged = False
        self._under_way: dict[str, tuple[int, torch.Size, bool]] = {}
        self._before: dict[nn.Module, Tensor] = {}
        self._real: Tensor | None = None

    def of(self, layer: str, mask: Tensor | None, count: int) -> tuple[list[int] | None, bool]:
        """Of the forward under way: how many real tokens come before each of its `count` sequences; if it has a cache.

        The numbers are -1 where the cache does not say or holds what was not seen, None where the forward is not of a
        model that takes tokens.

        Args:
            layer: always the same.
            mask: (T,) bool, its real tokens.
            count: how many sequences it has.
        """
        past, shape, cached = self._under_way.get(layer, (0, torch.Size(), False))
        if len(shape) != 2 or (mask is not None and mask.numel() != shape.numel()):
            return None, cached
        before = torch.zeros(shape[0], 0, dtype=torch.bool) if self._real is None or not past else self._real
        if past < 0 or before.shape[0] != shape[0] or before.shape[1] < past:
            return [-1] * count, cached
        present = torch.ones(shape, dtype=torch.bool) if mask is None else mask.reshape(shape).cpu()
        self._real = torch.cat([before[:, :past], present], 1)
        starts: list[int] | None = before[:, :past].sum(1).tolist()
        if count != shape[0]:  # rows of several sequences each
            starts = None if past else [0] * count
        return starts, cached

    def note(self, under: list[str], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take what the arguments of a forward of the model around some layers say."""
        given = arguments(module, args, kwargs)
        tokens = next((given[n] for n in ("input_ids", "inputs_embeds") if isinstance(given.get(n), Tensor)), None)
        cache, shape = _cache(given), torch.Size() if tokens is None else tokens.shape[:2]
        past = _length(cache)
        if tokens is not None and past == 0:
            self._compare(module, tokens)
        for name in under:
            self._under_way[name] = past, shape, cache is not None

    def _compare(self, module: nn.Module, tokens: Tensor) -> None:
        """Where a whole sequence is run again, as without a cache, see whether each row is still the same."""
        before, self._before[module] = self._before.get(module), tokens.detach()
        if before is not None and before.shape[0] == tokens.shape[0] and before.shape[1] < tokens.shape[1]:
            # Rows that began alike may have changed places unseen.
            alike = len(torch.unique(before, dim=0)) < len(before)
            self.exchanged |= alike or not torch.equal(tokens[:, : before.shape[1]], before)

    def reordering(self, reorder: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Note that rows become others, and let the cache have them so."""
        self.exchanged = True
        return reorder(*args, **kwargs)


def _cache(given: dict[str, Any]) -> Any:
    """The cache among a forward's arguments, by its names over the years; None without."""
    return next(
        (given[name] for name in ("cache", "past_key_values", "cache_params") if given.get(name) is not None), None
    )


def _length(cache: Any) -> int:
    """How many columns a cache holds; -1 where it does not say."""
    if cache is None:
        return 0
    length = getattr(cache, "get_seq_length", None)
    return -1 if length is None else int(length())


@contextmanager
def noting_starts(model: nn.Module, layers: list[str]) -> Iterator[Starts]:
    """While the context lasts, where the forwards of the models around some layers begin."""
    starts = Starts()
    with ExitStack() as stack:

        def note(under: list[str], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            starts.note(under, module, args, kwargs)
            cache = _cache(arguments(module, args, kwargs))
            for name in _REORDERING:
                if hasattr(cache, name) and name not in vars(cache):
                    vars(cache)[name] = partial(starts.reordering, getattr(cache, name))
                    stack.callback(vars(cache).pop, name, None)

        for path, module in model.named_modules():
            if takes_tokens(module):
                under = [name for name in layers if not path or name == path or name.startswith(path + ".")]
                stack.callback(module.register_forward_pre_hook(partial(note, under), with_kwargs=True).remove)
        yield starts
