"""Listening: what each forward of each mixture-of-experts layer decided, as an `Observation`, from plain hooks.

Shunter's layers call their router, whose inputs and outputs tell all. In transformers' families the experts' arguments
tell the choice, and the router beside them the logits; where the experts take something else, the router alone does.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from ...context import NO_CONTEXT, Context
from ...metrics import margins, routing_entropy
from ...moe import RoutedLayer
from ...recomputation import recomputing
from ...routing import Routing
from ..tokens import decoder_padding, takes_tokens, tokens_of
from .selection import EachForward, Selection
from .taps import SCORE_FUNCTIONS, OwnHook, Tap, require_taps

__all__ = ["Decisions", "Observation", "known_around", "lengths_of", "listening", "noting_tokens"]


@dataclass(frozen=True)
class Observation:
    """What one forward of one layer decided, for T tokens.

    Args:
        logits: (T, E) floating point, in the autograd graph, as the router's `assign` takes them (some of Shunter's
            score more than experts and are wider); None where the router is not found.
        index: (T, k) int64, the experts of each token, best first, those that capacity dropped included; -1 for none.
        weight: (T, k), the combine weights, outside the graph; 0 where a choice was dropped.
        hidden: (T, d), what the router saw (the experts, where the router is not found), outside the graph.
        mask: (T,) bool, True at real tokens; None where all are real.
        num_experts: E. Where the router also scores classes without weights (null, zero or skip experts) they count.
        sequence: (T,) int64, which sequence of the batch each token belongs to; None where it is not known.
        dropped: (T, k) bool, the choices that capacity took away; None where there is no capacity.
        to_probs: turns logits into router probabilities.
    """

    logits: Tensor | None
    index: Tensor
    weight: Tensor
    hidden: Tensor
    mask: Tensor | None
    num_experts: int
    sequence: Tensor | None = None
    dropped: Tensor | None = None
    to_probs: Callable[[Tensor], Tensor] | None = None

    @cached_property
    def probs(self) -> Tensor | None:
        """(T, E) router probabilities in at least float32; each row sums to 1. None where the logits are unknown."""
        if self.logits is None or self.to_probs is None:
            return None
        return self.to_probs(self.logits.to(torch.promote_types(self.logits.dtype, torch.float32)))

    @cached_property
    def routing(self) -> Routing:
        """The decision over real tokens as a `Routing`, what capacity dropped counted as asked for."""
        keep = self.index >= 0
        if self.mask is not None:
            keep = keep & self.mask[:, None]
        return Routing.from_topk(self.index, self.weight.float(), self.num_experts, keep=keep, check=False)


@dataclass(frozen=True)
class Decisions:
    """What one layer decided for N real tokens, in one forward or in several.

    Args:
        index: (N, k) int16 experts, best first, -1 for none.
        margin: (N,) float32, of `shunter.metrics.margins`; NaN where there are no scores.
        margin_size: (N,) float32, likewise.
        lengths: of each forward, the real tokens of each sequence; one number where the sequences are not known.
        num_experts: E.
        dim: d.
        weight: (N, k) float32 combine weights; None where they were not asked for.
        entropies: (N,) float32 of `shunter.metrics.routing_entropy`; NaN without logits, None where not asked for.
        dropped: how many choices capacity took away.
    """

    index: Tensor
    margin: Tensor
    margin_size: Tensor
    lengths: list[list[int]]
    num_experts: int
    dim: int
    weight: Tensor | None = None
    entropies: Tensor | None = None
    dropped: int = 0

    @classmethod
    def of(cls, seen: Observation, scores: Tensor | None, *, details: bool = False) -> Decisions:
        """Those of one forward.

        Args:
            seen: the forward.
            scores: (T, E) what the router ranked; None where it is not known.
            details: whether to keep the weights and the entropies too.
        """
        real = slice(None) if seen.mask is None else seen.mask
        index = seen.index[real]
        unknown = torch.full((len(index),), float("nan"), device=index.device)
        margin, size = (unknown, unknown) if scores is None else margins(scores[real], index)
        entropies = unknown if seen.logits is None or not details else routing_entropy(seen.logits[real])
        return cls(
            index.to(torch.int16),
            margin.float(),
            size.float(),
            [lengths_of(seen.mask, seen.sequence, len(seen.index))],
            seen.num_experts,
            seen.hidden.shape[-1],
            seen.weight[real].float() if details else None,
            entropies if details else None,
            0 if seen.dropped is None else int(seen.dropped[real].sum()),
        )

    @classmethod
    def joined(cls, parts: Sequence[Decisions]) -> Decisions:
        """Those of several forwards one after the other, on the CPU; k is the largest of theirs."""
        k = max(part.index.shape[1] for part in parts)

        def wide(columns: list[Tensor | None], value: float) -> Tensor | None:
            known = [F.pad(each, (0, k - each.shape[1]), value=value) for each in columns if each is not None]
            return torch.cat(known).cpu() if len(known) == len(parts) else None

        index = wide([part.index for part in parts], -1)
        assert index is not None
        entropies = [part.entropies for part in parts if part.entropies is not None]
        return cls(
            index,
            torch.cat([part.margin for part in parts]).cpu(),
            torch.cat([part.margin_size for part in parts]).cpu(),
            [lengths for part in parts for lengths in part.lengths],
            max(part.num_experts for part in parts),
            parts[0].dim,
            wide([part.weight for part in parts], 0),
            torch.cat(entropies).cpu() if len(entropies) == len(parts) else None,
            sum(part.dropped for part in parts),
        )

    @property
    def entropy(self) -> float | None:
        """The mean over tokens of their entropies; None where none is known."""
        if self.entropies is None or bool(self.entropies.isnan().all()):
            return None
        return float(self.entropies.double().nanmean())


def lengths_of(mask: Tensor | None, sequence: Tensor | None, num_tokens: int) -> list[int]:
    """How many real tokens each sequence of a forward has, 0 where all are padding; one number without sequences."""
    if sequence is None:
        return [num_tokens if mask is None else int(mask.sum())]
    numbers, place = torch.unique_consecutive(sequence, return_inverse=True)
    real = torch.ones_like(place) if mask is None else mask.to(place.dtype)
    return torch.zeros_like(numbers, dtype=place.dtype).index_add(0, place, real).tolist()


@contextmanager
def listening(model: nn.Module, callback: Callable[[str, Observation], None]) -> Iterator[dict[str, Tap]]:
    """While the context lasts, call callback(layer name, `Observation`) in every forward of every tapped layer.

    A recomputation (activation checkpointing) is not a forward. The logits are in the graph: differentiable losses of
    them are computed after the forward, not in the callback, which may run inside a checkpointed region. Yields
    `taps(model)`.

    One warning says where a model calls other experts than its router chose: what is heard is the router's choice.

    Raises:
        ValueError: where the model has no layer whose routing can be read.
    """
    found = require_taps(model)
    with ExitStack() as stack:
        compiled = any(module._compiled_call_impl is not None for module in model.modules())
        if compiled:
            warnings.warn(
                f"{type(model).__name__} was compiled before it is listened to: it runs uncompiled while it is",
                stacklevel=3,
            )
        if compiled or _has_graphs(model):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        around = stack.enter_context(noting_tokens(model, found))
        told: set[type] = set()
        for tap in found.values():
            emit = partial(_emit, tap, around, callback)
            experts = _expert_modules(tap)
            if experts:
                called = _Called(tap, experts, told)
                stack.callback(called.remove)
                emit = partial(called.emit, emit)
            for handle in _listen(tap, emit):
                stack.callback(handle.remove)
        yield found


def _has_graphs(model: nn.Module) -> bool:
    """Whether there are graphs, of this model or of one of its classes, in which hooks set now would not be."""
    if "torch._dynamo" not in sys.modules:
        return False
    entries = torch._C._dynamo.eval_frame._debug_get_cache_entry_list
    forwards = {getattr(type(module).forward, "__code__", None) for module in model.modules()}
    return any(code is not None and entries(code) for code in forwards)


@contextmanager
def noting_tokens(model: nn.Module, found: dict[str, Tap]) -> Iterator[dict[str, Context]]:
    """While the context lasts, what the models around the layers are told of their tokens, by layer name."""
    around: dict[str, Context] = {}
    padding: dict[str, Tensor] = {}  # of a decoder, as the labels say
    with ExitStack() as stack:
        for path, module in model.named_modules():
            if takes_tokens(module):
                under = [name for name in found if not path or name == path or name.startswith(path + ".")]
                note = partial(_note_tokens, around, padding, found, under, module is model)
                stack.callback(module.register_forward_pre_hook(note, with_kwargs=True).remove)
        yield around


def _note_tokens(
    around: dict[str, Context],
    padding: dict[str, Tensor],
    found: dict[str, Tap],
    under: list[str],
    outermost: bool,
    module: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    context = tokens_of(module, args, kwargs)
    if outermost:
        padding.clear()
        if (real := decoder_padding(module, args, kwargs)) is not None:
            inside = set(module.get_decoder().modules())
            padding.update({name: real for name in under if found[name].layer in inside})
    for name in under:
        around[name] = replace(context, mask=padding[name]) if name in padding else context


def _emit(
    tap: Tap,
    around: dict[str, Context],
    callback: Callable[[str, Observation], None],
    logits: Tensor | None,
    index: Tensor,
    weight: Tensor,
    hidden: Tensor,
    context: Context = NO_CONTEXT,
    dropped: Tensor | None = None,
    to_probs: Callable[[Tensor], Tensor] | None = None,
) -> None:
    known = known_around(tap, around, context, len(index))
    if logits is not None and to_probs is None:
        tap.num_experts = max(tap.num_experts, logits.shape[-1])
    num_experts = tap.num_experts
    none = (index < 0) | (index >= num_experts)
    if num_experts > tap.num_weights:
        none = none | (weight == 0)  # a skipped token may be sent to expert 0 with weight 0
    index = index.masked_fill(none, -1)
    if logits is not None and to_probs is None:
        if tap.score_function is None:
            tap.score_function = _score_function(logits.detach(), index, weight.detach())
        to_probs = tap.to_probs
    hidden = hidden.detach().reshape(-1, hidden.shape[-1])
    weight = weight.detach()
    callback(
        tap.name, Observation(logits, index, weight, hidden, known.mask, num_experts, known.sequence, dropped, to_probs)
    )


def known_around(tap: Tap, around: dict[str, Context], context: Context, num_tokens: int) -> Context:
    """Mask and sequence of a layer's T tokens: as it was told, else as the model around was, if of as many tokens."""
    outer = around.get(tap.name, NO_CONTEXT)

    def known(given: Tensor | None, other: Tensor | None) -> Tensor | None:
        return given if given is not None or other is None or other.numel() != num_tokens else other.reshape(-1)

    return Context(mask=known(context.mask, outer.mask), sequence=known(context.sequence, outer.sequence))


