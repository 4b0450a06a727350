"""A model in training and its optimizer in, the same with more experts out: dense blocks upcycled, experts split.

The function is kept at the moment of the change, and so are the moments of the optimizer: those of a new expert are a
copy of what its origin had.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from ..errors import UserError
from ..experts import Experts
from ..hf.blocks import FeedForward, find_feed_forwards
from ..hf.sparsifying import Placement, sparsify
from ..moe import MoE, expect_steps, moe_layers, update_routers
from ..ranks import num_ranks
from ..routers import Router
from ..routers.split import Split
from ..routing import Routing
from .trainer import caller, wrap_loss

__all__ = ["GrowOnPlateau", "UpcycleAt", "losses_by_expert", "split_expert", "upcycle_in_training"]


class _Optimizer(Protocol):
    param_groups: list[dict[str, Any]]
    state: Any


def upcycle_in_training(
    model: PreTrainedModel,
    optimizer: _Optimizer | None,
    num_experts: int,
    router: str = "topk",
    *,
    noise: float = 0.0,
    **options: Any,
) -> None:
    """Make a dense model sparse between two steps of its training, in place, with the moments of its optimizer.

    Each expert is a copy of the dense block, in weights and moments; routers are drawn, and begin with no moments. With
    weights that sum to 1 over a token's experts, and none dropped, the function is the dense one's.

    Args:
        model: as of `shunter.sparsify`.
        optimizer: its groups get the new parameters where they had the old ones; None where there is none yet.
        num_experts: E.
        router: as of `sparsify`; "dense_to_sparse" begins with all experts of a token and ends with one (EvoMoE).
        noise: what is added to each expert's weights, in standard deviations of the dense ones (EvoMoE: clones differ).
        **options: of `sparsify` and of the router.

    Raises:
        UserError: as of `sparsify`, for a noise below 0, and on several processes.

    Source: Dua et al. 2021 (Tricks for Training Sparse Translation Models); Nie et al. 2021 (EvoMoE).
    """
    if not (math.isfinite(noise) and noise >= 0):
        raise UserError(f"upcycle_in_training: noise {noise} must be a number of at least 0")
    if "init" in options:
        raise UserError("upcycle_in_training: experts begin as copies of the dense block; leave init out")
    _must_be_alone("upcycle_in_training")
    if options.get("where", "feed_forward") != "feed_forward":
        raise UserError("upcycle_in_training: experts grow of feed-forward blocks alone; leave where= out")
    place = Placement.parse(options.get("placement", ""), options.get("every", 1), options.get("layers"))
    blocks = place.blocks(find_feed_forwards(model))
    carried = [_carried(block, optimizer) for block in blocks]
    before = list(model.parameters())
    sparsify(model, num_experts, router, init="copy", **options)
    for block, (old, moments) in zip(blocks, carried, strict=True):
        layer = model.get_submodule(block.path)
        assert isinstance(layer, MoE) and isinstance(layer.experts, Experts)
        layer.to(next(iter(old.values())).device)
        weights = layer.experts.weights
        if noise:
            with torch.no_grad():
                for matrices in (weights.up, weights.down):
                    matrices.add_(torch.randn_like(matrices), alpha=noise * float(matrices[0].std()))
        if optimizer is None:
            continue
        new = {"up": weights.up, "down": weights.down, "up_bias": weights.up_bias, "down_bias": weights.down_bias}
        for part, parameter in new.items():
            if isinstance(parameter, nn.Parameter):
                _put(optimizer, old.get(part, old["up"]), parameter)
                if part in moments:
                    optimizer.state[parameter] = {
                        key: value if shared else value.expand(num_experts, *value.shape).clone()
                        for key, (value, shared) in moments[part].items()
                    }
        for parameter in layer.router.parameters():
            _put(optimizer, old["up"], parameter)
    if optimizer is not None:
        _begin_batches(optimizer)
        now = list(model.parameters())
        gone = {id(parameter) for parameter in before} - {id(parameter) for parameter in now}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) in gone:
                    optimizer.state.pop(parameter, None)
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in gone]
        _sort(optimizer, now)


_Moments = dict[str, dict[str, tuple[Any, bool]]]


def _carried(block: FeedForward, optimizer: _Optimizer | None) -> tuple[dict[str, nn.Parameter], _Moments]:
    """The dense parameters of a block's parts, and by part what the optimizer knows of them, laid out as experts are.

    Each entry of a state says whether it is one number (or object) for all of the parameter.
    """
    linears: dict[str, Any] = {"up": block.maps["up"].linear, "down": block.maps["down"].linear}
    old = {part: linear.weight for part, linear in linears.items()}
    old |= {f"{part}_bias": linear.bias for part, linear in linears.items() if linear.bias is not None}
    moments: _Moments = {}
    known = {} if optimizer is None else optimizer.state
    maps: list[Any] = [rows.linear for rows in block.maps.values()]
    used = [p for linear in maps for p in (linear.weight, linear.bias) if p is not None]
    for part, parameter in old.items():
        state = known.get(parameter, {})
        _must_carry(optimizer, parameter)
        moments[part] = {}
        for key, value in state.items():
            if not isinstance(value, Tensor) or value.shape != parameter.shape:
                moments[part][key] = (value.clone() if isinstance(value, Tensor) else value, True)
                continue
            weights = [(p, p.data) for p in used]
            try:  # the block reads its maps from where they are; for a moment they hold the moments
                for p in used:
                    p.data = known[p][key] if key in known.get(p, {}) else torch.zeros_like(p.data)
                read = getattr(block, part)
                moments[part][key] = (read.detach().clone(), False)
            finally:
                for p, data in weights:
                    p.data = data
        if not moments[part]:
            del moments[part]
    return old, moments


def _put(optimizer: _Optimizer, beside: nn.Parameter, new: nn.Parameter) -> None:
    """Let an optimizer train a new parameter as it trains another, before which it comes."""
    for group in optimizer.param_groups:
        for place, parameter in enumerate(group["params"]):
            if parameter is beside:
                group["params"].insert(place, new)
                return


def _sort(optimizer: _Optimizer, parameters: list[nn.Parameter]) -> None:
    """Have each group in a model's order: an optimizer made anew reads the state of a checkpoint by place."""
    places = {id(parameter): place for place, parameter in enumerate(parameters)}
    for group in optimizer.param_groups:
        group["params"].sort(key=lambda parameter: places.get(id(parameter), len(places)))


