"""Hugging Face's own mixtures of experts on Shunter's backends: `experts_implementation="shunter"`.

transformers calls `experts_forward` in place of a module's loop over its experts: the model's router has chosen, the
module holds the weights. Where the backends know the activation, they run. The other modules (a gate of their own,
interleaved weights, a norm behind each expert) run as products of sorted rows around the module's own code, in plain
autograd, so that whatever it computes is what is trained.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

from ..errors import UserError
from ..experts import QuantisedExperts, Weights, activate, choose
from ..experts.autograd import gradients_in_graph
from ..experts.backends.decode import decode_choices
from ..experts.combine import plain_sum, rows_of, sum_by_token, weighted_sum
from ..experts.quantised import without_backward
from ..experts.tracing import outside_tracing
from ..routing import Routing
from .blocks import known_activation

__all__ = [
    "NAME",
    "LowRank",
    "acted",
    "around",
    "attach_coded",
    "coded_of",
    "experts_forward",
    "how",
    "layout_of",
    "refusal",
    "routed",
    "use_experts",
]

NAME = "shunter"


class ExpertsModule(Protocol):
    """What transformers' `use_experts_implementation` promises of a module, beside gate_up_proj or up_proj."""

    num_experts: int
    down_proj: Tensor
    down_proj_bias: Tensor
    act_fn: Any
    post_expert_norm: Any
    has_gate: bool
    has_bias: bool
    has_post_expert_norm: bool
    training: bool
    is_transposed: bool
    is_concatenated: bool
    _is_expert_parallel: bool

    def _apply_gate(self, gate_up_out: Tensor) -> Tensor: ...


_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class _Parameters(NamedTuple):
    """A module's parameters as views in the backends' layout: (E, 2f or f, d), (E, d, f) and the biases."""

    up: Tensor
    down: Tensor
    up_bias: Tensor | None
    down_bias: Tensor | None

    def to(self, dtype: torch.dtype) -> _Parameters:
        up_bias, down_bias = (None if bias is None else bias.to(dtype) for bias in (self.up_bias, self.down_bias))
        return _Parameters(self.up.to(dtype), self.down.to(dtype), up_bias, down_bias)


class LowRank(NamedTuple):
    """What is added to the matrix (out, in) of each expert e: b[e].T @ a[e], which is never multiplied out.

    Args:
        a: (E, r, in).
        b: (E, r, out); of this layout the products with few columns are the fast ones.
    """

    a: Tensor
    b: Tensor

    def to(self, dtype: torch.dtype) -> LowRank:
        """The same in another dtype."""
        return LowRank(self.a.to(dtype), self.b.to(dtype))


def experts_forward(
    self: ExpertsModule,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    low_rank: tuple[LowRank | None, LowRank | None] = (None, None),
) -> Tensor:
    """A module's experts on the tokens that chose them: the function behind `experts_implementation="shunter"`.

    Args:
        self: a module decorated with transformers' `use_experts_implementation`.
        hidden_states: (T, d).
        top_k_index: (T, k) integers in [0, E]; E: the expert is not here (expert parallelism) and adds nothing.
        top_k_weights: (T, k).
        low_rank: what is added to the matrices up and down, if anything.

    Returns:
        (T, d), each token's weighted sum of expert outputs. Weights of a kind that Shunter does not compute with
        (quantised, sharded) go to the module's own loop, with a warning the first time.

    Raises:
        ValueError: for ids outside [0, E] (checked on the CPU only).
    """
    if (coded := coded_of(self)) is not None:  # type: ignore[arg-type]
        if any(low_rank):
            raise UserError("adapters of quantised experts would have no gradient; adapt the model that was quantised")
        return _coded_forward(self, coded, hidden_states, top_k_index, top_k_weights)
    parameters = _parameters(self)
    if why := _refusal(parameters):
        _warn_once(type(self), why)
        own_loop = type(self).forward.__wrapped__  # type: ignore[attr-defined]
        return own_loop(self, hidden_states, top_k_index, top_k_weights)
    kind = hidden_states.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else parameters.up.dtype
    x, parameters = hidden_states.to(dtype), parameters.to(dtype)
    activation = _activation(self)
    if activation is not None and not any(low_rank):
        found = decode_choices(x, Weights(*parameters, activation), top_k_index, top_k_weights)
        if found is not None:
            return found.to(hidden_states.dtype)
    routing = _routing(self, top_k_index, top_k_weights)
    if activation is None or any(low_rank):
        between, after = partial(_between, self), self.post_expert_norm if self.has_post_expert_norm else None
        out = around(x, parameters, routing, between, after, low_rank)
    else:
        weights = Weights(*parameters, activation)
        out = choose("auto", x, weights, routing)[0].run(x, weights, routing)
    return out.to(hidden_states.dtype)


