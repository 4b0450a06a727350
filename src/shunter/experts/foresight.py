"""A layer's hidden states to the experts that later layers will choose: their routers, applied ahead of time.

A block adds little to the residual stream, so a later layer's router mostly chooses for the hidden states of this
layer what it will choose for its own (Eliseev and Mazur 2023, section 3.2, a layer ahead). How often that is so is
counted, by how many layers ahead.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Foresight"]

LAYERS = 4  # ahead: reading an expert from a disk takes as long as a few layers' products with one token

# Of a batch, evenly spaced: foreseen experts are as many as memory has room for, however many tokens choose.
TOKENS = 64

# Of what is read ahead, the share that should be right: wrong reads cost the disk, and an expert its place.
TRUSTED = 1 / 3

MEMORY = 0.99  # what was right before counts this much less with every expert foreseen


class Foresight:
    """Which experts the next layers will choose, and how often that was right.

    Args:
        routers: by layer, in the order in which they run, the matrix (E, d) of its router and its bias (E,) or None;
            None where choices are no linear map of hidden states. They are copied.

    Attributes:
        made, right: by layers ahead (the first counts nothing), experts that were foreseen and not in memory, and those
            of them that were chosen.
    """

    def __init__(self, routers: Sequence[tuple[Tensor, Tensor | None] | None]) -> None:
        self.made, self.right = [0] * (LAYERS + 1), [0] * (LAYERS + 1)
        self._recently_made, self._recently_right = [2.0] * (LAYERS + 1), [1.0] * (LAYERS + 1)
        # By layer the distance to the first layer foreseen, how many are, their matrices and biases in one.
        self._next: list[tuple[int, int, Tensor, Tensor | None] | None] = []
        with torch.no_grad(), torch.inference_mode(False):
            runs = _runs(routers)
            for layer in range(len(routers)):
                ahead = range(layer + 1, min(layer + LAYERS, len(routers) - 1) + 1)
                first = next((other for other in ahead if other in runs), None)
                if first is None:
                    self._next.append(None)
                    continue
                start, weight, bias = runs[first]
                count, place = min(len(weight) - first + start, ahead[-1] - first + 1), first - start
                rows = weight[place : place + count].flatten(0, 1)
                biases = None if bias is None else bias[place : place + count].flatten()
                self._next.append((first - layer, count, rows, biases))

    def foresee(self, layer: int, x: Tensor, top_k: int) -> list[tuple[int, list[int]]]:
        """By layers ahead, the nearest first, the experts that a router chooses for hidden states, most chosen first.

        Args:
            layer: that is given the hidden states.
            x: (…, d).
            top_k: experts a token.
        """
        found = self._next[layer]
        if found is None or not x.numel() or x.shape[-1] != found[2].shape[1]:
            return []
        distance, count, weight, bias = found
        with torch.no_grad():
            tokens = x.reshape(-1, x.shape[-1])
            tokens = tokens[:: -(-len(tokens) // TOKENS)].to(weight.dtype)
            logits = F.linear(tokens, weight, bias).view(len(tokens), count, -1)
            chosen = logits.topk(min(top_k, logits.shape[-1]), -1).indices
        if len(tokens) == 1:
            return list(enumerate(chosen[0].tolist(), distance))
        by_layer = []
        for number, own in enumerate(chosen.transpose(0, 1).flatten(1), distance):
            times = own.bincount()
            order = times.argsort(descending=True)
            by_layer.append((number, order[: int((times > 0).sum())].tolist()))
        return by_layer

    def judge(self, distance: int, right: bool) -> None:
        """Count an expert that was foreseen so many layers ahead, and then chosen or not."""
        self.made[distance] += 1
        self.right[distance] += right
        self._recently_made[distance] = MEMORY * self._recently_made[distance] + 1
        self._recently_right[distance] = MEMORY * self._recently_right[distance] + right

    def share_right(self, distance: int) -> float:
        """Of late the share of experts, not in memory when foreseen so far ahead, that were chosen; 1/2 at first."""
        return self._recently_right[distance] / self._recently_made[distance]

    def trusted(self, distance: int) -> bool:
        """Whether it is worth reading what is foreseen so many layers ahead."""
        return self.share_right(distance) >= TRUSTED


def _runs(
    routers: Sequence[tuple[Tensor, Tensor | None] | None],
) -> dict[int, tuple[int, Tensor, Tensor | None]]:
    """By layer with a router, the first layer of its run of routers alike, and their matrices and biases stacked."""

    def kind(found: tuple[Tensor, Tensor | None] | None) -> object:
        return found and (found[0].shape, found[0].dtype, found[1] is None)

    runs: dict[int, tuple[int, Tensor, Tensor | None]] = {}
    start = 0
    while start < len(routers):
        end = start + 1
        while end < len(routers) and kind(routers[end]) == kind(routers[start]):
            end += 1
        alike = [found for found in routers[start:end] if found is not None]
        if alike:
            biases = [bias for _, bias in alike if bias is not None]
            stacked = torch.stack([weight.detach() for weight, _ in alike])
            run = start, stacked, torch.stack([bias.detach() for bias in biases]) if biases else None
            runs |= dict.fromkeys(range(start, end), run)
        start = end
    return runs
