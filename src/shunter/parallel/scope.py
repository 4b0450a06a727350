"""Decisions over all ranks' tokens: their logits gathered, assigned alike on every rank, each keeping its own rows.

Or, of one assignment for all: logits, or the tokens themselves, shuffled between the ranks, assigned where they come
to, and experts, or outputs, sent back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import context as contexts
from ..context import KNOWN, NO_CONTEXT, Context
from ..errors import UserError
from ..moe import moe_layers
from ..routers import Router
from ..routing import Routing
from .exchange import exchange, exchange_numbers
from .watch import at, named_errors

__all__ = ["LIMIT", "decide_globally", "ranks_of", "shuffle_assignments", "why_local"]

LIMIT = 2**30
"""Bytes of gathered logits of a layer above which a global decision is refused."""


def decide_globally(model: nn.Module, group: dist.ProcessGroup | None = None, *, evaluation: bool = True) -> nn.Module:
    """Have every router of a model decide, and measure its losses, over the tokens of all ranks, in place.

    What depends on other tokens (capacity, expert choice, one assignment for all, batch priority) is then what one
    process with the whole batch decides, and so is the gradient of every loss: each has the value of the whole batch on
    every rank, for data parallelism to average. The ranks gather logits, W T E numbers a layer, and each repeats the
    decision. Without it each rank decides over its own tokens, GShard's groups.

    Args:
        model: before or after it is sharded.
        group: the ranks whose tokens are others than this one's; None for all.
        evaluation: whether in evaluation too; False where every rank evaluates the same tokens.

    Returns:
        The same model.

    Raises:
        UserError: for a router that learns by reward, or whose experts compute slots: there is nothing to gather.

    Source: Lewis et al. 2021 (BASE), section 3.1; Qiu et al. 2025 (Demons in the detail), of the balance loss.
    """
    layers = moe_layers(model)
    for name, layer in layers.items():
        if why := why_local(layer.decider):
            kind = layer.decider.kind.__name__
            raise UserError(f"{name or 'the layer'}: {kind} {why}, which has no scope of all ranks")
    for layer in layers.values():
        router = layer.decider
        _must_be_new(router)
        whole = _Whole(group, evaluation)
        vars(router).update(
            forward=partial(_forward, router, whole), losses=partial(_losses, router, whole, type(router).losses)
        )
    return model


def shuffle_assignments(
    model: nn.Module, group: dist.ProcessGroup | None = None, *, rows: Literal["logits", "tokens"] = "logits"
) -> nn.Module:
    """Have the routers of one assignment for all (BASE, Sinkhorn) assign tokens that come from all ranks, in place.

    Each rank sends a random share of its tokens' logits to every other, assigns those that come to it, and sends their
    experts back: nearly the assignment of `decide_globally`, where each rank solves a problem of its own batch's size.
    The paper shuffles the tokens themselves: `rows="tokens"`. A layer then has 4 + 4 exchanges of hidden states in
    place of 2 + 2, and its routing is that of the tokens that came, padding not among them. By logits a layer's rows go
    to their experts as ever, and two small exchanges without a gradient are added, to the same assignment.

    Args:
        model: before or after it is sharded.
        group: the ranks whose tokens are others than this one's; None for all.
        rows: what is shuffled.

    Returns:
        The same model.

    Raises:
        UserError: where no router assigns all tokens together, or one decides over all ranks already.
        ValueError: for other rows.

    Source: Lewis et al. 2021 (BASE), section 3.2, sharding.
    """
    if rows not in ("logits", "tokens"):
        raise ValueError(f'shuffle_assignments: rows={rows!r} is unknown; choose "logits" or "tokens"')
    layers = [layer for layer in moe_layers(model).values() if hasattr(layer.decider, "solve")]
    if not layers:
        raise UserError(f"{type(model).__name__}: no router assigns all tokens together, as base and sinkhorn do")
    for layer in layers:
        _must_be_new(layer.decider)
    for layer in layers:
        router: Any = layer.decider
        if rows == "tokens":
            vars(layer).update(forward=partial(_forward_elsewhere, layer, group))
            vars(router).update(solve=partial(type(router).solve, router))  # by which it is known
        else:
            vars(router).update(solve=partial(_solve, router, group))
    return model


def _solve(router: Any, group: dist.ProcessGroup | None, logits: Tensor) -> Tensor:
    """As the router's own `solve`, of tokens from all ranks."""
    return _elsewhere(logits, partial(type(router).solve, router), group, router.kind.__name__)


