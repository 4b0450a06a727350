"""NaNGuard: losses and gradients that are not finite never reach the optimizer of a `Trainer`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback

from ..errors import Diverged
from ..parallel.fsdp import grad_norm
from .trainer import caller, wrap_loss

__all__ = ["NaNGuard", "not_finite"]

CURES = "try a lower learning rate, a longer warm-up, a smaller max_grad_norm, or look at the data of that step"


class NaNGuard(TrainerCallback):
    """Skip each optimizer step of a `Trainer` whose loss or gradient norm is NaN or infinite; after some, stop.

        Trainer(model, args, train_dataset=data, callbacks=[NaNGuard()])

    A skipped step leaves parameters, moments and buffers (the state of routers among them) as they were; its batch is
    used up, and the schedule goes on. All ranks skip alike. The step after one that was skipped is watched from the
    inside, so that the error names the layer. Infinite gradients under a gradient scaler (fp16) are left to the scaler.

    Args:
        strikes: so many skipped steps
        within: in so many steps raise `shunter.errors.Diverged`.

    Attributes:
        skipped: the last steps that were skipped, counted from 1.
        skipping: whether the present one is.
    """

    def __init__(self, strikes: int = 3, within: int = 100) -> None:
        if not 1 <= strikes <= within:
            raise ValueError(f"NaNGuard: strikes {strikes} must be between 1 and within, {within}")
        self.strikes, self.within = strikes, within
        self.skipped: list[int] = []
        self.skipping = False
        self._hooks = ExitStack()
        self._attached = ExitStack()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Listen to the Trainer's losses and gradient norms."""
        self.on_train_end(args, state, control)
        self._buffers: dict[tuple[nn.Module, str], tuple[Tensor, int, Tensor]] = {}
        trainer = caller(Trainer)
        if trainer is not None:
            self._attached.callback(wrap_loss(trainer, self._with_loss))
            self._attached.callback(_wrap_norm(trainer.accelerator, self._with_norm))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop listening."""
        self._attached.close()
        self._hooks.close()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remember the buffers that have changed."""
        self._bad: Tensor | None = None
        self._norm: Tensor | float | None = None
        self._found: dict[str, str] = {}
        for module in kwargs["model"].modules():
            for name, buffer in module.named_buffers(recurse=False):
                known = self._buffers.get((module, name))
                if known is None or known[0] is not buffer or known[1] != buffer._version:
                    self._buffers[module, name] = (buffer, buffer._version, buffer.clone())

    def _with_loss(self, trainer: Trainer, found: Any, num_items_in_batch: Any) -> Any:
        loss: Tensor = (found[0] if isinstance(found, tuple) else found).detach()
        bad = ~loss.isfinite().all()
        self._bad = bad if self._bad is None else self._bad | bad
        return found

    def _with_norm(self, norm: Any) -> None:
        if self._norm is None:
            self._norm = norm

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Decide for all ranks whether the step is to be skipped, and take its gradients away."""
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        loss_is_bad = self._bad is not None and bool(self._bad)
        bad = loss_is_bad
        if getattr(optimizer, "scaler", None) is None:
            norm = self._norm
            if norm is None:
                norm = grad_norm(model.parameters())
            bad |= not bool(torch.as_tensor(norm).isfinite().all())
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            flag = torch.tensor(float(bad), device=next(model.parameters()).device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            bad = bool(flag)
        self.skipping = control.skipped = bad
        self._hooks.close()
        if bad:
            self._skip(model, optimizer, state.global_step + 1, "loss" if loss_is_bad else "gradient")

    def _skip(self, model: nn.Module, optimizer: Any, step: int, what: str) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
        with torch.no_grad():
            for (module, name), (buffer, _, before) in self._buffers.items():
                buffer.copy_(before)
                setattr(module, name, buffer)
        self.skipped = [s for s in self.skipped if s > step - self.within] + [step]
        if len(self.skipped) >= self.strikes:
            where = not_finite(model, optimizer) or self._found.get("forward") or self._found.get("backward")
            raise Diverged(
                f"step {step}: the {what} is not finite, and {len(self.skipped)} of the last {self.within} steps were "
                f"skipped for that; " + (f"first not finite is {where}; " if where else "") + CURES,
                since=self.skipped[0],
            )
        self._look_inside(model)

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


def not_finite(model: nn.Module, optimizer: Any = None) -> str:
    """The first parameter, saved buffer or moment of an optimizer that is not finite, in words; empty if all are."""
    for name, tensor in model.state_dict().items():
        if _bad(tensor):
            return name
    names = {parameter: name for name, parameter in model.named_parameters()}
    for parameter, values in (optimizer.state if optimizer is not None else {}).items():
        for key, value in values.items():
            if isinstance(value, Tensor) and _bad(value):
                return f"{key} of the optimizer for {names.get(parameter, 'a parameter')}"
    return ""


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
