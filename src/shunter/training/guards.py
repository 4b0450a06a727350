"""Guards of a training: updates that are not finite are skipped, spikes and strikes rewind it to an earlier state."""

from __future__ import annotations

import copy
import functools
import math
import re
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from ..durable import discard
from ..errors import Diverged, UserError
from ..parallel.checkpoint import first_does
from ..parallel.fsdp import grad_norm
from ..ranks import num_ranks, sum_over_ranks
from .alarms import SpikeAlarm
from .trainer import caller, divides_loss, wrap_loss

__all__ = ["GuardedLoop", "NaNGuard", "not_finite"]

CURES = "try a lower learning rate, a longer warm-up, a smaller max_grad_norm, or look at the data of that step"


class _Judge:
    """What is known of a training's trouble: steps that were skipped, losses before a spike, rewinds."""

    def __init__(self, strikes: int, within: int, rewinds: int, margin: int) -> None:
        if not 1 <= strikes <= within:
            raise ValueError(f"{type(self).__name__}: strikes {strikes} must be between 1 and within, {within}")
        if rewinds < 0 or margin < 0:
            raise ValueError(f"{type(self).__name__}: rewinds {rewinds} and margin {margin} must be at least 0")
        self.strikes, self.within, self.rewinds, self.margin = strikes, within, rewinds, margin
        self.skipped: list[int] = []
        self.rewound: list[tuple[int, int]] = []
        self._spikes = SpikeAlarm()
        self._buffers = _Buffers()

    @property
    def memory(self) -> dict[str, Any]:
        """What a resumed training goes on with, as JSON."""
        return {"skipped": self.skipped, "rewound": self.rewound, "recent": list(self._spikes.recent)}

    @memory.setter
    def memory(self, known: dict[str, Any]) -> None:
        self.skipped = list(known["skipped"])
        self.rewound = [(step, to) for step, to in known["rewound"]]
        self._spikes.recent.clear()
        self._spikes.recent.extend(known["recent"])

    def _may_rewind(self) -> bool:
        return len(self.rewound) < self.rewinds

    def _strike(self, step: int) -> bool:
        """Count a skipped step; whether there are as many as are suffered."""
        self.skipped = [s for s in self.skipped if s > step - self.within] + [step]
        return len(self.skipped) >= self.strikes

    def _forget(self, step: int, to: int) -> None:
        """Begin anew after a rewind."""
        self.rewound.append((step, to))
        self.skipped = []
        self._spikes.recent.clear()  # of a training that went on from elsewhere

    def _diverged(self, step: int, what: str, where: str) -> Diverged:
        gone = f"after {len(self.rewound)} rewinds " if self.rewound else ""
        return Diverged(
            f"step {step}: the {what} is not finite, and {gone}{len(self.skipped)} of the last {self.within} steps "
            f"were skipped for that; " + (f"first not finite is {where}; " if where else "") + CURES,
            since=self.skipped[0],
        )


