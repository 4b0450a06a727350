"""What fine-tuning does to experts alone: dropout within them, and gradients scaled by the number of experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any, Literal, get_args

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.moe import _default_apply_gate

from ..errors import UserError
from ..experts import Experts
from ..hf.observe.taps import Tap, require_taps
from .roles import roles

__all__ = ["RelativeTo", "expert_dropout", "scale_expert_gradients"]

RelativeTo = Literal["sum", "mean"]


def expert_dropout(model: nn.Module, probability: float) -> int:
    """Drop entries of the experts' hidden units in training, apart from the dropout elsewhere in a model, in place.

    Args:
        model: with layers of Shunter's, which save it with the model, or of transformers' families whose experts take
            (hidden_states, top_k_index, top_k_weights), under any experts_implementation.
        probability: of an entry, from 0 (none) to below 1.

    Returns:
        How many layers have it now.

    Raises:
        UserError: where the probability is out of range or a layer's experts cannot have it; then none was changed.

    Source: Fedus et al. 2021 (Switch), section 2.4 and table 4: 0.4 in the experts, 0.1 elsewhere.
    """
    if not 0 <= probability < 1:
        raise UserError(f"expert_dropout: {probability} must be at least 0 and below 1")
    set_in = [_dropper(tap) for tap in require_taps(model).values()]
    for put in set_in:
        put(probability)
    return len(set_in)


def _dropper(tap: Tap) -> Callable[[float], None]:
    """What sets the probability in a layer."""
    experts: Any = tap.experts if tap.own is None else tap.own.experts
    if tap.own is not None and isinstance(experts, Experts):
        return partial(setattr, experts, "dropout")
    if not hasattr(experts, "_apply_gate"):
        raise UserError(f"expert_dropout: the experts of {tap.name} ({type(tap.layer).__name__}) cannot have it")
    own_gate = experts.has_gate and getattr(experts._apply_gate, "__func__", None) is not _default_apply_gate
    return partial(_drop_in, experts, "_apply_gate" if own_gate else "act_fn")


def _drop_in(experts: Any, name: str, probability: float) -> None:
    inner = getattr(experts, name)
    if isinstance(inner, Dropped):
        inner.probability = probability
    elif probability:
        # What the gate multiplies with may come after: dropping an entry of one factor drops that of the product.
        dropped = Dropped(inner, probability).train(experts.training)
        if name == "act_fn":
            setattr(experts, name, dropped)
        else:
            vars(experts)[name] = dropped  # a method: its module must not become its own child
            experts.register_forward_pre_hook(_follow_mode)


def _follow_mode(module: Any, args: Any) -> None:
    module._apply_gate.train(module.training)


class Dropped(nn.Module):
    """A function of hidden units, of whose values entries are dropped in training.

    Args:
        function: the activation, or the gate.
        probability: of an entry.
    """

    def __init__(self, function: Callable[..., Tensor], probability: float) -> None:
        super().__init__()
        if isinstance(function, nn.Module):
            self.function = function
        else:
            vars(self)["function"] = function
        self.probability = probability

    def forward(self, *args: Tensor) -> Tensor:
        """The function's values, after dropout."""
        return F.dropout(self.function(*args), self.probability, self.training)


def scale_expert_gradients(model: nn.Module, relative_to: RelativeTo) -> Callable[[], None]:
    """Scale the gradients of experts by the square root of their number E, from now on; returns what undoes it.

    Two definitions are in use, and they are a factor of E apart. The gradient of a loss that is a mean over a batch is
    that of its tokens' losses summed, over E ranks that hold an expert each, divided by E:

    * relative to the "sum": the summed gradient over sqrt(E), which is sqrt(E) times the gradient of the mean;
    * relative to the "mean": the gradient of the mean over sqrt(E).

    Under an optimizer that divides by the size of the gradients (Adam) a constant factor changes nothing but the norm
    that clipping sees, and with it all parameters, and what is as small as its epsilon.

    Args:
        model: any mixture of experts whose loss is a mean.
        relative_to: "sum" or "mean".

    Raises:
        UserError: for another word, and a model without experts.

    Source: Artetxe et al. 2021 (Efficient Large Scale Language Modeling with Mixtures of Experts), section 3.2.
    """
    if relative_to not in get_args(RelativeTo):
        raise UserError(f'scale_expert_gradients: relative_to={relative_to!r} must be "sum" or "mean"')
    with ExitStack() as stack:
        for parameter, num_experts in _experts_of(model):
            factor = num_experts**0.5 if relative_to == "sum" else num_experts**-0.5
            stack.callback(parameter.register_hook(partial(_times, factor)).remove)
        return stack.pop_all().close


def _times(factor: float, grad: Tensor) -> Tensor:
    return grad * factor


def _experts_of(model: nn.Module) -> Iterator[tuple[nn.Parameter, int]]:
    """The experts' parameters that are trained, each with E of its layer."""
    of, parameters = roles(model), dict(model.named_parameters())
    for path, tap in require_taps(model).items():
        inside = [n for n in parameters if n.startswith(f"{path}.") or not path]
        for name in inside:
            if of[name] == "expert" and parameters[name].requires_grad:
                yield parameters[name], tap.num_weights
