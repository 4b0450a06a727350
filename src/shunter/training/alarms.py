"""The losses and loads of a training's steps in, alarms out: a spike, a dead expert, a layer that collapses."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import torch
from torch import Tensor

from ..metrics import dead, effective_experts

__all__ = ["LoadAlarm", "SpikeAlarm"]

ROUNDING = 1e-6  # of an entropy: where a token takes all experts, their even use is the limit itself


class SpikeAlarm:
    """A number of each step (a loss, the logarithm of a gradient norm) that leaps off the line of those before it.

    Args:
        window: over how many steps the line is fitted, by least squares.
        deviations: how many standard deviations of the steps from their line are a spike.
        least: the smallest standard deviation that is believed, as a share of the line's height.
    """

    def __init__(self, window: int = 32, deviations: float = 8.0, least: float = 0.01) -> None:
        self.deviations, self.least = deviations, least
        self.recent: deque[float] = deque(maxlen=window)

    def note(self, value: float) -> float | None:
        """Take the next step's number; the line's height there, where the number is a spike."""
        recent = self.recent
        limit, height = math.inf, 0.0
        if len(recent) == recent.maxlen:
            n = len(recent)
            x = torch.arange(n, dtype=torch.float64) - (n - 1) / 2
            y = torch.tensor(list(recent), dtype=torch.float64)
            slope = float((x * y).sum() / (x * x).sum())
            height = float(y.mean()) + slope * (n + 1) / 2
            residual = y - y.mean() - slope * x
            spread = max(float(residual.square().sum() / (n - 2)) ** 0.5, self.least * abs(height))
            limit = height + self.deviations * spread
        recent.append(min(value, limit))  # a spike does not hide the next one
        return height if value > limit else None


class LoadAlarm:
    """Experts without tokens, and layers whose tokens gather on few experts, over the last steps.

    Args:
        patience: how many steps.
    """

    def __init__(self, patience: int = 25) -> None:
        self.patience = patience
        self.recent: dict[str, deque[Tensor]] = {}
        self.known: set[tuple[str, str]] = set()

    def note(self, name: str, load: Tensor, top_k: float) -> list[str]:
        """Take the load (E,) of a layer's step: each fault that is new, in words; again only if it was well in between.

        Args:
            name: of the layer.
            load: counts.
            top_k: how many experts a token takes.
        """
        recent = self.recent.setdefault(name, deque(maxlen=self.patience))
        recent.append(load.double().cpu())
        if len(recent) < self.patience:
            return []
        total = torch.stack(tuple(recent)).sum(0)
        if float(total.mean()) < 100:
            return []  # too few tokens to tell
        found = self._faults(name or "the layer", total, top_k)
        new = [text for kind, text in found.items() if (name, kind) not in self.known]
        self.known = {(n, kind) for n, kind in self.known if n != name} | {(name, kind) for kind in found}
        return new

    def _faults(self, where: str, load: Tensor, top_k: float) -> dict[str, str]:
        num_experts, found = load.numel(), {}
        effective = float(effective_experts(load))
        if effective < (top_k + (num_experts - top_k) / 8) * (1 - ROUNDING):
            found["collapse"] = (
                f"{where} is collapsing: in the last {self.patience} steps its tokens used {effective:.1f} of "
                f"{num_experts} experts effectively (the exponential of the load's entropy), with {top_k:g} a token"
            )
        for expert in dead(load).nonzero().flatten().tolist():
            state = "all but dead" if float(load[expert]) else "dead"
            found[f"dead {expert}"] = (
                f"{where}: expert {expert} is {state}: {int(load[expert])} of {int(load.sum())} choices in the last "
                f"{self.patience} steps"
            )
        return found

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training goes on with, as JSON."""
        recent = {name: [load.tolist() for load in loads] for name, loads in self.recent.items()}
        return {"recent": recent, "known": sorted(map(list, self.known))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        for name, loads in state["recent"].items():
            rows = [torch.tensor(load, dtype=torch.float64) for load in loads]
            self.recent[name] = deque(rows, maxlen=self.patience)
        self.known = {(name, kind) for name, kind in state["known"]}