def _listen(tap: Tap, emit: Callable[..., None]) -> list[Any]:
    if tap.own is not None:
        return [_listen_own(tap.own, emit)]
    return _listen_router(tap, emit) if tap.experts is None else _listen_experts(tap, emit)


def _listen_own(layer: RoutedLayer, emit: Callable[..., None]) -> RemovableHandle:
    def after(router: Any, args: tuple[Tensor, Context], output: tuple[Tensor, Routing]) -> None:
        if not recomputing():
            (x, context), (logits, routing) = args, output
            index, weight, dropped = routing.detach().by_choice()
            known = replace(context, sequence=context.sequences(x.device))
            emit(logits, index, weight, x, known, dropped, layer.decider.probs)

    return layer.router.register_forward_hook(OwnHook(after))


def _expert_modules(tap: Tap) -> list[nn.Module]:
    """The E modules of a layer that are an expert each, in order; empty where experts are called in another way."""
    if tap.own is not None or tap.experts is not None:
        return []
    for holder in tap.layer.modules():
        kinds = [type(part) for part in holder.children()]
        for kind in dict.fromkeys(kinds):
            if kinds.count(kind) == tap.num_experts > 1 and holder is not tap.router:
                return [part for part in holder.children() if type(part) is kind]
    return []


class _Called:
    """Which experts of a layer are called in a forward, held against those that its router chose.

    Args:
        tap: the layer.
        experts: a module each.
        told: the kinds of layers that were warned of.
    """

    def __init__(self, tap: Tap, experts: list[nn.Module], told: set[type]) -> None:
        self.tap, self.told = tap, told
        self.chosen: set[int] = set()
        self.called: set[int] = set()
        self.handles = [tap.layer.register_forward_hook(OwnHook(self._compare))]
        for number, expert in enumerate(experts):
            self.handles.append(expert.register_forward_pre_hook(OwnHook(partial(self._note, number))))

    def emit(self, emit: Callable[..., None], logits: Tensor | None, index: Tensor, *args: Any, **kwargs: Any) -> None:
        """Note what was chosen, and pass it on."""
        self.chosen.update(index[index >= 0].unique().tolist())
        emit(logits, index, *args, **kwargs)

    def _note(self, number: int, *args: Any) -> None:
        self.called.add(number)

    def _compare(self, *args: Any) -> None:
        chosen, called = self.chosen, self.called
        self.chosen, self.called = set(), set()
        never = sorted(chosen - called)
        if never and called and type(self.tap.layer) not in self.told:
            self.told.add(type(self.tap.layer))
            warnings.warn(
                f"{self.tap.name}: transformers {transformers.__version__} calls the experts {_some(called)} alone, "
                f"where the router chose {_some(chosen)}: what is shown is the router's choice, not what computed",
                stacklevel=2,
            )

    def remove(self) -> None:
        """Leave the layer as it was."""
        for handle in self.handles:
            handle.remove()