def _forward_elsewhere(layer: Any, group: dist.ProcessGroup | None, x: Tensor, **told: Tensor | None) -> Tensor:
    """As the layer's own `forward`, in training of tokens from all ranks; zeros at padding."""
    own = partial(type(layer).forward, layer)
    if not layer.training:
        out: Tensor = own(x, **told)
        return out
    around, by_scope = contexts.known_in(layer)
    context = contexts.of_tokens(x, {**by_scope, **told}, around, ())
    tokens = x.reshape(-1, x.shape[-1])
    real = torch.arange(len(tokens), device=x.device) if context.mask is None else context.mask.nonzero()[:, 0]
    # What is known of this rank's tokens says nothing of those that come.
    with contexts.within(contexts.Scope(NO_CONTEXT, dict.fromkeys(KNOWN))):
        y = _elsewhere(tokens[real], own, group, layer.decider.kind.__name__)
    return y.new_zeros(tokens.shape).index_copy(0, real, y).reshape(x.shape)


def _elsewhere(rows: Tensor, compute: Callable[[Tensor], Tensor], group: dist.ProcessGroup | None, name: str) -> Tensor:
    """What is computed of rows (T, …), each on a rank of chance, from as many of every rank: (T, …); differentiable."""
    group = group or dist.group.WORLD
    assert group is not None
    size, rank, tokens = dist.get_world_size(group), dist.get_rank(group), len(rows)
    place = f"a shuffled assignment of {name}"
    order = torch.randperm(tokens).to(rows.device)
    send = [tokens // size + ((to - rank) % size < tokens % size) for to in range(size)]
    recv = exchange_numbers(torch.tensor(send, device=rows.device)[:, None], group, place)[:, 0].tolist()
    found = compute(exchange(rows[order], send, recv, group, place))
    return exchange(found, recv, send, group, place)[order.argsort()]


def _must_be_new(router: Router) -> None:
    if {"forward", "solve"} & vars(router).keys():
        raise UserError(f"{router.kind.__name__} decides over all ranks already")


def ranks_of(router: Router) -> int:
    """Over how many ranks' tokens a router decides, and has its losses: of `decide_globally`, or its own alone."""
    forward = vars(router).get("forward")
    if not (isinstance(forward, partial) and forward.func is _forward):
        return 1
    return dist.get_world_size(forward.args[1].group)


def why_local(router: Router) -> str:
    """What keeps a router from deciding over all ranks, in words; empty where nothing does."""
    if router.learns_by_reward:
        return "learns by reward"
    return "mixes tokens into slots" if router.chooses == "slots" else ""


@dataclass(frozen=True)
class _Batch:
    """What a decision over all ranks' tokens saw and decided."""

    logits: Tensor
    routing: Routing
    context: Context


class _Whole:
    """The ranks, and the decisions of which each routing of this rank is a part, while somebody holds that.

    A copy has the same ranks, and no decisions.
    """

    def __init__(self, group: dist.ProcessGroup | None, evaluation: bool) -> None:
        self.group, self.evaluation = group, evaluation
        self.batches: WeakKeyDictionary[Routing, _Batch] = WeakKeyDictionary()

    def __deepcopy__(self, memo: Any) -> _Whole:
        return _Whole(self.group, self.evaluation)

    def __reduce__(self) -> Any:
        return _Whole, (None, self.evaluation)


def _forward(router: Router, whole: _Whole, x: Tensor, context: Context = NO_CONTEXT) -> tuple[Tensor, Routing]:
    """As `Router.forward`, deciding over the tokens of all ranks."""
    if not (router.training or whole.evaluation):
        found: tuple[Tensor, Routing] = type(router).forward(router, x, context)
        return found
    logits = router.score(context.real(x), context)
    sizes, seed, batch_logits, batch_context = _gathered(router, logits, context, whole.group)
    # What is drawn is the same on every rank; each rank's own random state goes on by one draw alone.
    devices = [] if logits.device.type == "cpu" else [logits.device]
    with torch.random.fork_rng(devices, device_type="cuda" if devices else None):
        torch.manual_seed(seed)
        decided = router.assign(batch_logits, batch_context)
    rank = dist.get_rank(whole.group)
    first = sum(sizes[:rank])
    routing = _part(decided, first, sizes[rank])
    whole.batches[routing] = _Batch(batch_logits, decided, batch_context)
    return logits, routing


def _losses(
    router: Router,
    whole: _Whole,
    losses: Any,
    logits: Tensor,
    routing: Routing,
    context: Context = NO_CONTEXT,
) -> dict[str, Tensor]:
    """As `Router.losses`, over all ranks' tokens; with W times the gradient of its own rows, for a mean over ranks."""
    batch = whole.batches.get(routing)
    if batch is None:
        found: dict[str, Tensor] = losses(router, logits, routing, context)
        return found
    size = dist.get_world_size(whole.group)
    every: dict[str, Tensor] = losses(router, batch.logits, batch.routing, batch.context)
    return {name: size * value - (size - 1) * value.detach() for name, value in every.items()}


def _part(routing: Routing, first: int, tokens: int) -> Routing:
    """The triples of so many tokens from one on, numbered from 0."""
    mine = (routing.token >= first) & (routing.token < first + tokens)
    own = routing.masked(mine)
    dropped = None if routing.dropped is None else _part(routing.dropped, first, tokens)
    return replace(own, token=own.token - first, num_tokens=tokens, dropped=dropped)


def _gathered(
    router: Router, logits: Tensor, context: Context, group: dist.ProcessGroup | None
) -> tuple[list[int], int, Tensor, Context]:
    """How many tokens each rank has, a number drawn on the first, all logits in the order of ranks, and what is known.

    This rank's rows keep their graph.
    """
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    known = {name: value for name in KNOWN if (value := _value(context, name, logits.device)) is not None}
    has = [int(name in known) for name in KNOWN]
    widths = [known[name].shape[1] if name in known and known[name].dim() > 1 else 0 for name in KNOWN]
    draw = int(torch.randint(2**62, ()))
    own = torch.tensor([logits.shape[0], draw, logits.shape[1], *has, *widths], device=logits.device)
    every = _all_gather(own[None], size, group).tolist()
    sizes = [row[0] for row in every]
    if any(row[2] != logits.shape[1] for row in every):
        raise UserError("ranks decide together over different numbers of experts; they are in different layers")
    if (numbers := size * max(sizes) * logits.shape[1] * logits.element_size()) > LIMIT:
        raise UserError(
            f"a decision over all ranks would gather {numbers / 2**20:.0f} MiB of logits in a layer, more than "
            f'{LIMIT / 2**20:.0f}; decide on each rank (ShardedTrainer(scope="rank")), or take smaller batches'
        )
    flags = [[row[3 + i] for row in every] for i in range(len(KNOWN))]
    longest = max(sizes)

    def join(rows: Tensor) -> Tensor:
        padded = rows.new_zeros(longest, *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = _all_gather(padded[None], size, group)
        return torch.cat([part[:n] for part, n in zip(parts, sizes, strict=True)])

    joined: dict[str, Any] = {}
    for i, (name, some) in enumerate(zip(KNOWN, flags, strict=True)):
        if not any(some):
            continue
        value = known.get(name)
        if value is None and (filler := _FILLERS.get(name)) is not None:
            value = torch.full((logits.shape[0],), filler, dtype=torch.bool, device=logits.device)
        # A rank without tokens may know nothing of them; the others must agree.
        if any(n and not flag for n, flag in zip(sizes, some, strict=True)) and name not in _FILLERS:
            raise UserError(f"{router.kind.__name__}: {name} is known on some ranks and not on others; pass it on all")
        width = max(row[3 + len(KNOWN) + i] for row in every)
        if value is None:
            shape = (0, width) if width else (0,)
            value = torch.zeros(shape, dtype=torch.float32 if name == "embedding" else torch.int64, device=own.device)
        if width and value.shape[1] < width:  # experts (T, k), fewer here
            value = torch.nn.functional.pad(value, (0, width - value.shape[1]), value=-1)
        joined[name] = join(value)
    if (sequence := joined.get("sequence")) is not None:
        joined["sequence"] = _apart(sequence, sizes)
    whole = join(logits.detach())
    before = sum(sizes[:rank])
    whole = torch.cat([whole[:before], logits, whole[before + len(logits) :]])
    return sizes, every[0][1], whole, Context(**joined, shape=torch.Size([len(whole)]))


_FILLERS = {"mask": True, "free": False}
"""What is known of the tokens of a rank that was told nothing, where another was."""


def _value(context: Context, name: str, device: torch.device) -> Tensor | None:
    value: Tensor | None = context.sequences(device) if name == "sequence" else getattr(context, name)
    return value


def _apart(sequence: Tensor, sizes: list[int]) -> Tensor:
    """The sequences (T,) of all ranks, numbered so that no two ranks share one."""
    parts, offset = [], 0
    for part in sequence.split(sizes):
        parts.append(part + offset)
        offset += int(part.max()) + 1 if part.numel() else 0
    return torch.cat(parts)


def _all_gather(rows: Tensor, size: int, group: dist.ProcessGroup | None) -> Tensor:
    """(1, …) of each rank to (W, …)."""
    out = rows.new_empty(size, *rows.shape[1:])
    at("a decision over all ranks")
    with named_errors():
        dist.all_gather_into_tensor(out, rows.contiguous(), group=group)
    return out
