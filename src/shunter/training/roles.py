"""A model's parameters by role: each in one of router, expert, shared, attention, …; trained, frozen, printed by it.

Layers with experts are found as `shunter.hf.observe.taps` finds them, in Shunter's and in transformers' models; the
other roles by what modules are and are called.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..experts import ResidualExperts
from ..hf.observe.taps import Tap, taps

__all__ = ["GROUPS", "ROLES", "accumulate", "parameter_groups", "roles", "select", "table", "train_only"]

Opt = TypeVar("Opt", bound=torch.optim.Optimizer)

ROLES: dict[str, str] = {
    "router": "what decides which experts a token takes, norms and scales of its own included",
    "expert": "the experts among which the router chooses",
    "core": "what the experts of a layer have in common, where they are a core and residuals",
    "shared": "experts that every token takes, and their gates",
    "feed_forward": "feed-forward blocks without experts",
    "attention": "what mixes tokens: attention, recurrences and convolutions over them",
    "norm": "normalisations outside of routers and experts",
    "embedding": "of tokens, positions and patches; an output matrix that is tied to them",
    "head": "what makes logits or other outputs of the last hidden states",
    "other": "what is none of these",
}
"""The roles, and what has them."""

GROUPS: dict[str, tuple[str, ...]] = {
    "all": tuple(ROLES),
    "moe": ("router", "expert", "core", "shared"),
    "non_moe": tuple(role for role in ROLES if role not in ("router", "expert", "core", "shared")),
    "all_but_experts": tuple(role for role in ROLES if role != "expert"),
}
"""Names for several roles, which fine-tuning trains alone (Zoph et al. 2022, ST-MoE, section 5)."""

# Of modules around a parameter, the outermost that tells decides.
_KINDS = {
    "embedding": r"Embed",
    "attention": r"Attention|Attn|Mamba|Mixer|DeltaNet|Conv|Recurrent(?!Gemma)|Indexer|Compressor|SSM|RWKV|KDA|MLA"
    r"|^(LSTM|GRU|RNN)$",
    "feed_forward": r"MLP|Mlp|FeedForward|FFN|FF$|MoE|MOE|Moe\w*Block|Intermediate|DenseAct|Output$",
}
_NAMES = {
    "head": r"lm_head|embed_out|classifier|score|qa_outputs|pooler|cls|\w*predictions?|proj_out|head",
    "embedding": r"\w*embed\w*|wte|wpe|\w*_token",
    "attention": r"\w*(attn|attention)\w*|[qkvo]_proj|\w*conv\w*|mamba|linear_attn|mixers",
    "feed_forward": r"mlp\w*|ff|ffn\w*|feed_forward\w*|fc\d|lin\d|wi|wo|w\d",
}
_STACK = re.compile(r"(Layer|(?<!Recurrent)Block|Model|Encoder|Decoder|Stack|Stage|LM|PreTrainedModel)$|For[A-Z]\w+$")
_SELECTION_BIASES = ("e_score_correction_bias", "expert_bias", "balancing_biases")
_WRAPPED = {"base_layer", "original_module", "_orig_mod"}
"""What adapters and compiled modules call the module that they wrap."""


def roles(model: nn.Module) -> dict[str, str]:
    """The role of each parameter of a model, by qualified name: a key of `ROLES`. A tied parameter has its first name.

    Args:
        model: any; its experts are known where `shunter.hf.observe.taps.taps` knows them, or by the name experts.
    """
    modules = dict(model.named_modules())
    places = dict(_places(modules, taps(model)))
    ends = _parameters_of(model, "get_output_embeddings") - _parameters_of(model, "get_input_embeddings")
    return {name: _role(name, id(p) in ends, modules, places) for name, p in model.named_parameters()}


def select(model: nn.Module, which: str) -> dict[str, nn.Parameter]:
    """The parameters of some roles, by qualified name.

    Args:
        model: any.
        which: roles and names of `GROUPS`, with commas between; one behind a minus is left out: "moe", "all,-norm".

    Raises:
        UserError: for a name that is neither, and a role that is named and that no parameter of the model has.

    >>> list(select(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)), "norm"))
    ['0.weight', '0.bias']
    """
    of = roles(model)
    chosen: set[str] = set()
    for word in which.split(","):
        name = word.strip().removeprefix("-")
        if name not in ROLES and name not in GROUPS:
            raise UserError(f"{name!r} is no role: {', '.join(ROLES)}; nor a group: {', '.join(GROUPS)}")
        found = set(GROUPS.get(name, (name,)))
        if not found & set(of.values()):
            there = ", ".join(role for role in ROLES if role in of.values())
            raise UserError(f"no parameter of {type(model).__name__} has the role {name}; there are {there}")
        chosen = chosen - found if word.strip().startswith("-") else chosen | found
    found_here = {name: p for name, p in model.named_parameters() if of[name] in chosen}
    if not found_here:
        raise UserError(f"{which!r} leaves no parameter of {type(model).__name__}")
    return found_here


def train_only(model: nn.Module, which: str) -> None:
    """Train the parameters of some roles and freeze all others, by requires_grad.

    Args:
        model: any; adapters of `peft` count with the modules that they adapt, which stay frozen.
        which: as of `select`; "non_moe" trains all but routers and experts.

    Raises:
        UserError: as of `select`.
    """
    chosen = select(model, which)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(name in chosen and not _adapted(model, name))


def _adapted(model: nn.Module, name: str) -> bool:
    """Whether a parameter is of a module that an adapter copies, or wraps, the innermost of several in each other."""
    if ".original_module." in name:
        return True
    before, wrapped, _ = name.rpartition(".base_layer.")
    return bool(wrapped) and not hasattr(model.get_submodule(f"{before}.base_layer"), "base_layer")


def parameter_groups(
    model: nn.Module,
    lr: float,
    train: str = "all",
    *,
    rates: Mapping[str, float] = MappingProxyType({}),
    batches: Mapping[str, int] = MappingProxyType({}),
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """The groups of an optimizer, with a learning rate and a batch for each role; what is not trained is frozen.

    In a loop it is the optimizer's first argument, and that optimizer is one argument of a Trainer:

        optimizer = torch.optim.AdamW(parameter_groups(model, 1e-4, "non_moe", rates={"norm": 10}))
        Trainer(model, args, train_dataset=data, optimizers=(optimizer, None))

    Args:
        model: any.
        lr: the learning rate.
        train: what is trained of what requires a gradient, as of `select`.
        rates: how many times the learning rate a role or a group of roles has; of two that name a role the later one
            counts.
        batches: over how many steps' batches a role or a group of roles takes the mean of its gradients before it is
            updated; the optimizer does so after `accumulate`.
        weight_decay: of matrices; vectors (norms, biases) have none.

    Returns:
        A list of {"params", "names", "role", "lr", "batches", "weight_decay"}; parameters of one role share a group or
        two.

    Raises:
        UserError: as of `select`, for a rate or batches of a role that is not trained, a rate that is no number above
            0, and batches that are no integer above 0.

    Source: Zoph et al. 2022 (ST-MoE), sections 5.2 and 5.3: sparse models want other rates, and may train a part alone.
    """
    of, trained = roles(model), {name: p for name, p in select(model, train).items() if p.requires_grad}
    if not trained:
        raise UserError(f"no parameter among {train!r} requires a gradient; unfreeze them first, as by train_only")
    for name, factor in rates.items():
        if not (math.isfinite(factor) and factor > 0):
            raise UserError(f"the rate {factor} of {name} must be a number above 0; to freeze a role leave it out")
    for name, number in batches.items():
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise UserError(f"the batches {number} of {name} must be an integer above 0: of how many steps")
    scale: dict[str, float] = dict.fromkeys(ROLES, 1.0)
    steps: dict[str, int] = dict.fromkeys(ROLES, 1)
    for what, given, of_roles in (("a rate", rates, scale), ("batches", batches, steps)):
        for name, value in given.items():
            if not select(model, name).keys() & trained.keys():
                raise UserError(f"{name} has {what}, and is not among what is trained, {train!r}")
            of_roles |= dict.fromkeys(GROUPS.get(name, (name,)), value)
    for name, parameter in model.named_parameters():
        if name not in trained:
            parameter.requires_grad_(False)
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for name, parameter in trained.items():
        decays = parameter.dim() > 1
        new = {"params": [], "names": [], "role": of[name], "lr": lr * scale[of[name]], "batches": steps[of[name]]}
        group = groups.setdefault((of[name], decays), new | {"weight_decay": weight_decay if decays else 0.0})
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def accumulate(optimizer: Opt) -> Opt:
    """Have an optimizer update each group by the mean of its gradients over so many steps as its "batches" say.

    On the steps between, the parameters of such a group, their moments and step counts are left alone. What has been
    added up is in the optimizer's state dict. A Trainer clips, and a guard judges, the gradients of each step.

        optimizer = accumulate(torch.optim.AdamW(parameter_groups(model, 1e-4, batches={"router": 4})))

    Args:
        optimizer: any that leaves parameters without a gradient alone, as those of torch do; its step takes no closure.
    """

    def add(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        # A GradScaler leaves both to a fused optimizer: to divide by its scale, and to take no step that is not finite.
        scale, infinite = (getattr(optimizer, name, None) for name in ("grad_scale", "found_inf"))
        if infinite is not None and bool(infinite):
            return
        for group in optimizer.param_groups:
            grads = [parameter.grad for parameter in group["params"]]
            number = group.get("batches", 1)
            if number == 1 or all(grad is None for grad in grads):  # the step is one that a guard skips
                continue
            before = group.get("accumulated") or [None] * len(grads)
            if scale is not None:
                grads = [None if grad is None else grad / scale.to(grad.device) for grad in grads]
            total = [_sum(a, grad) for a, grad in zip(before, grads, strict=True)]
            seen = group.get("seen", 0) + 1
            done = seen == number
            for parameter, grad in zip(group["params"], total, strict=True):
                mean = grad / number if done and grad is not None else None
                parameter.grad = mean if mean is None or scale is None else mean * scale.to(mean.device)
            group["seen"], group["accumulated"] = (0, None) if done else (seen, total)

    optimizer.register_step_pre_hook(add)
    return optimizer


def _sum(before: Tensor | None, grad: Tensor | None) -> Tensor | None:
    if before is None or grad is None:
        return before if grad is None else grad.clone()
    return before.to(grad.device) + grad


def table(model: nn.Module) -> str:
    """Each role of a model with its tensors, numbers and how many of these are trained, and an example, as text."""
    of, rows = roles(model), []
    for role in ROLES:
        named = {name: p for name, p in model.named_parameters() if of[name] == role}
        if named:
            trained = sum(p.numel() for p in named.values() if p.requires_grad)
            rows.append((role, len(named), sum(p.numel() for p in named.values()), trained, next(iter(named))))
    totals = [sum(column) for column in zip(*(row[1:4] for row in rows), strict=True)]
    lines = [f"{'role':12} {'tensors':>8} {'parameters':>16} {'trained':>16}  such as"]
    lines += [f"{role:12} {n:8,} {size:16,} {trained:16,}  {name}" for role, n, size, trained, name in rows]
    return "\n".join([*lines, "{:12} {:8,} {:16,} {:16,}".format("all", *totals)])


def _parameters_of(model: nn.Module, getter: str) -> set[int]:
    try:
        part = getattr(model, getter, lambda: None)()
    except (AttributeError, NotImplementedError):  # transformers: this model has none
        return set()
    return {id(p) for p in part.parameters()} if isinstance(part, nn.Module) else set()


def _places(modules: Mapping[str, nn.Module], found: Mapping[str, Tap]) -> Iterator[tuple[str, str]]:
    """Paths of modules under which all parameters have one role."""
    paths = {id(module): path for path, module in modules.items()}
    for path, tap in found.items():
        if tap.router is not None:
            yield _unwrapped(paths[id(tap.router)]), "router"
        if tap.own is not None:
            yield _join(path, "experts"), "expert"
        elif tap.experts is not None:
            yield _unwrapped(paths[id(tap.experts)]), "expert"
        else:  # the layer is its router and experts, and may have shared ones
            yield from ((_join(path, name), "shared") for name, _ in tap.layer.named_children() if "shared" in name)
            yield path, "expert"


def _unwrapped(path: str) -> str:
    """The path of what wraps a module on behalf of adapters or a compiler; its own where nothing does."""
    parts = path.split(".")
    while parts[-1] in _WRAPPED or parts[-2:-1] == ["modules_to_save"]:
        parts = parts[:-1] if parts[-1] in _WRAPPED else parts[:-2]
    return ".".join(parts)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _role(name: str, ends: bool, modules: Mapping[str, nn.Module], places: Mapping[str, str]) -> str:
    *parts, own = name.split(".")
    around = {".".join(parts[:depth]): part for depth, part in enumerate(parts, 1)}  # outermost first
    known = [places[path] for path in reversed(("", *around)) if path in places]  # innermost first
    if known and known[0] == "expert" and isinstance(modules[".".join(parts)], ResidualExperts) and "_core" in own:
        return "core"
    if known and known[0] != "shared":
        return known[0]
    if own in _SELECTION_BIASES:
        return "router"
    module = modules[".".join(parts)]
    if not isinstance(module, nn.Embedding) and (re.search(r"Norm(?!al)", type(module).__name__) or "norm" in own):
        return "norm"
    if ends:
        return "head"
    if any("shared" in part and not isinstance(modules[path], nn.Embedding) for path, part in around.items()):
        return "shared"
    for path, part in around.items():
        kind = type(modules[path]).__name__
        if re.match(r"router|experts$", part):
            return part.removesuffix("s") if part == "experts" else "router"
        if re.fullmatch(_NAMES["head"], part):
            return "head"
        if part.isdigit() or _STACK.search(kind):
            continue
        for role, pattern in _KINDS.items():
            if re.search(pattern, kind) or re.fullmatch(_NAMES[role], part):
                return role
    return next((role for role, pattern in _NAMES.items() if re.fullmatch(pattern, own)), "other")