def refusal(module: ExpertsModule) -> str | None:
    """Why the weights of a decorated module cannot be computed with here; None where they can."""
    return _refusal(_parameters(module))


def how(module: ExpertsModule) -> str:
    """How a decorated module runs under "shunter", in words, for the table of families."""
    activation = _activation(module)
    return "its own code between products" if activation is None else f"backends, {activation}"


def _parameters(module: ExpertsModule) -> _Parameters:
    name = "gate_up_proj" if module.has_gate else "up_proj"
    up, down = getattr(module, name), module.down_proj
    if module.is_transposed:
        up, down = up.mT, down.mT
    up_bias, down_bias = (getattr(module, f"{name}_bias"), module.down_proj_bias) if module.has_bias else (None, None)
    return _Parameters(up, down, up_bias, down_bias)


def _refusal(parameters: _Parameters) -> str | None:
    """Why the weights cannot be computed with; None where they can."""
    for value in parameters:
        if value is None:
            continue
        if value.dtype not in _DTYPES:
            return f"weights of dtype {value.dtype}"
        if is_traceable_wrapper_subclass(value):
            return f"weights of type {type(value).__name__}"
    return None


_WARNED: set[tuple[type, str]] = set()


def _warn_once(module: type, refusal: str) -> None:
    if (module, refusal) not in _WARNED:
        _WARNED.add((module, refusal))
        warnings.warn(
            f"experts_implementation={NAME!r} does not compute with {refusal}: {module.__name__} runs its own loop, as "
            "with experts_implementation='eager'",
            stacklevel=3,
        )


def _routing(module: ExpertsModule, index: Tensor, weight: Tensor) -> Routing:
    num_experts = module.num_experts
    here = index < num_experts
    keep: Tensor | None = here
    if index.is_cpu and not torch.compiler.is_compiling():
        if index.numel():
            low, high = torch.aminmax(index)
            if low < 0 or high > num_experts:
                bad = int(low if low < 0 else high)
                raise ValueError(f"expert {bad} is out of range: {type(module).__name__} has 0 to {num_experts - 1}")
            if high < num_experts:
                keep = None
    elif not module._is_expert_parallel:
        # Whether an expert is missing would have to be read back from the device; an expert of weight zero need not.
        index, weight, keep = index.clamp(max=num_experts - 1), weight.masked_fill(~here, 0), None
    # A token may name an expert twice (a skipped choice, a hash table's collision): its weights add up.
    return Routing.from_topk(index, weight, num_experts, keep=keep, check=False)


_NAMES: WeakKeyDictionary[Any, dict[bool, str | None]] = WeakKeyDictionary()


@outside_tracing
def _activation(module: ExpertsModule) -> str | None:
    """The name by which the backends know what a module does between its products; None where they do not."""
    default = getattr(module._apply_gate, "__func__", None) is _default_apply_gate
    if module.has_post_expert_norm or (module.has_gate and not (default and module.is_concatenated)):
        return None
    if module.training and getattr(module.act_fn, "probability", None):
        return None  # dropout, which its values cannot show
    names = _NAMES.setdefault(module.act_fn, {})
    if module.has_gate not in names:
        names[module.has_gate] = known_activation(module.act_fn, gated=module.has_gate)
    return names[module.has_gate]


def _between(module: ExpertsModule, h: Tensor) -> Tensor:
    """What a module computes between its products."""
    found: Tensor
    if not module.has_gate:
        found = module.act_fn(h)
    elif not module.is_concatenated and getattr(module._apply_gate, "__func__", None) is _default_apply_gate:
        found = module.act_fn(h[:, ::2]) * h[:, 1::2]
    else:
        found = module._apply_gate(h)
    return found


