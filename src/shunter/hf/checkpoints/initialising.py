"""A dense block to the experts that start from it, and dense models to the routers that start with those.

Every new weight of an upcycled model is made here: copies, parts, noise, units drawn anew, siblings, routers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ...errors import UserError
from ..blocks import FeedForward
from .dense import Dense
from .folders import load_tokenizer

__all__ = ["Method", "MethodName", "Parts", "drawn_gate", "gates", "mean"]

MethodName = Literal["copy", "split", "noise", "drop", "siblings"]

Parts = dict[str, Tensor]
"""One block's tensors: gate and up (f, d), down (d, f), and gate_bias, up_bias (f,), down_bias (d,) where there."""

# The one number that a method takes: its name, and what it is by default.
_AMOUNTS: dict[str, tuple[str, float]] = {"split": ("granularity", 2), "noise": ("noise", 0.01), "drop": ("drop", 0.5)}


@dataclass(frozen=True)
class Method:
    """How experts are made of a dense block.

    Args:
        name: of the method.
        amount: the one number that it takes, or 0.
    """

    name: MethodName
    amount: float

    @classmethod
    def of(cls, name: MethodName, **amounts: float | None) -> Method:
        """A method with its own amount among those that were given (granularity, noise, drop), or the default.

        Raises:
            UserError: for an unknown method, or an amount that is another's.
        """
        if name not in get_args(MethodName):
            raise UserError(f"upcycle: method {name!r} is unknown; choose from {', '.join(get_args(MethodName))}")
        for other, (amount, _) in _AMOUNTS.items():
            if other != name and amounts[amount] is not None:
                raise UserError(f"upcycle: {amount} is for method {other!r}; the method is {name!r}")
        own, default = _AMOUNTS.get(name, (None, 0))
        given = None if own is None else amounts[own]
        return cls(name, default if given is None else given)

    def check(self, num_experts: int, top_k: int) -> None:
        """Raises UserError where the amount is impossible, for E and k."""
        if self.name == "split" and (self.amount < 2 or num_experts % self.amount or top_k % self.amount):
            raise UserError(
                f"upcycle: granularity={self.amount} must be at least 2 and divide num_experts={num_experts} and "
                f"top_k={top_k}: a token takes whole copies"
            )
        if self.name == "noise" and not 0 < self.amount < float("inf"):
            raise UserError(f"upcycle: noise={self.amount} must be above 0")
        if self.name == "drop" and not 0 < self.amount <= 1:
            raise UserError(f"upcycle: drop={self.amount} must be above 0 and at most 1")

    @property
    def granularity(self) -> int:
        """g, into how many experts a copy of a block is split."""
        return int(self.amount) if self.name == "split" else 1

    @property
    def exact(self) -> bool:
        """Whether the sparse model computes what the dense one does."""
        return self.name in ("copy", "split")

    @property
    def how(self) -> str:
        """What becomes of a block's tensors, in words."""
        return {
            "copy": "copied to every expert",
            "split": f"split into {self.amount:g} parts, down times {self.amount:g}",
            "noise": f"copied to every expert with noise of {self.amount:g} times its standard deviation",
            "drop": f"copied to every expert, {self.amount:g} of the hidden units drawn anew",
            "siblings": "replaced by the siblings' own, an expert each",
        }[self.name]

    def expert(self, block: Parts, e: int, generator: torch.Generator) -> Parts:
        """Expert e of a block."""
        if self.name == "split":
            return _part_of(block, e % self.granularity, self.granularity)
        if self.name == "noise":
            return {n: _with_noise(t, self.amount, generator) if t.dim() == 2 else t for n, t in block.items()}
        if self.name == "drop":
            return _redrawn(block, self.amount, generator)
        return block


def _part_of(parts: Parts, which: int, granularity: int) -> Parts:
    """One of g equal parts of the hidden units; down is multiplied by g, as each part has 1/g of a copy's weight."""
    width = parts["up"].shape[0] // granularity
    units = slice(which * width, (which + 1) * width)
    found = {name: t[units] for name, t in parts.items() if not name.startswith("down")}
    found["down"] = parts["down"][:, units] * granularity
    if "down_bias" in parts:
        found["down_bias"] = parts["down_bias"]
    return found


def _with_noise(tensor: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    wide = tensor.float()
    return (wide + torch.randn(wide.shape, generator=generator) * (amount * wide.std())).to(tensor.dtype)


def _redrawn(parts: Parts, share: float, generator: torch.Generator) -> Parts:
    """A copy of which a share of the hidden units is drawn anew, with the mean and spread of what it replaces."""
    width = parts["up"].shape[0]
    units = torch.randperm(width, generator=generator)[: round(share * width)]
    found = {}
    for name, tensor in parts.items():
        if name == "down_bias":
            found[name] = tensor
            continue
        found[name] = tensor.clone()
        at = (slice(None), units) if name == "down" else (units,)
        old = tensor[at].float()
        drawn = old.mean() + torch.randn(old.shape, generator=generator) * old.std(correction=0)
        found[name][at] = drawn.to(tensor.dtype)
    return found


def mean(members: list[Dense], name: str) -> Tensor:
    """The mean over models of a tensor by its name in the model, rounded once.

    Raises:
        UserError: where it is not of floating point and they differ.
    """
    first = members[0].read(name)
    if len(members) == 1:
        return first
    if not first.is_floating_point():
        if any(not torch.equal(first, member.read(name)) for member in members[1:]):
            raise UserError(f"upcycle: {name} is not a weight and differs between siblings")
        return first
    total = first.double()
    for member in members[1:]:
        total += member.read(name)
    return (total / len(members)).to(first.dtype)


def drawn_gate(shape: tuple[int, ...], method: Method, spread: float, generator: torch.Generator) -> Tensor:
    """A router (E, d) drawn with a standard deviation; the parts of a copy have equal rows."""
    rows = torch.randn(shape[0] // method.granularity, shape[1], generator=generator) * spread
    return rows.repeat_interleave(method.granularity, 0)


@torch.no_grad()
def gates(source: Dense, blocks: list[FeedForward], prompts: Sequence[Sequence[str]]) -> list[Tensor]:
    """For each block a router (E, d) of unit rows that tells the siblings' prompts apart by their hidden states.

    Raises:
        UserError: where the folder has no tokenizer, or the prompts of some siblings look alike to the model.
    """
    try:
        tokenizer = load_tokenizer(source.folder)
    except UserError as error:
        raise UserError(f"upcycle: prompts need a tokenizer: {error}") from None
    model: Any = type(source.model).from_pretrained(source.folder, dtype=torch.float32, use_safetensors=True)
    model.eval()
    sums = torch.zeros(len(blocks), len(prompts), blocks[0].dim, dtype=torch.float64)
    counts = torch.zeros(len(prompts), dtype=torch.int64)
    now = 0

    def note(number: int) -> Any:
        def hook(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
            sums[number, now] += args[0].double().reshape(-1, args[0].shape[-1]).sum(0)

        return hook

    for number, block in enumerate(blocks):
        model.get_submodule(block.path).register_forward_pre_hook(note(number))
    for now, texts in enumerate(prompts):
        for text in texts:
            ids = tokenizer(text, return_tensors="pt").input_ids
            counts[now] += ids.numel()
            model(input_ids=ids)
    means = sums / counts[:, None]
    directions = means - means.mean(1, keepdim=True)
    norms = directions.norm(dim=-1, keepdim=True)
    if not bool((norms > 1e-6 * means.norm(dim=-1, keepdim=True)).all()):
        raise UserError("upcycle: the prompts of some siblings look alike to the model; give others, or none")
    return list(directions / norms)
