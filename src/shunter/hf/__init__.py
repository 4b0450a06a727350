"""Hugging Face: any dense model made sparse, any sparse one on Shunter's experts, decisions recorded and replayed."""

import importlib
from typing import Any

from . import backend, contrastive  # noqa: F401 (backend registers experts_implementation="shunter")
from .backend import use_experts
from .checkpoints import auto_classes
from .checkpoints.exporting import export
from .checkpoints.loading import from_pretrained
from .checkpoints.upcycling import upcycle
from .distribute import distribute
from .observe.records import RoutingRecord
from .observe.replaying import record, replay
from .offloading import offload
from .quantising import quantize
from .sparsifying import sparsify

__all__ = [
    "RoutingRecord",
    "distribute",
    "export",
    "from_pretrained",
    "offload",
    "quantize",
    "record",
    "replay",
    "sparsify",
    "upcycle",
    "use_experts",
]

auto_classes.register()


def __getattr__(name: str) -> Any:
    # Where it was before training had a room of its own, above this one.
    if name in ("BalanceCallback", "BalanceWarning"):
        return getattr(importlib.import_module("shunter"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
