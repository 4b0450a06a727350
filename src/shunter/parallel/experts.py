"""The experts of a layer, of which each rank holds a part: their parameters are DTensors, their rows are exchanged."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from ..errors import UserError
from ..experts import Experts, Weights, choose
from ..moe import MoE
from ..routing import Routing
from . import watch
from .dispatch import DISPATCHES, FORMS, Form, Sender, choose_form, rows_sent

__all__ = ["ShardedExperts", "reordered", "shard_experts"]


class _Scaled(torch.autograd.Function):
    """A tensor as it is, whose gradient is multiplied by a factor."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] * ctx.factor, None


class ShardedExperts(Experts):
    """E experts of which each of the P ranks of a mesh's dimension "ep" holds E / P, in order.

    It takes rows and a routing over all E, as `Experts` does, and has parameters of the same names and shapes, DTensors
    of which dimension 0 is sharded. Every rank of the group must call it, one without rows too. The gradient of a
    parameter is the mean over the ranks' losses, as data parallelism has it: that of its rank is the sum over the P
    ranks whose rows came, and is divided by P where the local part is taken.

    Args:
        experts: whose parameters, equal on every rank, are cut.
        mesh: with a dimension "ep".
        layer, name: of the layer in its model.
        top_k: how many experts a token takes in the mean.
        dispatch: in which form rows travel, one of `FORMS`; "auto" goes by top_k and P.
        overlap_degree: in how many pieces; experts compute one while the next is under way.

    Attributes:
        size: P.
        order: the experts in the order of their places, where they are not in their own; see `parallel.place`. The
            state dict has them in their own order nonetheless.

    While rows are under way the layer's shared experts run, in the backward too.

    Raises:
        UserError: where P does not divide E.
        ValueError: for another form, and for pieces of one in which rows are gathered.

    Source: Lepikhin et al. 2020 (GShard), section 3.3: experts sharded, tokens exchanged by all-to-all.
    """

    waits = True

    def __init__(
        self,
        experts: Experts,
        mesh: DeviceMesh,
        layer: int = 0,
        name: str = "the layer",
        top_k: float = 1.0,
        dispatch: Form | Literal["auto"] = "auto",
        overlap_degree: int = 1,
    ) -> None:
        nn.Module.__init__(self)
        part = mesh["ep"]
        self.size, self.place = part.size(), part.get_local_rank()
        if experts.num_experts % self.size:
            raise UserError(
                f"{name} has {experts.num_experts} experts, which {self.size} ranks cannot hold in equal parts; choose "
                "expert_parallel among the divisors"
            )
        for attribute in ("num_experts", "dim", "hidden", "activation", "bias", "backend", "recompute", "dropout"):
            setattr(self, attribute, getattr(experts, attribute))
        self.gated, self.up_name = experts.gated, experts.up_name
        if overlap_degree < 1:
            raise ValueError(f"overlap_degree {overlap_degree} must be at least 1, the exchange in one piece")
        if overlap_degree > 1 and dispatch == "all":
            raise ValueError(
                f'overlap_degree {overlap_degree} needs dispatch="ranks" or "choices"; "all" has no pieces'
            )
        self.sender = Sender(layer, name, part.get_group(), overlap_degree)
        self.order: list[int] | None = None
        if dispatch not in ("auto", *FORMS):
            raise ValueError(f"dispatch {dispatch!r} is unknown; choose auto, {', '.join(FORMS)}")
        self.top_k = top_k
        backend = dist.get_backend(part.get_group())
        form, why = choose_form(top_k, self.num_experts, self.size, backend)
        if form == "all" and overlap_degree > 1:
            form = "ranks"
        self.form, self.why = (form, why) if dispatch == "auto" else (dispatch, "you asked for it")
        e = experts.num_experts // self.size
        for key in (self.up_name, "down_proj", f"{self.up_name}_bias", "down_proj_bias"):
            whole = getattr(experts, key)
            if whole is not None:
                local = whole.detach()[self.place * e : (self.place + 1) * e].clone()
                sharded = DTensor.from_local(local, part, [Shard(0)], run_check=False)
                whole = nn.Parameter(sharded, requires_grad=whole.requires_grad)
            self.register_parameter(key, whole)
        self.train(experts.training)

    @property
    def weights(self) -> Weights:
        """The parameters of this rank's experts, as the backends take them; their gradients are divided by P."""
        whole = super().weights
        local = (self._local(part) for part in (whole.up, whole.down, whole.up_bias, whole.down_bias))
        up, down, up_bias, down_bias = local
        assert up is not None and down is not None
        return Weights(up, down, up_bias, down_bias, self.activation)

    def _local(self, parameter: Tensor | None) -> Tensor | None:
        if parameter is None:
            return None
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        # FSDP gathers them before the forward of the module, which is no forward of its own here.
        if local.shape[0] != self.num_experts // self.size:
            raise UserError(f"{self.sender.name}: the experts are sharded further; call the module, not its parts")
        out: Tensor = _Scaled.apply(local, 1 / self.size) if self.size > 1 and local.requires_grad else local
        return out

    def reorder(self, order: list[int], optimizer: torch.optim.Optimizer | None = None) -> None:
        """Move the experts to other places: their parameters, gradients, and an optimizer's moments. All ranks call it.

        Args:
            order: the experts in the order of their new places.
            optimizer: of the parameters.
        """
        place = {expert: i for i, expert in enumerate(self.order or range(self.num_experts))}
        rows = [place[expert] for expert in order]
        with torch.no_grad():
            for parameter in (own for own in self._parameters.values() if own is not None):
                moments = {} if optimizer is None else optimizer.state.get(parameter, {})
                moving = [parameter.detach(), parameter.grad, *moments.values()]
                for value in moving:
                    if isinstance(value, Tensor) and value.shape == parameter.shape:
                        value.copy_(reordered(value, rows))
        self.order = None if order == sorted(order) else list(order)

    def placed(self, routing: Routing) -> Routing:
        """A routing over the experts, over their places."""
        if self.order is None:
            return routing
        places = torch.tensor(self.order, device=routing.expert.device).argsort()
        expert, rows = places[routing.expert].sort(stable=True)
        token, weight = routing.token[rows], routing.weight[rows]
        return Routing(token, expert, weight, routing.num_tokens, routing.num_experts, check=False)

    def by_number(self, value: Tensor, back: bool = False) -> Tensor:
        """What is in the order of places (E, …) in that of the experts' numbers, or back."""
        if self.order is None:
            return value
        rows = self.order if back else torch.tensor(self.order).argsort().tolist()
        return reordered(value, rows)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for key, parameter in self._parameters.items():
            if parameter is not None and self.order is not None:
                destination[prefix + key] = self.by_number(parameter.detach())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """As any module, from the state of whole experts too, of which this rank takes its part."""
        for key, parameter in self._parameters.items():
            value = state_dict.get(prefix + key)
            if isinstance(value, Tensor):
                value = state_dict[prefix + key] = self.by_number(value, back=True)
            whole = isinstance(value, Tensor) and not isinstance(value, DTensor)
            if whole and isinstance(parameter, DTensor) and parameter.device_mesh.ndim == 1:
                state_dict[prefix + key] = distribute_tensor(
                    value, parameter.device_mesh, parameter.placements, src_data_rank=None
                )
        super()._load_from_state_dict(state_dict, prefix, *args)

    @torch.compiler.disable
    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """As `Experts`, in three exchanges (counts, rows, outputs), and two in the backward.

        Where a row does not travel for each choice there is one more each way, of the weights. In n pieces there are n
        of rows and n of outputs.

        Raises:
            ValueError: as `Experts`.
            LostRank: where a rank does not come within the timeout, or is in another forward.
        """
        x, weights = self.checked(x, routing)
        routing = self.placed(routing)
        dispatch = DISPATCHES[self.form](x, routing, self.sender)
        meanwhile, self.meanwhile = self.meanwhile, None
        return dispatch.computed(x, lambda rows, local: self.compute(rows, weights, local), meanwhile)

    def explain(self, num_tokens: int) -> str:
        """The ranks, which experts are here, what a forward of T = num_tokens sends, and the backend."""
        e = self.num_experts // self.size
        of, parts = getattr(self, self.up_name), super().weights
        up, down, up_bias, down_bias = (
            None if part is None else torch.empty(e, *part.shape[1:], dtype=part.dtype, device=part.device)
            for part in (parts.up, parts.down, parts.up_bias, parts.down_bias)
        )
        assert up is not None and down is not None
        probe = torch.empty(num_tokens, self.dim, dtype=of.dtype, device=of.device)
        backend, why = choose(self.backend, probe, Weights(up, down, up_bias, down_bias, self.activation))
        rows = num_tokens * rows_sent(self.form, self.top_k, self.num_experts, self.size)
        how = {
            "choices": "a row for each expert that a token takes",
            "ranks": "a row once to each rank that has some of its token's experts",
            "all": "every row to every rank",
        }[self.form]
        own = slice(self.place * e, self.place * e + e)
        pieces = self.sender.pieces
        if pieces > 1:
            how += f", in {pieces} pieces, of which experts compute one while the next travels,"
        here = f"{own.start} to {own.stop - 1}" if self.order is None else ", ".join(map(str, sorted(self.order[own])))
        return (
            f"Expert parallel: experts {here} of {self.num_experts} are on this "
            f"rank, {self.place} of {self.size}; an exchange sends {how} because {self.why}, "
            f"{rows * self.dim * of.dtype.itemsize / 2**20:.3g} MiB. Backend {backend.name}: "
            f"{backend.summary}; chosen because {why}."
        )


