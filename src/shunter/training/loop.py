"""One model's training inside a recipe: Hugging Face's `Trainer`, watched, resumable to the bit, and accounted for.

The Trainer writes a checkpoint aside, into the folder `partial`; it gets its place when it is whole, sealed with its
checksums, and only then do older ones go.
"""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, SequentialSampler
from tqdm import tqdm
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..analysis.runs import Metrics
from ..durable import why_not_written
from ..environment import _reset_peak_rss, peak_rss_bytes
from ..errors import Interrupted, NotWritten
from ..losses import consistency_loss
from ..metrics import balance
from ..moe import RoutedLayer, aux_loss, expect_steps, moe_layers, update_routers
from ..routers.thor import Thor
from .checkpoints import MEMORY, Checkpoints

__all__ = ["train_model"]

Evaluate = Callable[[PreTrainedModel], dict[str, Any]]

IN_A_LOG = 20.0  # seconds between lines of progress where standard error is no terminal

# What is added up between two lines of the log; routed are tokens, kept their assignments, over all layers.
_WINDOW = ("loss", "aux_loss", "steps", "routed", "kept")


class _Watch(TrainerCallback):
    """Logs, evaluates, shows progress, moves the routers' state, and stops on Ctrl-C: all at the ends of steps."""

    def __init__(
        self,
        name: str,
        metrics: Metrics,
        evaluate: Evaluate,
        checkpoints: Checkpoints,
        tokens_per_step: int,
        eval_every: int,
        log_every: int,
    ) -> None:
        self.name, self.metrics, self.evaluate, self.checkpoints = name, metrics, evaluate, checkpoints
        self.tokens_per_step, self.eval_every, self.log_every = tokens_per_step, eval_every, log_every
        self.stop = False
        self.seconds = 0.0
        self.window = dict.fromkeys(_WINDOW, 0.0)
        self.load: dict[str, Tensor] = {}
        self.bar: tqdm[Any] | None = None

    def add(self, losses: list[Tensor], disagreement: Tensor, model: nn.Module) -> None:
        """Note the losses of one step's forwards, what they cost to disagree, and the last one's routings."""
        extra = aux_loss(model).item()
        self.window["loss"] += (sum(loss.item() for loss in losses) - extra) / len(losses)
        self.window["aux_loss"] += extra + disagreement.item()
        self.window["steps"] += 1
        for name, layer in moe_layers(model).items():
            assert layer.routing is not None
            self.load[name] = self.load.get(name, 0) + layer.routing.demand
            self.window["routed"] += layer.routing.num_tokens
            self.window["kept"] += layer.routing.token.numel()

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        model: PreTrainedModel = kwargs["model"]
        expect_steps(model, state.max_steps)
        if state.global_step == 0:
            self._evaluate(model, 0)
        if self.metrics.echo is None:
            self.bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                desc=f"{self.name:6}",
                unit="step",
                dynamic_ncols=True,
                mininterval=0.1 if sys.stderr.isatty() else IN_A_LOG,
            )

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        model: PreTrainedModel = kwargs["model"]
        update_routers(model)
        self.seconds += time.perf_counter() - self.began
        step = state.global_step
        last = step == state.max_steps
        if step % self.log_every == 0 or last:
            self._log(step, args.learning_rate if kwargs.get("lr_scheduler") is None else _lr(kwargs["lr_scheduler"]))
        if self.bar is not None:
            self.bar.update()
        if step % self.eval_every == 0 or last:
            self._evaluate(model, step)
        if self.stop and not last:
            control.should_save = control.should_training_stop = True

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        memory = {
            "seconds": self.seconds,
            "window": self.window,
            "load": {name: load.tolist() for name, load in self.load.items()},
            "metrics": self.metrics.lines(self.name),
        }
        part = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        (part / MEMORY).write_text(json.dumps(memory), encoding="utf-8")
        self.checkpoints.add(part)

    def restore(self, checkpoint: Path) -> None:
        """Go on from a checkpoint's memory."""
        memory = json.loads((checkpoint / MEMORY).read_text(encoding="utf-8"))
        self.seconds, self.window = memory["seconds"], memory["window"]
        self.load = {name: torch.tensor(load) for name, load in memory["load"].items()}
        self.metrics.replace(self.name, memory["metrics"])

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()

    def _log(self, step: int, learning_rate: float) -> None:
        steps = self.window["steps"] or 1
        loss = self.window["loss"] / steps
        line: dict[str, Any] = {"step": step, "tokens": step * self.tokens_per_step, "loss": loss}
        line |= {"seconds": self.seconds, "learning_rate": learning_rate}
        shown = {"loss": f"{loss:.3f}", "tokens/s": f"{step * self.tokens_per_step / max(self.seconds, 1e-9):,.0f}"}
        if self.load:
            line["aux_loss"] = self.window["aux_loss"] / steps
            asked = math.fsum(float(n.sum()) for n in self.load.values())
            line["experts_per_token"] = asked / self.window["routed"]
            line["dropped"] = 1 - self.window["kept"] / asked if asked else 0.0
            line["balance"] = math.fsum(float(balance(n.float())) for n in self.load.values()) / len(self.load)
            shown["balance"] = f"{line['balance']:.2f}"
        self.metrics.write(kind="train", model=self.name, **line)
        if self.load:
            layers = {name: (load / load.sum().clamp_min(1)).tolist() for name, load in self.load.items()}
            self.metrics.write(kind="load", model=self.name, step=step, layers=layers)
        if self.bar is not None:
            self.bar.set_postfix(shown, refresh=False)
        self.window = dict.fromkeys(_WINDOW, 0.0)
        self.load = {}

    def _evaluate(self, model: PreTrainedModel, step: int) -> None:
        with _counting(model) as counts:
            found = self.evaluate(model)
        taken = {"experts_per_token": counts["asked"] / counts["routed"]} if counts["routed"] else {}
        self.metrics.write(
            kind="eval",
            model=self.name,
            step=step,
            tokens=step * self.tokens_per_step,
            seconds=self.seconds,
            **taken,
            **found,
        )


