"""The experts as a module: what a layer asks of them, and those with stacked parameters and a choice of backends."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..routing import Routing
from . import choice as backends
from .activations import ACTIVATIONS
from .backends.reference import reference
from .quantised import Coding, Packed, QuantisedWeights, check_bits, pack, without_backward
from .weights import ExpertWeights, Weights

__all__ = ["Experts", "QuantisedExperts", "RoutedExperts"]


class RoutedExperts(nn.Module):
    """What `MoE(ready_experts=…)`, `explain` and saving ask of experts: all that a wrapper has to provide.

    A subclass computes `forward` where and how it likes (on other ranks, from quantised or offloaded weights) and
    describes it in `explain`. Where only the place of the matrices is another, a subclass of `Experts` with its own
    `weights`, an `ExpertWeights`, is enough. A model is saved with the state dict that its modules give: to be loaded
    again, that of a wrapper has the names and shapes of `Experts`.

    Attributes:
        num_experts, dim, hidden: E, d and f.
        activation: a key of `ACTIVATIONS`.
        bias: whether both projections have a bias.
        backend, recompute, dropout: with what `Experts` a saved model is loaded.
    """

    num_experts: int
    dim: int
    hidden: int
    activation: str
    bias: bool
    backend: str = "auto"
    recompute: bool = False
    dropout: float = 0.0

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """Sum over each token's experts of weight times expert output: x (T, d) -> (T, d)."""
        raise NotImplementedError

    def explain(self, num_tokens: int) -> str:
        """One sentence on how a forward of T = num_tokens would be computed, and why so."""
        raise NotImplementedError

    @property
    def matrix_numbers(self) -> int:
        """How many numbers the matrices of one expert have: 3 d f where the activation gates, else 2 d f."""
        return (3 if ACTIVATIONS[self.activation][1] else 2) * self.dim * self.hidden

    @property
    def costs(self) -> Tensor:
        """(E,) float64 forward FLOPs of the products that each expert makes of one row; a multiply-add counts as 2."""
        return torch.full((self.num_experts,), 2.0 * self.matrix_numbers, dtype=torch.float64)


def _must_fit(experts: RoutedExperts, x: Tensor, routing: Routing) -> None:
    """Raises ValueError where x or the routing is not of the experts' sizes."""
    if x.shape != (routing.num_tokens, experts.dim):
        raise ValueError(f"Experts: x has shape {tuple(x.shape)}; it must be ({routing.num_tokens}, {experts.dim})")
    if routing.num_experts != experts.num_experts:
        raise ValueError(f"Experts: the routing has {routing.num_experts} experts, the layer {experts.num_experts}")


