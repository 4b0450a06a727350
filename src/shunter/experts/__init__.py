"""Experts: hidden states and a `Routing` to outputs. One file or folder a backend."""

from . import backends  # noqa: F401 (each registers itself)
from .activations import ACTIVATIONS, activate
from .choice import Backend, backend_names, choose, register
from .mixed import MixedExperts, Operation
from .module import Experts, QuantisedExperts, RoutedExperts
from .quantised import QuantisedWeights
from .weights import ExpertWeights, Weights

__all__ = [
    "ACTIVATIONS",
    "Backend",
    "ExpertWeights",
    "Experts",
    "MixedExperts",
    "Operation",
    "QuantisedExperts",
    "QuantisedWeights",
    "RoutedExperts",
    "Weights",
    "activate",
    "backend_names",
    "choose",
    "register",
]
