"""LoRA of experts through `peft`: a mixture of experts in, the same with adapters that are saved in peft's own layout.

peft wraps each stack of expert matrices; its forward adds the product of the two low-rank matrices of every expert
to the whole stack. Here the rows of each expert pass through the two, and nothing of the size of the stack is made. All
else (names, initial values, saving, merging) is peft's: what is trained here is loaded there, and the other way round.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import layer
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import UserError
from ..experts import Experts
from ..experts.activations import activate
from ..hf import backend
from ..hf.backend import LowRank
from ..hf.observe.taps import require_taps
from .roles import roles

__all__ = ["ParamWrapper", "check_trained", "expert_lora", "group_lora"]

_NOT_OF_STACKS = ("lora_dropout", "use_dora", "lora_bias", "fan_in_fan_out")
_UNHEEDED = ("layers_to_transform", "exclude_modules")
_MATRICES = ("gate_up_proj", "up_proj", "down_proj")


def expert_lora(model: PreTrainedModel, r: int = 8, **options: Any) -> PeftModel:
    """Put LoRA adapters on all experts of a model, as `peft` names them, and compute them without their product.

        model = expert_lora(model, r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
        print(shunter.training.roles.table(model))

    Args:
        model: a mixture of experts whose experts transformers' use_experts_implementation decorates, or Shunter's.
        r: the rank.
        **options: of `peft.LoraConfig`; target_parameters= takes some of the matrices alone, target_modules= other
            layers too. Experts can have no dropout, bias or DoRA, as peft says, and no layers_to_transform or
            exclude_modules, which peft does not heed for them.

    Returns:
        A `PeftModel`: save_pretrained writes peft's files, which `PeftModel.from_pretrained` loads with no Shunter
        installed; after loading so, `group_lora` makes it compute as here. merge_and_unload gives a model without
        adapters.

    Raises:
        UserError: for a rank below 1, an alpha of 0, experts that are not stacked, and where nothing of the experts
            would be trained; the model is as it was.

    Source: Hu et al. 2022 (LoRA), section 4.1.
    """
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise UserError(f"expert_lora: the rank r={r!r} must be an integer of at least 1")
    for alpha in (options.get("lora_alpha", 1), *(options.get("alpha_pattern") or {}).values()):
        if not (math.isfinite(alpha) and alpha > 0):
            raise UserError(f"expert_lora: the scale alpha={alpha} must be a number above 0, or nothing is learned")
    for name in _NOT_OF_STACKS:
        if options.get(name):
            raise UserError(
                f"expert_lora: peft has no {name} for stacks of matrices; leave it out, or give other layers an "
                "adapter of their own"
            )
    for name in _UNHEEDED:
        if options.get(name) not in (None, [], ""):
            raise UserError(
                f"expert_lora: peft adapts the experts of every layer whatever {name} says; leave it out, or give "
                "other layers an adapter of their own"
            )
    init = options.get("init_lora_weights", True)
    if not isinstance(init, bool) and str(init).lower() != "gaussian":
        raise UserError(
            f"expert_lora: init_lora_weights={init!r} begins with a matrix's own weights, which peft cannot do for "
            'stacks of them; choose True, False or "gaussian"'
        )
    found = dict.fromkeys(_stacks(model))
    # Without target_modules, peft would take its own choice for some families.
    options = {"target_modules": [], "target_parameters": list(found), **options}
    if not found:
        raise UserError(f"expert_lora: {type(model).__name__} has no experts in one stack of matrices (E, …)")
    with ExitStack() as failed:
        failed.callback(_as_it_is(model))
        try:
            adapted = get_peft_model(model, LoraConfig(r=r, **options))
        except ValueError as error:
            raise UserError(f"expert_lora: {error}") from None
        group_lora(adapted)
        check_trained(adapted)
        failed.pop_all()
    return adapted


def _as_it_is(model: nn.Module) -> Callable[[], None]:
    """What takes adapters that are put into a model from now on out again, and has it train what it trains now."""
    children = [(module, dict(module._modules)) for module in model.modules()]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    config = vars(model).get("peft_config")

    def restore() -> None:
        for module, inside in children:
            module._modules.update(inside)
        for parameter, was in trained:
            parameter.requires_grad_(was)
        if config is None:
            vars(model).pop("peft_config", None)

    return restore


def _stacks(model: nn.Module) -> Iterator[str]:
    """The names of the stacks of expert matrices, without what tells layers apart."""
    names = {id(module): name for name, module in model.named_modules()}
    for tap in require_taps(model).values():
        experts: Any = tap.experts if tap.own is None else tap.own.experts
        for matrix in _MATRICES:
            value = getattr(experts, matrix, None)
            if isinstance(value, nn.Parameter) and value.dim() == 3:
                yield ".".join([*names[id(experts)].split(".")[-2:], matrix])


def check_trained(model: nn.Module) -> None:
    """Raise UserError where no parameter of any expert of a model is trained, or only some layers' are."""
    of = roles(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad and of[name] == "expert"}
    missing = [path for path in require_taps(model) if not any(name.startswith(f"{path}.") for name in trained)]
    if not trained:
        rest = sorted({of[name] for name, p in model.named_parameters() if p.requires_grad}) or ["nothing"]
        raise UserError(f"nothing of the experts of {type(model).__name__} is trained, but {', '.join(rest)}")
    if missing:
        raise UserError(
            f"nothing of the experts of {missing[0]} is trained, and {len(missing) - 1} other layers' neither"
        )


def group_lora(model: nn.Module) -> int:
    """Let the adapters on experts that `peft` made or loaded compute without their product; returns how many do.

    Those on other layers, and on experts that this cannot compute (quantised, sharded), stay as peft has them.
    """
    wrappers = [module for module in model.modules() if isinstance(module, layer.ParamWrapper)]
    inner = {id(wrapper.base_layer) for wrapper in wrappers}
    outer = [wrapper for wrapper in wrappers if id(wrapper) not in inner]
    found = [wrapper for wrapper in outer if _computer(wrapper.get_base_layer()) is not None]
    for wrapper in found:
        wrapper.__class__ = ParamWrapper
    return len(found)


class ParamWrapper(layer.ParamWrapper):
    """peft's wrapper of a stack of experts, the outermost, whose forward sends rows through the low-rank matrices.

    It has the name of peft's own, by which peft knows it.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The experts' own forward, with the active adapters."""
        experts = self.get_base_layer()
        compute = _computer(experts)
        wrappers = list(self._wrappers())
        plain = self.disable_adapters or any(wrapper.merged for wrapper in wrappers) or "adapter_names" in kwargs
        if plain or compute is None:
            out: Tensor = super().forward(x, *args, **kwargs)
            return out
        self._check_forward_args(x, *args, **kwargs)
        low_rank = {wrapper.parameter_name: wrapper for wrapper in wrappers}
        up = _low_rank(low_rank.get("gate_up_proj") or low_rank.get("up_proj"))
        return compute(x, *args, low_rank=(up, _low_rank(low_rank.get("down_proj"))), **kwargs)

    def _wrappers(self) -> Iterator[layer.ParamWrapper]:
        """This wrapper and those inside of it, each of a matrix."""
        wrapper: Any = self
        while isinstance(wrapper, layer.ParamWrapper):
            yield wrapper
            wrapper = wrapper.base_layer


def _low_rank(wrapper: Any) -> LowRank | None:
    """The active adapters of a wrapper one beside the other, in the dtype of the experts; None without any."""
    adapters = [] if wrapper is None else [name for name in wrapper.active_adapters if name in wrapper.lora_A]
    if not adapters:
        return None
    parts = []
    for name in adapters:
        a, b = wrapper.lora_A[name].weight, wrapper.lora_B[name].weight
        a = a.reshape(wrapper.num_experts, -1, a.shape[-1])  # rows by expert, then rank
        b = b.reshape(b.shape[0], -1, wrapper.num_experts).permute(2, 1, 0)  # columns by rank, then expert
        parts.append((a, b * wrapper.scaling[name]))
    dtype = wrapper.get_param().dtype
    a, b = (torch.cat([part[i] for part in parts], 1).to(dtype).contiguous() for i in (0, 1))
    return LowRank(a, b)


def _computer(experts: Any) -> Callable[..., Tensor] | None:
    """What computes experts with low-rank parts; None where nothing here does."""
    if isinstance(experts, Experts):
        return partial(_own, experts)
    decorated = hasattr(experts, "_apply_gate") and hasattr(experts, "has_gate")
    return partial(backend.experts_forward, experts) if decorated and backend.refusal(experts) is None else None


def _own(experts: Experts, x: Tensor, routing: Any, low_rank: tuple[LowRank | None, LowRank | None]) -> Tensor:
    weights = experts.weights
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weights = x.to(dtype), weights.to(dtype)
    drop = nn.functional.dropout if experts.training and experts.dropout else None

    def between(h: Tensor) -> Tensor:
        hidden = activate(h, experts.activation)
        return hidden if drop is None else drop(hidden, experts.dropout)

    parameters = (weights.up, weights.down, weights.up_bias, weights.down_bias)
    return backend.around(x, parameters, routing, between, None, low_rank)
