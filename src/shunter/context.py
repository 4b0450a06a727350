"""What is known of a layer's T tokens besides their hidden states: padding, ids, task, sequence, forced experts."""

from __future__ import annotations

import sys
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .recomputation import Regions, notes, regions

__all__ = [
    "KNOWN",
    "NO_CONTEXT",
    "Context",
    "Scope",
    "enter",
    "known_in",
    "leave",
    "of_tokens",
    "places_in",
    "present",
    "within",
]


@dataclass(frozen=True)
class Context:
    """What a router may know of the tokens besides their hidden states.

    Args:
        mask: (T,) bool, True at real tokens, False at padding; None where all are real.
        token_ids: (T,) int64 vocabulary ids.
        task: (T,) int64 task of each token.
        domain: (T,) int64 domain of each token's document.
        language: (T,) int64 language of each token.
        modality: (T,) int64 modality of each token (text, image, speech, ...).
        sequence: (T,) int64 number of the sequence that each token belongs to; tokens of one are in order.
        position: (T,) int64 place of each token in its sequence.
        embedding: (T, w) floating point, what another network knows of each token (SpeechMoE's shared embedding).
        experts: (T, k) int64, the experts that each token takes, best first and -1 for none: a decision forced or
            replayed, which leaves the router the weights alone.
        free: (T,) bool, the tokens that choose by themselves although `experts` are given; None where none does.
        shape: the leading sizes (...) of the layer's input, whose product is T; None where it is not known.
        in_rows: whether the sequences are the rows of that shape, in order and of one length: nobody told others.
    """

    mask: Tensor | None = None
    token_ids: Tensor | None = None
    task: Tensor | None = None
    domain: Tensor | None = None
    language: Tensor | None = None
    modality: Tensor | None = None
    sequence: Tensor | None = None
    position: Tensor | None = None
    embedding: Tensor | None = None
    experts: Tensor | None = None
    free: Tensor | None = None
    shape: torch.Size | None = None
    in_rows: bool = False

    def num_real(self, num_tokens: int) -> int:
        """T without padding."""
        return num_tokens if self.mask is None else int(self.mask.sum())

    def real(self, values: Tensor) -> Tensor:
        """Values (T, ...) with zeros at padding: what stands there, NaN too, reaches no result and no gradient."""
        if self.mask is None:
            return values
        return torch.where(self.mask.reshape(-1, *[1] * (values.dim() - 1)), values, 0)

    def forced(self, num_experts: int) -> tuple[Tensor, Tensor]:
        """The forced experts (T, k), 0 in place of -1, and the mask (T, k) of those that there are.

        Raises:
            ValueError: where one is not in -1..E-1, or comes twice in a row.
        """
        assert self.experts is not None
        experts = self.experts.to(torch.int64)
        if experts.numel() and (int(experts.min()) < -1 or int(experts.max()) >= num_experts):
            bad = int(experts[(experts < -1) | (experts >= num_experts)][0])
            raise ValueError(f"experts {bad} is out of range; experts are 0 to {num_experts - 1}, and -1 for none")
        row = experts.sort(dim=-1).values
        again = (row[:, 1:] == row[:, :-1]) & (row[:, 1:] >= 0)
        if bool(again.any()):
            token = int(again.any(-1).nonzero()[0])
            raise ValueError(f"experts of token {token} are {experts[token].tolist()}; an expert may come once only")
        return experts.clamp_min(0), experts >= 0

    def sequences(self, device: torch.device) -> Tensor | None:
        """(T,) int64 which sequence each token is in, as told or as its input (B, ..., d) has them; None if unknown."""
        if self.sequence is not None or self.shape is None or len(self.shape) < 2:
            return self.sequence
        return _rows(self.shape, device)


NO_CONTEXT = Context()
KNOWN = tuple(field.name for field in fields(Context) if field.name not in ("shape", "in_rows"))
"""What a layer can be told of its tokens."""


