"""Split: the decisions of a router in, the same with some experts replaced by two that share what the one had, out."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..context import NO_CONTEXT, Context
from ..routing import Routing
from .base import Router

__all__ = ["Split"]


class Split(Router):
    """A router whose experts have been split: the gate of one goes to two by a sigmoid of the hidden state.

    Expert E, the new one, takes sigmoid(v x) of what the router gives its parent, which keeps the rest. With a copy of
    the parent as expert E the layer computes what it did before, for any v; v is drawn, so that the two, which hear
    more of some tokens than of others, part in training. Both are computed: a token of a split expert costs one expert
    more. Losses, capacity and state are those of the router inside.

    Args:
        inner: the router as it was.
        parents: of each new expert, in order, the expert that was split.

    Raises:
        ValueError: for a router whose layer is no sum over its routing, or that learns by reward or by two passes, and
            a parent that is none of the experts before.

    Source: Caccia et al. 2021 (On Anytime Learning at Macroscale), growing mixtures of experts: a leaf of the tree of
    gates becomes a node.
    """

    source: ClassVar[str] = "Caccia et al. 2021"
    chooses: ClassVar[str] = "tokens"

    def __init__(self, inner: Router, parents: list[int]) -> None:
        if inner.learns_by_reward or inner.passes > 1 or inner.kind.compute is not Router.compute:
            raise ValueError(f"{inner.kind.__name__} cannot be split: choose a router that gives weights to experts")
        for i, parent in enumerate(parents):
            if not isinstance(parent, int) or not 0 <= parent < inner.num_experts + i:
                raise ValueError(f"there is no expert {parent}: they are 0 to {inner.num_experts + i - 1}")
        super().__init__(inner.dim, inner.num_experts + len(parents))
        self.inner, self.parents = inner, list(parents)
        vars(self)["chooses"], self.top_k = inner.chooses, inner.top_k
        place = next(inner.parameters(), torch.zeros(()))
        self.weight = nn.Parameter(torch.empty(len(parents), inner.dim, device=place.device, dtype=place.dtype))
        nn.init.normal_(self.weight, std=inner.dim**-0.5)

    @property
    def innermost(self) -> Router:
        """The router inside."""
        return self.inner

    @property
    def required(self) -> tuple[str, ...]:
        """What the router inside needs."""
        return self.inner.required

    @property
    def leak(self) -> str | None:
        """As of the router inside."""
        return self.inner.leak

    @property
    def score_width(self) -> int:
        """The columns of the router inside, and one of each split."""
        return self.inner.score_width + len(self.parents)

    @property
    def experts_per_token(self) -> float:
        """Those of the router inside, as if tokens went evenly to its experts."""
        return self.inner.experts_per_token * self.num_experts / self.inner.num_experts

    @property
    def advances(self) -> bool:
        """As of the router inside."""
        return self.inner.advances

    def score(self, x: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        """The logits of the router inside, and v x of each split: (T, E + splits)."""
        logits = self.inner.score(x, context)
        with torch.autocast(x.device.type, enabled=False):
            return torch.cat([logits, F.linear(x.to(logits.dtype), self.weight.to(logits.dtype))], dim=-1)

    def probs(self, logits: Tensor) -> Tensor:
        """The probabilities of the router inside, shared out."""
        return self._share(self.inner.probs(self._own(logits)), logits)

    def choose(self, logits: Tensor, context: Context) -> Routing:
        """The routing of the router inside, within its capacity, shared out."""
        inner = self.inner.assign(self._own(logits), context)
        shared = self._shared(inner, logits)
        return shared if inner.dropped is None else replace(shared, dropped=self._shared(inner.dropped, logits))

    def losses(self, logits: Tensor, routing: Routing, context: Context = NO_CONTEXT) -> dict[str, Tensor]:
        """Those of the router inside."""
        return self.inner.losses(self._own(logits), self._merged(routing), context)

    def observe(self, logits: Tensor, routing: Routing, context: Context = NO_CONTEXT) -> None:
        """Tell the router inside."""
        self.inner.observe(self._own(logits), self._merged(routing), context)

    def update(self) -> None:
        """Advance the router inside."""
        self.inner.update()

    def expect_steps(self, steps: int) -> None:
        """Tell the router inside."""
        self.inner.expect_steps(steps)

    def _own(self, logits: Tensor) -> Tensor:
        return logits[:, : self.inner.score_width]

    def _share(self, matrix: Tensor, logits: Tensor) -> Tensor:
        """(T, E) of the router inside as (T, E + splits)."""
        columns = list(matrix.unbind(1))
        for parent, v in zip(self.parents, logits[:, self.inner.score_width :].unbind(1), strict=True):
            columns.append(columns[parent] * torch.sigmoid(v))
            columns[parent] = columns[parent] * torch.sigmoid(-v)
        return torch.stack(columns, 1)

    def _shared(self, routing: Routing, logits: Tensor) -> Routing:
        mask = self._share(routing.with_weight(torch.ones_like(routing.weight)).dense(), logits) != 0
        return Routing.from_dense(self._share(routing.dense(), logits), mask=mask, check=False)

    def _merged(self, routing: Routing) -> Routing:
        """The routing over the experts of the router inside."""
        matrix = routing.dense()
        columns = list(matrix.unbind(1))
        while len(columns) > self.inner.num_experts:
            new = columns.pop()
            parent = self.parents[len(columns) - self.inner.num_experts]
            columns[parent] = columns[parent] + new
        merged = Routing.from_dense(torch.stack(columns, 1), check=False)
        return merged if routing.dropped is None else replace(merged, dropped=self._merged(routing.dropped))
