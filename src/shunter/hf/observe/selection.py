"""The one step that routers share: a top-k over the scores of the experts, seen and replaced where it is taken.

What transformers' families do before it (softmax, sigmoid, biases, groups) and after it (gather, normalise, scale)
differs from one to the next and stays their own code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...context import Context

__all__ = ["EachForward", "ForcedSelection", "Selection"]


class Selection(TorchFunctionMode):
    """While entered, sees the top-k over experts.

    Args:
        where: the name of the layer, for errors.
        num_experts: E.

    Attributes:
        scores: (T, at least E), what was ranked; None until it was.
        index: (T, k) int64, the experts that were taken.
    """

    def __init__(self, where: str, num_experts: int) -> None:
        super().__init__()
        self.where, self.num_experts = where, num_experts
        self.scores: Tensor | None = None
        self.index: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in (torch.topk, Tensor.topk) or (out := self.topk(*args, **kwargs)) is None:
            return func(*args, **kwargs)
        return torch.return_types.topk(out)

    def topk(
        self, input: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
    ) -> tuple[Tensor, Tensor] | None:
        """The values and indices of a top-k; None where it is not over experts."""
        if input.dim() != 2 or dim not in (-1, 1) or input.shape[1] < self.num_experts:
            return None
        values, self.index = input.topk(k, sorted=sorted)
        self.scores = input.detach()
        return values, self.index


class ForcedSelection(Selection):
    """Takes the experts that are given, or its own in the same way.

    A recomputation that is given what its forward chose by itself saves the same tensors as the forward, which
    activation checkpointing asks for.

    Args:
        where: the name of the layer, for errors.
        num_experts: E.
        given: `experts` (T, k) for the T tokens, and which are `free` of them; None leaves the choice.

    Raises:
        ValueError: where the given experts do not fit the scores.
    """

    def __init__(self, where: str, num_experts: int, given: Context | None) -> None:
        super().__init__(where, num_experts)
        self.free = None if given is None else given.free
        self.experts = None if given is None else given.experts

    def topk(
        self, input: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
    ) -> tuple[Tensor, Tensor] | None:
        """The values and indices of a top-k, replaced where it is over experts or over groups of them."""
        given = self.experts
        if input.dim() != 2 or dim not in (-1, 1) or (given is not None and len(input) != len(given)):
            return None
        scores = input.detach()
        width = scores.shape[1]
        if width >= self.num_experts:
            self.scores, self.index = scores, scores.topk(k, sorted=sorted).indices
            if given is not None:
                self.index = self._take(self.index, given)
            return input.gather(1, self.index), self.index
        if self.num_experts % width:
            return None
        if given is not None:
            scores = self._prefer_groups(scores, k, given)
        index = scores.topk(k, sorted=sorted).indices
        return input.gather(1, index), index

    def _take(self, own: Tensor, given: Tensor) -> Tensor:
        if given.shape != own.shape:
            raise ValueError(f"{self.where} takes {own.shape[1]} experts a token; {given.shape[1]} are given")
        if self.scores is not None and given.numel() and int(given.max()) >= self.scores.shape[1]:
            raise ValueError(
                f"{self.where} has experts 0 to {self.scores.shape[1] - 1}; expert {int(given.max())} is given"
            )
        return given if self.free is None else torch.where(self.free[:, None], own, given)

    def _prefer_groups(self, scores: Tensor, k: int, given: Tensor) -> Tensor:
        """Scores of groups with those that hold a given expert above all others."""
        group = given.clamp(0, self.num_experts - 1) // (self.num_experts // scores.shape[1])
        needed = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, group, True)
        if self.free is not None:
            needed &= ~self.free[:, None]
        if bool((needed.sum(1) > k).any()):
            token = int((needed.sum(1) > k).nonzero()[0])
            raise ValueError(
                f"{self.where} takes its experts from {k} of {scores.shape[1]} groups; token {token} is given experts "
                f"{given[token].tolist()}, from more"
            )
        return scores.masked_fill(needed, torch.inf)


class EachForward:
    """Enters a selection around each forward of a module, until `remove`.

    Args:
        module: whose forwards.
        enter: makes the selection from the arguments and keyword arguments of a forward.
        leave: called after a forward with the selection and the module's output; not after one that raised.
        outermost: enter before the selections that others enter, so that these see the experts that it gives.
    """

    def __init__(
        self,
        module: nn.Module,
        enter: Callable[[tuple[Any, ...], dict[str, Any]], Selection],
        leave: Callable[[Selection, Any], None],
        outermost: bool = False,
    ) -> None:
        self._enter, self._leave = enter, leave
        self._entered: list[Selection] = []
        self._handles = [
            module.register_forward_pre_hook(self._before, with_kwargs=True, prepend=outermost),
            module.register_forward_hook(self._after, always_call=True),
        ]

    def remove(self) -> None:
        """Leave the module as it was, after Ctrl-C in a forward too."""
        for handle in self._handles:
            handle.remove()
        while self._entered:
            self._entered.pop().__exit__(None, None, None)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        selection = self._enter(args, kwargs)
        selection.__enter__()
        self._entered.append(selection)

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self._entered:  # a hook before this one raised
            return
        selection = self._entered.pop()
        selection.__exit__(None, None, None)
        if output is not None:
            self._leave(selection, output)
