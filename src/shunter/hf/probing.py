"""What the linear maps of a module receive and give while its own forward runs: a module and rows in, a recording out.

The forward runs on a copy of the module in which random numbers stand in for every parameter and for the output of
every linear map, in float64 on the CPU. So it costs no memory, whatever the size, dtype or device of the module, and
whatever equality is found holds for any weights.
"""

from __future__ import annotations

import inspect
import types
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

__all__ = ["Event", "Recording", "Way", "is_linear", "record", "shapes_given", "sizes", "trials"]

_ROWS = (2, 3)  # an image of so many patches
_RETURNS: tuple[Callable[[Tensor], Any], ...] = (lambda x: (x, None), lambda x: x, lambda x: (x, None, None))
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_WIDEST = 2**21
_LARGE = 2**12  # more numbers than these are one number, repeated
_DROPOUTS = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.dropout, F.alpha_dropout, F.feature_alpha_dropout}


def is_linear(module: nn.Module) -> bool:
    """Whether a module computes a linear map of its own weight, (out, in) or as in GPT-2 (in, out), and no more."""
    kind: Any = type(module)
    if not isinstance(module, nn.Linear | Conv1D) or not _is_linear(kind):
        return False
    weight = module.weight
    own = "forward" in vars(module) and not hasattr(module, "_hf_hook")
    return not own and weight.dim() == 2 and weight.is_floating_point() and weight.element_size() > 1


@cache
def _is_linear(kind: type[nn.Module]) -> bool:
    """Whether the forward of a kind of `Linear` or `Conv1D` is theirs or computes the same."""
    base = Conv1D if issubclass(kind, Conv1D) else nn.Linear
    if kind.forward is base.forward:
        return True
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
        plain = base(3, 4).double()
        copy = kind.__new__(kind)
        copy.__dict__.update(vars(plain))
        x = torch.randn(2, 2, plain.weight.shape[base is nn.Linear], dtype=torch.float64)
        try:
            return torch.allclose(copy(x), plain(x))
        except Exception:  # it has more than a weight and a bias
            return False