def _must_carry(optimizer: _Optimizer | None, parameter: nn.Parameter) -> None:
    state = {} if optimizer is None else optimizer.state.get(parameter, {})
    for key, value in state.items():
        if isinstance(value, Tensor) and value.numel() > 1 and value.shape != parameter.shape:
            raise UserError(
                f"{key} of the optimizer ({type(optimizer).__name__}) has the shape {tuple(value.shape)} for a "
                f"parameter of {tuple(parameter.shape)}, and cannot go to new experts; use one as Adam or SGD"
            )


def _begin_batches(optimizer: _Optimizer) -> None:
    """Drop the gradients that `shunter.training.roles.accumulate` has added up, whose parameters are no longer."""
    for group in optimizer.param_groups:
        if group.get("accumulated"):
            group["seen"], group["accumulated"] = 0, None


def _must_be_alone(what: str) -> None:
    if num_ranks() > 1:
        raise UserError(f"{what}: the parameters of a model on several processes cannot change in mid-run; use one")


class UpcycleAt(TrainerCallback):
    """Train densely first, then with experts, in one run of a `Trainer`: `upcycle_in_training` after so many steps.

        Trainer(model, args, train_dataset=data, callbacks=[UpcycleAt(1000, num_experts=8, router="topk", top_k=2)])

    A checkpoint from after that is of the sparse model: resume it with a model loaded from it, without this callback.

    Args:
        step: after which.
        num_experts, **options: of `upcycle_in_training`.

    Attributes:
        done: whether the model is sparse.

    Raises:
        UserError: for a negative step.
    """

    def __init__(self, step: int, num_experts: int, **options: Any) -> None:
        if step < 0:
            raise UserError(f"UpcycleAt: step {step} must be at least 0")
        self.step, self.num_experts, self.options = step, num_experts, options
        self.done = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse to go on where the step is past."""
        _must_be_alone("UpcycleAt")
        if state.global_step > self.step:
            raise UserError(
                f"UpcycleAt: the checkpoint of step {state.global_step} is of the sparse model that was made after "
                f"step {self.step}; load the model from it by shunter.from_pretrained, and leave UpcycleAt out"
            )
        if self.step == state.global_step:
            self._upcycle(state, **kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Upcycle after the step; after later ones advance the state of routers, which no other callback knows of."""
        if state.global_step == self.step:
            self._upcycle(state, **kwargs)
        elif self.done:
            update_routers(kwargs["model"])

    def _upcycle(self, state: Any, **kwargs: Any) -> None:
        if not self.done:
            upcycle_in_training(kwargs["model"], kwargs["optimizer"], self.num_experts, **self.options)
            expect_steps(kwargs["model"], state.max_steps - self.step)
            self.done = True


