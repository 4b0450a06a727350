"""A decoder that generates in, the same with tokens that leave it at the layer where they are sure out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from ..errors import UserError

__all__ = ["Confidence", "EarlyExit", "early_exit", "risk_p_value", "smallest_safe_threshold"]

Confidence = Literal["softmax", "saturation"]


@dataclass
class EarlyExit:
    """What the tokens that were generated took.

    Args:
        num_layers: L, of the decoder.

    Attributes:
        layers: of each step the number of layers that each row's token took, (B,).
    """

    num_layers: int
    layers: list[Tensor] = field(default_factory=list)

    @property
    def mean_layers(self) -> float:
        """The mean number of layers of a token that was generated after the first."""
        return float(torch.cat(self.layers).double().mean()) if self.layers else float(self.num_layers)


class _Cached(Exception):
    """The keys and values of a token that has left are in the cache: the rest of the layer is not computed."""


@contextmanager
def early_exit(
    model: PreTrainedModel, threshold: float, confidence: Confidence = "softmax", *, decay: float | None = None
) -> Iterator[EarlyExit]:
    """Within the block, each token that the model generates leaves the decoder at the first layer where it is sure.

        with early_exit(model, 0.9) as taken:
            model.generate(ids)
        print(taken.mean_layers)

    Only steps of one token with a cache leave early; prompts, training and forwards without a cache go through all
    layers. Of a token that has left, the later layers see the state that it left with: of that they make and keep the
    keys and values which later tokens attend to, and no more, once all rows of the batch have left. Until then they
    are computed for all rows, and the rows that have left keep their states.

    Args:
        model: a causal language model of transformers with a stack of layers and a `Cache` of keys and values.
        threshold: a token leaves where its confidence is at least this: 0 leaves after the first layer, above 1 never.
        confidence: "softmax", the difference between the two largest probabilities that the head gives to the state
            (it costs the head at each layer); "saturation", the cosine between the states before and after the layer.
        decay: where given, the threshold of the t-th generated token is min(1, 0.9 threshold + 0.1 exp(-decay t / N)),
            N the length of the prompt and at least 1; early mistakes cost more.

    Yields:
        How many layers the tokens took.

    Raises:
        UserError: for an unknown confidence, a threshold that is no number of at least 0, and a model without such a
            stack or head, or whose layers keep a state other than keys and values.

    Source: Schuster et al. 2022 (Confident Adaptive Language Modeling), sections 3.2 to 3.5.
    """
    if confidence not in get_args(Confidence):
        raise UserError(f"early_exit: confidence {confidence!r} is unknown; choose {' or '.join(get_args(Confidence))}")
    if not (math.isfinite(threshold) and threshold >= 0) or (decay is not None and not decay >= 0):
        raise UserError(f"early_exit: threshold {threshold} and decay {decay} must be numbers of at least 0")
    layers, finish = _stack(model)
    if getattr(model, "_is_stateful", False):
        raise UserError(
            f"early_exit: {type(model).__name__} keeps no keys and values alone, but a state that layers update"
        )
    run = _Run(EarlyExit(len(layers)), threshold, confidence, decay, finish)
    with ExitStack() as stack:
        for number, layer in enumerate(layers):
            own = vars(layer).get("forward")  # of a wrapper, as accelerate's
            vars(layer)["forward"] = run.wrap(number, layer.forward)
            stack.callback(vars(layer).pop if own is None else vars(layer).__setitem__, "forward", *filter(None, [own]))
        yield run.taken


def _stack(model: Any) -> tuple[nn.ModuleList, Callable[[Tensor], Tensor]]:
    """The decoder's layers, and what makes logits of a layer's output."""
    decoder: Any = model.get_decoder() if isinstance(model, PreTrainedModel) and model.can_generate() else None
    head = model.get_output_embeddings() if decoder is not None else None
    lists = [m for m in decoder.modules() if isinstance(m, nn.ModuleList)] if decoder is not None else []
    length = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None) if lists else None
    stacks = [m for m in lists if len(m) == length]
    if not stacks or head is None or model.config.is_encoder_decoder:
        raise UserError(
            f"early_exit: {type(model).__name__} is no causal language model with a stack of layers and a head; "
            "encoders and encoder-decoders are not known here"
        )
    owner = next(m for m in decoder.modules() if any(child is stacks[0] for child in m.children()))
    norms = [m for name, m in owner.named_children() if "norm" in type(m).__name__.lower() and "embed" not in name]
    final = norms[-1] if norms else nn.Identity()
    return stacks[0], lambda state: head(final(state))


class _Run:
    """One model's generation: which rows of the present step have left, and with what."""

    def __init__(
        self, taken: EarlyExit, threshold: float, confidence: Confidence, decay: float | None, finish: Any
    ) -> None:
        self.taken, self.threshold, self.confidence, self.decay, self.finish = (
            taken,
            threshold,
            confidence,
            decay,
            finish,
        )
        self.gone: Tensor | None = None
        self.whole = True
        self.prompt, self.step = 1, 0
        self.forms: dict[int, tuple[None, ...]] = {}

    def _begin(self, tokens: int, cache: Cache | None) -> None:
        """A forward of so many tokens begins: a prompt, of which all layers are computed, or a step."""
        self.whole = tokens > 1 or (cache is not None and not cache.get_seq_length())
        if self.whole:
            self.prompt, self.step = tokens, 0

    def limit(self) -> float:
        if self.decay is None:
            return self.threshold
        return min(1.0, 0.9 * self.threshold + 0.1 * math.exp(-self.decay * self.step / self.prompt))

    def wrap(self, number: int, inner: Callable[..., Any]) -> Callable[..., Any]:
        """The forward of a layer."""

        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            cache = next((v for v in (*args, *kwargs.values()) if isinstance(v, Cache)), None)
            if number == 0:
                self._begin(hidden_states.shape[1], cache)
            if cache is None or self.whole or torch.is_grad_enabled():
                if hidden_states.shape[1] == 1 and self.prompt > 1 and not torch.is_grad_enabled():
                    raise UserError("early_exit: the model keeps no keys and values of its tokens that could be copied")
                return self._note(number, inner(hidden_states, *args, **kwargs))
            if number == 0:
                self.gone = hidden_states.new_zeros(len(hidden_states), dtype=torch.bool)
                self.depth = torch.full((len(hidden_states),), self.taken.num_layers, device=hidden_states.device)
                self.step += 1
            gone = self.gone
            assert gone is not None
            if bool(gone.all()):
                self._keep(inner, cache, hidden_states, args, kwargs)
                more = self.forms.get(number)
                out: Any = hidden_states if more is None else (hidden_states, *more)
            else:
                found = self._note(number, inner(hidden_states, *args, **kwargs))
                made = found[0] if isinstance(found, tuple) else found
                made = torch.where(gone[:, None, None], hidden_states, made)
                if number + 1 < self.taken.num_layers:
                    sure = self._confidence(hidden_states, made) >= self.limit()
                    self.depth = torch.where(sure & ~gone, number + 1, self.depth)
                    self.gone = gone | sure
                out = (made, *found[1:]) if isinstance(found, tuple) else made
            if number + 1 == self.taken.num_layers:
                self.taken.layers.append(self.depth.cpu())
            return out

        return forward

    def _note(self, number: int, found: Any) -> Any:
        """Remember what a layer returns beside its states."""
        if isinstance(found, tuple):
            self.forms[number] = (None,) * (len(found) - 1)
        return found

    def _confidence(self, before: Tensor, after: Tensor) -> Tensor:
        if self.confidence == "saturation":
            # Above 1 never leaves, so rounding must not carry a cosine there.
            return F.cosine_similarity(before[:, 0].float(), after[:, 0].float(), dim=-1).clamp(0, 1)
        best = self.finish(after)[:, 0].float().softmax(-1).topk(2, dim=-1).values
        return best[:, 0] - best[:, 1]

    def _keep(self, inner: Callable[..., Any], cache: Cache, state: Tensor, args: Any, kwargs: Any) -> None:
        """Put keys and values of a state into the cache: the layer begins, and ends when they are there."""

        def update(*given: Any, **more: Any) -> Any:
            put(*given, **more)
            raise _Cached

        put = cache.update
        vars(cache)["update"] = update
        try:
            inner(state, *args, **kwargs)
        except _Cached:
            return
        finally:
            del vars(cache)["update"]
        raise UserError("early_exit: a layer keeps no keys and values in its cache, and cannot be left out")


