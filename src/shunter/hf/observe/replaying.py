"""Record and replay: recomputation, rollout and training take the same experts.

A router's choice of experts is not continuous: two kernels, two batch sizes or two precisions that agree to the last
bit but one can send a token elsewhere (Ma et al. 2025, arXiv 2510.11370, on reinforcement learning). A replay
fixes which experts; how much each weighs is computed anew, so that routers and experts learn as ever.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...context import Context
from ...metrics import margins
from ...moe import MoE, recomputing
from ...routers import Router, TopK
from .forcing import forcing
from .records import RoutingRecord
from .selection import Given, Selection
from .taps import Observation, Tap, listening, noting_tokens, require_taps

__all__ = ["record", "replay"]


_REMEMBERED = 64  # forwards that a backward may still recompute


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
    layers: dict[str, list[_Heard]] = {}

    def decide(tap: Tap, hidden: Tensor, context: Context) -> Given | None:
        if not recomputing():
            forwards.begin(tap, hidden)
            return None
        follows = not isinstance(tap.layer, MoE) or tap.layer.router.replays
        return forwards.find(tap, hidden) if follows else None

    def hear(name: str, seen: Observation) -> None:
        some = seen.index < 0
        free = some.any(-1) if found[name].experts is not None else some.all(-1)
        forwards.decided(name, Given(seen.index, free, -1))
        layers.setdefault(name, []).append(_keep(found[name], seen, selections.get(name)))

    result = RoutingRecord(torch.zeros(0, 0, 0, dtype=torch.int16), [])
    with noting_tokens(model, found) as around, forcing(found, around, decide) as selections:
        with listening(model, hear):
            yield result
    _assemble(result, {name: layers[name] for name in found if name in layers})


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
    present: dict[str, Given] = {}

    def decide(tap: Tap, hidden: Tensor, context: Context) -> Given | None:
        if recomputing():
            return forwards.find(tap, hidden)
        forwards.begin(tap, hidden)
        present[tap.name] = tracks[tap.name].next(hidden, context)
        forwards.decided(tap.name, present[tap.name])
        return present[tap.name]

    def verify(name: str, seen: Observation) -> None:
        given = present[name]
        index = F.pad(seen.index, (0, max(0, given.index.shape[1] - seen.index.shape[1])), value=-1)
        wrong = (index[:, : given.index.shape[1]] != given.index) & (index >= 0)[:, : given.index.shape[1]]
        if given.free is not None:
            wrong = wrong & ~given.free[:, None]
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
    """What each layer decided in its last forwards, for the recomputations of them."""

    def __init__(self) -> None:
        self._marks: dict[str, Tensor] = {}
        self._known: dict[str, deque[tuple[Tensor, Given]]] = {}

    def begin(self, tap: Tap, hidden: Tensor) -> None:
        self._marks.pop(tap.name, None)
        if tap.layer.training or torch.is_grad_enabled():
            self._marks[tap.name] = _mark(hidden)

    def decided(self, name: str, given: Given) -> None:
        mark = self._marks.pop(name, None)
        if mark is not None:
            self._known.setdefault(name, deque(maxlen=_REMEMBERED)).append((mark, given))

    def find(self, tap: Tap, hidden: Tensor) -> Given | None:
        """The decision of the forward that is recomputed: that of the same input, or of the most similar one."""
        mark = _mark(hidden)
        alike = [
            (seen, given)
            for seen, given in reversed(self._known.get(tap.name, ()))
            if seen.shape == mark.shape and len(given.index) == len(hidden)
        ]
        for seen, given in alike:
            if torch.equal(seen, mark):
                return given
        if not alike:
            return None
        distances = torch.stack([(seen - mark).norm() for seen, _ in alike])
        return alike[int(distances.argmin())][1]


def _mark(hidden: Tensor) -> Tensor:
    """A few of the numbers of hidden states (T, d), by which to know them again."""
    rows, columns = max(1, hidden.shape[0] // 16), max(1, hidden.shape[1] // 64)
    return hidden.detach()[::rows, ::columns].to(torch.float32, copy=True)


@dataclass(frozen=True)
class _Heard:
    index: Tensor
    lengths: list[int]
    margin: Tensor
    size: Tensor


def _keep(tap: Tap, seen: Observation, selection: Selection | None) -> _Heard:
    real = slice(None) if seen.mask is None else seen.mask
    index = seen.index[real]
    margin = size = torch.full((len(index),), float("nan"), device=index.device)
    scores = _ranked(tap, seen, selection)
    if scores is not None:
        margin, size = (value.float() for value in margins(scores[real], index))
    return _Heard(index.to(torch.int16), _lengths(seen.mask, seen.sequence, len(seen.index)), margin, size)


def _ranked(tap: Tap, seen: Observation, selection: Selection | None) -> Tensor | None:
    """What the choice went by (T, E): the logits where they order the experts as the router does."""
    ranked = None if selection is None else selection.scores
    router = tap.router
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


def _lengths(mask: Tensor | None, sequence: Tensor | None, num_tokens: int) -> list[int]:
    """How many real tokens each sequence of a forward has; one number where the sequences are not known."""
    if sequence is None:
        return [num_tokens if mask is None else int(mask.sum())]
    real = sequence if mask is None else sequence[mask]
    return torch.unique_consecutive(real, return_counts=True)[1].tolist()


def _assemble(result: RoutingRecord, layers: dict[str, list[_Heard]]) -> None:
    lengths = {name: [heard.lengths for heard in forwards] for name, forwards in layers.items()}
    if not layers:
        return
    first, of_first = next(iter(lengths.items()))
    for name, own in lengths.items():
        if own != of_first:
            raise ValueError(
                f"the layers saw different tokens: {first} {sum(map(sum, of_first))} in {len(of_first)} forwards, "
                f"{name} {sum(map(sum, own))} in {len(own)}; record the parts of the model apart, as "
                "shunter.record(model.get_encoder()) and shunter.record(model.get_decoder())"
            )
    k = max(heard.index.shape[1] for forwards in layers.values() for heard in forwards)

    def stacked(parts: dict[str, list[Tensor]]) -> Tensor:
        return torch.stack([torch.cat(own).cpu() for own in parts.values()], dim=1)

    complete = RoutingRecord(
        stacked({n: [F.pad(h.index, (0, k - h.index.shape[1]), value=-1) for h in own] for n, own in layers.items()}),
        [length for forward in of_first for length in forward],
        layers=list(layers),
        forwards=[len(forward) for forward in of_first],
        margin=stacked({name: [heard.margin for heard in own] for name, own in layers.items()}),
        size=stacked({name: [heard.size for heard in own] for name, own in layers.items()}),
    )
    vars(result).update(vars(complete))


class _Track:
    """The part of a record that one layer replays, and how far it is."""

    def __init__(self, tap: Tap, experts: Tensor, lengths: list[int]) -> None:
        self.name = tap.name or "the layer"
        chosen = experts >= 0
        count = chosen.sum(-1)
        self.missing = count == 0
        width = int(count.max()) if count.numel() else 0
        if isinstance(tap.layer, MoE):
            self._check_moe(tap.layer.router, width)
        elif bool(((count != width) & ~self.missing).any()) or bool(chosen[:, width:].any()):
            raise ValueError(f"replay: {self.name} takes {width} experts a token; the record has fewer for some tokens")
        self.experts = experts[:, : max(width, 1)].to(torch.int64)
        self.largest = int(experts.max()) if experts.numel() else -1
        self.lengths, self.at, self.start = lengths, 0, 0

    def _check_moe(self, router: Router, width: int) -> None:
        if not router.replays:
            raise ValueError(
                f"replay: {self.name} cannot be replayed: its router {type(router).__name__} ({router.chooses} choose) "
                "does not follow experts from outside"
            )
        if isinstance(router, TopK) and width not in (0, router.top_k):
            raise ValueError(f"replay: {self.name} takes {router.top_k} experts a token; the record has {width}")

    def next(self, hidden: Tensor, context: Context) -> Given:
        """The experts of the T tokens of the next forward."""
        lengths = _lengths(context.mask, context.sequence, len(hidden))
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
        return Given(index, free, self.largest)

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
