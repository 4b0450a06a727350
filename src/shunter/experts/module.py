"""The experts as a module: what a layer asks of them, and those with stacked parameters and a choice of backends."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..routing import Routing
from . import choice as backends
from .activations import ACTIVATIONS
from .backends.reference import reference
from .weights import ExpertWeights, Weights

__all__ = ["Experts", "RoutedExperts"]


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
        if x.shape != (routing.num_tokens, self.dim):
            raise ValueError(f"Experts: x has shape {tuple(x.shape)}; it must be ({routing.num_tokens}, {self.dim})")
        if routing.num_experts != self.num_experts:
            raise ValueError(f"Experts: the routing has {routing.num_experts} experts, the layer {self.num_experts}")
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
