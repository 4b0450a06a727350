"""Hugging Face: any dense model made sparse, any sparse one on Shunter's experts, kept balanced, replayed."""

from . import experts  # noqa: F401 (registers experts_implementation="shunter")
from .balance import BalanceCallback, BalanceWarning
from .conversion import sparsify
from .exporting import export
from .llama4 import use_experts
from .loading import from_pretrained
from .records import RoutingRecord
from .replaying import record, replay
from .upcycling import upcycle

__all__ = [
    "BalanceCallback",
    "BalanceWarning",
    "RoutingRecord",
    "export",
    "from_pretrained",
    "record",
    "replay",
    "sparsify",
    "upcycle",
    "use_experts",
]