def shard_experts(
    model: nn.Module, mesh: DeviceMesh, *, dispatch: Form | Literal["auto"] = "auto", overlap_degree: int = 1
) -> nn.Module:
    """Leave each rank its part of the experts of every `MoE` layer of a model, in place.

    The rest of the model stays whole on every rank, and each rank has a batch of its own: enough for inference, and for
    a plain loop that averages the other gradients (`average_gradients`). `shard_model` shards the rest, too.

    Args:
        model: with equal parameters on every rank.
        mesh: of `parallel.mesh`.
        dispatch: what travels: "choices", a row for each expert that a token takes; "ranks", one for each rank that has
            some of them; "all", every row to every rank. "auto": choices below 4 experts a token, else ranks, or, but
            by gloo, all where a token's experts are on nearly every rank. `layer.explain()` says which and why.
        overlap_degree: in how many pieces rows travel. Experts compute one piece while the next is under way, at the
            cost of smaller products and messages; 1 exchanges all rows at once.

    Returns:
        The same model.

    Raises:
        UserError: where no layer has experts to shard, P does not divide E, a parameter of experts is another module's
            too, or the ranks' parameters differ.
    """
    watch.begin()
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, MoE)]
    if not layers:
        raise UserError(f"{type(model).__name__} has no MoE layer whose experts could be sharded; see shunter.sparsify")
    if sharded := [name for name, layer in layers if isinstance(layer.experts, ShardedExperts)]:
        raise UserError(f"the experts of {sharded[0] or 'the layer'} are sharded already")
    for name, layer in layers:
        if type(layer.experts) is not Experts:  # a subclass may compute with more than its matrices
            kind = type(layer.experts).__name__
            raise UserError(f"{name or 'the layer'}: its experts are {kind}, which cannot be sharded; only Experts can")
    _must_not_be_tied(model, layers)
    same_on_all_ranks(model)
    made: dict[Experts, ShardedExperts] = {}
    for number, (name, layer) in enumerate(layers):
        whole = layer.experts
        assert isinstance(whole, Experts)
        if whole not in made:  # layers may share theirs
            top_k = layer.decider.experts_per_token
            made[whole] = ShardedExperts(whole, mesh, number, name or "the layer", top_k, dispatch, overlap_degree)
    for _, layer in layers:
        assert isinstance(layer.experts, Experts)
        layer.experts = made[layer.experts]
    return model