def around(
    x: Tensor,
    parameters: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    routing: Routing,
    between: Callable[[Tensor], Tensor],
    after: Callable[[Tensor], Tensor] | None = None,
    low_rank: tuple[LowRank | None, LowRank | None] = (None, None),
) -> Tensor:
    """Experts as products of their rows around code that is not known here: x (T, d) -> (T, d).

    Args:
        x: (T, d).
        parameters: up (E, 2f or f, d), down (E, d, f), and their biases.
        routing: of the T tokens.
        between: the rows' products with up -> what is multiplied with down.
        after: the rows' products with down -> what is weighted and summed; None for themselves.
        low_rank: what is added to up and down, if anything.
    """
    up, down, up_bias, down_bias = parameters
    up_part, down_part = (None if part is None else part.to(x.dtype) for part in low_rank)
    traced = torch.compiler.is_compiling()
    if traced:
        products, rows = partial(_traced_products, routing.offsets), x.index_select(0, routing.token)
    else:
        bounds = routing.offsets.tolist()
        products, rows = partial(_products, bounds), rows_of(x, routing)
    h = products(rows, up, up_bias, up_part)
    y = products(between(h).to(x.dtype), down, down_bias, down_part)
    if after is not None:
        y = after(y)
    if traced:
        return plain_sum(routing.token, x.shape, y, routing.weight)
    return weighted_sum(y, routing)


def coded_of(module: nn.Module) -> QuantisedExperts | None:
    """The quantised experts that a module of a family runs in place of its own, or None."""
    found = module._modules.get("coded")
    return found if isinstance(found, QuantisedExperts) else None


def layout_of(module: nn.Module) -> Weights | None:
    """The weights of a family's module of experts as views in the backends' layout; None for other modules.

    Where the module has its own code between the products, the activation only says whether they gate.
    """
    if isinstance(module, Llama4TextExperts):
        activation = known_activation(module.act_fn, gated=True)
        if activation is None or "gate_up_proj" not in module._parameters:
            return None
        return Weights(module.gate_up_proj.mT, module.down_proj.mT, activation=activation)
    if "_apply_gate" not in dir(module) or not hasattr(module, "has_gate") or "down_proj" not in module._parameters:
        return None
    experts: Any = module
    parameters = _parameters(experts)
    if any(value is not None and value.dtype not in _DTYPES for value in parameters):
        return None
    return Weights(*parameters, _activation(experts) or ("swiglu" if experts.has_gate else "silu"))


def acted(module: nn.Module, weights: Weights, h: Tensor) -> Tensor:
    """The hidden states (n, f) that a module of experts makes of pre-activations (n, 2f) or (n, f)."""
    experts: Any = module
    own = hasattr(module, "has_gate") and _activation(experts) is None
    return _between(experts, h) if own else activate(h, weights.activation)