class Experts(RoutedExperts):
    """E feed-forward networks with stacked parameters, applied to the rows that a routing gives each.

    Args:
        num_experts: E.
        dim: d.
        hidden: f, the width of one expert.
        activation: "swiglu", "geglu", "geglu_tanh", "reglu" (gated), "silu", "gelu", "gelu_tanh",
            "quick_gelu", "relu" or "relu2".
        bias: whether both projections have a bias.
        backend: "auto" or one of `shunter.experts.backend_names()`.
        recompute: whether the backward computes the pre-activations again instead of keeping them: less memory, about
            a fifth more work, the same gradients.
        dropout: in training, the probability of dropping an entry of an expert's hidden units (Fedus et al. 2021,
            Switch, table 4); then a loop over the experts computes, without a backend.
        device, dtype: of the parameters.

    Parameters are named and laid out as in Hugging Face models: gate_up_proj (E, 2f, d), or up_proj (E, f, d) where the
    activation does not gate, and down_proj (E, d, f); with bias, gate_up_proj_bias or up_proj_bias, and down_proj_bias.

    Raises:
        ValueError: for an unknown activation or backend, or sizes below 1.
    """

    def __init__(
        self,
        num_experts: int,
        dim: int,
        hidden: int,
        *,
        activation: str = "swiglu",
        bias: bool = False,
        backend: str = "auto",
        recompute: bool = False,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if min(num_experts, dim, hidden) < 1:
            raise ValueError(f"Experts: num_experts {num_experts}, dim {dim} and hidden {hidden} must be at least 1")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation {activation!r} is unknown; choose from {', '.join(ACTIVATIONS)}")
        if backend != "auto":
            backends.get(backend)
        if not 0 <= dropout < 1:
            raise ValueError(f"Experts: dropout {dropout} must be at least 0 and below 1")
        self.num_experts, self.dim, self.hidden = num_experts, dim, hidden
        self.activation, self.bias, self.backend, self.recompute = activation, bias, backend, recompute
        self.dropout = dropout
        self.gated = ACTIVATIONS[activation][1]

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        self.up_name = "gate_up_proj" if self.gated else "up_proj"
        rows = 2 * hidden if self.gated else hidden
        self.register_parameter(self.up_name, parameter(num_experts, rows, dim))
        self.down_proj = parameter(num_experts, dim, hidden)
        self.register_parameter(f"{self.up_name}_bias", parameter(num_experts, rows) if bias else None)
        self.down_proj_bias: nn.Parameter | None
        self.register_parameter("down_proj_bias", parameter(num_experts, dim) if bias else None)
        self.reset_parameters()

    def reset_parameters(self, up_std: float | None = None, down_std: float | None = None) -> None:
        """Draw weights from normal distributions (default: fan-in, 1/sqrt(d) and 1/sqrt(f)); biases become zero."""
        weights = self.weights
        nn.init.normal_(weights.up, std=self.dim**-0.5 if up_std is None else up_std)
        nn.init.normal_(weights.down, std=self.hidden**-0.5 if down_std is None else down_std)
        for bias in (weights.up_bias, weights.down_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    @property
    def weights(self) -> Weights:
        """The parameters as the backends take them."""
        return Weights(
            up=getattr(self, self.up_name),
            down=self.down_proj,
            up_bias=getattr(self, f"{self.up_name}_bias"),
            down_bias=self.down_proj_bias,
            activation=self.activation,
        )

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """Sum over each token's experts of weight times expert output: x (T, d) -> (T, d).

        Raises:
            ValueError: where x is not (T, d) of this layer's width and the routing's number of tokens, or its dtype or
                device differs from the parameters'.
        """
        x, weights = self.checked(x, routing)
        return self.compute(x, weights, routing)

    def checked(self, x: Tensor, routing: Routing) -> tuple[Tensor, ExpertWeights]:
        """x and the weights as they are computed with, in the dtype of autocast where it is on; raises as `forward`."""
        weights: ExpertWeights = self.weights
        _must_fit(self, x, routing)
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weights = x.to(dtype), weights.to(dtype)
        if weights.device.type == "meta":
            raise ValueError("Experts: the weights are on the meta device, without values; load or draw them first")
        if x.dtype != weights.dtype or x.device != weights.device:
            raise ValueError(
                f"Experts: x is {x.dtype} on {x.device}, the parameters are {weights.dtype} on {weights.device}; "
                "convert one to the other, or use torch.autocast"
            )
        if isinstance(weights, Weights) and is_traceable_wrapper_subclass(weights.up) and not is_compiling():
            raise ValueError(
                f"Experts: the parameters are of type {type(weights.up).__name__}, in which the backends cannot look. "
                "Sharded ones are gathered by the module that shards them: call that one"
            )
        return x, weights

    def compute(self, x: Tensor, weights: ExpertWeights, routing: Routing) -> Tensor:
        """x (T, d), weights and a routing over their experts to the output (T, d), by the layer's backend."""
        if self.training and self.dropout:
            return reference(x, weights, routing, self.recompute, self.dropout)
        backend, _ = backends.choose(self.backend, x, weights, routing)
        return backend.run(x, weights, routing, recompute=self.recompute)

    def explain(self, num_tokens: int) -> str:
        """The backend that a forward of T = num_tokens would run, how it works, and why it is chosen."""
        weights: ExpertWeights = self.weights
        probe = torch.empty(num_tokens, self.dim, dtype=weights.dtype, device=weights.device)
        backend, why = backends.choose(self.backend, probe, weights)
        return f"Backend {backend.name}: {backend.summary}; chosen because {why}."

    def extra_repr(self) -> str:
        """The sizes, for `print(model)`."""
        return (
            f"num_experts={self.num_experts}, dim={self.dim}, hidden={self.hidden}, activation={self.activation!r}, "
            f"backend={self.backend!r}"
        )


class QuantisedExperts(RoutedExperts):
    """E feed-forward networks with matrices in codes of 8 or 4 bits: for inference, in any dtype that x comes in.

    Args:
        num_experts, dim, hidden, activation, bias, backend: as of `Experts`.
        bits: 8 or 4, or one of them for each expert.
        group: in 4 bits, how many neighbours of a row share a scale: 32 or 64.
        zero_point: in 4 bits, whether a group's codes have a zero of their own, or it is in the middle.
        device: of the buffers.
        dtype: of the biases.

    The buffers are those of `shunter.experts.quantised.Packed`, for up and down; they are zeros until they are loaded
    or `of` fills them. A backward that comes to them raises UserError.

    Raises:
        UserError: for other bits and groups.
    """

    def __init__(
        self,
        num_experts: int,
        dim: int,
        hidden: int,
        activation: str = "swiglu",
        bias: bool = False,
        bits: int | Sequence[int] = 4,
        group: int = 32,
        zero_point: bool = False,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_experts, self.dim, self.hidden = num_experts, dim, hidden
        self.activation, self.bias, self.backend = activation, bias, backend
        self.coding = Coding(check_bits(bits, num_experts, group), group, zero_point)
        rows = 2 * hidden if ACTIVATIONS[activation][1] else hidden
        self.sizes = {"up": (rows, dim), "down": (dim, hidden)}
        for name, size in self.sizes.items():
            codes, scales = (starts[-1] for starts in self.coding.starts(*size))
            kinds = {"codes": (codes, torch.uint8), "scale": (scales, torch.int16)}
            kinds["zero"] = (scales if zero_point else 0, torch.uint8)
            for part, (numel, kind) in kinds.items():
                self.register_buffer(f"{name}_{part}", torch.zeros(numel, dtype=kind, device=device))
            values = torch.zeros(num_experts, size[0], dtype=dtype, device=device) if bias else None
            self.register_buffer(f"{name}_bias", values)

    @classmethod
    def of(
        cls,
        weights: Weights,
        bits: int | Sequence[int] = 4,
        group: int = 32,
        zero_point: bool = False,
        importance: tuple[Tensor | None, Tensor | None] = (None, None),
        backend: str = "auto",
    ) -> QuantisedExperts:
        """The experts of stacked weights, quantised.

        Args:
            weights: `Experts.weights`, for instance.
            bits, group, zero_point, backend: as of the class.
            importance: of the columns of up (E, d) and of down (E, f); see `shunter.experts.quantised.pack`.

        Raises:
            UserError: for other bits and groups, and for weights that are not finite.
        """
        sizes = weights.num_experts, weights.dim, weights.hidden
        biased = weights.up_bias is not None
        found = cls(*sizes, weights.activation, biased, bits, group, zero_point, backend, device="meta")
        for name, counts in zip(("up", "down"), importance, strict=True):
            packed = pack(getattr(weights, name), found.coding, counts)
            found.register_buffer(f"{name}_codes", packed.codes)
            found.register_buffer(f"{name}_scale", packed.scale)
            found.register_buffer(f"{name}_zero", packed.zero)
            bias = getattr(weights, f"{name}_bias")
            found.register_buffer(f"{name}_bias", None if bias is None else bias.detach().clone())
        return found

    @property
    def nbytes(self) -> int:
        """Of the matrices: codes, scales and zeros."""
        weights = self.weights(torch.float32)
        return weights.up.nbytes + weights.down.nbytes

    def finite(self) -> bool:
        """Whether every scale is a finite number, and so every weight."""
        scales = (self.get_buffer(f"{name}_scale").view(torch.bfloat16) for name in self.sizes)
        return all(bool(scale.isfinite().all()) for scale in scales)

    def weights(self, dtype: torch.dtype) -> QuantisedWeights:
        """The experts as the backends take them, decoded into a dtype."""

        def packed(name: str) -> Packed:
            codes, scale, zero = (self.get_buffer(f"{name}_{part}") for part in ("codes", "scale", "zero"))
            return Packed(codes, scale, zero, *self.sizes[name], self.coding)

        up_bias, down_bias = (self.get_buffer(f"{name}_bias") if self.bias else None for name in self.sizes)
        return QuantisedWeights(packed("up"), packed("down"), up_bias, down_bias, self.activation, dtype)

    @torch.compiler.disable
    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """Sum over each token's experts of weight times expert output: x (T, d) -> (T, d); no gradient passes.

        Raises:
            ValueError: where x is not (T, d) of this layer's width, or on another device than the codes.
        """
        _must_fit(self, x, routing)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        weights = self.weights(x.dtype)
        if x.device != weights.device:
            raise ValueError(f"Experts: x is on {x.device}, the quantised experts are on {weights.device}; move one")
        with torch.no_grad():
            out = backends.choose(self.backend, x, weights, routing)[0].run(x, weights, routing)
        return without_backward(out, x, routing.weight)

    def explain(self, num_tokens: int) -> str:
        """The backend that a forward of T = num_tokens in float32 would run, how it works, and why it is chosen."""
        weights = self.weights(torch.float32)
        probe = torch.empty(num_tokens, self.dim, device=weights.device)
        with torch.no_grad():
            backend, why = backends.choose(self.backend, probe, weights)
        return f"Backend {backend.name}: {backend.summary}; in codes of {self._bits()} bits; chosen because {why}."

    def _bits(self) -> str:
        return " and ".join(map(str, sorted(set(self.coding.bits), reverse=True)))

    def extra_repr(self) -> str:
        """The sizes, for `print(model)`."""
        return (
            f"num_experts={self.num_experts}, dim={self.dim}, hidden={self.hidden}, activation={self.activation!r}, "
            f"bits={self._bits()}, group={self.coding.group}, zero_point={self.coding.zero_point}"
        )
