"""The matrices of E experts as the backends ask for them: of one expert at a time, or all in one tensor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .activations import ACTIVATIONS

__all__ = ["STACKED", "ExpertWeights", "Matrices", "Weights"]

STACKED = "gate_up_proj (E, 2f, d), gate first; down_proj (E, d, f)"
"""The tag of Shunter's own layout, which config.json carries."""


class Matrices(NamedTuple):
    """The parameters of one expert: up (2f, d) or (f, d), down (d, f), and their biases or None."""

    up: Tensor
    down: Tensor
    up_bias: Tensor | None
    down_bias: Tensor | None


class ExpertWeights(ABC):
    """The parameters of E experts, wherever they are: quantised, sharded, on disk, or stacked in tensors (`Weights`).

    The backends `reference` and `decode` ask for one expert after another, for those alone that have tokens; the others
    need `Weights`, and say so.

    Attributes:
        num_experts, dim, hidden: E, d and f.
        activation: a key of `ACTIVATIONS`.
        dtype, device: of the matrices that `expert` returns.
    """

    num_experts: int
    dim: int
    hidden: int
    activation: str
    dtype: torch.dtype
    device: torch.device

    @abstractmethod
    def expert(self, e: int) -> Matrices:
        """The matrices of expert e."""

    def learned(self) -> tuple[Tensor, ...]:
        """The tensors behind the matrices that a gradient may reach, each once."""
        return ()

    @abstractmethod
    def to(self, dtype: torch.dtype) -> ExpertWeights:
        """The same in another precision."""

    @property
    def gated(self) -> bool:
        """Whether the activation multiplies two halves of the pre-activations."""
        return ACTIVATIONS[self.activation][1]


@dataclass(frozen=True)
class Weights(ExpertWeights):
    """The parameters of E experts in one tensor each, in Hugging Face's layout.

    Args:
        up: gated (E, 2f, d), the gate's rows before the up projection's; not gated (E, f, d).
        down: (E, d, f).
        up_bias: (E, 2f) or (E, f), or None.
        down_bias: (E, d), or None.
        activation: a key of `ACTIVATIONS`.
    """

    up: Tensor
    down: Tensor
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    activation: str = "swiglu"

    @property
    def num_experts(self) -> int:  # type: ignore[override]
        """E."""
        return self.down.shape[0]

    @property
    def dim(self) -> int:  # type: ignore[override]
        """d."""
        return self.down.shape[1]

    @property
    def hidden(self) -> int:  # type: ignore[override]
        """f."""
        return self.down.shape[2]

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """Of the matrices."""
        return self.up.dtype

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Of the matrices."""
        return self.up.device

    def expert(self, e: int) -> Matrices:
        """The matrices of expert e, views of the tensors."""
        up_bias, down_bias = (None if bias is None else bias[e] for bias in (self.up_bias, self.down_bias))
        return Matrices(self.up[e], self.down[e], up_bias, down_bias)

    def learned(self) -> tuple[Tensor, ...]:
        """The tensors."""
        return tuple(t for t in (self.up, self.down, self.up_bias, self.down_bias) if t is not None)

    def to(self, dtype: torch.dtype) -> Weights:
        """The same in another precision."""
        up_bias, down_bias = (None if bias is None else bias.to(dtype) for bias in (self.up_bias, self.down_bias))
        return replace(self, up=self.up.to(dtype), down=self.down.to(dtype), up_bias=up_bias, down_bias=down_bias)
