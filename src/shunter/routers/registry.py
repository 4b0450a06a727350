"""The routers by name: create one, list them and their options, register one of your own."""

from __future__ import annotations

import difflib
import inspect
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, get_args, get_type_hints

from .adaptive_k import ReLU, TopP
from .base import Router
from .base_layers import Base, Sinkhorn
from .bernoulli import Bernoulli
from .cosine import Cosine
from .deepseek import DeepSeek
from .dense_to_sparse import DenseToSparse
from .dselect_k import DSelectK
from .expert_choice import ExpertChoice
from .fixed import Domain, Language
from .given import Forced, Uniform
from .gshard import GShard
from .hash import BigramHash, Hash, PositionHash, PreviousTokenHash
from .limoe import LIMoE
from .noisy_topk import HierarchicalNoisyTopK, NoisyTopK
from .null_experts import NullExperts
from .prototypes import Prototypes
from .reinforce import Reinforce
from .routing_networks import RoutingNetworks
from .soft import HME, MMoE, Soft
from .soft_moe import SoftMoE
from .speech import Speech
from .switch import Switch
from .task import Sentence, Task
from .thor import Thor
from .topk import TopK
from .two_sided import TwoSided
from .vmoe import VMoE

__all__ = ["create", "names", "option_types", "options", "register"]

_ROUTERS: dict[str, type[Router]] = {
    "switch": Switch,
    "topk": TopK,
    "noisy_topk": NoisyTopK,
    "hierarchical_noisy_topk": HierarchicalNoisyTopK,
    "gshard": GShard,
    "vmoe": VMoE,
    "prototypes": Prototypes,
    "dense_to_sparse": DenseToSparse,
    "dselect_k": DSelectK,
    "task": Task,
    "sentence": Sentence,
    "speech": Speech,
    "limoe": LIMoE,
    "expert_choice": ExpertChoice,
    "two_sided": TwoSided,
    "base": Base,
    "sinkhorn": Sinkhorn,
    "hash": Hash,
    "previous_token_hash": PreviousTokenHash,
    "bigram_hash": BigramHash,
    "position_hash": PositionHash,
    "domain": Domain,
    "language": Language,
    "thor": Thor,
    "soft": Soft,
    "hme": HME,
    "mmoe": MMoE,
    "deepseek": DeepSeek,
    "cosine": Cosine,
    "null_experts": NullExperts,
    "top_p": TopP,
    "relu": ReLU,
    "forced": Forced,
    "uniform": Uniform,
    "reinforce": Reinforce,
    "routing_networks": RoutingNetworks,
    "bernoulli": Bernoulli,
    "soft_moe": SoftMoE,
}


@cache
def _installed() -> dict[str, EntryPoint]:
    """The routers of other installed packages, by name, not yet imported."""
    return {entry.name: entry for entry in entry_points(group="shunter.routers") if entry.name not in _ROUTERS}


def names() -> list[str]:
    """The names that `create` knows: built in, registered, or an installed package's entry point `shunter.routers`."""
    return [*_ROUTERS, *(name for name in _installed() if name not in _ROUTERS)]


def register(name: str, router: type[Router]) -> None:
    """Make a router of your own available under a name.

    Raises:
        ValueError: where the name is taken by another class.
        TypeError: where the class is not a `Router`.
    """
    if not (isinstance(router, type) and issubclass(router, Router)):
        raise TypeError(f"register: {router!r} is not a subclass of shunter.routers.Router")
    if _ROUTERS.get(name, router) is not router:
        raise ValueError(f"register: {name!r} is already {_ROUTERS[name].__name__}; choose another name")
    _ROUTERS[name] = router


def find(name: str | type[Router]) -> type[Router]:
    """The class behind a name.

    Raises:
        ValueError: for an unknown name, with the nearest known one; for an installed router that cannot be imported.
    """
    if isinstance(name, type):
        return name
    if name not in _ROUTERS:
        entry = _installed().get(name)
        if entry is None:
            near = difflib.get_close_matches(name, names(), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"router {name!r} is unknown{hint} Known: {', '.join(names())}")
        try:
            register(name, entry.load())
        except Exception as error:
            raise ValueError(f"router {name!r} of the entry point {entry.value} cannot be loaded: {error}") from error
    return _ROUTERS[name]


def options(name: str | type[Router]) -> set[str]:
    """The options that a router takes, those of its base classes included."""
    return set(option_types(name))


def option_types(name: str | type[Router]) -> dict[str, Any]:
    """What each option is annotated with, by the router's own word before that of its base classes."""
    found: dict[str, Any] = {}
    for cls in find(name).__mro__:
        if "__init__" in vars(cls) and issubclass(cls, Router):
            types, parameters = _types(cls), inspect.signature(cls.__init__).parameters.values()
            found = {p.name: types.get(p.name, Any) for p in parameters if p.kind is p.KEYWORD_ONLY} | found
            if not any(p.kind is p.VAR_KEYWORD for p in parameters):
                break
    return {option: kind for option, kind in found.items() if option not in ("device", "dtype")}


def _types(cls: type[Router]) -> dict[str, Any]:
    try:
        return get_type_hints(cls.__init__)
    except NameError:  # one that is imported for type checkers alone
        return {}


def create(name: str | type[Router], dim: int, num_experts: int, **kwargs: Any) -> Router:
    """A router by name (or class): `create("topk", 512, 8, top_k=2)`.

    Args:
        name: one of `names()`, or a subclass of `Router`.
        dim: d, the width of the hidden states.
        num_experts: E.
        **kwargs: the router's options (see `options`), and device and dtype.

    Raises:
        ValueError: for an unknown name or option, with the nearest known one; for an impossible value, such as True
            where a number belongs, which would count as 1.
    """
    cls = find(name)
    known = option_types(cls)
    for key, value in kwargs.items():
        kinds = {known.get(key), *get_args(known.get(key))}
        if isinstance(value, bool) and bool not in kinds and kinds & {int, float}:
            raise ValueError(f"router {name!r}: {key} is a number; got {value}")
        if key not in known.keys() | {"device", "dtype"}:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"router {name!r} has no option {key!r}{hint} Options: {', '.join(sorted(known))}")
    return cls(dim, num_experts, **kwargs)