class NaNGuard(_Judge, TrainerCallback, ExportableState):
    """Skip each optimizer step of a `Trainer` whose loss or gradient norm is NaN or infinite; then rewind or stop.

        Trainer(model, args, train_dataset=data, callbacks=[NaNGuard()])

    A skipped step leaves parameters, moments, their step counts, buffers (the state of routers among them) and the
    schedule as they were; its batch is used up. All ranks skip alike. The step after one that was skipped is watched
    from the inside, so that the error names the layer. Infinite gradients under a gradient scaler (fp16) are left to
    the scaler. What the guard knows is in the Trainer's checkpoints, and a resumed training goes on with it.

    With rewinds, strikes and a loss that leaps off the line of those before it (`shunter.training.alarms.SpikeAlarm`;
    that step is not taken) take model, optimizer and schedule back to a checkpoint of this training. The batches since
    are not seen again: `global_step` counts them and goes on.

    Args:
        strikes: so many skipped steps
        within: in so many steps rewind, or raise `shunter.errors.Diverged`.
        rewinds: how often to go back, at most; 0 never does, and looks for no spikes.
        margin: checkpoints of the last so many steps before the trouble are not trusted either, nor are those with
            values that are not finite; a rewind removes them and later ones.

    Attributes:
        skipped: the last steps that were skipped, counted from 1.
        skipping: whether the present one is.
        rewound: of each rewind its step, and that of the checkpoint.

    Source: Du et al. 2022 (GLaM), section 5: updates with NaN or infinite gradients are skipped, and training restarts
    from an earlier checkpoint after large fluctuations.
    """

    def __init__(self, strikes: int = 3, within: int = 100, *, rewinds: int = 0, margin: int = 10) -> None:
        super().__init__(strikes, within, rewinds, margin)
        self.skipping = False
        self._trainer: Trainer | None = None
        self._hooks, self._attached, self._step = ExitStack(), ExitStack(), ExitStack()

    def state(self) -> dict[str, Any]:
        """What a Trainer writes of the guard into its checkpoints."""
        names = ("strikes", "within", "rewinds", "margin")
        return {"args": {name: getattr(self, name) for name in names}, "attributes": {"memory": self.memory}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Listen to the Trainer's losses and gradient norms."""
        if self.rewinds and (args.save_strategy == "no" or args.save_only_model):
            raise UserError("NaNGuard(rewinds=…) goes back to checkpoints with their optimizer: set save_strategy, "
                            "and leave save_only_model out")  # fmt: skip
        self.on_train_end(args, state, control)
        self._buffers = _Buffers()
        self._saved: set[int] = set()
        if state.global_step:
            self._saved = {step for step in _checkpoints(args.output_dir) if step <= state.global_step}
            known = state.stateful_callbacks.get(type(self).__name__)
            if isinstance(known, dict):
                self.memory = known["attributes"]["memory"]
        trainer = self._trainer = caller(Trainer)
        if trainer is not None:
            self._attached.callback(wrap_loss(trainer, self._with_loss))
            self._attached.callback(_wrap_norm(trainer.accelerator, self._with_norm))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop listening."""
        self._trainer = None
        self._step.close()
        self._attached.close()
        self._hooks.close()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remember the buffers that have changed."""
        self._loss: Tensor | None = None
        self._norm: Tensor | float | None = None
        self._found: dict[str, str] = {}
        self._back_to: int | None = None
        self._buffers.remember(kwargs["model"])

    def _with_loss(self, trainer: Trainer, found: Any, num_items_in_batch: Any) -> Any:
        loss: Tensor = (found[0] if isinstance(found, tuple) else found).detach().float().mean()
        if divides_loss(trainer, num_items_in_batch):
            loss = loss / getattr(trainer, "current_gradient_accumulation_steps", 1)
        self._loss = loss if self._loss is None else self._loss + loss
        return found

    def _with_norm(self, norm: Any) -> None:
        if self._norm is None:
            self._norm = norm

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Decide for all ranks whether the step is to be skipped, and take its gradients away."""
        model, optimizer, step = kwargs["model"], kwargs["optimizer"], state.global_step + 1
        norm: Any = 0.0
        if getattr(optimizer, "scaler", None) is None:
            norm = grad_norm(model.parameters()) if self._norm is None else self._norm
        loss, bad = _of_all_ranks(self._loss, norm, next(model.parameters()).device)
        leaps = not bad and self.rewinds > 0 and loss is not None and self._spikes.note(loss) is not None
        if leaps:
            self._back_to = self._earlier(step)
            if self._back_to is None:
                warnings.warn(f"step {step}: the loss leaps to {loss:.4f}, with nothing to rewind to", stacklevel=2)
        self.skipping = control.skipped = bad or self._back_to is not None
        self._hooks.close()
        if not self.skipping:
            return
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
        self._buffers.restore()
        if (scheduler := kwargs.get("lr_scheduler")) is not None:
            scheduler.step = lambda *_: None  # until the end of the step
            self._step.callback(delattr, scheduler, "step")
        if not bad:
            return
        if self._strike(step):
            self._back_to = self._earlier(self.skipped[0])
            if self._back_to is None:
                where = not_finite(model, optimizer) or self._found.get("forward") or self._found.get("backward") or ""
                finite = loss is None or math.isfinite(loss)
                self._step.close()
                raise self._diverged(step, "gradient" if finite else "loss", where)
        else:
            self._look_inside(model)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let the schedule go on, and rewind where that was decided."""
        self._step.close()
        if self._back_to is None:
            return
        folder = _checkpoints(args.output_dir)[self._back_to]
        assert self._trainer is not None
        _load_weights(self._trainer, folder)
        self._trainer._load_optimizer_and_scheduler(str(folder))
        for step in [step for step in self._saved if step > self._back_to]:
            self._saved.remove(step)
            first_does(functools.partial(discard, _checkpoints(args.output_dir)[step]))
        self._forget(state.global_step, self._back_to)
        warnings.warn(f"step {state.global_step}: rewound to {folder}", stacklevel=2)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Know the checkpoint of this training, if it may be gone back to."""
        if not self.rewinds or _all_finite(kwargs["model"], kwargs["optimizer"]):
            self._saved.add(state.global_step)

    def _earlier(self, since: int) -> int | None:
        """The newest checkpoint to rewind to from trouble that began at a step."""
        if not self._may_rewind() or self._trainer is None:
            return None
        self._saved &= _checkpoints(self._trainer.args.output_dir).keys()
        return max((step for step in self._saved if step < since - self.margin), default=None)

    def _look_inside(self, model: nn.Module) -> None:
        """Note in the next step where the first value that is not finite comes from."""

        def forward(name: str, module: nn.Module, args: Any, output: Any) -> None:
            if "forward" not in self._found and any(map(_bad, _tensors(output))):
                self._found["forward"] = f"the output of {name or 'the model'} ({type(module).__name__})"

        def backward(name: str, parameter: Tensor) -> None:
            if "backward" not in self._found and parameter.grad is not None and _bad(parameter.grad):
                self._found["backward"] = f"the gradient of {name}"

        for name, module in model.named_modules():
            self._hooks.callback(module.register_forward_hook(functools.partial(forward, name)).remove)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                hook = parameter.register_post_accumulate_grad_hook(functools.partial(backward, name))
                self._hooks.callback(hook.remove)


def not_finite(model: nn.Module, *optimizers: Any) -> str:
    """The first parameter, saved buffer or moment of optimizers that is not finite, in words; empty if all are."""
    for name, tensor in model.state_dict().items():
        if _bad(tensor):
            return name
    names = {parameter: name for name, parameter in model.named_parameters()}
    states = [item for optimizer in optimizers for item in optimizer.state.items()]
    for parameter, values in states:
        for key, value in values.items():
            if isinstance(value, Tensor) and _bad(value):
                return f"{key} of the optimizer for {names.get(parameter, 'a parameter')}"
    return ""


def _all_finite(model: nn.Module, *optimizers: Any) -> bool:
    """Whether all parameters, saved buffers and moments are finite, on every rank."""
    bad = torch.tensor(float(bool(not_finite(model, *optimizers))), device=next(model.parameters()).device)
    sum_over_ranks(bad)
    return not bool(bad)


def _bad(tensor: Tensor) -> bool:
    if isinstance(tensor, DTensor):  # of which each rank looks at its own part
        tensor = tensor.to_local()
    return tensor.is_floating_point() and not bool(tensor.isfinite().all())


def _tensors(output: Any) -> list[Tensor]:
    """The tensors of a module's output, whatever holds them."""
    if isinstance(output, Tensor):
        return [output]
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, list | tuple) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def _wrap_norm(accelerator: Any, hear: Callable[[Any], None]) -> Callable[[], None]:
    """Tell what clip_grad_norm_ of an accelerator returns; returns what undoes it."""
    inner = accelerator.clip_grad_norm_

    @functools.wraps(inner)
    def clip_grad_norm_(*args: Any, **kwargs: Any) -> Any:
        norm = inner(*args, **kwargs)
        hear(norm)
        return norm

    accelerator.clip_grad_norm_ = clip_grad_norm_
    return lambda: delattr(accelerator, "clip_grad_norm_")


