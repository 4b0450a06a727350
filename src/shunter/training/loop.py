"""One model's training inside a recipe: Hugging Face's `Trainer`, watched, resumable to the bit, and accounted for.

The Trainer writes a checkpoint aside, into the folder `partial`; it gets its place when it is whole, sealed with its
checksums, and only then do older ones go.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import stat
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sized
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, SequentialSampler
from tqdm import tqdm
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..analysis.runs import Metrics
from ..context import KNOWN
from ..durable import why_not_written
from ..environment import _reset_peak_rss, peak_rss_bytes
from ..errors import Diverged, Interrupted, NotWritten, UserError, one_line
from ..losses import consistency_loss
from ..metrics import balance
from ..moe import RoutedLayer, aux_loss, expect_steps, moe_layers, tell, update_routers
from ..parallel.checkpoint import first_does
from ..ranks import is_first_rank, num_ranks, sum_over_ranks
from ..routers.thor import Thor
from .alarms import LoadAlarm, SpikeAlarm
from .checkpoints import MEMORY, Checkpoints
from .guards import CURES, NaNGuard, not_finite
from .sharded import ShardedTrainer

__all__ = ["told_and_given", "train_model"]

Evaluate = Callable[[PreTrainedModel], dict[str, Any]]

IN_A_LOG = 20.0  # seconds between lines of progress where standard error is no terminal

WEIGHTS = "model.safetensors"  # of a checkpoint

# What is added up between two lines of the log; routed are tokens, no padding, kept their assignments, over all layers.
_WINDOW = ("loss", "aux_loss", "steps", "routed", "kept", "skipped")


class _Watch(TrainerCallback):
    """At the ends of steps logs, evaluates, alarms, shows progress, moves the routers' state, and stops on Ctrl-C."""

    def __init__(
        self,
        name: str,
        metrics: Metrics,
        evaluate: Evaluate,
        checkpoints: Checkpoints,
        guard: NaNGuard,
        tokens_per_step: int,
        eval_every: int,
        log_every: int,
    ) -> None:
        self.name, self.metrics, self.evaluate = name, metrics, evaluate
        self.checkpoints, self.guard = checkpoints, guard
        self.tokens_per_step, self.eval_every, self.log_every = tokens_per_step, eval_every, log_every
        self.asked = self.stop = self.saving = False  # by a signal to this process; by one to any of them
        self.seconds = 0.0
        self.window = dict.fromkeys(_WINDOW, 0.0)
        self.load: dict[str, Tensor] = {}
        self.spikes, self.loads = SpikeAlarm(), LoadAlarm()
        self.bar: tqdm[Any] | None = None

    def add(self, losses: list[Tensor], disagreement: Tensor, model: nn.Module) -> None:
        """Note the losses of one step's forwards, what they cost to disagree, and the last one's routings."""
        self.step = dict.fromkeys(_WINDOW, 0.0)
        self.step_load: dict[str, Tensor] = {}
        extra = aux_loss(model).item()
        self.step["loss"] = (sum(loss.item() for loss in losses) - extra) / len(losses)
        self.step["aux_loss"] = extra + disagreement.item()
        self.step["steps"] = 1
        for name, layer in moe_layers(model).items():
            assert layer.routing is not None
            self.step_load[name] = layer.routing.demand
            self.step["routed"] += layer.tokens_routed
            self.step["kept"] += layer.routing.token.numel()

    def _over_ranks(self) -> None:
        """Add up what the ranks' forwards left: losses become their mean, tokens and loads their sum."""
        if (size := num_ranks()) == 1:
            return
        self.step_load = {name: load.clone() for name, load in self.step_load.items()}
        values = torch.tensor(list(self.step.values()), dtype=torch.float64)
        sum_over_ranks(values)
        self.step = dict(zip(self.step, values.tolist(), strict=True))
        for name in ("loss", "aux_loss", "steps"):
            self.step[name] /= size
        sum_over_ranks(*self.step_load.values())

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        model: PreTrainedModel = kwargs["model"]
        expect_steps(model, state.max_steps)
        if state.global_step == 0:
            self._evaluate(model, 0)
        if self.metrics.echo is None and is_first_rank():
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
        step = state.global_step
        last = step == state.max_steps
        if self.guard.skipping:
            self.window["skipped"] += 1
            self._alarm(step, "the loss or the gradient is not finite: the step was skipped")
        else:
            update_routers(model)
            self._over_ranks()
            self._count(step)
        self.seconds += time.perf_counter() - self.began
        if step % self.log_every == 0 or last:
            self._log(step, args.learning_rate if kwargs.get("lr_scheduler") is None else _lr(kwargs["lr_scheduler"]))
        if self.bar is not None:
            self.bar.update()
        if step % self.eval_every == 0 or last:
            self._evaluate(model, step)
        asked = torch.tensor(int(self.asked))
        sum_over_ranks(asked)  # what comes meanwhile is for the next step: it came too late for some rank
        self.stop = bool(asked)
        if self.stop and not last:
            control.should_save = control.should_training_stop = True
        self.saving = control.should_save

    def _count(self, step: int) -> None:
        """Add a step that was taken to the window, and see whether anything in it is alarming."""
        self.window = {key: value + self.step[key] for key, value in self.window.items()}
        if (expected := self.spikes.note(self.step["loss"])) is not None:
            self._alarm(step, f"the loss leaps to {self.step['loss']:.4f}; the steps before it led to {expected:.4f}")
        for name, load in self.step_load.items():
            self.load[name] = self.load.get(name, 0) + load
            top_k = float(load.sum()) * len(self.step_load) / max(self.step["routed"], 1)
            for text in self.loads.note(name, load, top_k):
                self._alarm(step, text)

    def _alarm(self, step: int, text: str) -> None:
        self.metrics.write(kind="alarm", model=self.name, step=step, what=text)
        if is_first_rank():
            tqdm.write(f"{self.name} model, step {step}: {text}", file=sys.stderr)

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        memory = {
            "seconds": self.seconds,
            "window": self.window,
            "load": {name: load.tolist() for name, load in self.load.items()},
            "metrics": self.metrics.lines(self.name),
            "spikes": list(self.spikes.recent),
            "loads": self.loads.state_dict(),
            "skipped": self.guard.skipped,
        }
        part = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        bad = torch.tensor(int(bool(name := not_finite(kwargs["model"], kwargs["optimizer"]))))
        sum_over_ranks(bad)
        if bad:
            first_does(partial(shutil.rmtree, part))
            name = name or "a part of the model on another rank"
            self._alarm(state.global_step, f"{name} is not finite: no checkpoint")
            self.saving = False
            return
        text = json.dumps(memory)
        first_does(partial(self._keep, part, text))
        self.saving = False

    def _keep(self, part: Path, memory: str) -> None:
        """Complete a checkpoint that was written aside, and put it in its place."""
        (part / MEMORY).write_text(memory, encoding="utf-8")
        self.checkpoints.add(part)

    def restore(self, checkpoint: Path) -> None:
        """Go on from a checkpoint's memory."""
        memory = json.loads((checkpoint / MEMORY).read_text(encoding="utf-8"))
        self.seconds, self.window = memory["seconds"], memory["window"]
        self.load = {name: torch.tensor(load) for name, load in memory["load"].items()}
        self.spikes.recent.extend(memory["spikes"])
        self.loads.load_state_dict(memory["loads"])
        self.guard.skipped = memory["skipped"]
        self.metrics.replace(self.name, memory["metrics"])

    def _log(self, step: int, learning_rate: float) -> None:
        steps = self.window["steps"]
        loss = self.window["loss"] / steps if steps else None
        line: dict[str, Any] = {"step": step, "tokens": step * self.tokens_per_step, "loss": loss}
        line |= {"seconds": self.seconds, "learning_rate": learning_rate, "skipped": int(self.window["skipped"])}
        shown = {
            "loss": "skipped" if loss is None else f"{loss:.3f}",
            "tokens/s": f"{step * self.tokens_per_step / max(self.seconds, 1e-9):,.0f}",
        }
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
        if not math.isfinite(found["loss"]):
            where = not_finite(model)
            raise Diverged(
                f"step {step}: the held-out loss of the {self.name} model is not finite; "
                + (f"first not finite is {where}; " if where else "")
                + CURES,
                since=step,
            )
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
        counts["routed"] += layer.tokens_routed
        counts["asked"] += int(layer.routing.demand.sum())

    handles = [layer.register_forward_hook(add) for layer in moe_layers(model).values()]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def _lr(scheduler: Any) -> float:
    return float(scheduler.get_last_lr()[0])


