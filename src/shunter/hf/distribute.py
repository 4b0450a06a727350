"""A sparse model of Hugging Face over several ranks, as its `Trainer` and `save_pretrained` know such models."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers import PreTrainedModel

from .. import parallel
from ..errors import UserError
from ..moe import moe_layers

if TYPE_CHECKING:
    from transformers.distributed import DistributedConfig

__all__ = ["distribute"]


def distribute(
    model: PreTrainedModel, config: DistributedConfig, *, timeout: float = 600.0, overlap_degree: int = 1
) -> PreTrainedModel:
    """`shunter.parallel.shard_model` by transformers' `DistributedConfig`, in place; a `Trainer` then trains the model.

    The model is one that `shunter.sparsify`, `upcycle` or `from_pretrained` gave, the same on every rank. Mixtures of
    transformers' own are distributed as they are loaded: `from_pretrained(name, experts_implementation="shunter",
    distributed_config=config)`.

    Args:
        model: each rank's.
        config: `fsdp_size` is the number of ranks, `ep_size` how many of them share the experts;
            `fsdp_mixed_precision` computes in bfloat16, routers in float32.
        timeout: seconds that a rank waits for others, as in `parallel.mesh`.
        overlap_degree: in how many pieces rows travel, as in `parallel.shard_experts`.

    Returns:
        The same model. Every rank calls its `save_pretrained`, which writes an ordinary folder.

    Raises:
        UserError: for tensor or pipeline parallelism and replicas, which Shunter's layers do not have; for a model
            without such layers; and as `shard_model`.
    """
    if config.tp_size != 1 or config.pp_size != 1 or config.dp_replicate_size != 1:
        raise UserError(
            f"distribute: tp_size={config.tp_size}, pp_size={config.pp_size} and dp_replicate_size="
            f"{config.dp_replicate_size} must be 1; Shunter's layers are distributed by fsdp_size and ep_size"
        )
    if config.ep_size != 1 and not moe_layers(model):
        raise UserError(
            f"distribute: {type(model).__name__} has no layers of Shunter's; a mixture of transformers' own is "
            'distributed by from_pretrained(..., experts_implementation="shunter", distributed_config=…)'
        )
    mesh = parallel.mesh(config.ep_size or 1, timeout=timeout)
    if config.fsdp_size != dist.get_world_size():
        raise UserError(
            f"distribute: fsdp_size={config.fsdp_size} must be the number of ranks, {dist.get_world_size()}"
        )
    dtype = torch.bfloat16 if config.fsdp_mixed_precision else None
    parallel.shard_model(model, mesh, dtype=dtype, overlap_degree=overlap_degree)
    if hasattr(model, "generate"):
        # It calls an encoder by itself, whose embedding is gathered before a forward of the whole alone.
        register_fsdp_forward_method(model, "generate")
    # What Trainer, generate and save_pretrained ask of a model that transformers itself has sharded.
    model.config.distributed_config = config
    vars(model).update(_is_distributed_loading_by_transformers=True, _is_fsdp_managed_module=True)
    return model
