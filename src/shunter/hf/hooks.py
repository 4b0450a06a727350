"""From a batch to the `Context` of a sparsified model's layers, and from their losses to `output.loss`.

Both are plain hooks on the Hugging Face modules, so that any `Trainer` and any training loop is right without more.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from .. import context as contexts
from ..context import KNOWN, Context, Scope
from ..errors import UserError
from ..moe import RoutedLayer, aux_loss, give_reward, mark, moe_layers
from ..parallel.scope import ranks_of
from ..ranks import sum_over_ranks
from ..recomputation import recomputing
from .probing import shapes_given
from .tokens import arguments, decoder_padding, fitted, hands_on_others, has_tokens, padding_behind, tokens_of

__all__ = ["check_batch", "install"]


def install(model: PreTrainedModel, batch: Mapping[str, str] | None = None) -> None:
    """Hook a sparsified model: token ids and padding reach the routers, auxiliary losses reach `output.loss`.

    Args:
        model: whose layers are told, of its own tokens and of those of the models inside of it.
        batch: what the batch knows besides, a field of `Context` -> the keyword of the model that holds it, as in
            {"task": "task_ids"}: in the shape of the tokens (B, S), or (B,): one value for each sequence. The model's
            own forward need not take the keyword. (A Trainer hands it on with remove_unused_columns=False.)

    Raises:
        UserError: for a name that is not a field of `Context`.
    """
    forwards = _Forwards(check_batch(batch))
    model.register_forward_pre_hook(forwards.begin, with_kwargs=True)
    scopes = [module for module in model.modules() if moe_layers(module) and has_tokens(module)]
    for module in scopes:
        module.register_forward_pre_hook(forwards.enter, with_kwargs=True)
    for layer in _places_first(model, scopes):
        layer.register_forward_pre_hook(_sequences_first)
        layer.register_forward_hook(_places_first_again)
    for module in filter(hands_on_others, scopes):
        for layer in moe_layers(module).values():
            layer.register_forward_pre_hook(partial(forwards.fit, module))
            layer.register_forward_hook(forwards.leave, always_call=True)
    for module in scopes:
        module.register_forward_hook(forwards.leave, always_call=True)
    model.register_forward_hook(forwards.end, with_kwargs=True, always_call=True)


def _places_first(model: nn.Module, scopes: list[nn.Module]) -> list[RoutedLayer]:
    """The layers whose input is (S, B, d), place by place, as in XLNet and FSMT: found on a copy with tokens (2, 3)."""
    layers = moe_layers(model)
    found = []
    for module in scopes:
        inside = {path: layer for path, layer in moe_layers(module).items() if layer in layers.values()}
        takes = set(inspect.signature(module.forward).parameters) & {"input_ids", "decoder_input_ids"}
        if "input_ids" not in takes or not inside:
            continue
        ids = torch.full((2, 3), 2)
        for path, shape in shapes_given(module, inside, **dict.fromkeys(takes, ids)).items():
            layer = layers.pop(next(name for name, layer in layers.items() if layer is inside[path]))
            if shape[:2] == (3, 2):
                found.append(layer)
    return found


def _sequences_first(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return args[0].transpose(0, 1), *args[1:]


def _places_first_again(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return output.transpose(0, 1)


def check_batch(batch: Mapping[str, str] | None) -> dict[str, str]:
    """A mapping from fields of `Context` to keywords of a model, checked.

    Raises:
        UserError: for a name that is not a field of `Context`.
    """
    unknown = [name for name in batch or {} if name not in KNOWN]
    if unknown:
        raise UserError(f"batch: {', '.join(unknown)} is not known of tokens; the names are {', '.join(KNOWN)}")
    return dict(batch or {})


@dataclass(frozen=True)
class _OfBatch(Scope):
    """The scope of a sparse model's forward.

    Args:
        values: what the batch says of any tokens, by name of `Context`.
        decoder: the modules of its decoder, where the labels say which of its tokens are real.
        padding: (B, S) bool, True at those.
        since: the mark of its beginning.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    decoder: frozenset[nn.Module] = frozenset()
    padding: Tensor | None = None
    since: int = -1


@dataclass(frozen=True)
class _OfTokens(Scope):
    """The scope of a model's forward within it.

    Args:
        behind: (B, n) bool, which are real of the tokens that the model puts behind those of its context.
    """

    behind: Tensor | None = None