def routed(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Routing]:
    """The hidden states (., d) and the routing that the arguments of a family's module of experts stand for."""
    experts: Any = module
    if isinstance(module, Llama4TextExperts):
        x = args[0] if args else kwargs["hidden_states"]
        rows, _, routing = _chosen_rows(experts, x)
        return rows, routing

    def arguments(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return hidden_states, top_k_index, top_k_weights

    x, index, weight = arguments(*args, **kwargs)
    return x, _routing(experts, index, weight)


def attach_coded(module: nn.Module, coded: QuantisedExperts) -> None:
    """Have a family's module of experts run quantised ones, whatever `experts_implementation` is; its own are gone."""
    for name in ("gate_up_proj", "up_proj", "down_proj"):
        module._parameters.pop(name, None)
        module._parameters.pop(f"{name}_bias", None)
    module.coded = coded.train(module.training)
    module._is_hf_initialized = True  # type: ignore[assignment]  # which would look for the parameters
    if isinstance(module, Llama4TextExperts):
        module.__class__ = _Experts
    else:
        own: Any = module
        vars(module)["forward"] = partial(experts_forward, own)  # of the instance: what is copied keeps it


def _coded_forward(
    module: ExpertsModule, coded: QuantisedExperts, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    known = _activation(module) is not None
    if known and coded.backend == "auto":
        found = decode_choices(x.to(dtype), coded.weights(dtype), top_k_index, top_k_weights)
        if found is not None:
            return found.to(x.dtype)
    routing = _routing(module, top_k_index, top_k_weights)
    if known:
        out: Tensor = coded(x, routing).to(x.dtype)
        return out
    weights, bounds = coded.weights(dtype), routing.offsets.tolist()
    with torch.no_grad():
        rows = x.to(dtype).index_select(0, routing.token)
        y = rows.new_empty(rows.shape[0], weights.dim)
        for e, span in _spans(bounds):
            up, down, up_bias, down_bias = weights.expert(e)
            a = _between(module, F.linear(rows[span], up, up_bias))
            y[span] = F.linear(a.to(dtype), down, down_bias)
        if module.has_post_expert_norm:
            y = module.post_expert_norm(y)
        out = sum_by_token(y, routing, routing.weight).to(x.dtype)
    return without_backward(out, x, top_k_weights)


def _products(
    bounds: list[int], rows: Tensor, weight: Tensor, bias: Tensor | None, low_rank: LowRank | None = None
) -> Tensor:
    out: Tensor
    if low_rank is None:
        out = _Products.apply(rows, weight, bias, bounds)
    else:
        out = _AdaptedProducts.apply(rows, weight, bias, *low_rank, bounds)
    return out


def _traced_products(
    offsets: Tensor, rows: Tensor, weight: Tensor, bias: Tensor | None, low_rank: LowRank | None = None
) -> Tensor:
    product = torch.ops.shunter.products
    out: Tensor = product(rows, weight, bias, offsets)
    if low_rank is not None:
        out = out + product(product(rows, low_rank.a, None, offsets), low_rank.b.mT, None, offsets)
    return out


class _Products(torch.autograd.Function):
    """Each expert's rows times its matrix: rows (N, in), weight (E, out, in), bias (E, out) or None -> (N, out)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, bounds: list[int]) -> Tensor:
        ctx.save_for_backward(rows, weight, bias)
        ctx.bounds = bounds
        return _multiply(rows, weight, bias, bounds)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        rows, weight, bias = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            plain = partial(_plain_products, ctx.bounds)
            return (*gradients_in_graph(plain, (rows, weight, bias), needs, grads[0]), None)
        return (*_multiply_backward(grads[0], rows, weight, needs, ctx.bounds), None)


class _AdaptedProducts(torch.autograd.Function):
    """As `_Products` with the matrices weight[e] + b[e].T @ a[e], rows through a and then b: the sum is never made."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, bounds: list[int]
    ) -> Tensor:
        out = _multiply(rows, weight, bias, bounds)
        inner = _multiply(rows, a, None, bounds)
        for e, span in _spans(bounds):
            out[span].addmm_(inner[span], b[e])
        ctx.save_for_backward(rows, weight, bias, a, b, inner)
        ctx.bounds = bounds
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        rows, weight, bias, a, b, inner = ctx.saved_tensors
        needs, bounds = ctx.needs_input_grad, ctx.bounds
        if torch.is_grad_enabled():
            plain = partial(_plain_adapted, bounds)
            return (*gradients_in_graph(plain, (rows, weight, bias, a, b), needs[:5], grads[0]), None)
        grad = grads[0].contiguous()
        grad_rows, grad_weight, grad_bias = _multiply_backward(grad, rows, weight, needs[:3], bounds)
        grad_inner = _multiply(grad, b, None, bounds)
        grad_a, grad_b = torch.zeros_like(a), torch.zeros_like(b)
        for e, span in _spans(bounds):
            if grad_rows is not None:
                grad_rows[span].addmm_(grad_inner[span], a[e])
            torch.mm(grad_inner[span].T, rows[span], out=grad_a[e])
            torch.mm(inner[span].T, grad[span], out=grad_b[e])
        return grad_rows, grad_weight, grad_bias, grad_a, grad_b, None


def _plain_adapted(
    bounds: list[int], rows: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor
) -> Tensor:
    """As `_AdaptedProducts`, in plain autograd."""
    inner = _plain_products(bounds, rows, a, None)
    return _plain_products(bounds, rows, weight, bias) + _plain_products(bounds, inner, b.mT, None)


def _multiply(rows: Tensor, weight: Tensor, bias: Tensor | None, bounds: list[int]) -> Tensor:
    out = rows.new_empty(rows.shape[0], weight.shape[1])
    for e, span in _spans(bounds):
        if bias is None:
            torch.mm(rows[span], weight[e].T, out=out[span])
        else:
            torch.addmm(bias[e], rows[span], weight[e].T, out=out[span])
    return out


def _multiply_backward(
    grad: Tensor, rows: Tensor, weight: Tensor, needs: Sequence[bool], bounds: list[int]
) -> list[Tensor | None]:
    """The gradients of rows, weight and bias; None where they are not needed."""
    grad = grad.contiguous()
    grad_rows = torch.empty_like(rows) if needs[0] else None
    grad_weight = torch.zeros_like(weight) if needs[1] else None
    grad_bias = weight.new_zeros(weight.shape[:2]) if needs[2] else None
    for e, span in _spans(bounds):
        if grad_rows is not None:
            torch.mm(grad[span], weight[e], out=grad_rows[span])
        if grad_weight is not None:
            torch.mm(grad[span].T, rows[span], out=grad_weight[e])
        if grad_bias is not None:
            torch.sum(grad[span], 0, out=grad_bias[e])
    return [grad_rows, grad_weight, grad_bias]


@torch.library.custom_op("shunter::products", mutates_args=())
def _operator(rows: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    """`_Products` to a compiler; the offsets (E + 1,) of the experts' rows are data there."""
    return _multiply(rows, weight, bias, offsets.tolist())


@_operator.register_fake
def _(rows: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[1])


@torch.library.custom_op("shunter::products_backward", mutates_args=())
def _backward_operator(
    grad: Tensor, rows: Tensor, weight: Tensor, offsets: Tensor, needs: Sequence[bool]
) -> list[Tensor]:
    """The gradients that are needed, in order."""
    found = _multiply_backward(grad, rows, weight, needs, offsets.tolist())
    return [gradient for gradient in found if gradient is not None]


@_backward_operator.register_fake
def _(grad: Tensor, rows: Tensor, weight: Tensor, offsets: Tensor, needs: Sequence[bool]) -> list[Tensor]:
    shapes = (rows.shape, weight.shape, weight.shape[:2])
    return [weight.new_empty(shape) for shape, need in zip(shapes, needs, strict=True) if need]


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, weight, _, offsets = inputs
    ctx.save_for_backward(rows, weight, offsets)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    needs = ctx.needs_input_grad[:3]
    rows, weight, offsets = ctx.saved_tensors
    found = iter(_backward_operator(grad, rows, weight, offsets, list(needs)))
    return *(next(found) if need else None for need in needs), None


_operator.register_autograd(_backward, setup_context=_keep_for_backward)


def _plain_products(bounds: list[int], rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As `_Products`, in plain autograd."""
    parts = [F.linear(rows[span], weight[e], None if bias is None else bias[e]) for e, span in _spans(bounds)]
    tie = weight[:0].sum() if bias is None else weight[:0].sum() + bias[:0].sum()
    return torch.cat([*parts, rows.new_empty(0, weight.shape[1])]) + tie


def _spans(bounds: list[int]) -> list[tuple[int, slice]]:
    pairs = enumerate(zip(bounds, bounds[1:], strict=False))
    return [(e, slice(start, end)) for e, (start, end) in pairs if end > start]


ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def _chosen_rows(module: Any, x: Tensor) -> tuple[Tensor, Tensor, Routing]:
    """Of each expert's copy (E T, d) of the tokens in Llama 4 those that its router left in, where, and whose."""
    chosen = (x != 0).any(-1).nonzero().squeeze(1)
    rows = x[chosen]
    expert = chosen // (x.shape[0] // module.num_experts)
    weight = torch.ones(rows.shape[0], dtype=torch.promote_types(rows.dtype, torch.float32), device=rows.device)
    token = torch.arange(rows.shape[0], device=rows.device)
    return rows, chosen, Routing(token, expert, weight, rows.shape[0], module.num_experts, check=False)


class _Experts(Llama4TextExperts):
    """Llama 4's experts, computing only the rows that its router left in: the others are zeros, and so are theirs."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Each expert's copy of the T tokens, (E T, d), scaled by its scores -> (E T, d)."""
        coded, weights = coded_of(self), layout_of(self)
        if coded is None and weights is None:
            return super().forward(hidden_states)
        rows, chosen, routing = _chosen_rows(self, hidden_states)
        if coded is not None:
            out = coded(rows, routing)
        else:
            assert weights is not None
            out = choose("auto", rows, weights)[0].run(rows, weights, routing)
        return torch.zeros_like(hidden_states).index_copy(0, chosen, out)


def use_experts(model: PreTrainedModel) -> PreTrainedModel:
    """Run a model's experts on Shunter's backends, in place: `experts_implementation="shunter"`, and for Llama 4 too.

    Args:
        model: one of the families in docs/families.md.

    Returns:
        The same model.

    Raises:
        ValueError: where the model has no experts that Shunter can run.
    """
    llama4 = [module for module in model.modules() if type(module) in (Llama4TextExperts, _Experts)]
    for module in llama4:
        module.__class__ = _Experts
    if llama4:
        return model
    if not any("_apply_gate" in dir(module) and hasattr(module, "has_gate") for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} has no experts that Shunter can run in place; docs/families.md lists the families"
        )
    model.set_experts_implementation("shunter")
    return model