def _some(numbers: set[int], most: int = 8) -> str:
    """Numbers in order, the first few where they are many."""
    ordered = [str(number) for number in sorted(numbers)]
    return ", ".join(ordered[:most]) + (", …" if len(ordered) > most else "")


class _Seen:
    """What a router returned and saw in the forward under way."""

    logits: Tensor | None = None
    hidden: Tensor | None = None
    inner: Tensor | None = None


def _called_for(experts: nn.Module, layer: nn.Module) -> nn.Module:
    """The module that a layer calls for its experts: these, or the outermost of peft's wrappers around them."""
    for module in layer.modules():
        inner = module
        while isinstance(base := getattr(inner, "base_layer", None), nn.Module):
            inner = base
        if inner is experts:
            return module
    return experts


def _listen_experts(tap: Tap, emit: Callable[..., None]) -> list[RemovableHandle]:
    assert tap.experts is not None
    seen, experts = _Seen(), tap.experts
    handles = _watch_router(tap, seen)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        logits, saw = seen.logits, seen.hidden
        seen.logits = seen.hidden = None
        if recomputing():
            return
        named = {name: value for name, value in kwargs.items() if name != "adapter_names"}  # which is peft's own
        given = inspect.signature(experts.forward).bind(*args, **named)
        hidden, index, weight = given.arguments.values()
        if index.dim() == 3:  # Switch: one-hot (T, k, E), all zero where capacity dropped the token
            index = torch.where(index.any(-1), index.argmax(-1), -1)
        emit(logits, index.to(torch.int64), weight, hidden if saw is None else saw)

    return [*handles, _called_for(experts, tap.layer).register_forward_pre_hook(before, with_kwargs=True)]


