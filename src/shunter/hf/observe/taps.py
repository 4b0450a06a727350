"""The mixture-of-experts layers of any model, Shunter's or transformers': a model in, the modules that decide out.

No list of model classes is kept. A layer is one of

* Shunter's (`RoutedLayer`);
* transformers': a module that takes (hidden_states, top_k_index, top_k_weights), the contract that experts share, and
  the router beside it;
* transformers', where experts take something else (Llama 4, JetMoE, NLLB-MoE): a router whose scores are recorded.

Routers are found by what each model says transformers may record (`_can_record_outputs`), or by the name gate or router
beside the experts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ...moe import RoutedLayer

__all__ = ["SCORE_FUNCTIONS", "OwnHook", "Tap", "require_taps", "taps"]

_INDEX_NAMES = ("top_k_index", "router_indices", "selected_experts")

_ROUTER_NAMES = ("gate", "router")

SCORE_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda h: h.log_softmax(-1),
    "sigmoid": F.logsigmoid,
    "sqrtsoftplus": lambda h: F.softplus(h).clamp_min(torch.finfo(h.dtype).tiny).log() / 2,
}
"""What families make of logits (T, E), as logarithms of scores."""


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
    def own(self) -> RoutedLayer | None:
        """The layer, where it is one of Shunter's, whose router says itself what it decides; else None."""
        return self.layer if isinstance(self.layer, RoutedLayer) else None

    @property
    def top_k(self) -> int | None:
        """k, by the router's own word; None where it does not say."""
        k = getattr(self.router, "top_k", None)
        if k is None:
            k = getattr(getattr(self.router, "config", None), "top_k_experts", None)
        return k if isinstance(k, int) else None

    @property
    def num_weights(self) -> int:
        """How many experts have weights."""
        return self.num_experts if self.experts is None else _size(self.experts)

    def to_probs(self, logits: Tensor) -> Tensor:
        """(T, E) router probabilities of logits (T, E), by the score function; each row sums to 1."""
        log_scores = SCORE_FUNCTIONS[self.score_function or "softmax"](logits)
        return log_scores.softmax(-1)


class OwnHook:
    """A hook that copies and pickles of its module are without: they are made between forwards, and observed by no one.

    Args:
        hook: called with what the hook is called with.
    """

    def __init__(self, hook: Callable[..., Any]) -> None:
        self.hook = hook

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the hook returns."""
        return self.hook(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return OwnHook, (_nothing,)


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def taps(model: nn.Module) -> dict[str, Tap]:
    """The mixture-of-experts layers of a model by their qualified names, in order; empty where there are none."""
    aside = _set_aside(model)
    recorded = {module: at for module, at in _recorded_routers(model).items() if module not in aside}
    modules = {path: module for path, module in model.named_modules() if module not in aside}
    found: dict[str, Tap] = {}
    used: set[nn.Module] = set()
    for path, module in modules.items():
        if isinstance(module, RoutedLayer):
            found[path] = Tap(path, module, _in_use(module.router), None, module.num_experts)
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


def _in_use(module: nn.Module) -> nn.Module:
    """What computes where a module stands: where peft trains it whole, the original or the active adapter's copy."""
    copies: Any = getattr(module, "modules_to_save", None)
    original: Any = getattr(module, "original_module", None)
    if not isinstance(copies, nn.ModuleDict) or not isinstance(original, nn.Module):
        return module
    names: Any = () if getattr(module, "disable_adapters", False) else getattr(module, "active_adapters", ())
    return next((copies[name] for name in names if name in copies), original)


def _set_aside(model: nn.Module) -> set[nn.Module]:
    """What peft keeps beside the modules in use: originals, and copies of adapters that are not active."""
    found: set[nn.Module] = set()
    for wrapper in model.modules():
        if (used := _in_use(wrapper)) is not wrapper:
            parts: Any = (wrapper.original_module, *wrapper.modules_to_save.values())  # type: ignore[operator]
            found.update(m for part in parts if part is not used for m in part.modules())
    return found


def _scores(module: nn.Module, num_experts: int) -> bool:
    """Whether a module has a logit for each expert: keys that are combined into experts (Doge) are not understood."""
    return any(isinstance(part, nn.Linear) and part.out_features == num_experts for part in module.modules())


def _inside(module: nn.Module) -> list[nn.Module]:
    return list(module.modules())[1:]


def _takes_choices(module: nn.Module) -> bool:
    """Whether the forward of a module's class is the experts' contract: hidden states, indices, weights.

    That of an instance may be what computes quantised or offloaded experts, with other names.
    """
    names = list(inspect.signature(type(module).forward).parameters)[1:]
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