@dataclass(frozen=True)
class Scope:
    """What a model knows of its tokens while one of its forwards runs.

    Args:
        context: what its arguments say, in the shape of its tokens (B, S); None leaves that of the model around.
        told: what its layers are told besides, by name, which counts before that; None for what is not known here.
        layers: the layers that are told; None for all.
    """

    context: Context | None = None
    told: Mapping[str, Tensor | None] = field(default_factory=dict)
    layers: frozenset[Any] | None = None


_CALL = nn.Module._call_impl.__code__


class _Entry(NamedTuple):
    """A scope that was entered.

    Args:
        scope: it.
        frame: the call that it lasts for; None where it is left in any case.
        region: the checkpointed region in whose recomputation it was entered; None in any other forward.
    """

    scope: Scope
    frame: FrameType | None
    region: Any


class _Present(threading.local):
    """The scopes that this thread has entered, outermost first."""

    def __init__(self) -> None:
        # Changed in place: torch.compile loses an attribute of a thread that is set around a break of its graph.
        self.entries: list[_Entry] = []


_PRESENT = _Present()


def present() -> tuple[Scope, ...]:
    """The scopes of the forwards that run in this thread, outermost first; in a recomputation those of its forward."""
    return _scopes(regions())


def _scopes(around: Regions) -> tuple[Scope, ...]:
    entries = _PRESENT.entries
    if around.frames:  # torch calls no hook where Ctrl-C ends a forward
        while entries and entries[-1].frame is not None and id(entries[-1].frame) not in around.frames:
            entries.pop()
    known = None if around.again is None else notes(around.again).get(Scope)
    if known is None:
        scopes = tuple(entry.scope for entry in entries)
    else:
        scopes = (*known, *(entry.scope for entry in entries if entry.region is around.again))
    for region in around.first:  # nothing was entered in it before, or it would have been noted then
        notes(region).setdefault(Scope, scopes)
    return scopes


@contextmanager
def within(scope: Scope) -> Iterator[None]:
    """Within the block, a scope is added to those of this thread."""
    around = regions()
    _scopes(around)
    _PRESENT.entries.append(_Entry(scope, None, around.again))
    before = len(_PRESENT.entries) - 1
    try:
        yield
    finally:
        del _PRESENT.entries[before:]


def enter(scope: Scope) -> None:
    """From a hook before a module's forward, add a scope to those of this thread until the forward ends or `leave`."""
    around = regions()
    _scopes(around)
    _PRESENT.entries.append(_Entry(scope, _call_of_module(), around.again))


def leave() -> Scope | None:
    """From a hook after a module's forward, end the last scope that one before it entered; None where it did not."""
    entries = _PRESENT.entries
    frame = _call_of_module()
    while entries and any(entry.frame is frame for entry in entries):
        last = entries.pop()
        if last.frame is frame:
            return last.scope
    return None


def _call_of_module() -> FrameType | None:
    """The call of the module whose hook is under way; None in a graph that is being compiled."""
    frame = None if torch.compiler.is_compiling() else sys._getframe(1)
    while frame is not None and frame.f_code is not _CALL:
        frame = frame.f_back
    return frame


def known_in(layer: Any) -> tuple[Context, dict[str, Tensor | None]]:
    """What the models around a layer know of its tokens, and what the layer is told, in the present scopes."""
    around = NO_CONTEXT
    told: dict[str, Tensor | None] = {}
    for scope in present():
        if scope.context is not None:
            around = scope.context
        if scope.layers is None or layer in scope.layers:
            told.update(scope.told)
    return around, told