def split_expert(layer: MoE, expert: int, optimizer: _Optimizer | None = None) -> None:
    """Split an expert of a layer into two: the new one, expert E, is a copy, and a sigmoid gate shares what they get.

    The two are equal at first: the layer computes what it did. Capacity and losses go on by the
    experts as they were (`shunter.routers.split.Split`). A model is saved and loaded with its splits.

    Args:
        layer: with `Experts` and a router of any kind that gives weights to experts.
        expert: which.
        optimizer: gets the new parameters in place of the old ones, with their moments.

    Raises:
        UserError: where the layer cannot be split, there is no such expert, or on several processes.

    Source: Caccia et al. 2021 (On Anytime Learning at Macroscale).
    """
    _must_be_alone("split_expert")
    experts, router = layer.experts, layer.router
    if type(experts) is not Experts or not isinstance(router, Router):
        what = f"experts of {type(experts).__name__} and a router of {type(router).__name__}"
        raise UserError(f"split_expert: the layer has {what}; only plain ones can be split")
    try:
        inner, parents = (router.inner, router.parents) if isinstance(router, Split) else (router, [])
        grown = Split(inner, [*parents, expert]).train(router.training)
    except ValueError as error:
        raise UserError(f"split_expert: {error}") from None

    def widen(stack: Tensor) -> Tensor:
        return torch.cat([stack, stack[expert : expert + 1]])

    for old in (*experts.parameters(), *router.parameters()):
        _must_carry(optimizer, old)
    if optimizer is not None:
        _begin_batches(optimizer)
    for name, old in list(experts.named_parameters(recurse=False)):
        new = nn.Parameter(widen(old.detach()), requires_grad=old.requires_grad)
        setattr(experts, name, new)
        if optimizer is not None:
            _replace(optimizer, old, new, widen)
    if isinstance(router, Split):
        with torch.no_grad():
            grown.weight[:-1] = router.weight
        if optimizer is not None:
            _replace(optimizer, router.weight, grown.weight, lambda v: torch.cat([v, torch.zeros_like(v[:1])]))
    elif optimizer is not None:
        _put(optimizer, [*router.parameters(), *experts.parameters()][0], grown.weight)
    layer.router = grown
    experts.num_experts = layer.num_experts = grown.num_experts


def _replace(optimizer: _Optimizer, old: nn.Parameter, new: nn.Parameter, widen: Callable[[Tensor], Tensor]) -> None:
    for group in optimizer.param_groups:
        group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
    if (state := optimizer.state.pop(old, None)) is not None:
        optimizer.state[new] = {
            key: widen(value) if isinstance(value, Tensor) and value.shape == old.shape else value
            for key, value in state.items()
        }


def losses_by_expert(routing: Routing, losses: Tensor) -> Tensor:
    """The mean loss of each expert's tokens, weighted as the experts are: (E,); NaN for one without tokens.

    Args:
        routing: of T tokens.
        losses: (T,); NaN where a token has none.
    """
    known = ~losses[routing.token].isnan()
    weight = torch.where(known, routing.weight.detach().float(), 0.0)
    total = losses.new_zeros(2, routing.num_experts, dtype=torch.float32)
    total[0].index_add_(0, routing.expert, weight * losses[routing.token].nan_to_num().float())
    total[1].index_add_(0, routing.expert, weight)
    return total[0] / total[1]


