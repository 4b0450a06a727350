"""Taps: read the routing of any mixture-of-experts layer, Shunter's or transformers', without a list of model classes.

Where a family's decision is read:

* Shunter's `MoE`: from `Router.assign`, which turns logits into a `Routing`;
* transformers' families: from the call of the experts, `experts(hidden_states, top_k_index, top_k_weights)`, the one
  contract that they share, and from the output of the router beside them for the logits;
* families whose experts take something else (Llama 4, JetMoE, NLLB-MoE): from the router's output alone.

Routers are found by what each model says transformers may record (`_can_record_outputs`), or by the name gate or router
beside the experts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ...context import NO_CONTEXT, Context, with_sequence
from ...moe import MoE, recomputing
from ...routers import Router
from ...routing import Routing, by_choice
from ..hooks import takes_tokens, tokens_of
from .selection import EachForward, Selection

__all__ = ["SCORE_FUNCTIONS", "Observation", "Tap", "listening", "noting_tokens", "own_tokens", "require_taps", "taps"]


_INDEX_NAMES = ("top_k_index", "router_indices", "selected_experts")


_ROUTER_NAMES = ("gate", "router")


SCORE_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda h: h.log_softmax(-1),
    "sigmoid": F.logsigmoid,
    "sqrtsoftplus": lambda h: F.softplus(h).clamp_min(torch.finfo(h.dtype).tiny).log() / 2,
}
"""What families make of logits (T, E), as logarithms of scores."""


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


@dataclass(eq=False)
class Tap:
    """One mixture-of-experts layer of a model and where its routing is read.

    Attributes:
        name: the layer's qualified name.
        layer: the module.
        router: the module that scores experts; None where it is not found.
        experts: the module that takes (hidden_states, top_k_index, top_k_weights); None in Shunter's layers and where
            the routing is read from the router alone.
        num_experts: E; with the classes without weights that the router scores, once a forward has shown them.
        logits_at: which output of the router is the logits.
        score_function: a key of `SCORE_FUNCTIONS`; found from the first forward's logits and weights, unless set.
            Unused in Shunter's layers, whose routers know.
    """

    name: str
    layer: nn.Module
    router: nn.Module | None
    experts: nn.Module | None
    num_experts: int
    logits_at: int = 0
    score_function: str | None = None
    _returns_probs: bool | None = field(default=None, repr=False)

    @property
    def top_k(self) -> int | None:
        """k, by the router's own word; None where it does not say."""
        k = getattr(self.router, "top_k", None)
        if k is None:
            k = getattr(getattr(self.router, "config", None), "top_k_experts", None)
        return k if isinstance(k, int) else None

    def _listen(self, emit: Callable[..., None]) -> list[Any]:
        if isinstance(self.layer, MoE):
            return _listen_moe(self.layer, emit)
        if self.experts is None:
            return _listen_router(self, emit)
        return _listen_experts(self, emit)

    def _to_probs(self, logits: Tensor) -> Tensor:
        log_scores = SCORE_FUNCTIONS[self.score_function or "softmax"](logits)
        return log_scores.softmax(-1)


def taps(model: nn.Module) -> dict[str, Tap]:
    """The mixture-of-experts layers of a model by their qualified names, in order; empty where there are none."""
    recorded = _recorded_routers(model)
    modules = dict(model.named_modules())
    found: dict[str, Tap] = {}
    used: set[nn.Module] = set()
    for path, module in modules.items():
        if isinstance(module, MoE):
            found[path] = Tap(path, module, module.router, None, module.num_experts)
        elif _takes_choices(module):
            where, router = _router_beside(path, modules, recorded)
            at = 0 if router is None else recorded.get(router, 0)
            found[where] = Tap(where, modules[where], router, module, _size(module), at)
            if router is not None:
                used.add(router)
    for path, module in modules.items():
        num_experts = getattr(module, "num_experts", None)
        if module in recorded and module not in used and isinstance(num_experts, int) and _scores(module, num_experts):
            where = path.rpartition(".")[0]
            found[where] = Tap(where, modules[where], module, None, num_experts, recorded[module])
    order = {path: place for place, path in enumerate(modules)}
    return dict(sorted(found.items(), key=lambda item: order[item[0]]))


@contextmanager
def listening(model: nn.Module, callback: Callable[[str, Observation], None]) -> Iterator[dict[str, Tap]]:
    """While the context lasts, call callback(layer name, `Observation`) in every forward of every tapped layer.

    A recomputation (activation checkpointing) is not a forward. The logits are in the graph: differentiable losses of
    them are computed after the forward, not in the callback, which may run inside a checkpointed region. Yields
    `taps(model)`.

    Raises:
        ValueError: where the model has no layer whose routing can be read.
    """
    found = require_taps(model)
    with ExitStack() as stack:
        around = stack.enter_context(noting_tokens(model, found))
        for tap in found.values():
            for handle in tap._listen(partial(_emit, tap, around, callback)):
                stack.callback(handle.remove)
        yield found


def require_taps(model: nn.Module) -> dict[str, Tap]:
    """`taps` of a model that must have some.

    Raises:
        ValueError: where it has none.
    """
    found = taps(model)
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no layer whose routing can be read: no shunter.MoE, no module that takes "
            "(hidden_states, top_k_index, top_k_weights), and no router that transformers records"
        )
    return found


@contextmanager
def noting_tokens(model: nn.Module, found: dict[str, Tap]) -> Iterator[dict[str, Context]]:
    """While the context lasts, what the models around the layers are told of their tokens, by layer name."""
    around: dict[str, Context] = {}
    with ExitStack() as stack:
        for path, module in model.named_modules():
            if isinstance(module, PreTrainedModel) and takes_tokens(module):
                under = [name for name in found if not path or name == path or name.startswith(path + ".")]
                stack.callback(
                    module.register_forward_pre_hook(partial(_note_tokens, around, under), with_kwargs=True).remove
                )
        yield around


