"""Record and replay: recomputation, rollout and training take the same experts.

A router's choice of experts is not continuous: two kernels, two batch sizes or two precisions that agree to the last
bit but one can send a token elsewhere (Ma et al. 2025, arXiv 2510.11370, on reinforcement learning). A replay
fixes which experts; how much each weighs is computed anew, so that routers and experts learn as ever.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...context import Context
from ...recomputation import notes, recomputing, regions
from ...routers import Router, TopK
from .forcing import forcing
from .generations import noting_starts
from .listening import Decisions, Observation, lengths_of, listening, noting_tokens
from .records import RoutingRecord
from .selection import Selection
from .taps import Tap, require_taps

__all__ = ["record", "replay"]


@contextmanager
def record(model: nn.Module) -> Iterator[RoutingRecord]:
    """Record which experts the tokens of every forward take, in training, evaluation and generation.

    The record is complete when the context ends. Until then, the recomputations of activation checkpointing take the
    experts of their forward.

        with shunter.record(model) as r:
            model.generate(**prompts)
        r.experts        # (tokens, layers, k) int16

    Raises:
        ValueError: where the model has no layer whose routing can be read; at the end, where its layers saw different
            tokens, as those of an encoder and of a decoder do: record these apart.
    """
    found = require_taps(model)
    forwards = _Forwards()
    layers: dict[str, list[Decisions]] = {}
    begun: list[tuple[list[int] | None, bool]] = []

    def decide(tap: Tap, hidden: Tensor, context: Context) -> Context | None:
        if not recomputing():
            forwards.begin(tap, hidden)
            return None
        follows = tap.own is None or tap.own.decider.replays
        return forwards.find(tap, hidden) if follows else None

    def hear(name: str, seen: Observation) -> None:
        some = seen.index < 0
        free = some.any(-1) if found[name].experts is not None else some.all(-1)
        forwards.decided(name, Context(experts=seen.index, free=free))
        scores = _ranked(found[name], seen, selections.get(name))
        layers.setdefault(name, []).append(Decisions.of(seen, scores))
        if name == next(iter(layers)):
            begun.append(starts.of(name, seen.mask, len(layers[name][-1].lengths[0])))

    result = RoutingRecord(torch.zeros(0, 0, 0, dtype=torch.int16), [])
    with noting_tokens(model, found) as around, forcing(found, around, decide) as selections:
        with noting_starts(model, list(found)) as starts, listening(model, hear):
            yield result
    recorded = {name: Decisions.joined(layers[name]) for name in found if name in layers}
    _assemble(result, recorded, begun, starts.exchanged)


@contextmanager
def replay(model: nn.Module, record: RoutingRecord) -> Iterator[None]:
    """Let the tokens of the model's forwards take the experts of a record.

    Each sequence of a forward takes the next sequence of the record, so that the batch may be cut into other
    micro-batches than it was recorded in. Padding, and tokens whose experts are not known, choose by themselves.
    Gradients reach the routers and the experts, and recomputations take the experts of their forward.

        with shunter.replay(model, r):
            model(**batch).loss.backward()

    Args:
        model: of Shunter's layers whose routers follow (`Router.replays`), or of transformers' families, all of which
            do but those that do not choose by a top-k (Switch Transformers, NLLB-MoE, Phi-MoE).
        record: of as many layers, experts a token and tokens.

    Raises:
        ValueError: where the model, or a forward, does not fit the record; where a router cannot be replayed; at the
            end, where tokens of the record are left.
    """
    tracks = _tracks(require_taps(model), record)
    found = {name: tap for name, tap in require_taps(model).items() if name in tracks}
    forwards = _Forwards()
    present: dict[str, Context] = {}

    def decide(tap: Tap, hidden: Tensor, context: Context) -> Context | None:
        if recomputing():
            return forwards.find(tap, hidden)
        forwards.begin(tap, hidden)
        present[tap.name] = tracks[tap.name].next(hidden, context)
        forwards.decided(tap.name, present[tap.name])
        return present[tap.name]

    def verify(name: str, seen: Observation) -> None:
        given, free = present[name].experts, present[name].free
        assert given is not None
        index = F.pad(seen.index, (0, max(0, given.shape[1] - seen.index.shape[1])), value=-1)[:, : given.shape[1]]
        wrong = (index != given) & (index >= 0)
        if free is not None:
            wrong = wrong & ~free[:, None]
        if bool(wrong.any()):
            raise ValueError(
                f"{name or 'the layer'} cannot be replayed: {type(found[name].router).__name__} does not choose by a "
                "top-k over its experts"
            )

    with noting_tokens(model, found) as around, forcing(found, around, decide), listening(model, verify):
        yield
    for track in tracks.values():
        track.finish()


class _Forwards:
    """What each layer decided in its forwards, for the recomputations of them: noted of the regions around them."""

    def __init__(self) -> None:
        self._under_way: dict[str, tuple[list[Any], Tensor]] = {}

    def begin(self, tap: Tap, hidden: Tensor) -> None:
        first = regions().first
        if first:
            self._under_way[tap.name] = first, _mark(hidden)

    def decided(self, name: str, given: Context) -> None:
        first, mark = self._under_way.pop(name, ([], None))
        for region in first:
            notes(region).setdefault((self, name), []).append((mark, given))

    def find(self, tap: Tap, hidden: Tensor) -> Context | None:
        """The decision of the forward that is recomputed: in its region that of the same, or of the most similar input.

        A region within, which may be run once more, has it too.
        """
        around, mark = regions(), _mark(hidden)
        alike = [each for each in notes(around.again).get((self, tap.name), ()) if each[0].shape == mark.shape]
        if not alike:
            return None
        distances = torch.stack([(seen - mark).norm() for seen, _ in alike])
        given: Context = alike[int(distances.argmin())][1]
        for region in around.first:
            notes(region).setdefault((self, tap.name), []).append((mark, given))
        return given


def _mark(hidden: Tensor) -> Tensor:
    """A few of the numbers of hidden states (T, d), by which to know them again."""
    rows, columns = max(1, hidden.shape[0] // 16), max(1, hidden.shape[1] // 64)
    return hidden.detach()[::rows, ::columns].to(torch.float32, copy=True)


def _ranked(tap: Tap, seen: Observation, selection: Selection | None) -> Tensor | None:
    """What the choice went by (T, E): the logits where they order the experts as the router does."""
    ranked = None if selection is None else selection.scores
    router = tap.router if tap.own is None else tap.own.decider
    if seen.logits is None:
        return ranked
    logits = seen.logits.detach()
    if isinstance(router, Router):
        ranked = router.rank(logits) if isinstance(router, TopK) else None
    if ranked is None or ranked.shape != logits.shape:
        return logits
    ordered = ranked.gather(1, logits.argsort(-1))
    monotone = (ordered[:, 1:] >= ordered[:, :-1]).all()
    return torch.where(monotone, logits, ranked.to(logits.dtype))


def _assemble(
    result: RoutingRecord,
    layers: dict[str, Decisions],
    begun: list[tuple[list[int] | None, bool]],
    exchanged: bool,
) -> None:
    """Fill the record that `record` yielded with what its layers decided."""
    if not layers:
        return
    first, of_first = next((name, own.lengths) for name, own in layers.items())
    for name, own in layers.items():
        if own.lengths != of_first:
            raise ValueError(
                f"the layers saw different tokens: {first} {sum(map(sum, of_first))} in {len(of_first)} forwards, "
                f"{name} {sum(map(sum, own.lengths))} in {len(own.lengths)}; record the parts of the model apart, as "
                "shunter.record(model.get_encoder()) and shunter.record(model.get_decoder())"
            )
    k = max(own.index.shape[1] for own in layers.values())
    starts = [start for start, _ in begun if start is not None]
    result.__init__(  # type: ignore[misc]
        torch.stack([F.pad(own.index, (0, k - own.index.shape[1]), value=-1) for own in layers.values()], dim=1),
        [length for forward in of_first for length in forward],
        layers=list(layers),
        forwards=[len(forward) for forward in of_first],
        starts=[each for start in starts for each in start] if len(starts) == len(of_first) else None,
        drafts=[cached for _, cached in begun],
        exchanged=exchanged,
        margin=torch.stack([own.margin for own in layers.values()], dim=1),
        size=torch.stack([own.margin_size for own in layers.values()], dim=1),
    )


class _Track:
    """The part of a record that one layer replays, and how far it is."""

    def __init__(self, tap: Tap, experts: Tensor, lengths: list[int]) -> None:
        self.name = tap.name or "the layer"
        chosen = experts >= 0
        count = chosen.sum(-1)
        self.missing = count == 0
        width = int(count.max()) if count.numel() else 0
        if tap.own is not None:
            self._check_own(tap.own.decider, width)
        elif bool(((count != width) & ~self.missing).any()) or bool(chosen[:, width:].any()):
            raise ValueError(f"replay: {self.name} takes {width} experts a token; the record has fewer for some tokens")
        self.experts = experts[:, : max(width, 1)].to(torch.int64)
        self.lengths, self.at, self.start = lengths, 0, 0

    def _check_own(self, router: Router, width: int) -> None:
        if not router.replays:
            raise ValueError(
                f"replay: {self.name} cannot be replayed: its router {type(router).__name__} ({router.chooses} choose) "
                "does not follow experts from outside"
            )
        if isinstance(router, TopK) and width not in (0, router.top_k):
            raise ValueError(f"replay: {self.name} takes {router.top_k} experts a token; the record has {width}")

    def next(self, hidden: Tensor, context: Context) -> Context:
        """The experts of the T tokens of the next forward."""
        lengths = lengths_of(context.mask, context.sequence, len(hidden))
        recorded = self.lengths[self.at : self.at + len(lengths)]
        if lengths != recorded:
            raise ValueError(
                f"replay: the sequences of a forward have {lengths} real tokens in {self.name}; the next of the record "
                f"have {recorded}" + ("" if recorded else ": it is at its end")
            )
        self.at += len(lengths)
        part = slice(self.start, self.start + sum(lengths))
        self.start = part.stop
        index = self.experts[part].to(hidden.device)
        free = self.missing[part].to(hidden.device) if bool(self.missing[part].any()) else None
        if context.mask is not None:
            every = index.new_full((len(hidden), index.shape[1]), -1)
            every[context.mask] = index
            padding = ~context.mask
            if free is not None:
                padding[context.mask] = free
            index, free = every, padding
        return Context(experts=index, free=free)

    def finish(self) -> None:
        """Raise ValueError where tokens are left."""
        if self.start < len(self.experts):
            raise ValueError(
                f"replay: {self.name} replayed {self.start} of the {len(self.experts)} tokens of the record"
            )


def _tracks(found: dict[str, Tap], record: RoutingRecord) -> dict[str, _Track]:
    names, num_layers = record.layers, record.experts.shape[1]
    if names is None or not set(names) <= set(found):
        names = list(found)
    if len(names) != num_layers:
        raise ValueError(f"replay: the record has {num_layers} layers, the model {len(found)}: {', '.join(found)}")
    return {name: _Track(found[name], record.experts[:, place], record.lengths) for place, name in enumerate(names)}