@contextmanager
def _counting(model: nn.Module) -> Iterator[dict[str, int]]:
    """While the context lasts, the tokens that layers route and the experts that they ask for are added up."""
    counts = {"routed": 0, "asked": 0}

    def add(layer: RoutedLayer, *_: Any) -> None:
        assert layer.routing is not None
        counts["routed"] += layer.routing.num_tokens
        counts["asked"] += int(layer.routing.demand.sum())

    handles = [layer.register_forward_hook(add) for layer in moe_layers(model).values()]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def _lr(scheduler: Any) -> float:
    return float(scheduler.get_last_lr()[0])


class _Trainer(Trainer):
    """A Trainer that takes the data in its given order and shows each step's losses to its watch.

    Where a router trains by several passes, the loss is the sum of theirs and alpha times their disagreement.
    """

    watch: _Watch

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        assert isinstance(self.train_dataset, Sized)
        return SequentialSampler(self.train_dataset)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        alpha = _consistency(model)
        passes = [
            super(_Trainer, self).compute_loss(model, inputs, True, num_items_in_batch)
            for _ in range(1 if alpha is None else 2)
        ]
        losses, (outputs, *others) = [loss for loss, _ in passes], [output for _, output in passes]
        disagreement = torch.zeros_like(losses[0])
        if alpha is not None:
            mask = inputs.get("attention_mask")
            real = None if mask is None else mask.to(torch.bool)
            disagreement = alpha * consistency_loss(outputs.logits, others[0].logits, real)
        self.watch.add(losses, disagreement, model)
        loss = sum(losses[1:], losses[0]) + disagreement
        return (loss, outputs) if return_outputs else loss


def _consistency(model: nn.Module) -> float | None:
    """The coefficient alpha of the disagreement of two passes, the largest of a model's routers; None without such."""
    routers = [layer.router for layer in moe_layers(model).values()]
    return max((router.consistency_loss for router in routers if isinstance(router, Thor)), default=None)


def train_model(
    name: str,
    model: PreTrainedModel,
    dataset: Dataset[Any],
    evaluate: Evaluate,
    metrics: Metrics,
    checkpoints: Checkpoints,
    *,
    tokens_per_step: int,
    eval_every: int,
    log_every: int,
    **arguments: Any,
) -> dict[str, float]:
    """Train a model on a dataset in its given order, from its newest whole checkpoint where there is one.

    Args:
        name: what metrics call the model.
        model: trained in place.
        dataset: items in training order.
        evaluate: called on the model before the first step, every eval_every steps and at the end.
        metrics: where losses, evaluations and expert loads go.
        checkpoints: of this model, here and before.
        tokens_per_step: tokens of one optimizer step.
        eval_every, log_every: in steps.
        **arguments: of `TrainingArguments`.

    Returns:
        seconds of training without evaluation, and peak_rss_bytes of the process meanwhile.

    Raises:
        Interrupted: after Ctrl-C, when the checkpoint is written.
        NotWritten: where the disk does not take a checkpoint or a line of the metrics; what was there before is whole.
    """
    watch = _Watch(name, metrics, evaluate, checkpoints, tokens_per_step, eval_every, log_every)
    trainer = _Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(checkpoints.partial),
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **arguments,
        ),
        train_dataset=dataset,
        callbacks=[watch],
    )
    trainer.watch = watch
    trainer.remove_callback(_printer())
    checkpoint = checkpoints.newest()
    if checkpoint is not None:
        watch.restore(checkpoint)
    else:
        metrics.replace(name, [])
    _reset_peak_rss()
    try:
        with _interruptible(watch):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except Exception as error:
        if reason := why_not_written(error):
            where = f"{checkpoints.folder / 'partial'}, a checkpoint at step {trainer.state.global_step},"
            raise NotWritten(f"{where} cannot be written: {reason}") from error
        raise
    if watch.stop and trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted(f"{name} model, step {trainer.state.global_step} of {trainer.state.max_steps}")
    return {"seconds": watch.seconds, "peak_rss_bytes": peak_rss_bytes()}


def _printer() -> type[TrainerCallback]:
    from transformers.trainer_callback import PrinterCallback

    return PrinterCallback


@contextmanager
def _interruptible(watch: _Watch) -> Iterator[None]:
    """The first Ctrl-C (or a polite kill) ends training after the present step; a second one at once."""

    def ask(signum: int, frame: Any) -> None:
        if watch.stop:
            raise KeyboardInterrupt
        watch.stop = True
        print("\nStopping after this step; a checkpoint will be written. Again to stop at once.", file=sys.stderr)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