def _note_tokens(
    around: dict[str, Context], under: list[str], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    context = tokens_of(module, args, kwargs)
    for name in under:
        around[name] = context


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
    mask, sequence = (
        own_tokens(getattr(context, field), getattr(around.get(tap.name, NO_CONTEXT), field), len(index))
        for field in ("mask", "sequence")
    )
    if logits is not None and to_probs is None:
        tap.num_experts = max(tap.num_experts, logits.shape[-1])
    num_experts = tap.num_experts
    none = (index < 0) | (index >= num_experts)
    if tap.experts is not None and num_experts > _size(tap.experts):
        none = none | (weight == 0)  # a skipped token may be sent to expert 0 with weight 0
    index = index.masked_fill(none, -1)
    if logits is not None and to_probs is None:
        if tap.score_function is None:
            tap.score_function = _score_function(logits.detach(), index, weight.detach())
        to_probs = tap._to_probs
    hidden = hidden.detach().reshape(-1, hidden.shape[-1])
    weight = weight.detach()
    callback(tap.name, Observation(logits, index, weight, hidden, mask, num_experts, sequence, dropped, to_probs))


def own_tokens(given: Tensor | None, outer: Tensor | None, num_tokens: int) -> Tensor | None:
    """What a layer was told of its T tokens; else what the model around was, unless the layer sees only some."""
    if given is not None or outer is None or outer.numel() != num_tokens:
        return given
    return outer.reshape(-1)


def _size(experts: nn.Module) -> int:
    size = getattr(experts, "num_experts", None)
    return size if isinstance(size, int) else len(list(experts.children()))


def _recorded_routers(model: nn.Module) -> dict[nn.Module, int]:
    """The modules whose output transformers may record as router_logits, and which output it is."""
    found: dict[nn.Module, int] = {}
    for stack in model.modules():
        specs = getattr(stack, "_can_record_outputs", None) if isinstance(stack, PreTrainedModel) else None
        specs = (specs or {}).get("router_logits", [])
        for spec in specs if isinstance(specs, list) else [specs]:
            target: Any = getattr(spec, "target_class", spec)
            for module in stack.modules() if isinstance(target, type) else ():
                if isinstance(module, target):
                    found[module] = getattr(spec, "index", 1)
    # Some record a whole block, which is not the router.
    return {m: at for m, at in found.items() if not any(_takes_choices(c) or c in found for c in _inside(m))}


def _scores(module: nn.Module, num_experts: int) -> bool:
    """Whether a module has a logit for each expert: keys that are combined into experts (Doge) are not understood."""
    return any(isinstance(part, nn.Linear) and part.out_features == num_experts for part in module.modules())


def _inside(module: nn.Module) -> list[nn.Module]:
    return list(module.modules())[1:]


def _takes_choices(module: nn.Module) -> bool:
    """Whether a module's forward is the experts' contract: hidden states, indices, weights."""
    names = list(inspect.signature(module.forward).parameters)
    return len(names) == 3 and names[0] == "hidden_states" and names[1] in _INDEX_NAMES


def _router_beside(
    path: str, modules: dict[str, nn.Module], recorded: dict[nn.Module, int]
) -> tuple[str, nn.Module | None]:
    """The layer around the experts at a path, and its router: the nearest module that holds both."""
    parent = path.rpartition(".")[0]
    around = parent
    while True:
        inside = set(modules[around].modules())
        routers = [module for module in recorded if module in inside]
        routers = routers or [m for n, m in modules[around].named_children() if n in _ROUTER_NAMES]
        if len(routers) == 1:
            return around, routers[0]
        if routers or not around or isinstance(modules[around], PreTrainedModel | nn.ModuleList):
            return parent, None
        around = around.rpartition(".")[0]


def _listen_moe(layer: MoE, emit: Callable[..., None]) -> list[RemovableHandle]:
    router: Router = layer.router

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["x"]
        inner = router.assign

        def assign(logits: Tensor, context: Context = NO_CONTEXT) -> Routing:
            routing = inner(logits, context)
            if not recomputing():
                index, weight, dropped = by_choice(routing.detach())
                emit(logits, index, weight, x, with_sequence(context, x), dropped, router.probs)
            return routing

        router.__dict__["assign"] = assign

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # Only while a forward runs, so that models can be copied and pickled between forwards.
        router.__dict__.pop("assign", None)

    return [
        layer.register_forward_pre_hook(before, with_kwargs=True),
        layer.register_forward_hook(after, always_call=True),
    ]


class _Seen:
    """What a router returned and saw in the forward under way."""

    logits: Tensor | None = None
    hidden: Tensor | None = None
    inner: Tensor | None = None


def _listen_experts(tap: Tap, emit: Callable[..., None]) -> list[RemovableHandle]:
    seen = _Seen()
    handles = _watch_router(tap, seen)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        logits, saw = seen.logits, seen.hidden
        seen.logits = seen.hidden = None
        if recomputing():
            return
        given = inspect.signature(module.forward).bind(*args, **kwargs)
        hidden, index, weight = given.arguments.values()
        if index.dim() == 3:  # Switch: one-hot (T, k, E), all zero where capacity dropped the token
            index = torch.where(index.any(-1), index.argmax(-1), -1)
        emit(logits, index.to(torch.int64), weight, hidden if saw is None else saw)

    assert tap.experts is not None
    return [*handles, tap.experts.register_forward_pre_hook(before, with_kwargs=True)]


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
    inner = [m for m in _inside(router) if isinstance(m, nn.Linear) and m.out_features == tap.num_experts]
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
