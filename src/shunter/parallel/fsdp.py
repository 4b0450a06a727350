"""A model with its experts on some ranks and everything else over all: FSDP2, gradients and their norm over both."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from ..errors import UserError
from ..moe import moe_layers
from .dispatch import Form
from .experts import ShardedExperts, shard_experts
from .watch import named_errors

__all__ = [
    "average_gradients",
    "checkpoint_policy",
    "clip_grad_norm_",
    "grad_norm",
    "parameter_groups",
    "shard_model",
]


def shard_model(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    dtype: torch.dtype | None = None,
    dispatch: Form | Literal["auto"] = "auto",
    overlap_degree: int = 1,
) -> nn.Module:
    """`shard_experts`, and FSDP2 for all parameters, in place: experts over the ranks that hold the same, the rest over
    all.

    Make the optimizer afterwards, of `parameter_groups(model)`.

    Args:
        model: with equal parameters on every rank.
        mesh: of `parallel.mesh`, over all ranks.
        dtype: in which blocks and experts are computed; None leaves it. Parameters, their gradients' sums, and the
            routers, whose decisions would be others, keep their own.
        dispatch, overlap_degree: as of `shard_experts`.

    Returns:
        The same model.

    Raises:
        UserError: as `shard_experts`, and where the mesh lacks ranks.

    Source: Zhao et al. 2023 (PyTorch FSDP); torch.distributed.fsdp.fully_shard.
    """
    size = dist.get_world_size()
    if mesh.size() != size:
        raise UserError(f"the mesh has {mesh.size()} ranks of {size}; shard_model needs one over all of them")
    layers = moe_layers(model)
    if layers or mesh["ep"].size() > 1:
        shard_experts(model, mesh, dispatch=dispatch, overlap_degree=overlap_degree)
    every = init_device_mesh(mesh.device_type, (size,), mesh_dim_names=("dp",))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=None if dtype is None else torch.float32)
    exact = MixedPrecisionPolicy(cast_forward_inputs=False)
    experts = dict.fromkeys(layer.experts for layer in layers.values())  # layers may share them, and routers
    for module in experts:
        if isinstance(module, ShardedExperts):
            fully_shard(module, mesh=mesh["edp"], mp_policy=policy)
    for router in dict.fromkeys(layer.router for layer in layers.values()):
        if any(True for _ in router.parameters()):
            # Losses and outputs may read a router's parameters after its forward.
            fully_shard(router, mesh=every, reshard_after_forward=False, mp_policy=exact)
    for block in dict.fromkeys(_blocks(model)):
        if block not in layers.values() or any(True for _ in block.parameters(recurse=False)):
            fully_shard(block, mesh=every, mp_policy=policy)
    fully_shard(model, mesh=every, mp_policy=policy)
    return model


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The elements of the outermost lists of modules in which there are sparse layers: a sparse model's blocks."""
    sparse = set(moe_layers(model).values())
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and module not in inside and not sparse.isdisjoint(module.modules()):
            found += [block for block in module if block not in inside]
            inside.update(module.modules())
    return found


def _mesh_of(parameter: Tensor) -> DeviceMesh | None:
    return parameter.device_mesh if isinstance(parameter, DTensor) else None


def parameter_groups(
    parameters: nn.Module | Iterable[Tensor] | Iterable[dict[str, Any]],
) -> list[dict[str, Any]]:
    """What an optimizer takes: groups of parameters, split so that each is of one mesh.

    Optimizers compute with all tensors of a group at once, which torch refuses for DTensors of several meshes.

    Args:
        parameters: a model, its parameters, or groups of them with options of their own.
    """
    given: list[Any] = list(parameters.parameters() if isinstance(parameters, nn.Module) else parameters)
    groups = given if given and isinstance(given[0], dict) else [{"params": given}]
    split = []
    for group in groups:
        by_mesh: dict[Any, list[Tensor]] = {}
        for parameter in group["params"]:
            by_mesh.setdefault(_mesh_of(parameter), []).append(parameter)
        split += [{**group, "params": part} for part in by_mesh.values()]
    return split


def clip_grad_norm_(
    model: nn.Module | Iterable[Tensor], max_norm: float, *, error_if_nonfinite: bool = False
) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_` over parameters of several meshes: the norm is that of the whole model.

    Args:
        model: or its parameters.
        max_norm: to which gradients with a larger norm are scaled, in place.
        error_if_nonfinite: whether a norm that is not finite raises RuntimeError.

    Returns:
        The norm before, a scalar, the same on every rank.
    """
    parameters = list(model.parameters() if isinstance(model, nn.Module) else model)
    total = grad_norm(parameters)
    if error_if_nonfinite and not bool(total.isfinite()):
        raise RuntimeError(f"the norm of the gradients is {float(total)}, so they cannot be clipped")
    for group in parameter_groups(p for p in parameters if p.grad is not None):
        nn.utils.clip_grads_with_norm_(group["params"], max_norm, total)
    return total


def grad_norm(parameters: Iterable[Tensor]) -> Tensor:
    """The norm of the gradients of parameters of several meshes, a scalar, the same on every rank."""
    groups = [group["params"] for group in parameter_groups(p for p in parameters if p.grad is not None)]
    with named_errors():
        norms = [_whole(nn.utils.get_total_norm([p.grad for p in group])) for group in groups]
    if not norms:
        return torch.zeros(())
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0]) for norm in norms]))


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def average_gradients(model: nn.Module, mesh: DeviceMesh) -> None:
    """After `shard_experts` and a backward: each gradient becomes the mean over the ranks, in place.

    That of a whole parameter over all ranks, that of a rank's experts over those that hold the same ones. A rank whose
    parameter has no gradient counts as zero. Under `shard_model` FSDP does this.

    Args:
        model: of `shard_experts`.
        mesh: the same.
    """
    sums: dict[Any, list[Tensor]] = {}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        sharded = isinstance(parameter.grad, DTensor)
        grad = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
        sums.setdefault((sharded, grad.dtype), []).append(grad)
    with named_errors(), torch.no_grad():
        for (sharded, _), grads in sums.items():
            group = mesh["edp"].get_group() if sharded else dist.group.WORLD
            flat = torch.cat([grad.reshape(-1) for grad in grads])
            dist.all_reduce(flat, group=group)
            flat /= dist.get_world_size(group)
            for grad, mean in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
                grad.copy_(mean.view_as(grad))


def checkpoint_policy() -> Any:
    """The `context_fn` of torch.utils.checkpoint under which the backward computes all again but the exchanges.

        checkpoint(block, x, use_reentrant=False, context_fn=parallel.checkpoint_policy)

    What they brought is kept, so that a layer has its two exchanges of the backward and no more.
    """
    operators = torch.ops._c10d_functional
    kept = {
        operators.all_to_all_single.default, operators.all_gather_into_tensor.default,
        operators.reduce_scatter_tensor.default, operators.wait_tensor.default,
    }  # fmt: skip

    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if operator in kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