def _checkpoints(folder: str | None) -> dict[int, Path]:
    """The folders of a Trainer's checkpoints by step."""
    found = [path for path in Path(folder or ".").glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return {int(path.name.split("-")[1]): path for path in found}


def _load_weights(trainer: Trainer, folder: Path) -> None:
    """Put a checkpoint's weights into a Trainer's model.

    A Trainer leaves those as they are, with a warning, whose names its family saves under others.
    """
    model: Any = trainer.model
    lacking: list[str] = []
    with ExitStack() as stack:
        vars(trainer)["_issue_warnings_after_load"] = lambda found: lacking.extend(found.missing_keys)
        stack.callback(delattr, trainer, "_issue_warnings_after_load")
        trainer._load_from_checkpoint(str(folder))
    ignored = getattr(model, "_keys_to_ignore_on_save", None) or ()
    if set(lacking) - set(ignored):
        model.load_state_dict(type(model).from_pretrained(folder, dtype=model.dtype).state_dict())


def _of_all_ranks(loss: Tensor | None, norm: Any, device: torch.device) -> tuple[float | None, bool]:
    """The mean of the ranks' losses, and whether any rank's loss or gradient norm is not finite."""
    values = torch.zeros(2, device=device, dtype=torch.float32)
    if loss is not None:
        values[0] = loss
    values[1] = float(not (bool(values[0].isfinite()) and bool(torch.as_tensor(norm).isfinite().all())))
    if (size := num_ranks()) > 1:
        dist.all_reduce(values)
    mean, bad = values.tolist()
    return (None if loss is None else mean / size), bad > 0


class _Buffers:
    """The buffers of a model as they were, the state of routers among them."""

    def __init__(self) -> None:
        self.known: dict[tuple[nn.Module, str], tuple[Tensor, int, Tensor]] = {}

    def remember(self, model: nn.Module) -> None:
        """Copy those that have changed."""
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                known = self.known.get((module, name))
                if known is None or known[0] is not buffer or known[1] != buffer._version:
                    self.known[module, name] = (buffer, buffer._version, buffer.clone())

    @torch.no_grad()
    def restore(self) -> None:
        """Put them back."""
        for (module, name), (buffer, _, before) in self.known.items():
            buffer.copy_(before)
            setattr(module, name, buffer)


class GuardedLoop(_Judge):
    """A plain loop's guard: whether each step may be taken, and the state to go back to after trouble.

        with GuardedLoop(model, optimizer, scheduler) as guard:
            for batch in batches:
                loss = model(**batch).loss
                loss.backward()
                if guard.admits(loss):
                    optimizer.step()
                    scheduler.step()
                optimizer.zero_grad()

    A step that is not admitted has no gradients, and its buffers are those from before its forward. The states to
    rewind to are copies in memory, two at a time.

    Args:
        model: of the loop.
        optimizer, scheduler: of the loop; where there are several, as Muon for matrices beside AdamW, a list of them.
        scaler: the `GradScaler` of the loop (fp16). Infinite gradients are left to it, which leaves such a step out by
            itself and looks for its scale by them: call its unscale_ before `admits`, which takes the loss as it was
            before scaling, and its update whatever that says.
        strikes, within: as of `NaNGuard`.
        rewinds: how often to go back, at most; 0 keeps no copies.
        margin: states of the last so many steps before the trouble are not trusted either.
        every: in so many admitted steps a copy is made.

    Attributes:
        step: how many steps were judged.
        skipped, rewound: as of `NaNGuard`.

    Raises:
        ValueError: where `every` is less than 1.

    Source: as of `NaNGuard`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        scheduler: Any = None,
        *,
        scaler: Any = None,
        strikes: int = 3,
        within: int = 100,
        rewinds: int = 3,
        margin: int = 10,
        every: int = 100,
    ) -> None:
        super().__init__(strikes, within, rewinds, margin)
        if every < 1:
            raise ValueError(f"GuardedLoop: every {every} must be at least 1 step")
        self.model, self.scaler, self.every = model, scaler, every
        self.optimizers = list(optimizer) if isinstance(optimizer, Sequence) else [optimizer]
        self.schedulers = list(scheduler) if isinstance(scheduler, Sequence) else [scheduler]
        self.step = self._taken = 0
        self._copied = -1
        self._copies: list[tuple[int, list[Any]]] = []

    def __enter__(self) -> Self:
        self._fresh, self._copied = True, -1
        self._hook = self.model.register_forward_pre_hook(lambda *_: self._begin())
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()
        self._copies = []

    def state_dict(self) -> dict[str, Any]:
        """What a resumed loop goes on with, as JSON; the copies are not in it."""
        return {"step": self.step, **self.memory}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`, with model and optimizer as they were then."""
        self.step, self.memory = state["step"], state

    def admits(self, loss: Tensor) -> bool:
        """Whether the optimizer may take the step, on all ranks alike: call it once a step, after the backward.

        Args:
            loss: of the step; the mean over its micro-batches.

        Raises:
            Diverged: after strikes, where nothing is left to rewind to.
        """
        self.step += 1
        device = next(self.model.parameters()).device
        norm = grad_norm(self.model.parameters()) if self.scaler is None else 0.0
        value, bad = _of_all_ranks(loss.detach().float().mean(), norm, device)
        assert value is not None
        self._fresh = True
        leaps = not bad and self.rewinds > 0 and self._spikes.note(value) is not None
        copied = self._earlier(self.step) if leaps else None
        if leaps and copied is None:
            warnings.warn(f"step {self.step}: the loss leaps to {value:.4f}, with nothing to rewind to", stacklevel=2)
        if not bad and copied is None:
            self._taken += 1
            return True
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        self._buffers.restore()
        if bad and self._strike(self.step):
            copied = self._earlier(self.skipped[0])
            if copied is None:
                finite = math.isfinite(value)
                where = not_finite(self.model, *self.optimizers)
                raise self._diverged(self.step, "gradient" if finite else "loss", where)
        if copied is not None:
            self._rewind(*copied)
        return False

    def _holders(self) -> list[Any]:
        return [part for part in (self.model, *self.optimizers, *self.schedulers, self.scaler) if part is not None]

    def _begin(self) -> None:
        """Before the first forward of a step: what may have to come back."""
        if not self._fresh or not self.model.training:
            return
        self._fresh = False
        self._buffers.remember(self.model)
        if self.rewinds and self._taken % self.every == 0 and self._taken != self._copied:
            self._copied = self._taken
            if not _all_finite(self.model, *self.optimizers):
                return
            states = [_copied(part.state_dict()) for part in self._holders()]
            self._copies = [*self._copies[-1:], (self.step, states)]

    def _earlier(self, since: int) -> tuple[int, list[Any]] | None:
        if not self._may_rewind():
            return None
        trusted = [copied for copied in self._copies if copied[0] < since - self.margin]
        return trusted[-1] if trusted else None

    def _rewind(self, to: int, states: list[Any]) -> None:
        for part, state in zip(self._holders(), states, strict=True):
            part.load_state_dict(copy.deepcopy(state))
        self._copies = [copied for copied in self._copies if copied[0] <= to]
        self._buffers = _Buffers()
        self._forget(self.step, to)
        warnings.warn(f"step {self.step}: rewound to the state after step {to}", stacklevel=3)


def _copied(state: Any) -> Any:
    """A state dict with copies of its tensors, on the CPU."""
    return tree_map(lambda x: x.detach().clone().cpu() if isinstance(x, Tensor) else copy.deepcopy(x), state)
