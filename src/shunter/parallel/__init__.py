"""Several processes: each holds a part of the experts, rows go to the ranks of their experts and back."""

from ..ranks import sum_over_ranks
from .checkpoint import load, save, save_pretrained
from .experts import ShardedExperts, shard_experts
from .fsdp import average_gradients, checkpoint_policy, clip_grad_norm_, parameter_groups, shard_model
from .placement import place
from .processes import mesh
from .scope import decide_globally, shuffle_assignments
from .watch import named_errors

__all__ = [
    "ShardedExperts",
    "average_gradients",
    "checkpoint_policy",
    "clip_grad_norm_",
    "decide_globally",
    "load",
    "mesh",
    "named_errors",
    "parameter_groups",
    "place",
    "save",
    "save_pretrained",
    "shard_experts",
    "shard_model",
    "shuffle_assignments",
    "sum_over_ranks",
]