def _listen_router(tap: Tap, emit: Callable[..., None]) -> list[Any]:
    seen = _Seen()
    assert tap.router is not None

    def enter(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Selection:
        return Selection(tap.name, tap.num_experts)

    def leave(selection: Selection, output: Any) -> None:
        logits, hidden = seen.logits, seen.hidden
        seen.logits = seen.hidden = None
        if recomputing() or logits is None or hidden is None:
            return
        index = logits.detach().topk(tap.top_k or 2, dim=-1).indices if selection.index is None else selection.index
        weight = logits.detach().gather(1, index).softmax(-1)
        outputs = output if isinstance(output, tuple) else ()
        for place, value in enumerate(outputs):
            # A dense matrix of weights, zero where an expert was not chosen (Llama 4, NLLB-MoE).
            dense = isinstance(value, Tensor) and value.is_floating_point() and value.shape == logits.shape
            if dense and place != tap.logits_at:
                weight = value.detach()
                if selection.index is None:
                    index = weight.topk(tap.top_k or 2, dim=-1).indices
                weight = weight.gather(1, index)
                index = index.masked_fill(weight == 0, -1)
        emit(logits, index, weight, hidden)

    return [*_watch_router(tap, seen), EachForward(tap.router, enter, leave)]


def _watch_router(tap: Tap, seen: _Seen) -> list[RemovableHandle]:
    router = tap.router
    if router is None:
        return []

    def note_scores(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        seen.inner = output

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        value = output[tap.logits_at] if isinstance(output, tuple) else output
        logits = value.reshape(-1, value.shape[-1])
        if tap._returns_probs is None and not recomputing():
            rows = logits.detach().float()
            tap._returns_probs = bool((rows >= 0).all() and (rows.sum(-1) - 1).abs().max() < 1e-2)
        if tap._returns_probs:
            # The family calls probabilities its router logits (Gemma 4).
            tap.score_function = "softmax"
            logits = logits.log() if seen.inner is None else seen.inner.reshape(logits.shape)
        seen.logits, seen.inner = logits, None
        seen.hidden = args[0] if args else next(iter(kwargs.values()))

    handles = [router.register_forward_hook(note, with_kwargs=True)]
    inner = [m for m in list(router.modules())[1:] if isinstance(m, nn.Linear) and m.out_features == tap.num_experts]
    if len(inner) == 1:
        handles.append(inner[0].register_forward_hook(note_scores))
    return handles


def _score_function(logits: Tensor, index: Tensor, weight: Tensor) -> str | None:
    """The function of the logits that the weights follow, up to a factor of each row; None where data cannot tell."""
    chosen = index.clamp_min(0)
    use = (index >= 0) & (weight > 0) & (chosen < logits.shape[-1])
    wanted = _centred(weight.double().clamp_min(1e-300).log(), use)
    if float(wanted.square().sum()) < 1e-12 * max(int(use.sum()), 1):
        return None
    errors = {}
    for name, function in SCORE_FUNCTIONS.items():
        got = _centred(function(logits.double()).gather(-1, chosen.clamp_max(logits.shape[-1] - 1)), use)
        errors[name] = float((wanted - got).square().sum())
    return min(errors, key=errors.__getitem__)


def _centred(values: Tensor, use: Tensor) -> Tensor:
    """Values (T, k) less the mean of their row; of all rows where k is 1."""
    dims = (0, 1) if values.shape[1] == 1 else (1,)
    values = torch.where(use, values, 0)
    mean = values.sum(dims, keepdim=True) / use.sum(dims, keepdim=True).clamp_min(1)
    return torch.where(use, values - mean, 0)