def sizes(linear: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear map."""
    weight = linear.weight
    assert isinstance(weight, Tensor)
    first, second = weight.shape
    return (second, first) if isinstance(linear, Conv1D) else (first, second)


@dataclass(frozen=True, eq=False)
class Event:
    """A call of a module or function.

    Args:
        path: of the module, or of the attribute that holds the function.
        module: the original module; None for a function.
        args, kwargs, out: of the call.
        begin, end: where in the recording.
    """

    path: str
    module: nn.Module | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    begin: int
    end: int

    @property
    def given(self) -> Any:
        """What it was called with, where that is one value by position; else None."""
        return self.args[0] if len(self.args) == 1 and not self.kwargs else None


@dataclass
class Recording:
    """What happened in one forward.

    Args:
        training: in which mode it ran.
        events: the calls of the modules inside, of functions that they hold, and of the module itself (path "").
        dropouts: the times of dropouts, none of which dropped anything, and their probabilities.
        failed: whether a part could not be computed, and returned what the way says.
        ended: whether the forward did.
    """

    training: bool
    events: list[Event] = field(default_factory=list)
    dropouts: list[tuple[int, float]] = field(default_factory=list)
    failed: bool = False
    ended: bool = False
    time: int = 0

    def tick(self) -> int:
        """The present time; it moves on."""
        self.time += 1
        return self.time

    def first(self, path: str) -> Event | None:
        """The first call of a module."""
        return next((event for event in self.events if event.path == path), None)

    def is_between(self, path: str, time: int, other: str) -> bool:
        """Whether a time is behind the first call of a module and before that of another."""
        first, second = self.first(path), self.first(other)
        return first is not None and second is not None and first.end < time < second.begin

    @property
    def linears(self) -> list[Event]:
        """The calls of linear maps, in order."""
        return [event for event in self.events if event.args and event.module is not None and is_linear(event.module)]


@dataclass(frozen=True)
class Way:
    """How a module of which nothing is known is called.

    Args:
        method: what is called: its forward, or a method for the feed-forward part alone, whose arguments are known.
        shape: of what it takes, d among its sizes.
        fill: whether its other arguments, where they have no default, are hidden states too; else None.
        returns: what a part of it returns that fails, for it got less than it needs.
    """

    method: str
    shape: tuple[int, ...]
    fill: bool
    returns: Callable[[Tensor], Any]


class _NoDropout(TorchFunctionMode):
    """Writes down dropouts instead of dropping."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self.recording = recording

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _DROPOUTS:
            bound = inspect.signature(F.dropout).bind_partial(*args, **(kwargs or {})).arguments
            if bound.get("training", True):
                self.recording.dropouts.append((self.recording.tick(), float(bound.get("p", 0.5))))
            return args[0] if args else bound["input"]
        return func(*args, **(kwargs or {}))


class _Instead(nn.Module):
    """A module that has nothing but a forward."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.forward = function


def _unknown(*args: Any, **kwargs: Any) -> Any:
    raise ValueError("a forward that was put in the place of the module's own cannot run on a copy of it")


class _Probe:
    """A copy of a module whose calls are recorded.

    Args:
        module: the original.
        way: how it is called.
        training: in which mode.
        instead: path of a module or function inside -> what stands in its place.
        probabilities: (path of a module, name of its attribute) -> the probability of a dropout that stands there.
    """

    def __init__(
        self,
        module: nn.Module,
        way: Way,
        training: bool,
        instead: Mapping[str, Callable[..., Any]],
        probabilities: Mapping[tuple[str, str], float],
    ) -> None:
        self.way, self.instead, self.probabilities = way, instead, probabilities
        self.generator = torch.Generator().manual_seed(0)
        self.recording = Recording(training)
        self._copies: dict[int, nn.Module] = {}
        self.root = self._copy(module, "")

    def run(self) -> Recording:
        """Call the module as the way says."""
        given: dict[str, Any] = {}
        called = self.root if self.way.method == "forward" else getattr(self.root, self.way.method)
        for parameter in list(inspect.signature(getattr(type(self.root), self.way.method)).parameters.values())[2:]:
            if parameter.default is parameter.empty and parameter.kind not in _VARIADIC:
                other = self.normal(*self.way.shape) if self.way.fill else None
                given[parameter.name] = _ROWS if "dimensions" in parameter.name else other
        with torch.no_grad(), torch.device("cpu"), torch.random.fork_rng(devices=[]), _NoDropout(self.recording):
            called(self.normal(*self.way.shape), **given)
        return self.recording

    def normal(self, *shape: int, one: bool = False) -> Tensor:
        """Random numbers; a large tensor is one number, repeated."""
        size = torch.Size(shape)
        few = (1,) * len(size) if one or size.numel() > _LARGE else size
        return torch.randn(few, generator=self.generator, dtype=torch.float64, device="cpu").expand(size)

    def _like(self, tensor: Tensor, one: bool = False) -> Tensor:
        if tensor.is_floating_point():
            return self.normal(*tensor.shape, one=one)
        return torch.zeros((1,) * tensor.dim(), dtype=tensor.dtype, device="cpu").expand(tensor.shape)

    def _copy(self, module: nn.Module, path: str) -> nn.Module:
        if id(module) in self._copies:
            return self._copies[id(module)]
        if path in self.instead:
            self._copies[id(module)] = _Instead(partial(self._call, path, module, self.instead[path]))
            return self._copies[id(module)]
        copy = module.__class__.__new__(module.__class__)
        self._copies[id(module)] = copy
        state = dict(vars(module))
        for name in [name for name in state if name.endswith(("_hooks", "_hooks_with_kwargs"))]:
            state[name] = OrderedDict()
        state |= {"training": self.recording.training, "_compiled_call_impl": None, "gradient_checkpointing": False}
        state["_parameters"] = {
            n: None if p is None else nn.Parameter(self._like(p, one=is_linear(module)), requires_grad=False)
            for n, p in module._parameters.items()
        }
        state["_buffers"] = {n: None if b is None else self._like(b) for n, b in module._buffers.items()}
        state["_modules"] = {
            n: None if m is None else self._copy(m, f"{path}.{n}" if path else n) for n, m in module._modules.items()
        }
        for name, value in state.items():
            here = f"{path}.{name}" if path else name
            if (path, name) in self.probabilities:
                state[name] = self.probabilities[path, name]
            elif isinstance(value, types.FunctionType | types.BuiltinFunctionType) and name != "forward":
                state[name] = partial(self._call, here, None, self.instead.get(here, value))
        own = state.pop("forward", None)
        forward: Callable[..., Any] = type(module).forward
        if own is not None and not hasattr(module, "_hf_hook"):  # else accelerate's, around that of the class
            bound = isinstance(own, types.MethodType) and own.__self__ is module
            forward = own.__func__ if bound else _unknown
        if is_linear(module):
            state["forward"] = partial(self._call, path, module, partial(self._linear, module))
        else:
            state["forward"] = partial(self._call, path, module, partial(forward, copy))
        copy.__dict__.update(state)
        return copy

    def _linear(self, module: nn.Module, x: Tensor) -> Tensor:
        wide_out, wide_in = sizes(module)
        if x.shape[-1] != wide_in:
            raise ValueError(f"a linear map of {wide_in} got {x.shape[-1]}")
        if wide_out > _WIDEST:
            raise ValueError(f"a linear map to {wide_out:,} values is wider than any model has")
        out = 2 * torch.randn((*x.shape[:-1], wide_out), generator=self.generator, dtype=torch.float64, device="cpu")
        out[..., ::5] *= 20  # an activation may clip what is large
        return out

    def _call(
        self, path: str, module: nn.Module | None, function: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        recording = self.recording
        begin, known = recording.tick(), len(recording.events)
        try:
            out = function(*args, **kwargs)
        except Exception:
            given = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            if not path or given is None or (module is not None and is_linear(module)):
                raise
            # What it computes needs more than is known here; it must not be what lies inside of a block.
            del recording.events[known:]
            recording.failed = True
            out = self.way.returns(self.normal(*given.shape))
        recording.events.append(Event(path, module, args, kwargs, out, begin, recording.tick()))
        return out


def trials(module: nn.Module, widths: Iterable[int]) -> Iterator[tuple[Way, Recording]]:
    """The ways in which a module can be called, that of most modules first, each with its recording in evaluation.

    Args:
        module: any module.
        widths: what d may be.
    """
    others = [name for name in dir(type(module)) if "feed_forward" in name and callable(getattr(type(module), name))]
    for method in ("forward", *others):
        parameters = list(inspect.signature(getattr(type(module), method)).parameters.values())[2:]
        needs = any(p.default is p.empty and p.kind not in _VARIADIC for p in parameters)
        for d in widths:
            for shape in ((2, 6, d), (2, *_ROWS, d), (2, d, *_ROWS), (6, d)):
                for fill in (False, True) if needs else (False,):
                    for returns in _RETURNS:
                        way = Way(method, shape, fill, returns)
                        probe = _Probe(module, way, False, {}, {})
                        with suppress(Exception):  # it cannot be called in this way
                            probe.run()
                            probe.recording.ended = True
                        if probe.recording.ended:
                            yield way, probe.recording
                        if not probe.recording.failed:
                            break


def record(
    module: nn.Module,
    way: Way,
    training: bool = False,
    instead: Mapping[str, Callable[..., Any]] | None = None,
    probabilities: Mapping[tuple[str, str], float] | None = None,
) -> Recording:
    """A forward of a module, called in a way.

    Args:
        module: any module.
        way: of `trials`.
        training: whether in training; else in evaluation. Nothing is dropped in either.
        instead: path of a module or function inside -> what runs in its place.
        probabilities: (path of a module, name of its attribute) -> the number that stands there.

    Raises:
        Exception: whatever the module raises that cannot be called in this way.
    """
    return _Probe(module, way, training, instead or {}, probabilities or {}).run()


def shapes_given(module: nn.Module, paths: Iterable[str], **given: Any) -> dict[str, torch.Size]:
    """The shapes of what some modules inside of a module are given, where it can be called with these arguments.

    Args:
        module: any module.
        paths: of modules inside, which here return what they are given.
        **given: of its forward.
    """
    instead = dict.fromkeys(paths, lambda x, **known: x)
    probe = _Probe(module, Way("forward", (), False, lambda x: x), False, instead, {})
    with torch.no_grad(), torch.device("cpu"), torch.random.fork_rng(devices=[]), suppress(Exception):
        probe.root(**given)
    first = {path: probe.recording.first(path) for path in instead}
    return {path: event.args[0].shape for path, event in first.items() if event is not None and event.args}
