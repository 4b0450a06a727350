"""The load of a training model's experts in, an alteration of its layers out, once that load has drifted.

drift = OnDrift(fit_capacity, trigger=drifted(0.1)).attach(model)
for batch in data:
    ...
    optimizer.step()
    drift.step()
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..moe import RoutedLayer, moe_layers
from ..ranks import sum_over_ranks
from ..recomputation import recomputing

__all__ = ["OnDrift", "Trigger", "drifted", "fit_capacity"]

Trigger = Callable[[Tensor, Tensor], bool]
"""Whether to alter a layer: its load (E,) of the last steps, and that for which it was altered last, at first even."""

Alteration = Callable[[nn.Module, dict[str, Tensor]], object]
"""What to do with a model, given by the name of each layer to alter its load (E,)."""


class OnDrift:
    """Alter layers of a model, between two steps of its training, whose load a trigger finds drifted.

    A load is how many tokens asked for each expert, those that capacity dropped included, in training forwards, over
    all ranks: every rank alters alike. What an alteration may do: `fit_capacity`; `shunter.parallel.place`, which moves
    experts among the ranks; or the user's own.

    Args:
        alter: takes the model and the loads (E,) by layer.
        trigger: takes the load and the one before; see `drifted`.
        every: over how many steps loads are added up, before the trigger is asked.

    Attributes:
        alterations: how often each layer was altered.

    Raises:
        ValueError: where `every` is less than 1.

    Source: Kossmann et al. 2022 (RECOMPILE): a trigger and an alteration that the user sets, tried each step.
    """

    def __init__(self, alter: Alteration, *, trigger: Trigger | None = None, every: int = 1) -> None:
        if every < 1:
            raise ValueError(f"{type(self).__name__}: every {every} must be at least 1 step")
        self.alter, self.every = alter, every
        self.trigger = drifted() if trigger is None else trigger
        self.alterations: dict[str, int] = {}
        self._attached: ExitStack | None = None
        self._begin_anew({})

    def _begin_anew(self, layers: dict[str, RoutedLayer]) -> None:
        self._layers = layers
        self._loads = {name: torch.zeros(layer.num_experts, dtype=torch.int64) for name, layer in layers.items()}
        self._before = {name: torch.ones_like(load) for name, load in self._loads.items()}
        self._steps = 0
        self.alterations = dict.fromkeys(layers, 0)

    def attach(self, model: nn.Module) -> Self:
        """Listen to the layers of a model from now on; returns itself.

        Raises:
            RuntimeError: where it listens already.
            UserError: where the model has none of Shunter's layers.
        """
        if self._attached is not None:
            raise RuntimeError(f"{type(self).__name__}: attached already; call detach() first")
        layers = moe_layers(model)
        if not layers:
            raise UserError(f"{type(self).__name__}: {type(model).__name__} has no layers whose load could drift")
        self._model = model
        self._begin_anew(dict(layers))
        with ExitStack() as stack:
            for name, layer in layers.items():
                stack.callback(layer.register_forward_hook(self._hear(name)).remove)
            self._attached = stack.pop_all()
        return self

    def detach(self) -> None:
        """Stop listening."""
        if self._attached is not None:
            self._attached.close()
            self._attached = None

    def _hear(self, name: str) -> Callable[..., None]:
        def heard(layer: RoutedLayer, *_: Any) -> None:
            if layer.training and torch.is_grad_enabled() and not recomputing() and layer.routing is not None:
                demand = layer.routing.demand[: layer.num_experts]  # not null experts
                self._loads[name] = self._loads[name].to(demand.device) + demand

        return heard

    def step(self) -> list[str]:
        """End an optimizer step; returns the names of the layers that were altered.

        Raises:
            RuntimeError: where it listens to no model.
        """
        if self._attached is None:
            raise RuntimeError(f"{type(self).__name__}: attach(model) first")
        self._steps += 1
        if self._steps < self.every:
            return []
        loads = self._loads
        sum_over_ranks(*loads.values())
        self.forget()
        due = {
            name: load for name, load in loads.items() if load.any() and self.trigger(load, self._before[name].to(load))
        }
        if due:
            self.alter(self._model, due)
        for name, load in due.items():
            self._before[name] = load
            self.alterations[name] += 1
        return list(due)

    def forget(self) -> None:
        """Begin to add up anew, as after a step that was skipped."""
        self._steps = 0
        self._loads = {name: torch.zeros_like(load) for name, load in self._loads.items()}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training goes on with, as JSON."""
        return {
            "steps": self._steps,
            "loads": {name: load.tolist() for name, load in self._loads.items()},
            "before": {name: load.tolist() for name, load in self._before.items()},
            "alterations": self.alterations,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`, after `attach`: layers that had been altered are altered so once more.

        Raises:
            UserError: for the state of another model's training.
        """
        sizes = {name: layer.num_experts for name, layer in self._layers.items()}
        if {name: len(load) for name, load in state["before"].items()} != sizes:
            raise UserError(f"{type(self).__name__}: this state is of other layers than {', '.join(sizes)}")
        self._steps, self.alterations = state["steps"], dict(state["alterations"])
        self._loads = {name: torch.tensor(load) for name, load in state["loads"].items()}
        self._before = {name: torch.tensor(load) for name, load in state["before"].items()}
        if altered := {name: self._before[name] for name, count in self.alterations.items() if count}:
            self.alter(self._model, altered)


def drifted(distance: float = 0.1) -> Trigger:
    """A trigger: the share of the tokens that would have to change experts for the old shares is above a distance.

    Args:
        distance: of 0 to 1, the total variation distance of both loads' shares.

    Raises:
        ValueError: for another distance.
    """
    if not 0 <= distance < 1:
        raise ValueError(f"drifted: distance {distance} must be at least 0 and below 1, a share of the tokens")

    def trigger(load: Tensor, before: Tensor) -> bool:
        share, old = load.double() / load.sum(), before.double() / before.sum()
        return float((share - old).abs().sum() / 2) > distance

    return trigger


def fit_capacity(model: nn.Module, loads: dict[str, Tensor]) -> None:
    """An alteration: the slots of each layer's experts in proportion to their loads (`Router.share_capacity`).

    All experts together keep as many. A layer that is dropless computes what it did.
    """
    layers = moe_layers(model)
    for name, load in loads.items():
        layers[name].decider.share_capacity(load.tolist())
