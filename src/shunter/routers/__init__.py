"""Who chooses whom: hidden states to a `Routing`, one file a paper."""

from ..context import NO_CONTEXT, Context
from .base import Router
from .expert_choice import ExpertChoice
from .gshard import GShard
from .hash import Hash
from .linear import LinearRouter
from .noisy_topk import HierarchicalNoisyTopK, NoisyTopK
from .registry import create, find, names, options, register
from .switch import Switch
from .topk import TopK

__all__ = [
    "NO_CONTEXT",
    "Context",
    "ExpertChoice",
    "GShard",
    "Hash",
    "HierarchicalNoisyTopK",
    "LinearRouter",
    "NoisyTopK",
    "Router",
    "Switch",
    "TopK",
    "create",
    "find",
    "names",
    "options",
    "register",
]