class _Forwards:
    """The forwards of one model: what they know of their tokens reaches the layers, their losses the model's output.

    What a forward knows is the scope of the thread that runs it, as long as it runs.

    Args:
        keywords: a field of `Context` -> the keyword of the model that holds it.
    """

    def __init__(self, keywords: dict[str, str]) -> None:
        self.keywords = keywords
        self._router: Tensor | None = None
        self._settled = False

    def __getstate__(self) -> dict[str, Any]:
        return {"keywords": self.keywords}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["keywords"])  # type: ignore[misc]

    def begin(
        self, module: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Take from the model's keywords what a batch says of its tokens; what its forward does not know ends here."""
        values: dict[str, Any] = {}
        for name, keyword in self.keywords.items():
            if isinstance(kwargs.get(keyword), Tensor):
                values[name] = kwargs[keyword]
            elif any(name in layer.decider.required for layer in moe_layers(module).values()):
                raise UserError(
                    f"{type(module).__name__}: the batch has no {keyword!r}, by which the routers know the {name} of "
                    f"its tokens; its keys are {', '.join(kwargs)}. (A Trainer keeps it with "
                    "remove_unused_columns=False)"
                )
        if module.training and torch.is_grad_enabled() and not torch.compiler.is_compiling() and not recomputing():
            self._look_for_updates(module)
        padding = decoder_padding(module, args, kwargs)
        decoder = frozenset() if padding is None else frozenset(module.get_decoder().modules())
        contexts.enter(_OfBatch(Context(**values), values=values, decoder=decoder, padding=padding, since=mark()))
        foreign = set(self.keywords.values()) - set(inspect.signature(module.forward).parameters)
        return args, {key: value for key, value in kwargs.items() if key not in foreign}

    def _look_for_updates(self, model: nn.Module) -> None:
        """Warn once where an optimizer has moved a router and nobody its state; nothing is looked at after either."""
        if self._settled:
            return
        layer = next((layer for layer in moe_layers(model).values() if layer.decider.advances), None)
        if layer is None:
            return
        weights = (p.detach() for p in layer.decider.parameters() if p.requires_grad and not p.is_meta)
        weight = next(weights, torch.zeros(0))
        some = getattr(weight, "to_local", lambda: weight)().flatten()[:16].clone()
        before, self._router = self._router, some
        self._settled = layer.updates > 0
        if not self._settled and before is not None and not torch.equal(some, before):
            self._settled = True
            warnings.warn(
                f"{type(model).__name__}: its routers ({type(layer.decider).__name__}) have state that no gradient "
                "moves (selection biases, temperatures, running means), and the optimizer has stepped without it: "
                "call shunter.update_routers(model) after each step; in a Trainer take "
                "callbacks=[shunter.BalanceCallback(load_balancing_loss=0)], which does",
                stacklevel=2,
            )

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Tell the layers of a model what its own arguments say of its tokens, and what the batch says of any."""
        known = tokens_of(module, args, kwargs)
        batch = next((scope for scope in reversed(contexts.present()) if isinstance(scope, _OfBatch)), _OfBatch())
        if module in batch.decoder:
            known = replace(known, mask=batch.padding)
        contexts.enter(_OfTokens(replace(known, **batch.values), behind=padding_behind(module, args, kwargs)))

    def fit(self, model: nn.Module, layer: nn.Module, args: tuple[Any, ...]) -> None:
        """Tell a layer of the tokens that the model around makes of its own."""
        scope = next(scope for scope in reversed(contexts.present()) if scope.context is not None)
        behind = scope.behind if isinstance(scope, _OfTokens) else None
        assert scope.context is not None
        contexts.enter(Scope(fitted(model, scope.context, args[0].shape[:-1], behind)))

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """End the scope that the module entered."""
        contexts.leave()

    def end(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """End the model's forward: its losses join its output's; those of a forward that raised are forgotten."""
        scope = contexts.leave()
        if not isinstance(scope, _OfBatch):  # its batch was refused
            return None
        since = scope.since
        if output is None:
            for layer in moe_layers(module).values():
                layer.forget(since)
            return None
        if not module.training:
            return None
        for layer in () if torch.compiler.is_compiling() else moe_layers(module).values():
            for call in layer.calls(since):
                call.watch(partial(_say_that_losses_are_lost, type(module).__name__))
        name, loss = _loss_of(output)
        if loss is None:
            return None
        given = arguments(module, args, kwargs)
        labels = given.get("labels")
        _give_rewards(module, labels, output)
        share, of_ranks = _shares_of_batch(module, labels, given.get("num_items_in_batch"))
        extra = aux_loss(module, since=since) * of_ranks
        if takes_a_mean(module):
            loss = loss * share
        if isinstance(output, tuple):
            return (loss + extra, *output[1:])
        if isinstance(output, Tensor):
            return loss + extra
        output[name] = loss + extra
        return output


def _loss_of(output: Any) -> tuple[str, Tensor | None]:
    """The loss in a model's output and its name there, whatever it was made of; None where there is none."""
    if isinstance(output, dict):
        names = ["loss", *(name for name in output if name.endswith("_loss") and name != "aux_loss")]
        return next(((name, output[name]) for name in names if isinstance(output.get(name), Tensor)), ("", None))
    first = output[0] if isinstance(output, tuple) and output else output
    return "", first if isinstance(first, Tensor) and first.dim() == 0 and first.is_floating_point() else None


def _say_that_losses_are_lost(model: str) -> None:
    warnings.warn(
        f"{model}: a backward has gone through its sparse layers, but not through their auxiliary losses, which "
        "balance the experts. They are part of output.loss where the model makes one; to another loss (of label "
        "smoothing, of a compute_loss_func, of TRL's trainers, your own) add shunter.aux_loss(model), or take "
        "shunter.BalanceCallback",
        stacklevel=2,
    )


def _shares_of_batch(
    model: Any, labels: Any, num_items_in_batch: Tensor | int | None
) -> tuple[Tensor | float, Tensor | float]:
    """This micro-batch's share of an accumulated batch's labels, and the weight of its auxiliary losses.

    Both are 1 unless the Trainer says how many labels there are in all. It divides a micro-batch's summed loss by
    these, on all ranks, so that the losses add up to one mean; the auxiliary losses, means themselves, need the same
    weights. Where they are of all ranks' tokens, each rank adds as much of them, however many labels it has.
    """
    if num_items_in_batch is None or not isinstance(labels, Tensor):
        return 1.0, 1.0
    if _predicts_the_next(model):
        labels = labels[..., 1:]
    count = (labels != -100).sum()
    ranks = max((ranks_of(layer.decider) for layer in moe_layers(model).values()), default=1)
    every = count.clone()
    if ranks > 1:
        sum_over_ranks(every)
    return count / num_items_in_batch, every / (num_items_in_batch * ranks)


def takes_a_mean(model: Any) -> bool:
    """Whether a model's loss is the mean over its own batch whatever `num_items_in_batch` says, as T5's and BERT's.

    A Trainer goes by the `**kwargs` of the forward, of which the loss of these models knows nothing.
    """
    code = getattr(inspect.unwrap(type(model).forward), "__code__", None)
    names = set() if code is None else {*code.co_names, *code.co_varnames}
    return bool(names & {"CrossEntropyLoss", "cross_entropy"}) and not names & {"loss_function", "num_items_in_batch"}


def _predicts_the_next(model: PreTrainedModel) -> bool:
    """Whether the logits at a place are for the label of the next place."""
    if model.config.is_encoder_decoder or not (model.loss_type or model.can_generate()):
        return False
    # A class whose name transformers does not know (GPT2LMHeadModel) has this loss too.
    return LOSS_MAPPING.get(model.loss_type or "ForCausalLM") is ForCausalLMLoss


def _awaits_reward(module: nn.Module) -> bool:
    return any(layer.decision is not None for layer in moe_layers(module).values())


def _give_rewards(model: PreTrainedModel, labels: Any, output: Any) -> None:
    """Reward each token by minus the cross-entropy of its own prediction; tokens without a label have no reward.

    An encoder's tokens predict nothing themselves: they share the mean reward of their sequence.
    """
    if not _awaits_reward(model):
        return
    logits = output[1] if isinstance(output, tuple) else getattr(output, "logits", None)
    has_labels = isinstance(labels, Tensor) and not labels.is_floating_point()
    if logits is None or not has_labels or logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"{type(model).__name__}: its routers learn by reward, and the reward of a token, minus the cross-entropy "
            "of its prediction, needs logits and an integer label for each; have the model make no loss, and call "
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
