"""Experts: a routing and hidden states to outputs. The backends are one file each; `reference` defines the result."""

from . import decode, fused, grouped, padded, reference, triton  # noqa: F401 (each registers itself)
from .activations import ACTIVATIONS, activate
from .backends import Backend, Weights, backend_names, choose, register
from .module import Experts

__all__ = ["ACTIVATIONS", "Backend", "Experts", "Weights", "activate", "backend_names", "choose", "register"]
