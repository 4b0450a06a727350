"""Forcing: experts from outside in, a layer's own weights for them out.

Shunter's layers follow the `experts` of their `Context`; in transformers' families the top-k inside of the router
returns the experts that are given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from ...context import NO_CONTEXT, Context
from .listening import known_around
from .selection import EachForward, ForcedSelection, Selection
from .taps import OwnHook, Tap

__all__ = ["Decide", "forcing"]

Decide = Callable[[Tap, Tensor, Context], Context | None]
"""From a layer, its hidden states (T, d) and what is known of the tokens to a context whose `experts`, and `free` where
some tokens choose by themselves, the layer takes; None leaves the router alone.

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
            if tap.own is not None:
                follow = OwnHook(partial(_follow, tap, around, decide))
                stack.callback(tap.own.router.register_forward_pre_hook(follow).remove)
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
    given = decide(tap, hidden, known_around(tap, around, NO_CONTEXT, len(hidden)))
    selections[tap.name] = ForcedSelection(tap.name or "the layer", tap.num_experts, given)
    return selections[tap.name]


def _follow(
    tap: Tap, around: dict[str, Context], decide: Decide, router: Any, args: tuple[Tensor, Context]
) -> tuple[Tensor, Context]:
    x, context = args
    known = replace(context, sequence=context.sequences(x.device))
    given = decide(tap, x, known_around(tap, around, known, len(x)))
    return args if given is None else (x, replace(context, experts=given.experts, free=given.free))
