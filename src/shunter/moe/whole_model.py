"""What is asked of all layers of a model at once: their losses and rewards, what they are told, router updates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .. import context as contexts
from ..experts import ResidualExperts
from ..routers.policy_gradient import PolicyRouter
from .routed_layer import moe_layers


@contextmanager
def tell(model: nn.Module, **known: Tensor) -> Iterator[None]:
    """Within the block, every `MoE` layer of a model knows of the tokens what its forward can be told.

    For what a model around the layers does not hand down itself: with tell(model, domain=labels): model(input_ids).

    Args:
        model: any module.
        **known: fields of `Context` (`domain=`, `language=`, `task=`, …) in the shape of the layers' tokens (...), or
            with fewer leading sizes: one value for each sequence, or a single one () for all tokens.

    Raises:
        TypeError: for a name that is not a field of `Context`.
    """
    unknown = [name for name in known if name not in contexts.KNOWN]
    if unknown:
        raise TypeError(f"tell: {', '.join(unknown)} is not known of tokens; the names are {', '.join(contexts.KNOWN)}")

    scope = contexts.Scope(told=known, layers=frozenset(moe_layers(model).values()))
    with contexts.within(scope):
        yield


def aux_loss(model: nn.Module, *, since: int = -1) -> Tensor:
    """The sum over a model's layers of their weighted losses from the training forwards that await a backward; scalar.

    Add it to the loss of the same forwards. A layer counts once for each time it ran since a backward went through it,
    as long as somebody holds what it returned; what nobody holds counts for a layer's last time, until another layer
    has run whose output somebody holds. Where no layer has a loss it is zero; after a backward it is that of the last
    forward, without a gradient.

    Args:
        model: any module.
        since: count only forwards from `mark()` on.

    Raises:
        RuntimeError: where gradients are wanted but the losses were computed without them, as under reentrant
            activation checkpointing, or where a router that learns by reward has none: they would silently train
            nothing.
    """
    layers = moe_layers(model)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        while any(layer.drop_last(layers.values()) for layer in layers.values()):
            pass  # the losses of one may have kept the output of another
    waiting = [(name, layer, call) for name, layer in layers.items() for call in layer.calls(since)]
    terms = []
    for name, layer, call in waiting:
        if call.decision is not None and layer.training and torch.is_grad_enabled():
            raise RuntimeError(
                f"the router of {name or 'the layer'} learns by reward and has none for this forward: call "
                "shunter.give_reward(model, reward) before aux_loss(model)"
            )
        for loss, value in call.losses.items():
            learns = any(p.requires_grad for p in layer.router.parameters())
            if torch.is_grad_enabled() and learns and not value.requires_grad:
                raise RuntimeError(
                    f"{loss} of {name or 'the layer'} carries no gradient: its forward ran without autograd. Under "
                    "activation checkpointing pass use_reentrant=False; for an evaluation call model.eval() first"
                )
            terms.append(value)
    if not waiting and since < 0:
        terms = [value.detach() for layer in layers.values() for value in layer.losses.values()]
    if not terms:
        device = next(model.parameters(), torch.zeros(())).device
        return torch.zeros((), device="cpu" if device.type == "meta" else device)  # offloaded parameters are elsewhere
    return torch.stack([term.to(terms[0].device) for term in terms]).sum()


def give_reward(model: nn.Module, reward: Tensor, mask: Tensor | None = None) -> None:
    """Tell the routers that learn by reward how well the last training forward went; `aux_loss` then has their losses.

    The return of a layer's action is this reward and what `PolicyRouter.action_reward` gives to its own action and to
    those of later layers.

    Args:
        model: whose layers decided; layers without such a router are left alone.
        reward: floating point, larger is better, as minus the loss of each token's prediction, or +1 and -1 for right
            and wrong. Its shape is that of the layers' tokens, (...) or (T,), or has fewer leading sizes: one value for
            each sequence. No gradient flows through it.
        mask: bool, in such a shape, True at tokens that have a reward; padding has none in any case.

    Raises:
        RuntimeError: where no layer awaits a reward.
        ValueError: where reward or mask do not fit a layer's tokens.
    """
    waiting = [
        (layer.decider, call)
        for layer in moe_layers(model).values()
        for call in (layer.calls() or ([] if layer._last is None else [layer._last]))
        if call.decision is not None
    ]
    if not waiting:
        raise RuntimeError(
            "give_reward: no layer awaits a reward; call it once after each training forward of a model whose router "
            "learns by reward"
        )
    decisions = Counter(call.decision.shape for _, call in waiting if call.decision is not None)
    earned: dict[torch.Size, Tensor] = {}
    for router, call in sorted(waiting, key=lambda entry: entry[1].order, reverse=True):
        decision = call.decision
        assert decision is not None and isinstance(router, PolicyRouter)
        shape, device = decision.shape, decision.logits.device
        value = _for_tokens("reward", reward.detach().to(device), shape)
        real = decision.context.mask
        if mask is not None:
            rewarded = _for_tokens("mask", mask.to(device, torch.bool), shape)
            real = rewarded if real is None else real & rewarded
        own = router.action_reward(decision, decisions[shape])
        if own is not None:
            earned[shape] = earned.get(shape, torch.zeros_like(own)) + own.to(device)
        if shape in earned:
            value = value + earned[shape].to(device)
        if real is not None:
            value = value.masked_fill(~real, 0)
        call.losses = {**call.losses, **router.reward_losses(decision, value, real)}
        call.decision, call.used = None, False


def _for_tokens(name: str, value: Tensor, shape: torch.Size) -> Tensor:
    """A value for each of the T tokens of a layer whose input has these leading sizes, (T,)."""
    if value.shape == (shape.numel(),):
        return value
    if value.shape != shape[: value.dim()]:
        raise ValueError(
            f"give_reward: {name} has shape {tuple(value.shape)}; the tokens of a layer are {tuple(shape)}: give one "
            "value for each token, or for each sequence"
        )
    return value.reshape(*value.shape, *[1] * (len(shape) - value.dim())).expand(shape).reshape(-1)


def update_routers(model: nn.Module) -> None:
    """Advance the state of every router of a model that no gradient moves; call it once after each optimizer step."""
    for layer in moe_layers(model).values():
        layer.decider.update()
        layer.updates += 1


def dropless(model: nn.Module) -> None:
    """Have every layer of a model drop no token in evaluation, whatever its capacity: then a sequence's output does not
    depend on what else is in its batch.

    Each router takes `eval_capacity_factor="dropless"`, as a layer can be made with; training is as it was.

    Raises:
        ValueError: where a router decides by its capacity (expert_choice); no layer is changed then.
    """
    layers = moe_layers(model)
    limited = {name: layer.decider for name, layer in layers.items() if layer.decider.capacity_factor is not None}
    for name, router in limited.items():
        if router.chooses == "experts":
            raise ValueError(f"dropless: in {name or 'the layer'} experts choose their tokens, by a capacity")
    for router in limited.values():
        router.eval_capacity_factor = router.options["eval_capacity_factor"] = "dropless"


def plain_experts(model: nn.Module) -> None:
    """Replace, in place, experts that are a core and residuals by experts of their own that compute the same.

    What reads experts one by one, as exporting, quantising and pruning do, knows these.
    """
    for layer in moe_layers(model).values():
        if isinstance(layer.experts, ResidualExperts):
            layer.experts = layer.experts.plain()


def expect_steps(model: nn.Module, steps: int) -> None:
    """Tell every router of a model how many optimizer steps a training will have in all, before it begins or goes on.

    Schedules that are given no length of their own, as the temperature of `dense_to_sparse`, go by it.
    """
    for layer in moe_layers(model).values():
        layer.decider.expect_steps(steps)