def of_tokens(x: Tensor, told: Mapping[str, Tensor | None], around: Context, required: Collection[str]) -> Context:
    """What is known of the T tokens of a layer's input x (..., d).

    Args:
        x: (..., d) hidden states; the leading sizes together are the T tokens. The first of two or more counts
            sequences, the others together are places in a sequence.
        told: names of `Context` and what the layer itself was told, in the shape (...) or with fewer leading sizes:
            one value for each sequence, or one for all.
        around: what the model around was told, likewise; it counts where the layer was told nothing. Where x is the
            rows (T, d) of all its tokens, as OPT hands them on, they are in its order.
        required: what the router needs. Sequence and position are then taken from x where nobody told. What only the
            model around knows, of other tokens than these, is left out where it is not needed.

    Raises:
        ValueError: for a value that does not fit x, and for padding of the model around that cannot be mapped to x.
        TypeError: for a name that is not known of tokens.
    """
    unknown = [name for name in told if name not in KNOWN]
    if unknown:
        raise TypeError(f"MoE: {', '.join(unknown)} is not known of tokens; the names are {', '.join(KNOWN)}")
    shape = x.shape[:-1]
    values: dict[str, Tensor | None] = {}
    for name in KNOWN:
        value = told.get(name)
        if value is not None and not _fits(name, value, shape):
            raise ValueError(_misfit(name, value, x))
        if value is None:
            value = _in_rows(name, getattr(around, name), shape)
            if value is not None and not _fits(name, value, shape):
                needed = name in required or (name == "sequence" and "position" in required)
                if needed or (name == "mask" and not bool(value.all())):
                    raise ValueError(
                        f"{_misfit(name, value, x)}. The model around knows it of other tokens than this layer's: say "
                        f"what it is here by shunter.tell(model, {name}=…)"
                    )
                value = None
        values[name] = None if value is None else _spread(name, value, shape)
    in_rows = bool(shape) and values["sequence"] is None and bool({"sequence", "position"} & set(required))
    if in_rows:
        values["sequence"] = _rows(shape, x.device)
    if shape and values["position"] is None and "position" in required:
        assert values["sequence"] is not None
        values["position"] = places_in(values["sequence"], values["mask"])
    return Context(**values, shape=shape, in_rows=in_rows)


def places_in(sequence: Tensor, mask: Tensor | None) -> Tensor:
    """The place (T,) of each token among the real ones of its sequence, from 0; that of padding is not defined.

    Args:
        sequence: (T,) int64 numbers of sequences.
        mask: (T,) bool, True at real tokens; None for everywhere.
    """
    order = sequence.argsort(stable=True)
    number = sequence[order]
    real = torch.ones_like(number) if mask is None else mask[order].to(torch.int64)
    before = real.cumsum(0) - real
    first = torch.ones_like(number, dtype=torch.bool)
    first[1:] = number[1:] != number[:-1]
    return torch.empty_like(before).index_copy(0, order, before - torch.where(first, before, 0).cummax(0).values)


def _leading(name: str, value: Tensor) -> int:
    """How many leading sizes of a value are those of tokens; the others are its own."""
    return value.dim() - 1 if name in ("embedding", "experts") else value.dim()


def _in_rows(name: str, value: Tensor | None, shape: torch.Size) -> Tensor | None:
    """What the model around knows of its tokens (B, S), for each of as many rows where a layer is given rows."""
    leading = 0 if value is None else _leading(name, value)
    if value is None or len(shape) != 1 or leading < 2 or value.shape[:leading].numel() != shape[0]:
        return value
    return value.flatten(0, leading - 1)


def _fits(name: str, value: Tensor, shape: torch.Size) -> bool:
    leading = _leading(name, value)
    return value.shape[:leading] == shape[:leading]


def _misfit(name: str, value: Tensor, x: Tensor) -> str:
    last = "" if _leading(name, value) == value.dim() else " and its own last size"
    return f"MoE: {name} has shape {tuple(value.shape)}; x {tuple(x.shape)} needs {tuple(x.shape[:-1])}{last}"


def _spread(name: str, value: Tensor, shape: torch.Size) -> Tensor:
    """A value for each of the T tokens: (T,) or (T, its own last size)."""
    leading = _leading(name, value)
    own = value.shape[leading:]
    value = value.reshape(*value.shape[:leading], *[1] * (len(shape) - leading), *own)
    value = value.expand(*shape, *own).reshape(-1, *own)
    return value.to(torch.bool) if name in ("mask", "free") else value


def _rows(shape: torch.Size, device: torch.device) -> Tensor:
    """(T,) int64 the sequence of each token by its leading sizes; one leading size alone is one sequence."""
    rows, places = (shape[0], shape[1:].numel()) if len(shape) > 1 else (1, shape.numel())
    return torch.arange(rows, device=device)[:, None].expand(rows, places).reshape(-1)