class GrowOnPlateau(TrainerCallback, ExportableState):
    """Split an expert of each layer when the loss of a `Trainer` no longer falls: the one whose tokens lose most.

        Trainer(model, args, train_dataset=data, callbacks=[GrowOnPlateau(window=200, max_experts=16)])

    Where data come in large batches one after the other, call `grow` when the next has come. A Trainer's checkpoints
    hold the losses of the windows, and a training that goes on from one grows when it would have grown.

    Args:
        max_experts: of a layer, which is then left alone.
        window: in steps: the mean loss of the last window is compared with that of the one before.
        least: by which share it must have fallen; else the experts are split, and two new windows begin.

    Attributes:
        grown: of each growth its step, and by layer the expert that was split.

    Raises:
        UserError: for less than 2 experts or 1 step, and for `least` outside of [0, 1).

    Source: Caccia et al. 2021 (On Anytime Learning at Macroscale).
    """

    def __init__(self, max_experts: int, window: int = 200, least: float = 0.01) -> None:
        if max_experts < 2 or window < 1 or not 0 <= least < 1:
            raise UserError(
                f"GrowOnPlateau: max_experts {max_experts} must be at least 2, window {window} at least 1, least "
                f"{least} from 0 to below 1"
            )
        self.max_experts, self.window, self.least = max_experts, window, least
        self.grown: list[tuple[int, dict[str, int]]] = []
        self._recent: deque[float] = deque(maxlen=2 * window)
        self._undo: list[Callable[[], None]] = []

    def state(self) -> dict[str, Any]:
        """What a Trainer writes of it into its checkpoints."""
        given = {name: getattr(self, name) for name in ("max_experts", "window", "least")}
        return {"args": given, "attributes": {"memory": self.memory}}

    @property
    def memory(self) -> dict[str, Any]:
        """What a resumed training goes on with, as JSON."""
        return {"grown": self.grown, "recent": list(self._recent)}

    @memory.setter
    def memory(self, known: dict[str, Any]) -> None:
        self.grown = [(step, found) for step, found in known["grown"]]
        self._recent.clear()
        self._recent.extend(known["recent"])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Listen to the losses and predictions."""
        _must_be_alone("GrowOnPlateau")
        self.on_train_end(args, state, control)
        if not moe_layers(kwargs["model"]):
            raise UserError("GrowOnPlateau: the model has no layers of Shunter's; make them by shunter.sparsify")
        known = state.stateful_callbacks.get(type(self).__name__) if state.global_step else None
        self.memory = known["attributes"]["memory"] if isinstance(known, dict) else {"grown": [], "recent": []}
        self._losses: Tensor | None = None
        self._step: list[Tensor] = []
        trainer = caller(Trainer)
        assert trainer is not None
        self._undo.append(wrap_loss(trainer, self._with_loss))
        self._undo.append(kwargs["model"].register_forward_hook(self._hear, with_kwargs=True).remove)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop listening."""
        while self._undo:
            self._undo.pop()()

    def _with_loss(self, trainer: Trainer, found: Any, num_items_in_batch: Any) -> Any:
        self._step.append((found[0] if isinstance(found, tuple) else found).detach())
        return found

    def _hear(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if model.training and kwargs.get("labels") is not None:
            self._losses = token_losses(output["logits"].detach(), kwargs["labels"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Compare the last two windows."""
        self._recent.append(float(torch.stack(self._step).mean()))
        self._step = []
        if len(self._recent) < 2 * self.window:
            return
        losses = list(self._recent)
        before, now = math.fsum(losses[: self.window]), math.fsum(losses[self.window :])
        if now > before - self.least * abs(before):
            self.grow(kwargs["model"], kwargs["optimizer"], state.global_step)

    def grow(self, model: nn.Module, optimizer: _Optimizer | None, step: int = 0) -> dict[str, int]:
        """Split the expert of each layer whose tokens had the largest mean loss in the last forward.

        Returns:
            By layer, which.

        Raises:
            UserError: where the losses of the tokens are not known.
        """
        found: dict[str, int] = {}
        for name, layer in moe_layers(model).items():
            if not isinstance(layer, MoE) or layer.num_experts >= self.max_experts or layer.routing is None:
                continue
            if self._losses is None or len(self._losses) != layer.routing.num_tokens:
                raise UserError(
                    "GrowOnPlateau: no losses of the tokens are known; the model takes labels and gives logits"
                )
            by_expert = losses_by_expert(layer.routing, self._losses)
            expert = int(by_expert.nan_to_num(-torch.inf).argmax())
            split_expert(layer, expert, optimizer)
            found[name] = expert
        self._recent.clear()
        if found:
            self.grown.append((step, found))
        return found


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy of each token's prediction, (T,); NaN where it has none.

    Args:
        logits: (B, S, V) of a causal language model, or (B, S, C) of one label a token.
        labels: (B, S), -100 where there is none; the prediction of a token is compared with the next one's label.

    Raises:
        UserError: for other shapes.
    """
    if logits.dim() != 3 or labels.shape != logits.shape[:2]:
        raise UserError(
            f"logits have shape {tuple(logits.shape)} and labels {tuple(labels.shape)}; give those of a causal "
            "language model, (B, S, V) and (B, S)"
        )
    following = F.pad(labels[:, 1:], (0, 1), value=-100)
    losses = F.cross_entropy(logits.float().flatten(0, 1), following.flatten(), reduction="none", ignore_index=-100)
    return losses.masked_fill(following.flatten() == -100, torch.nan)
