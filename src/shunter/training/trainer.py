"""BalanceCallback: load balancing as a callback of transformers' `Trainer`, TRL's included."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import CallbackHandler, ExportableState

from ..moe import expect_steps
from .balance import Balance
from .drift import OnDrift

__all__ = ["BalanceCallback", "DriftCallback", "caller", "divides_loss", "wrap_loss"]

T = TypeVar("T")


class BalanceCallback(Balance, TrainerCallback):
    """Balance the experts of any mixture-of-experts model, transformers' or Shunter's, in a `Trainer` or a plain loop.

    In a Trainer, TRL's included, the losses become part of what `compute_loss` returns, the mean over the micro-batches
    of an optimizer step and over ranks; biases move after each optimizer step; metrics are in every log:

        Trainer(model, args, train_dataset=data, callbacks=[BalanceCallback(load_balancing_loss=0.01)])

    In a plain loop it is a `Balance`, whose arguments it takes.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach to the Trainer's model, and come before what it reports to."""
        self.detach()
        self.attach(kwargs["model"])
        expect_steps(kwargs["model"], state.max_steps)
        assert self._attached is not None
        trainer, handler = caller(Trainer), caller(CallbackHandler)
        if trainer is not None:
            self._attached.callback(wrap_loss(trainer, self._with_loss))
        if handler is not None:
            # Before those that report (to TensorBoard, W&B, …), so that they see the metrics. A new list: the handler
            # is going through the old one.
            handler.callbacks = [self, *(other for other in handler.callbacks if other is not self)]

    def _with_loss(self, trainer: Trainer, found: Any, num_items_in_batch: Any) -> Any:
        """What the Trainer's compute_loss found, with the losses of this micro-batch."""
        if not self._heard:
            return found
        if divides_loss(trainer, num_items_in_batch):
            parts = 1
        else:
            parts = getattr(trainer, "current_gradient_accumulation_steps", trainer.args.gradient_accumulation_steps)
        extra = self.loss() / parts
        return (found[0] + extra, *found[1:]) if isinstance(found, tuple) else found + extra

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End an optimizer step."""
        if self._heard:
            warnings.warn(
                "BalanceCallback: this training does not ask its Trainer's compute_loss for the loss, so the balancing "
                "losses are not in it; add the callback's loss()",
                stacklevel=2,
            )
        if getattr(control, "skipped", False):  # by a NaNGuard
            self.forget()
        else:
            self.step()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add the metrics to a log of training."""
        if logs is None or "loss" not in logs or self._attached is None:
            return
        values = self.metrics()
        logs.update(values)
        if state.log_history:
            state.log_history[-1].update(values)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the model as it was."""
        self.detach()


class DriftCallback(OnDrift, TrainerCallback, ExportableState):
    """An `OnDrift`, whose arguments it takes, in a `Trainer`; its checkpoints keep what it knows.

    Trainer(model, args, train_dataset=data, callbacks=[DriftCallback(fit_capacity, trigger=drifted(0.1))])
    """

    def state(self) -> dict[str, Any]:
        """What a Trainer writes into its checkpoints."""
        return {"args": {"every": self.every}, "attributes": {"memory": self.state_dict()}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach to the Trainer's model; resumed, alter its layers as they were."""
        self.detach()
        self.attach(kwargs["model"])
        known = state.stateful_callbacks.get(type(self).__name__)
        if state.global_step and isinstance(known, dict):
            self.load_state_dict(known["attributes"]["memory"])

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End an optimizer step."""
        if getattr(control, "skipped", False):  # by a NaNGuard
            self.forget()
        else:
            self.step()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the model as it has become."""
        self.detach()


def caller(kind: type[T]) -> T | None:
    """The object of a kind whose method is being called, the innermost.

    transformers hands a callback the model, the optimizer and the data, but no way to the Trainer or to the other
    callbacks; they are found where they are: in the interpreter's frames.
    """
    frame = inspect.currentframe()
    while frame is not None:
        found = frame.f_locals.get("self")
        if isinstance(found, kind):
            return found
        frame = frame.f_back
    return None


def divides_loss(trainer: Trainer, num_items_in_batch: Any) -> bool:
    """Whether Trainer.training_step divides a micro-batch's loss by their number: it was not made for all of them."""
    made_for_all = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
    return not made_for_all and trainer.compute_loss_func is None


def wrap_loss(trainer: Trainer, change: Callable[[Trainer, Any, Any], Any]) -> Callable[[], None]:
    """Let what a Trainer's compute_loss returns pass through change(…); returns what undoes it.

    The output of the model would be the wrong place: many trainers make their loss from its logits alone (label
    smoothing, compute_loss_func, all of TRL's).
    """
    inner, own = trainer.compute_loss, vars(trainer).get("compute_loss")

    @functools.wraps(inner)
    def compute_loss(*args: Any, **kwargs: Any) -> Any:
        found = inner(*args, **kwargs)
        given = signature.bind(*args, **kwargs).arguments
        return change(trainer, found, given.get("num_items_in_batch"))

    def undo() -> None:
        if own is None:
            del trainer.compute_loss
        else:
            trainer.compute_loss = own  # type: ignore[method-assign]

    signature = inspect.signature(inner)
    trainer.compute_loss = compute_loss  # type: ignore[method-assign]
    return undo
