"""Router, the base of every gating function: hidden states to logits (`score`), logits to a `Routing` (`assign`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import capacity, losses
from ..context import NO_CONTEXT, Context
from ..routing import Routing

__all__ = ["Router", "largest"]


class Router(nn.Module):
    """Hidden states (T, d) to a `Routing` in two steps, plus the losses that train it.

    A subclass sets the class attributes, implements `score` and `choose`, and is registered by name.

    Args:
        dim: d, the width of the hidden states.
        num_experts: E.
        capacity_factor: slots of an expert as a multiple of an even share, in training; None is dropless, in training
            and in evaluation. As in Tutel (Hwang et al. 2023), 0 has as many slots as the fullest expert
            takes, which is dropless too, and -F as many, but no more than F has. No slot that stays empty is computed
            or exchanged, whatever the factor.
        eval_capacity_factor: the same in evaluation; None takes `capacity_factor`, "dropless" drops no token.
        capacity_shares: E numbers of at least 0, how the slots of all experts are shared out among them, in proportion
            and at least one each; None has all alike. `share_capacity` changes it.
        capacity_formula: how the factor becomes a number of slots, a key of `shunter.capacity.FORMULAS`.
        capacity_order: who gets the slots: "position", "random", "batch" or "probability" (see
            `shunter.capacity.limit`).
        load_balancing_loss: coefficient of the load balancing loss; 0 leaves it out.
        importance_loss: coefficient of the importance loss; 0 leaves it out.
        z_loss: coefficient of the router z-loss; 0 leaves it out.
        balance_choices: which choices enter the load balancing loss: "first", "all" or "mean".

    Raises:
        ValueError: for sizes below 1, and for an unknown capacity_order or balance_choices.
    """

    chooses: ClassVar[str]
    """Who chooses whom: "tokens", "experts", "both", "global", "fixed", "all" or "slots" (none: they are mixtures)."""
    in_review: ClassVar[bool] = True
    """Whether the review (Fedus et al. 2022) describes the algorithm, or it came after."""
    needs: ClassVar[tuple[str, ...]] = ()
    """Fields of `Context` that `score` or `assign` cannot do without."""
    replays: ClassVar[bool] = False
    """Whether the router follows the `experts` of a context."""
    source: ClassVar[str]
    """The paper that the router comes from."""
    passes: ClassVar[int] = 1
    """How many forwards, each with decisions of its own, make a training step."""
    example_options: ClassVar[dict[str, Any]] = {}
    """Small values of the options that have no default, with which tables and benchmarks make the router."""
    top_k: int = 1
    """k, how many experts a token takes; it enters the capacity formulas that count choices."""
    group_size: int | None = None
    """How many consecutive tokens have capacity and balance of their own; None takes the whole batch as one group."""
    process_group: Any = None
    """The ranks whose tokens are others than this one's, over which `update` sums its counts; None for all."""
    unsaved_options: ClassVar[tuple[str, ...]] = ()
    """Options whose effect is in the state dict, so that a saved configuration leaves them out."""

    options: dict[str, Any]
    """What the router was made with by name, but for `unsaved_options`: with E and d enough to make it again."""

    def __new__(cls, *args: Any, **options: Any) -> Self:
        """Keep the options: what saves a model writes them."""
        router = super().__new__(cls)
        left_out = {*cls.unsaved_options, "dim", "num_experts", "device", "dtype"}
        vars(router)["options"] = {name: value for name, value in options.items() if name not in left_out}
        return router

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        capacity_factor: float | None = None,
        eval_capacity_factor: float | Literal["dropless"] | None = None,
        capacity_formula: str = "review",
        capacity_order: str = "position",
        capacity_shares: Sequence[float] | None = None,
        load_balancing_loss: float = 0.0,
        importance_loss: float = 0.0,
        z_loss: float = 0.0,
        balance_choices: losses.Choices = "mean",
    ) -> None:
        super().__init__()
        if dim < 1 or num_experts < 1:
            raise ValueError(f"{type(self).__name__}: dim {dim} and num_experts {num_experts} must be at least 1")
        for factor in (capacity_factor, None if eval_capacity_factor == "dropless" else eval_capacity_factor):
            if factor is not None:
                by_the_fullest = factor <= 0 and self.chooses not in ("experts", "both")
                capacity.capacity(1, 1, 1, abs(factor) or 1.0 if by_the_fullest else factor, capacity_formula)
        if capacity_order not in capacity.ORDERS:
            raise ValueError(f"capacity_order {capacity_order!r} is unknown; choose from {', '.join(capacity.ORDERS)}")
        if balance_choices not in ("first", "all", "mean"):
            raise ValueError(f"balance_choices {balance_choices!r} is unknown; choose from first, all, mean")
        self.dim = dim
        self.num_experts = num_experts
        self.capacity_factor = capacity_factor
        self.eval_capacity_factor = eval_capacity_factor
        self.capacity_formula = capacity_formula
        self.capacity_order = capacity_order
        self.coefficients = {
            "load_balancing_loss": load_balancing_loss,
            "importance_loss": importance_loss,
            "z_loss": z_loss,
        }
        self.balance_choices = balance_choices
        self.capacity_shares: list[float] | None = None
        if capacity_shares is not None:
            self.share_capacity(capacity_shares)

    learns_by_reward: ClassVar[bool] = False
    """Whether a training forward leaves a decision, of which `shunter.give_reward` makes losses."""

    @property
    def itself(self) -> Router:
        """The router, where a module around it hands on its attributes."""
        return self

    @property
    def innermost(self) -> Router:
        """The router that decides within a capacity, where this one shares out what another decided; else this one."""
        return self

    @property
    def kind(self) -> type[Router]:
        """Its class; of what FSDP2 shards, the class from which `fully_shard` derived the one that it has now."""
        first, *others = type(self).__mro__
        return others[1] if others[0].__name__ == "FSDPModule" else first

    def forward(self, x: Tensor, context: Context = NO_CONTEXT) -> tuple[Tensor, Routing]:
        """The logits of hidden states x (T, d) and the routing that they lead to: `score`, then `assign`.

        A layer calls its router as a module, so that hooks, offloading and sharding see each decision and its inputs.

        Raises:
            ValueError: where a weight has no values, being on the meta device.
        """
        missing = [name for name, value in (*self.named_parameters(), *self.named_buffers()) if value.is_meta]
        if missing or x.is_meta:
            raise ValueError(
                f"{type(self).__name__}: {', '.join(missing) or 'x'} is on the meta device, without values to decide "
                "by; load or draw the weights first (module.to_empty(device=…), then reset_parameters or a state dict)"
            )
        logits = self.score(context.real(x), context)
        return logits, self.assign(logits, context)

    def score(self, x: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        """The logits (T, E) of hidden states x (T, d), in float32 (float64 for float64), autocast off."""
        raise NotImplementedError

    @property
    def required(self) -> tuple[str, ...]:
        """What the router needs of the context as its options are: `needs`, to which an option may add."""
        return self.needs

    def require(self, context: Context, name: str, size: int | None = None) -> Tensor:
        """What the context knows of the tokens under a name of `Context`; ids are checked to be in 0..size-1.

        What stands at padding is not checked: with a size, and of floating point, it comes back as 0. A compiled graph
        checks no values.

        Raises:
            ValueError: where the context lacks it, or an id is out of range.
        """
        value = getattr(context, name)
        if value is None:
            raise ValueError(f"{type(self).__name__} needs {name}; pass {name}= to the layer")
        blank = size is not None or value.is_floating_point()
        if blank and context.mask is not None and value.shape[:1] == context.mask.shape:
            value = context.real(value)
        if size is None or torch.compiler.is_compiling():
            return value
        if value.numel() and (int(value.min()) < 0 or int(value.max()) >= size):
            bad = int(value[(value < 0) | (value >= size)][0])
            raise ValueError(f"{type(self).__name__}: {name} {bad} is out of range; ids are 0 to {size - 1}")
        return value

    def choose(self, logits: Tensor, context: Context) -> Routing:
        """The routing that logits (T, E) ask for, before capacity and with padding still in place."""
        raise NotImplementedError

    def probs(self, logits: Tensor) -> Tensor:
        """The probabilities (T, E) that the losses and the batch priority read; rows sum to 1."""
        return logits.softmax(-1)

    def assign(self, logits: Tensor, context: Context = NO_CONTEXT) -> Routing:
        """The routing of logits (T, E): chosen, without padding, within capacity.

        A function of its arguments and of the train or eval mode alone (and of torch's random state where the router
        samples).

        Raises:
            ValueError: where logits are not (T, E), or where the context lacks what the router needs.
        """
        if logits.dim() != 2 or logits.shape[1] != self.score_width:
            raise ValueError(f"assign: logits have shape {tuple(logits.shape)}; they must be (T, {self.score_width})")
        for name in self.required:
            self.require(context, name)
        if context.experts is not None and not self.replays:
            raise ValueError(f"{type(self).__name__} decides itself: it cannot follow experts=; use a top-k router")
        for name in ("mask", "experts", "free", *self.required):
            value = getattr(context, name)
            if value is not None and value.shape[0] != logits.shape[0]:
                raise ValueError(f"assign: {name} has {value.shape[0]} entries for {logits.shape[0]} tokens")
        routing = self.choose(logits, self._with_own_choices(logits, context))
        if context.mask is not None:
            real = context.mask[routing.token]
            if torch.compiler.is_compiling() or not bool(real.all()):
                routing = routing.masked(real)
        return self.limit(routing, logits, context)

    def _with_own_choices(self, logits: Tensor, context: Context) -> Context:
        """The context whose `experts` hold the router's own choice at the tokens that are `free`."""
        free = context.free
        if context.experts is None or free is None:
            return context
        free = free if context.mask is None else free & context.mask
        if not bool(free.any()):
            return context
        alone = replace(context, experts=None, free=None)
        own, _, _ = self.assign(logits.detach(), alone).by_choice()
        k = max(own.shape[1], context.experts.shape[1])
        own, given = (F.pad(index, (0, k - index.shape[1]), value=-1) for index in (own, context.experts))
        return replace(context, experts=torch.where(free[:, None], own, given), free=None)

    def limit(self, routing: Routing, logits: Tensor, context: Context) -> Routing:
        """The part of the routing that fits the capacity of the present mode."""
        group = self.groups(logits)
        slots = self.slots(logits, group, context)
        if slots is None:
            return routing
        if isinstance(slots, Tensor):
            slots = slots[:, : routing.num_experts]
        return capacity.limit(routing, slots, self.capacity_order, self.priority(logits), group)

    def groups(self, logits: Tensor) -> Tensor | None:
        """The group (T,) of each token, runs of `group_size`, the last maybe shorter; None where there is only one."""
        if self.group_size is None or logits.shape[0] <= self.group_size:
            return None
        return torch.arange(logits.shape[0], device=logits.device) // self.group_size

    def slots(self, logits: Tensor, group: Tensor | None, context: Context) -> int | Tensor | None:
        """The capacity of an expert; by groups, of their own tokens, (G, 1); by shares (G, E); dropless: None."""
        if self.capacity(1) is None:  # asked before real tokens are counted, for which a graph would break
            return None
        if group is None:
            each = self.capacity(context.num_real(logits.shape[0]))
            return each if self.capacity_shares is None else self._shared_out(torch.tensor([[each]]), logits)
        real = group if context.mask is None else group[context.mask]
        sizes = torch.bincount(real, minlength=int(group[-1]) + 1).tolist()
        even = torch.tensor([self.capacity(size) for size in sizes], device=group.device)[:, None]
        return even if self.capacity_shares is None else self._shared_out(even, logits)

    def _shared_out(self, even: Tensor, logits: Tensor) -> Tensor:
        """The slots (G, columns of the logits) of experts of which each would have (G, 1); null ones have these."""
        share = torch.tensor(self.capacity_shares, dtype=torch.float64, device=logits.device)
        if len(share) != self.num_experts:
            raise ValueError(
                f"{type(self).__name__}: capacity_shares are of {len(share)} experts, and there are "
                f"{self.num_experts}; call share_capacity again, with None for equal ones"
            )
        share = F.pad(share / share.mean(), (0, logits.shape[1] - len(share)), value=1.0)
        return (even.to(share) * share - 1e-6).ceil().clamp_min(1).long()

    def share_capacity(self, shares: Sequence[float] | None) -> None:
        """Share the slots of all experts out by E numbers of at least 0, such as their loads; None: equally.

        It is an option from then on, which a saved model keeps.

        Raises:
            ValueError: for other numbers, and for a router that decides by an equal capacity.
        """
        given = None if shares is None else [float(share) for share in shares]
        if given is not None:
            if self.chooses in ("experts", "both"):
                raise ValueError(f"{type(self).__name__} decides by a capacity that all experts have; leave shares out")
            if len(given) != self.num_experts or min(given) < 0 or not 0 < sum(given) < math.inf:
                raise ValueError(
                    f"{type(self).__name__}: capacity_shares must be {self.num_experts} numbers of at least 0, not all "
                    f"of them 0; got {given}"
                )
        self.capacity_shares = self.options["capacity_shares"] = given

    def priority(self, logits: Tensor) -> Tensor | None:
        """What `capacity_order` ranks tokens by; None where it needs no score."""
        if self.capacity_order == "batch":
            return self.probs(logits).amax(-1)
        return self.probs(logits) if self.capacity_order == "probability" else None

    def capacity(self, num_tokens: int) -> int | None:
        """The slots C of one expert for T real tokens in the present mode; None when dropless."""
        factor = self.present_capacity_factor
        if factor is None:
            return None
        return capacity.capacity(num_tokens, self.num_experts, self.top_k, factor, self.capacity_formula)

    @property
    def present_capacity_factor(self) -> float | None:
        """The capacity factor of the present mode, positive; None when dropless."""
        factor: float | str | None = self.capacity_factor
        if factor and not self.training and self.eval_capacity_factor is not None:
            factor = self.eval_capacity_factor
        return None if isinstance(factor, str) or not factor else abs(factor)

    def compute(
        self,
        x: Tensor,
        logits: Tensor,
        routing: Routing,
        context: Context,
        experts: Callable[[Tensor, Routing], Tensor],
    ) -> Tensor:
        """The output (T, d) of a layer for hidden states x (T, d): what its experts make of x and the routing.

        Args:
            x: (T, d).
            logits: (T, E), of `score`.
            routing: of `assign`.
            context: what is known of the tokens.
            experts: rows (N, d) and a routing of them to outputs (N, d), as `shunter.experts.Experts`.
        """
        return experts(x, routing)

    def draw_experts(self, up: Tensor, down: Tensor) -> None:
        """Set the matrices (E, f or 2f, d) and (E, d, f) of new experts, in place, as the router's paper begins them.

        Raises:
            ValueError: where the paper has no way of its own.
        """
        raise ValueError(f"{type(self).__name__}: its paper begins experts in no way of its own; leave them as drawn")

    def observe(self, logits: Tensor, routing: Routing, context: Context = NO_CONTEXT) -> None:
        """Note what `update` needs of a training forward. `MoE` calls it once a forward, not in a recomputation."""

    def update(self) -> None:
        """Advance the state that no gradient moves (selection biases, annealing, baselines) by one optimizer step."""

    def expect_steps(self, steps: int) -> None:
        """Learn how often `update` will have been called at the end of the training that begins: schedules go by it."""

    @property
    def advances(self) -> bool:
        """Whether there is such a state."""
        return type(self).update is not Router.update

    @property
    def score_width(self) -> int:
        """The number of columns of the logits: E, unless the router scores more than experts."""
        return self.num_experts

    def losses(self, logits: Tensor, routing: Routing, context: Context = NO_CONTEXT) -> dict[str, Tensor]:
        """The weighted losses by name; coefficients of zero leave their loss out."""
        terms = self.loss_terms(logits, routing, context)
        return {name: c * terms[name]() for name, c in self.coefficients.items() if c}

    def loss_terms(self, logits: Tensor, routing: Routing, context: Context) -> dict[str, Callable[[], Tensor]]:
        """How to compute each loss that `coefficients` names; a router with losses of its own adds them to both."""
        return {
            "load_balancing_loss": lambda: losses.load_balancing_loss(
                self.probs(logits), routing, context.mask, self.balance_choices, self.groups(logits)
            ),
            "importance_loss": lambda: losses.importance_loss(self.probs(logits), context.mask, self.groups(logits)),
            "z_loss": lambda: losses.z_loss(logits, context.mask),
        }

    @property
    def experts_per_token(self) -> float:
        """The mean number of experts that a token asks for: what its computation costs."""
        return float(self.top_k)

    def experts_for(self, sequence_length: int) -> float:
        """The mean number of experts that a token of sequences of this length asks for."""
        return self.experts_per_token

    @property
    def flops_per_token(self) -> float:
        """Forward FLOPs of the router's products for one token; a multiply-add counts as 2."""
        return 2.0 * sum(p.numel() for p in self.parameters() if p.dim() == 2)

    @property
    def leak(self) -> str | None:
        """How a later token can change what an earlier one gets, in words; None where it cannot (causal-safe)."""
        if self.present_capacity_factor is None:
            return None
        if self.capacity_order != "position":
            return f"capacity_order={self.capacity_order!r} lets later tokens take the slots of earlier ones"
        if self.top_k > 1:
            return "the first choices of later tokens take capacity from the second choices of earlier ones"
        return None

    def reset_unsaved(self) -> None:
        """Set the buffers that a state dict leaves out as in a new router: loaders may leave them unfilled."""
        unsaved = [name for name in self._non_persistent_buffers_set if self._buffers.get(name) is not None]
        if unsaved:
            with torch.random.fork_rng(devices=[]), torch.device("cpu"):
                new = type(self)(self.dim, self.num_experts, **self.options)
            for name in unsaved:
                setattr(self, name, getattr(new, name).to(getattr(self, name).device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move and cast as any module, except that buffers keep their precision: they are state, not weights."""
        exact = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, before in exact.items():
            after = self._buffers[name]
            if after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self


def largest(scores: Tensor, k: int) -> Tensor:
    """The k columns (T, k) of the largest scores of each row of (T, E), best first, ties to the lowest column.

    `torch.topk` breaks ties arbitrarily; here equal scores give the same columns on every device and in every run.
    A NaN counts as the largest score, so that the columns are always in range and different.
    """
    if k == 1:
        return scores.argmax(-1, keepdim=True)
    if scores.dtype != torch.float32:
        return scores.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    if k and scores.is_cpu and type(scores) is Tensor and not _is_traced(scores):
        # Where the k differ, and no other score reaches the last of them, there is nothing to break: keys, which are
        # several arrays of T x E integers, are for the other rows.
        best, index = torch.topk(scores.detach(), k, dim=-1)
        clear = (best[:, 1:] < best[:, :-1]).all(-1) & ((scores >= best[:, -1:]).sum(-1) == k)  # not where one is NaN
        return index if clear.all() else index.index_put((~clear,), _by_keys(scores[~clear], k))
    return _by_keys(scores, k)


def _is_traced(scores: Tensor) -> bool:
    """Whether values cannot be looked at: a compiler traces, or a transform of torch.func goes over them."""
    return torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(scores)


def _by_keys(scores: Tensor, k: int) -> Tensor:
    """`largest` of float32 by integers that are all different."""
    # An integer key that orders as the float does (its bits, negatives flipped; -0.0 joins 0.0), unique by the column.
    bits = (scores.detach() + 0.0).contiguous().view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)
    columns = torch.arange(scores.shape[1] - 1, -1, -1, device=scores.device)
    return torch.topk((ordered << 32) | columns, k, dim=-1).indices