class _Trainer(ShardedTrainer):
    """A Trainer that takes the data in its given order and shows each step's losses to its watch.

    Where a router trains by several passes, the loss is the sum of theirs and alpha times their disagreement.
    """

    watch: _Watch

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        # As the model names its weights: save_pretrained renames those of some families, and a Trainer that goes on
        # does not know the names and leaves the weights as they are.
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        if self.is_distributed_loading_by_transformers:  # the ranks' parts hold the weights
            return
        assert self.model is not None
        safetensors.torch.save_model(self.model, str(folder / WEIGHTS))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_distributed_loading_by_transformers:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        assert self.model is not None
        file = Path(resume_from_checkpoint) / WEIGHTS
        missing, unexpected = safetensors.torch.load_model(model or self.model, file, strict=False)
        if wrong := [*missing, *unexpected]:
            raise UserError(
                f"the checkpoint of the {self.watch.name} model has other weights: {wrong[0]!r} in one alone"
            )

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        assert isinstance(self.train_dataset, Sized)
        return SequentialSampler(self.train_dataset)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        alpha = _consistency(model)
        told, inputs = told_and_given(inputs)
        with tell(model, **told):
            passes = [
                super(_Trainer, self).compute_loss(model, inputs, True, num_items_in_batch)
                for _ in range(1 if alpha is None else 2)
            ]
        losses, (outputs, *others) = [loss for loss, _ in passes], [output for _, output in passes]
        disagreement = torch.zeros_like(losses[0])
        if alpha is not None:
            mask = inputs.get("attention_mask")
            if model.config.is_encoder_decoder:  # whose logits are of the decoder's tokens
                mask = inputs["labels"] != -100
            real = None if mask is None else mask.to(torch.bool)
            disagreement = alpha * consistency_loss(outputs.logits, others[0].logits, real)
        self.watch.add(losses, disagreement, model)
        loss = sum(losses[1:], losses[0]) + disagreement
        return (loss, outputs) if return_outputs else loss


