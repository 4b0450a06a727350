"""Shunter: sparse expert models in PyTorch. Every routing algorithm as one drop-in layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import capacity, domains, experts, losses, routers
from .moe import MoE, aux_loss, give_reward, moe_layers, tell, update_routers
from .routing import Routing

if TYPE_CHECKING:
    from .hf import RoutingRecord, export, from_pretrained, record, replay, sparsify, upcycle

__all__ = [
    "MoE",
    "Routing",
    "RoutingRecord",
    "aux_loss",
    "capacity",
    "domains",
    "experts",
    "export",
    "from_pretrained",
    "give_reward",
    "losses",
    "moe_layers",
    "record",
    "replay",
    "routers",
    "sparsify",
    "tell",
    "upcycle",
    "update_routers",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("shunter")
        except PackageNotFoundError:  # run from a source folder
            return "0+unknown"
    # Hugging Face is an extra: it is imported when first used.
    if name in ("RoutingRecord", "export", "from_pretrained", "record", "replay", "sparsify", "upcycle"):
        from . import hf

        return getattr(hf, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
