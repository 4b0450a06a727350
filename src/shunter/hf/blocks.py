"""Where a Hugging Face model keeps its dense feed-forward blocks, read off what its modules compute, not their names.

A block is a linear map down of an activation of a linear map up, act(up(x)), or of two, act(gate(x)) * up(x), which
may be one map whose rows are both. `probing` runs the modules around with random numbers for what their linear maps
give; where what one receives equals that formula of what others gave, they are a block.
"""

from __future__ import annotations

import math
import re
import types
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from ..errors import UserError, one_line
from ..experts import ACTIVATIONS
from .probing import Event, Recording, Way, is_linear, record, sizes, trials

__all__ = ["FeedForward", "Rows", "find_feed_forwards", "known_activation", "survey"]


@dataclass(frozen=True)
class Rows:
    """Rows of the matrix (out, in) of a linear map, and of its bias.

    Args:
        path: of the map, dotted.
        linear: the map.
        start, stop: the rows.
    """

    path: str
    linear: nn.Module
    start: int
    stop: int

    @property
    def is_transposed(self) -> bool:
        """Whether the weight is (in, out)."""
        return isinstance(self.linear, Conv1D)

    @property
    def weight(self) -> Tensor:
        """(stop - start, in), a view."""
        weight = self.linear.weight
        assert isinstance(weight, Tensor)
        return (weight.T if self.is_transposed else weight)[self.start : self.stop]

    @property
    def bias(self) -> Tensor | None:
        """(stop - start,), a view, or None."""
        bias = self.linear.bias
        return bias[self.start : self.stop] if isinstance(bias, Tensor) else None


@dataclass(frozen=True)
class FeedForward:
    """A dense feed-forward block as it stands in a model.

    Args:
        path: the module that an `MoE` takes the place of, dotted.
        maps: "gate" where the activation gates, "up" and "down": where each matrix is.
        activation: a key of `shunter.experts.ACTIVATIONS`.
        dropout: the probability of the dropout at the end of that module.
        superfluous: where the block is spread over several modules, the others: they hand on what they are given.
        undropped: (module, attribute) of the probabilities of dropouts between the maps, which become 0.
    """

    path: str
    maps: dict[str, Rows]
    activation: str
    dropout: float = 0.0
    superfluous: tuple[str, ...] = ()
    undropped: tuple[tuple[str, str], ...] = ()

    @property
    def dim(self) -> int:
        """d, the model width."""
        return self.maps["down"].weight.shape[0]

    @property
    def hidden(self) -> int:
        """f, the width of the block."""
        return self.maps["down"].weight.shape[1]

    @property
    def bias(self) -> bool:
        """Whether any of its maps has one."""
        return any(rows.bias is not None for rows in self.maps.values())

    @property
    def up(self) -> Tensor:
        """(2f, d) where the activation gates (the gate's rows first), else (f, d)."""
        parts = [rows.weight for name, rows in self.maps.items() if name != "down"]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @property
    def down(self) -> Tensor:
        """(d, f)."""
        return self.maps["down"].weight

    @property
    def up_bias(self) -> Tensor | None:
        """(2f,) or (f,), or None; zeros where one of two maps has none."""
        maps = [rows for name, rows in self.maps.items() if name != "down"]
        if all(rows.bias is None for rows in maps):
            return None
        return torch.cat([rows.weight.new_zeros(len(rows.weight)) if rows.bias is None else rows.bias for rows in maps])

    @property
    def down_bias(self) -> Tensor | None:
        """(d,), or None."""
        return self.maps["down"].bias