def told_and_given(batch: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What of a batch is told to the layers, being a field of `Context`, and what its forward is given."""
    told = {name: value for name, value in batch.items() if name in KNOWN}
    return told, {name: value for name, value in batch.items() if name not in KNOWN}


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
        Diverged: where the loss, the gradient or the held-out loss is not finite, again and again.
        NotWritten: where the disk does not take a checkpoint or a line of the metrics; what was there before is whole.
    """
    guard = NaNGuard()
    watch = _Watch(name, metrics, evaluate, checkpoints, guard, tokens_per_step, eval_every, log_every)
    trainer = _Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(checkpoints.partial),
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,  # what is told to the layers is no keyword of the forward
            **arguments,
        ),
        train_dataset=dataset,
        callbacks=[guard, watch],
    )
    trainer.watch = watch
    trainer.remove_callback(_printer())
    checkpoint = first_does(checkpoints.newest)
    if checkpoint is not None:
        watch.restore(checkpoint)
    else:
        metrics.replace(name, [])
    _reset_peak_rss()
    try:
        with _interruptible(watch):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            sum_over_ranks(torch.zeros(1))  # no rank looks into the partial folder any more
    except NotWritten:
        raise
    except Exception as error:
        # Writers in C++ may say no more than "iostream error".
        if reason := why_not_written(error) or (one_line(error) if watch.saving else ""):
            step = trainer.state.global_step
            raise NotWritten(f"{checkpoints.folder}/checkpoint-{step} cannot be written: {reason}") from error
        raise
    finally:
        if watch.bar is not None:
            watch.bar.close()
        if is_first_rank():
            shutil.rmtree(checkpoints.partial, ignore_errors=True)
    if watch.stop and trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted(f"{name} model, step {trainer.state.global_step} of {trainer.state.max_steps}")
    return {"seconds": watch.seconds, "peak_rss_bytes": peak_rss_bytes()}


def _printer() -> type[TrainerCallback]:
    from transformers.trainer_callback import PrinterCallback

    return PrinterCallback


@contextmanager
def _interruptible(watch: _Watch) -> Iterator[None]:
    """The first Ctrl-C (or a polite kill, or the end of the terminal) ends training after the present step.

    A second one ends it at once. Under nohup the end of the terminal is nothing.
    """
    hangup = getattr(signal, "SIGHUP", None)  # not on Windows

    def ask(signum: int, frame: Any) -> None:
        if signum == hangup:
            _leave_terminal()
        if watch.asked:
            raise KeyboardInterrupt
        watch.asked = True
        if is_first_rank():
            print("\nStopping after this step; a checkpoint will be written. Again to stop at once.", file=sys.stderr)

    numbers = [signal.SIGINT, signal.SIGTERM]
    if hangup is not None and signal.getsignal(hangup) is not signal.SIG_IGN:
        numbers.append(hangup)
    before = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave_terminal() -> None:
    """From now on what is said to the terminal goes nowhere: it is gone, and to write there is an error."""
    for descriptor in (1, 2):
        if stat.S_ISCHR(os.fstat(descriptor).st_mode):
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
