"""What happens around the layers of a sparsified model: what routers may know is handed down, losses are added up.

Both are plain hooks on the Hugging Face modules, so that any `Trainer` and any training loop is right without more.
A recomputation (activation checkpointing) sees what the last forward handed down: run the backward of a forward before
the next forward, as trainers do.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from ..context import Context
from ..moe import aux_loss, give_reward, moe_layers

__all__ = ["add_to_loss", "install", "takes_tokens", "tokens_of"]


_INPUTS = ("input_ids", "attention_mask")


def install(model: PreTrainedModel) -> None:
    """Hook a sparsified model: token ids and padding reach the routers, auxiliary losses reach `output.loss`."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and takes_tokens(module):
            module.register_forward_pre_hook(_hand_down, with_kwargs=True)
    model.register_forward_hook(_add_losses, with_kwargs=True)


def _arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    names = list(inspect.signature(module.forward).parameters)
    return {**dict(zip(names, args, strict=False)), **kwargs}


def takes_tokens(module: nn.Module) -> bool:
    """Whether a module's forward takes token ids or an attention mask."""
    return bool(set(_INPUTS) & set(inspect.signature(module.forward).parameters))


def tokens_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Context:
    """What the arguments of a model's forward say of its tokens (B, S): padding (None for none), ids, sequences."""
    given = _arguments(module, args, kwargs)
    ids, mask = given.get("input_ids"), given.get("attention_mask")
    embeds = given.get("inputs_embeds")
    shape = ids.shape[:2] if ids is not None else None if embeds is None else embeds.shape[:2]
    if not isinstance(mask, Tensor) or mask.dim() != 2 or shape is None or mask.shape[0] != shape[0]:
        mask = None
    else:
        # While generating from a cache the mask covers the past too; the present tokens are its last columns.
        mask = mask[:, -shape[1] :].to(torch.bool)
        if bool(mask.all()):
            mask = None
    sequence = None
    known = embeds if ids is None else ids
    if known is not None:
        sequence = torch.arange(known.shape[0], device=known.device)[:, None].expand(known.shape[:2])
    return Context(mask=mask, token_ids=ids, sequence=sequence)


def _hand_down(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    context = tokens_of(module, args, kwargs)
    for layer in moe_layers(module).values():
        layer.context = context


def _add_losses(module: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    def losses() -> Tensor:
        _give_rewards(module, _arguments(module, args, kwargs)["labels"], output)
        return aux_loss(module)

    return add_to_loss(module, args, kwargs, output, losses) if module.training else None


def add_to_loss(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, losses: Callable[[], Tensor]
) -> Any | None:
    """A model's output with losses (means over a micro-batch) in its loss, by the micro-batch's share of the batch.

    None where the forward had no labels and so no loss; the losses are then not computed.
    """
    given = _arguments(module, args, kwargs)
    labels = given.get("labels")
    if labels is None:
        return None
    extra = losses() * _share_of_batch(module, labels, given.get("num_items_in_batch"))
    if isinstance(output, tuple):
        return (output[0] + extra, *output[1:])
    if output.loss is not None:
        output.loss = output.loss + extra
    return output


def _share_of_batch(model: Any, labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor | float:
    """This micro-batch's share of an accumulated batch's labels: 1 unless the Trainer says how many there are in all.

    The Trainer divides a micro-batch's summed loss by the labels of the whole accumulated batch, so the micro-batches'
    losses add up to one mean; the auxiliary losses, means themselves, need the same weights.
    """
    if num_items_in_batch is None:
        return 1.0
    if _predicts_the_next(model):
        labels = labels[..., 1:]
    return (labels != -100).sum() / num_items_in_batch


def _predicts_the_next(model: PreTrainedModel) -> bool:
    """Whether the logits at a place are for the label of the next place."""
    if model.config.is_encoder_decoder or not (model.loss_type or model.can_generate()):
        return False
    # A class whose name transformers does not know (GPT2LMHeadModel) has this loss too.
    return LOSS_MAPPING.get(model.loss_type or "ForCausalLM") is ForCausalLMLoss


def _awaits_reward(module: nn.Module) -> bool:
    return any(layer.decision is not None for layer in moe_layers(module).values())


def _give_rewards(model: PreTrainedModel, labels: Tensor, output: Any) -> None:
    """Reward each token by minus the cross-entropy of its own prediction; tokens without a label have no reward.

    An encoder's tokens predict nothing themselves: they share the mean reward of their sequence.
    """
    if not _awaits_reward(model):
        return
    logits = output[1] if isinstance(output, tuple) else getattr(output, "logits", None)
    if logits is None or logits.shape[:-1] != labels.shape or labels.is_floating_point():
        raise ValueError(
            f"{type(model).__name__}: its routers learn by reward, and the reward of a token, minus the cross-entropy "
            "of its prediction, needs logits and an integer label for each; call the model without labels, and "
            "shunter.give_reward(model, reward) before shunter.aux_loss(model)"
        )
    if _predicts_the_next(model):
        # The last token of a sequence predicts nothing that is known.
        labels = torch.nn.functional.pad(labels[..., 1:], (0, 1), value=-100)
    labels = labels.to(logits.device)
    flat = logits.detach().reshape(-1, logits.shape[-1]).float()
    nats = torch.nn.functional.cross_entropy(flat, labels.reshape(-1), reduction="none")
    reward, real = -nats.reshape(labels.shape), labels != -100
    if model.config.is_encoder_decoder and labels.dim() == 2:
        encoder = model.get_encoder()
        if _awaits_reward(encoder):
            give_reward(encoder, reward.sum(-1) / real.sum(-1).clamp_min(1), real.any(-1))
    if _awaits_reward(model):
        give_reward(model, reward, real)
