"""The matrices of E experts as the backends read them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .activations import ACTIVATIONS

__all__ = ["STACKED", "Weights"]

STACKED = "gate_up_proj (E, 2f, d), gate first; down_proj (E, d, f)"
"""The tag of Shunter's own layout, which config.json carries."""


@dataclass(frozen=True)
class Weights:
    """The parameters of E experts, in Hugging Face's layout.

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
    def gated(self) -> bool:
        """Whether the activation multiplies two halves of the pre-activations."""
        return ACTIVATIONS[self.activation][1]