def _must_not_be_tied(model: nn.Module, layers: list[tuple[str, MoE]]) -> None:
    """Raise UserError where a parameter of experts is another module's too: it would be cut for one of them alone."""
    experts = {id(p) for _, layer in layers for p in layer.experts.parameters()}
    owners: dict[int, str] = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is None or id(parameter) not in experts:
                continue
            own = f"{name}.{key}" if name else key
            if (other := owners.setdefault(id(parameter), own)) != own:
                raise UserError(
                    f"{own} is the same parameter as {other}; experts of several layers are shared as a module: "
                    "layer.experts = other.experts"
                )


def same_on_all_ranks(model: nn.Module) -> None:
    """Raise UserError naming the first parameter or buffer that is not bit-equal on all ranks."""
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    values = {
        name: value.detach() for name, value in named.items() if not (value.is_meta or isinstance(value, DTensor))
    }
    own = [(name, tuple(value.shape), str(value.dtype), _checksum(value)) for name, value in values.items()]
    every: list[Any] = [None] * dist.get_world_size()
    with watch.named_errors():
        dist.all_gather_object(every, own)
    for rank, other in enumerate(every):
        if other == every[0]:
            continue
        different = next((mine[0] for mine, its in zip(every[0], other, strict=False) if mine != its), "their number")
        raise UserError(
            f"the ranks' models differ: {different} is another on rank {rank} than on rank 0. Build the model with one "
            "seed everywhere (torch.manual_seed), or load the same folder"
        )


def _checksum(value: Tensor) -> int:
    """A number of the bits of a tensor that depends on their places."""
    if value.is_sparse or value.numel() == 0:
        return 0
    flat = value.contiguous().reshape(-1).view(torch.uint8)
    if rest := -flat.numel() % 8:
        flat = torch.cat([flat, flat.new_zeros(rest)])
    words = flat.view(torch.int64)
    places = torch.arange(1, 2 * words.numel(), 2, device=words.device)
    return int((words * places).sum())


def reordered(value: Tensor, order: list[int]) -> Tensor:
    """The rows (E, …) of a tensor in another order, distributed as it is: row i of the result is row order[i]."""
    rows = torch.tensor(order)
    if not isinstance(value, DTensor):
        return value[rows.to(value.device)]
    with watch.named_errors(), torch.no_grad():
        whole = value.full_tensor()
        moved = whole[rows.to(whole.device)]
        return distribute_tensor(moved, value.device_mesh, value.placements, src_data_rank=None)
