"""Forcing: the experts of a model's tokens come from outside; what they weigh stays the routers' own computation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...context import NO_CONTEXT, Context, with_sequence
from ...moe import MoE
from ...routing import Routing, by_choice
from .selection import EachForward, ForcedSelection, Given, Selection
from .taps import Tap, own_tokens

__all__ = ["Decide", "forcing"]


Decide = Callable[[Tap, Tensor, Context], Given | None]
"""From a layer, its hidden states (T, d) and what is known of the tokens to the experts; None leaves the router alone.

It is called in recomputations (activation checkpointing) too.
"""


@contextmanager
def forcing(found: dict[str, Tap], around: dict[str, Context], decide: Decide) -> Iterator[dict[str, Selection]]:
    """While the context lasts, the layers take the experts that decide(…) gives.

    Shunter's layers follow the `experts` of their context; in transformers' families the top-k inside of the router
    returns the experts that are given, so that their weights are the family's own function of the present logits.

    Args:
        found: `taps(model)`.
        around: of `noting_tokens(model, found)`.
        decide: see `Decide`.

    Yields the selection of each of transformers' layers in its forward under way or last.
    """
    selections: dict[str, Selection] = {}
    with ExitStack() as stack:
        for tap in found.values():
            if isinstance(tap.layer, MoE):
                for remove in _force_moe(tap, tap.layer, around, decide):
                    stack.callback(remove)
            else:
                enter = partial(_enter, tap, around, decide, selections)
                # Where the experts are not one module, the layer may be called by another name than forward (JetMoE).
                chooser = tap.router if tap.experts is None else tap.layer
                assert chooser is not None
                stack.callback(EachForward(chooser, enter, lambda selection, output: None, outermost=True).remove)
        yield selections


def _enter(
    tap: Tap,
    around: dict[str, Context],
    decide: Decide,
    selections: dict[str, Selection],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Selection:
    hidden = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.is_floating_point())
    hidden = hidden.reshape(-1, hidden.shape[-1])
    given = decide(tap, hidden, _known(tap, around, NO_CONTEXT, len(hidden)))
    selections[tap.name] = ForcedSelection(tap.name or "the layer", tap.num_experts, given)
    return selections[tap.name]


def _known(tap: Tap, around: dict[str, Context], context: Context, num_tokens: int) -> Context:
    outer = around.get(tap.name, NO_CONTEXT)
    mask, sequence = (
        own_tokens(getattr(context, field), getattr(outer, field), num_tokens) for field in ("mask", "sequence")
    )
    return Context(mask=mask, sequence=sequence)


def _force_moe(tap: Tap, layer: MoE, around: dict[str, Context], decide: Decide) -> list[Callable[[], None]]:
    router = layer.router

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["x"]
        inner = router.assign

        def assign(logits: Tensor, context: Context = NO_CONTEXT) -> Routing:
            known = _known(tap, around, with_sequence(context, x), len(logits))
            given = decide(tap, x.reshape(-1, x.shape[-1]), known)
            if given is None:
                return inner(logits, context)
            index, free = given.index, given.free
            if free is not None and context.mask is not None:
                free = free & context.mask
            if free is not None and bool(free.any()):
                # Not through inner, where others listen: this is not yet the decision.
                own, _, _ = by_choice(type(router).assign(router, logits.detach(), context))
                k = max(own.shape[1], index.shape[1])
                own, index = (F.pad(each, (0, k - each.shape[1]), value=-1) for each in (own, index))
                index = torch.where(free[:, None], own, index)
            return inner(logits, replace(context, experts=index))

        router.__dict__["assign"] = assign

    def after(module: Any, args: tuple[Any, ...], output: Any) -> None:
        router.__dict__.pop("assign", None)

    return [
        layer.register_forward_pre_hook(before, with_kwargs=True).remove,
        layer.register_forward_hook(after, always_call=True).remove,
    ]