def risk_p_value(risk: float, count: int, tolerance: float) -> float:
    """How likely so low a mean loss is where the expected one is above the tolerance: exp(-2 n max(0, delta - risk)^2).

    Args:
        risk: the mean of the losses, each in [0, 1].
        count: n, of how many independent ones.
        tolerance: delta.

    Source: Hoeffding's inequality, as in Angelopoulos et al. 2021 (Learn then Test), section 2.
    """
    return math.exp(-2 * count * max(0.0, tolerance - risk) ** 2)


def smallest_safe_threshold(losses: dict[float, Tensor], tolerance: float = 0.1, epsilon: float = 0.05) -> float | None:
    """The smallest threshold whose expected loss is at most the tolerance, with probability 1 - epsilon over the data.

    Thresholds are tested from the largest on, each at level epsilon, until the first that fails: so no correction for
    their number is due.

    Args:
        losses: of each threshold that is tried the losses (n,) of calibration examples, in [0, 1], the same examples
            for all: how unlike the full model's generation the early one is, or how much worse its score.
        tolerance: delta.
        epsilon: how often the answer may be wrong.

    Returns:
        The threshold; None where already the largest fails: more examples or another tolerance are needed.

    Raises:
        UserError: where there are no losses, or some are not in [0, 1], or delta or epsilon is not in (0, 1).

    Source: Schuster et al. 2022 (CALM), section 4 and algorithm 1; Angelopoulos et al. 2021 (Learn then Test).
    """
    if not (0 < tolerance < 1 and 0 < epsilon < 1):
        raise UserError(f"tolerance {tolerance} and epsilon {epsilon} must be between 0 and 1")
    if not losses or any(not len(v) or not bool(((v >= 0) & (v <= 1)).all()) for v in losses.values()):
        raise UserError("the losses of each threshold must be one or more numbers from 0 to 1")
    safe: float | None = None
    for threshold in sorted(losses, reverse=True):
        values = losses[threshold].double()
        if risk_p_value(float(values.mean()), len(values), tolerance) > epsilon:
            break
        safe = threshold
    return safe
