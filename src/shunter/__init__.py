"""Shunter: sparse expert models in PyTorch. Every routing algorithm as one drop-in layer."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import capacity, experts, losses, routers
from .layers import domain_mixture as domains
from .layers import em_mixture as mixtures
from .moe import MoE, aux_loss, dropless, give_reward, moe_layers, plain_experts, tell, update_routers
from .routing import Routing

if TYPE_CHECKING:
    from . import hf, parallel
    from .hf import RoutingRecord, export, from_pretrained, offload, quantize, record, replay, sparsify, upcycle
    from .training.balance import BalanceWarning
    from .training.trainer import BalanceCallback

__all__ = [
    "BalanceCallback",
    "BalanceWarning",
    "MoE",
    "Routing",
    "RoutingRecord",
    "aux_loss",
    "capacity",
    "domains",
    "dropless",
    "experts",
    "export",
    "from_pretrained",
    "give_reward",
    "hf",
    "losses",
    "mixtures",
    "moe_layers",
    "offload",
    "parallel",
    "plain_experts",
    "quantize",
    "record",
    "replay",
    "routers",
    "sparsify",
    "tell",
    "upcycle",
    "update_routers",
]


def __getattr__(name: str) -> Any:
    # Hugging Face is an extra, torch.distributed takes its time: they are imported when first used.
    if name == "__version__":
        return importlib.import_module(".environment", __name__).VERSION
    if name in ("hf", "parallel"):
        return importlib.import_module(f".{name}", __name__)
    if name == "BalanceCallback":
        return importlib.import_module(".training.trainer", __name__).BalanceCallback
    if name == "BalanceWarning":
        return importlib.import_module(".training.balance", __name__).BalanceWarning
    if name in __all__ and name in importlib.import_module(".hf", __name__).__all__:
        return getattr(importlib.import_module(".hf", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