def known_activation(function: object, gated: bool) -> str | None:
    """The name under which `shunter.experts` has an activation of a model; None where it does not."""
    if isinstance(function, str):
        function = ACT2FN[function]
    probe = torch.cat([torch.linspace(-6, 6, 97, device="cpu"), torch.tensor([-90.0, -12.0, 12.0, 90.0], device="cpu")])
    try:
        value = function(probe) if callable(function) else None
    except Exception:  # it takes more than a tensor, or has parameters elsewhere
        return None
    if not isinstance(value, Tensor) or value.shape != probe.shape or value.device != probe.device:
        return None
    for name, (ours, gates) in ACTIVATIONS.items():
        if gates == gated and torch.allclose(value.float(), ours(probe.float()), atol=1e-6):
            return name
    return None


# ---- what a recording shows


@dataclass(frozen=True)
class _Seen:
    """A block in a recording.

    Args:
        ups: the calls of gate and up, of up alone, or of the one map that is both.
        down: the call of down.
        activation: a key of `ACTIVATIONS`.
        gate_first: of one map that is both, whether the gate's rows come first.
    """

    ups: tuple[Event, ...]
    down: Event
    activation: str
    gate_first: bool = True

    @property
    def paths(self) -> tuple[str, ...]:
        return (*(up.path for up in self.ups), self.down.path)

    def maps(self) -> dict[str, Rows]:
        down = _rows(self.down)
        if len(self.ups) == 2:
            return {"gate": _rows(self.ups[0]), "up": _rows(self.ups[1]), "down": down}
        up = _rows(self.ups[0])
        if not ACTIVATIONS[self.activation][1]:
            return {"up": up, "down": down}
        halves = [replace(up, stop=up.stop // 2), replace(up, start=up.stop // 2)]
        gate, up = halves if self.gate_first else reversed(halves)
        return {"gate": gate, "up": up, "down": down}


def _rows(event: Event) -> Rows:
    assert event.module is not None
    return Rows(event.path, event.module, 0, sizes(event.module)[0])


def _equal(a: object, b: object) -> bool:
    """Whether two values are the same rows, but for rounding to float32 and for how the rows are ordered in sizes."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.dim() < 2 or b.dim() < 2:
        return False
    if a.shape[-1] != b.shape[-1] or a.numel() != b.numel():
        return False
    a, b = a.reshape(-1, a.shape[-1]).double(), b.reshape(-1, b.shape[-1]).double()
    return torch.allclose(a, b, rtol=1e-5, atol=1e-5)


def _blocks_in(recording: Recording) -> Iterator[_Seen]:
    """The blocks that a recording shows, at most one for each map down."""
    linears = recording.linears
    for down in linears:
        before = [up for up in linears if up.end < down.begin and up.args[0].shape[-1] == down.out.shape[-1]]
        found = next(_formulas(down, before), None)
        if found is not None:
            yield found


def _formulas(down: Event, before: list[Event]) -> Iterator[_Seen]:
    h = down.args[0]
    width = h.shape[-1]
    for up in reversed(before):
        wide = up.out.shape[-1]
        for name, (act, gates) in ACTIVATIONS.items():
            if wide == width and not gates and _equal(act(up.out), h):
                yield _Seen((up,), down, name)
            if wide == 2 * width and gates:
                first, second = up.out.chunk(2, -1)
                if _equal(act(first) * second, h):
                    yield _Seen((up,), down, name)
                if _equal(act(second) * first, h):
                    yield _Seen((up,), down, name, gate_first=False)
            if wide == width and gates:
                for gate in before:
                    same = gate is not up and gate.out.shape == up.out.shape and _equal(gate.args[0], up.args[0])
                    if same and _equal(act(gate.out) * up.out, h):
                        yield _Seen((gate, up), down, name)


def _near_misses(recording: Recording) -> Iterator[tuple[str, str]]:
    """The maps down of what would be blocks with an activation that is known, and what lies there instead."""
    linears = recording.linears
    for up, down in zip(linears, linears[1:], strict=False):
        assert up.module is not None and down.module is not None
        (wide, dim), (out, f) = sizes(up.module), sizes(down.module)
        if dim == out and wide in (f, 2 * f) and f > dim:
            inner = [e.module for e in recording.events if up.end < e.begin and e.end < down.begin]
            kinds = dict.fromkeys(type(module).__name__ for module in inner if module is not None)
            if kinds:
                what, known = " and ".join(kinds), ", ".join(ACTIVATIONS)
                yield down.path, f"between {up.path} and {down.path} lies {what}, not just one of {known}"


# ---- how a block is replaced


def _parents(path: str) -> list[str]:
    """The modules around a path, innermost first, "" the last."""
    parts = path.split(".")
    return [".".join(parts[:depth]) for depth in range(len(parts) - 1, -1, -1)] if path else []


def _around(paths: tuple[str, ...]) -> list[str]:
    """The modules around all paths, innermost first."""
    return [path for path in _parents(paths[0]) if all(path in _parents(other) for other in paths[1:])]


class _Missed(NamedTuple):
    """Why a map down is in no block, and whether a look at a module inside could not find otherwise."""

    why: str
    final: bool = False


class _Place:
    """A module in which a block was seen, and how an `MoE` replaces just that block there.

    Args:
        module: the module.
        way: how it is called.
        seen: the block, in its recording in evaluation.
        recordings: those in evaluation and in training.
    """

    def __init__(self, module: nn.Module, way: Way, seen: _Seen, recordings: tuple[Recording, Recording]) -> None:
        self.module, self.way, self.seen, self.recordings = module, way, seen, recordings

    def block(self) -> FeedForward | _Missed:
        """How an `MoE` replaces the block, by paths within the module; or why it cannot, in words."""
        whole = _around(self.seen.paths)[0]
        if self._computes(whole, lambda call, down: call.out.shape == call.given.shape and _equal(call.out, down.out)):
            try:
                for training in (False, True):
                    record(self.module, self.way, training, {whole: _other} if whole else {})
            except Exception as error:
                return _Missed(f"its forward needs {whole} for more: {one_line(error)}", final=True)
            return FeedForward(whole, self.seen.maps(), self.seen.activation, dropout=self._dropout_at_end(whole))
        starts = [path for path in _parents(self.seen.paths[0]) if path not in _around(self.seen.paths)]
        starts = [path for path in starts if all(path in _parents(up.path) for up in self.seen.ups)]
        for path in reversed(starts):
            if self._computes(path, lambda call, down: _equal(call.out, down.args[0])):
                return self._spread(path)
        if ACTIVATIONS[self.seen.activation][1]:
            return _Missed("its gate is computed in a forward that does more")
        return self._spread(self.seen.paths[0])

    def _computes(self, path: str, right: Callable[[Event, Event], bool]) -> bool:
        """Whether a module takes the hidden states that the maps up do, alone, and gives what is right."""
        for recording in self.recordings:
            call, up, down = map(recording.first, (path, self.seen.paths[0], self.seen.down.path))
            if call is None or up is None or down is None:
                return False
            if not _equal(call.given, up.args[0]) or not right(call, down):
                return False
        return True

    def _dropout_at_end(self, path: str) -> float:
        recording = self.recordings[1]
        call, down = recording.first(path), recording.first(self.seen.down.path)
        assert call is not None and down is not None
        found = [p for time, p in recording.dropouts if down.end < time < call.end]
        return found[0] if len(found) == 1 else 1.0 - math.prod(1 - p for p in found)

    def _spread(self, path: str) -> FeedForward | _Missed:
        """With an `MoE` at a path, what comes behind it up to the map down left out."""
        recording, end = self.recordings[0], self.seen.down.path
        call, down = recording.first(path), recording.first(end)
        assert call is not None and down is not None
        value, way = call.out, []
        for event in sorted(recording.events, key=lambda event: event.begin):
            if call.end < event.begin and event.end < down.begin and event.args and _equal(event.args[0], value):
                value = event.out
                way.append(event)
        names = {event.path for event in way}
        superfluous = [name for name in dict.fromkeys(e.path for e in way) if not names.intersection(_parents(name))]
        for event in recording.events:
            if event.path in superfluous and event not in way:
                if not isinstance(event.module, nn.Dropout):
                    return _Missed(f"{event.path} is at work elsewhere too")
                superfluous.remove(event.path)
        instead: dict[str, Callable[..., Any]] = dict.fromkeys([*superfluous, end], _hand_on)
        instead[path] = _other
        # Each dropout with a probability of its own is known by it.
        marks: dict[tuple[str, str], float] = {}
        for name, module in self.module.named_modules():
            for attribute, value in vars(module).items():
                if "drop" in attribute and type(value) in (int, float):
                    marks[name, attribute] = (len(marks) + 1) / 2**10
        try:
            marked = record(self.module, self.way, True, instead, marks)
            used = {p for time, p in marked.dropouts if marked.is_between(path, time, end)}
            undropped = {place: 0.0 for place, mark in marks.items() if mark in used}
            for training in (False, True):
                after = record(self.module, self.way, training, instead, undropped)
                call, down = after.first(path), after.first(end)
                if call is None or down is None or not _equal(call.out, down.args[0]):
                    return _Missed("what its forward computes between its linear maps cannot be left out")
        except Exception as error:
            return _Missed(f"its forward needs its linear maps for more: {one_line(error)}", final=True)
        return FeedForward(
            path,
            self.seen.maps(),
            self.seen.activation,
            superfluous=(*superfluous, end),
            undropped=tuple(undropped),
        )


def _placed(module: nn.Module, way: Way, seen: _Seen, evaluated: Recording) -> FeedForward | _Missed:
    """How an `MoE` replaces a block that was seen in a module, or why it cannot."""
    try:
        trained = record(module, way, training=True)
    except Exception as error:
        return _Missed(f"in training it does not run as in evaluation: {one_line(error)}", final=True)
    return _Place(module, way, seen, (evaluated, trained)).block()


def _hand_on(x: Any) -> Any:
    return x


def _other(x: Tensor) -> Tensor:
    return torch.randn(x.shape, dtype=torch.float64, device="cpu")


def _at(path: str, module: nn.Module, block: FeedForward) -> FeedForward:
    """The block of a module at a path of the model, of the same block of a module of its kind, by paths within it."""

    def full(inner: str) -> str:
        return ".".join(part for part in (path, inner) if part)

    return replace(
        block,
        path=full(block.path),
        maps={
            name: replace(rows, path=full(rows.path), linear=module.get_submodule(rows.path))
            for name, rows in block.maps.items()
        },
        superfluous=tuple(map(full, block.superfluous)),
        undropped=tuple((full(inner), name) for inner, name in block.undropped),
    )


# ---- the blocks of a model


def _widths(module: nn.Module, taken: Container[int] = ()) -> list[int]:
    """The widths d of which some linear maps inside, of no block yet, could be maps up and down."""
    free = dict.fromkeys(sizes(inner) for inner in module.modules() if is_linear(inner) and id(inner) not in taken)
    return list(dict.fromkeys(d for d, f in free if (f, d) in free or (2 * f, d) in free))


def _kind(module: nn.Module) -> tuple[object, ...]:
    """Equal for modules that compute alike with their own weights: layers of a stack."""
    facts: list[object] = [repr(module)]
    for path, inner in module.named_modules():
        plain = {n: v for n, v in vars(inner).items() if isinstance(v, str | int | float | bool | types.FunctionType)}
        facts.append((path, type(inner), *((n, v) for n, v in plain.items() if not n.startswith("layer_i"))))
        facts += [(name, p.shape, p.dtype) for name, p in inner.named_parameters(recurse=False)]
        facts.append("forward" in vars(inner))
    return tuple(facts)


def _analysed(module: nn.Module) -> tuple[list[FeedForward], dict[str, _Missed]]:
    """The blocks that a module shows, by paths within it; and of other maps down why they are in none."""
    blocks: dict[str, FeedForward] = {}
    reasons: dict[str, _Missed] = {}
    done: set[str] = set()
    for way, recording in trials(module, _widths(module)):
        if way.method in done:
            continue
        for down, reason in _near_misses(recording):
            reasons.setdefault(down, _Missed(reason))
        for seen in _blocks_in(recording):
            done.add(way.method)
            down = seen.down.path
            if down not in blocks:
                found = _placed(module, way, seen, recording)
                if isinstance(found, FeedForward):
                    blocks[down] = found
                else:
                    reasons[down] = found
        if "forward" in done:
            break
    return list(blocks.values()), {down: reason for down, reason in reasons.items() if down not in blocks}


def _layer(path: str) -> str:
    """The layer of a path: up to the outermost number, for parts of a layer are numbered too."""
    parts = path.split(".")
    return ".".join(parts[: next(i for i, part in enumerate(parts) if part.isdigit()) + 1])


def find_feed_forwards(model: PreTrainedModel) -> list[list[FeedForward]]:
    """The dense feed-forward blocks of a model, a list for each stack of layers (an encoder, a decoder), in order.

    Raises:
        UserError: as of `survey`.
    """
    return survey(model)[0]


def survey(model: PreTrainedModel) -> tuple[list[list[FeedForward]], list[str]]:
    """As `find_feed_forwards`, and of the layers in which no block is known why, in words.

    Raises:
        UserError: where the model already has experts, or where no block is known: the error lists what was looked at.
    """
    numbered = {}
    for path, module in model.named_modules():
        if any(part.isdigit() for part in path.split(".")):
            if hasattr(module, "experts"):
                raise UserError(
                    f"sparsify: {type(model).__name__} already has experts, at {path}.experts; it is sparse"
                )
            numbered[path] = module
    blocks: list[FeedForward] = []
    reasons: dict[int, tuple[str, str]] = {}
    taken: set[int] = set()
    refused: set[int] = set()
    kinds: dict[tuple[object, ...], tuple[list[FeedForward], dict[str, _Missed]]] = {}
    for path, module in numbered.items():
        if isinstance(module, nn.ModuleList | nn.ModuleDict) or not _widths(module, taken | refused):
            continue
        kind = _kind(module)
        if kind not in kinds:
            kinds[kind] = _analysed(module)
        found, missed = kinds[kind]
        for block in (_at(path, module, block) for block in found):
            maps = {id(rows.linear) for rows in block.maps.values()}
            if not maps & (taken | refused):
                taken |= maps
                blocks.append(block)
        for down, (why, final) in missed.items():
            linear = id(module.get_submodule(down))
            reasons[linear] = path, f"{path} ({type(module).__name__}: {why})"
            if final:
                refused.add(linear)
    known = {_layer(block.path) for block in blocks}
    left = [why for down, (path, why) in reasons.items() if down not in taken and _layer(path) not in known]
    widest: dict[str, int] = {}
    for block in blocks:
        widest[_layer(block.path)] = max(block.hidden, widest.get(_layer(block.path), 0))
    order = {path: i for i, path in enumerate(numbered)}
    stacks: dict[str, list[FeedForward]] = {}
    for block in sorted(blocks, key=lambda block: order[block.path]):
        layer = _layer(block.path)
        if block.hidden >= block.dim or 2 * block.hidden > widest[layer]:  # else an adapter beside the block
            stacks.setdefault(re.sub(r"\b\d+\b", "*", block.path), []).append(block)
    if not stacks:
        seen = left or [
            f"{path} ({type(module).__name__})"
            for path, module in numbered.items()
            if any(is_linear(child) for child in module.children())
        ]
        raise UserError(
            f"sparsify: no feed-forward block is known in {type(model).__name__}. Looked at: "
            f"{', '.join(seen[:3]) or 'nothing'}. Put shunter.MoE into the model yourself"
        )
    return list(stacks.values()), left
