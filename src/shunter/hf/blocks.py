"""Where a Hugging Face model keeps its dense feed-forward blocks, read off their structure, not their class names.

A new architecture is one more function in `LAYOUTS`, or none: any block with one of these shapes is known.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from ..experts import ACTIVATIONS

__all__ = ["LAYOUTS", "FeedForward", "find_feed_forwards"]


@dataclass(frozen=True)
class FeedForward:
    """A dense feed-forward block as it stands in a model.

    Args:
        path: the module that an `MoE` takes the place of, dotted.
        up: (2f, d) where the activation gates (the gate's rows first), else (f, d).
        down: (d, f).
        up_bias: (2f,) or (f,), or None.
        down_bias: (d,), or None.
        activation: a key of `shunter.experts.ACTIVATIONS`.
        linears: the modules that hold the matrices: gate and up (or up alone), then down.
        second: where the block is spread over two modules, the second linear map, which the `MoE` makes superfluous.
        dropout: the probability of the dropout at the block's end.
    """

    path: str
    up: Tensor
    down: Tensor
    up_bias: Tensor | None
    down_bias: Tensor | None
    activation: str
    linears: tuple[nn.Module, ...]
    second: str | None = None
    dropout: float = 0.0

    @property
    def dim(self) -> int:
        """d, the model width."""
        return self.down.shape[0]

    @property
    def hidden(self) -> int:
        """f, the width of the block."""
        return self.down.shape[1]


_NAMES = {
    "SiLUActivation": "silu",
    "SiLU": "silu",
    "GELUActivation": "gelu",
    "GELU": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "AccurateGELUActivation": "gelu_tanh",
    "ReLU": "relu",
    "silu": "silu",
    "gelu": "gelu",
    "relu": "relu",
}

_GATED = {"silu": "swiglu", "gelu": "geglu", "gelu_tanh": "geglu_tanh", "relu": "reglu"}


def known_activation(function: object, gated: bool) -> str | None:
    """The name of an activation in a model; None where `shunter.experts` does not have it."""
    if isinstance(function, str):
        function = ACT2FN[function]
    name = _NAMES.get(getattr(function, "__name__", type(function).__name__))
    if name is None:
        return None
    name = _GATED[name] if gated else name
    # The class name is a hint: what counts is that it computes the same.
    probe = torch.linspace(-6, 6, 97, device="cpu", dtype=torch.float32)
    ours = ACTIVATIONS[name][0](probe)
    return name if callable(function) and torch.allclose(function(probe), ours, atol=1e-6) else None


def _matrix(linear: nn.Module) -> Tensor:
    """The weight (out, in) of a Linear or of GPT-2's transposed Conv1D."""
    weight = linear.weight
    assert isinstance(weight, Tensor)
    return weight.T if isinstance(linear, Conv1D) else weight


def _bias(*linears: nn.Module) -> Tensor | None:
    biases = [linear.bias for linear in linears if isinstance(linear.bias, Tensor)]
    return torch.cat(biases) if len(biases) == len(linears) else None


def _block(
    path: str,
    ups: list[nn.Module],
    down: nn.Module,
    activation: object,
    second: str | None = None,
    dropout: float = 0.0,
) -> FeedForward | None:
    known = known_activation(activation, gated=len(ups) == 2)
    if known is None or not all(isinstance(linear, nn.Linear | Conv1D) for linear in [*ups, down]):
        return None
    matrices = [_matrix(up) for up in ups]
    up = matrices[0] if len(matrices) == 1 else torch.cat(matrices)
    return FeedForward(path, up, _matrix(down), _bias(*ups), _bias(down), known, (*ups, down), second, dropout)


def _first(module: nn.Module, *names: str) -> object:
    return next((getattr(module, name) for name in names if hasattr(module, name)), None)


def _gated(path: str, module: nn.Module) -> FeedForward | None:
    """Llama, Qwen, Mistral, Gemma, …: down_proj(act(gate_proj(x)) * up_proj(x))."""
    if not all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj")):
        return None
    activation = _first(module, "act_fn", "activation_fn", "act")
    ups = [getattr(module, name) for name in ("gate_proj", "up_proj")]
    return _block(path, ups, getattr(module, "down_proj"), activation)  # noqa: B009 (a Module's attribute is untyped)


def _two_linears(path: str, module: nn.Module) -> FeedForward | None:
    """GPT-2 (c_fc, c_proj), T5 (wi, wo; gated wi_0, wi_1, wo), ViT and CLIP (fc1, fc2)."""
    for ups, down in ((["c_fc"], "c_proj"), (["wi_0", "wi_1"], "wo"), (["wi"], "wo"), (["fc1"], "fc2")):
        if all(hasattr(module, name) for name in [*ups, down]):
            activation = _first(module, "act", "activation_fn", "act_fn", "activation")
            last = getattr(module, "dropout", None)
            end = last.p if isinstance(last, nn.Dropout) and down != "wo" else 0.0
            linears = [getattr(module, name) for name in ups]
            return _block(path, linears, getattr(module, down), activation, dropout=end)
    return None


def _bert(path: str, module: nn.Module) -> FeedForward | None:
    """BERT and its kin: a layer's intermediate.dense, activation, output.dense; dropout and norm stay in output."""
    up = getattr(getattr(module, "intermediate", None), "dense", None)
    down = getattr(getattr(module, "output", None), "dense", None)
    if up is None or down is None:
        return None
    activation = getattr(module.intermediate, "intermediate_act_fn", None)
    return _block(f"{path}.intermediate", [up], down, activation, second=f"{path}.output.dense")


LAYOUTS: list[Callable[[str, nn.Module], FeedForward | None]] = [_gated, _two_linears, _bert]


def find_feed_forwards(model: PreTrainedModel) -> list[list[FeedForward]]:
    """The dense feed-forward blocks of a model, a list for each stack of layers (an encoder, a decoder), in order.

    Raises:
        ValueError: where the model already has experts, or where no block is known: the error lists what was looked at.
    """
    stacks: dict[str, list[FeedForward]] = {}
    looked_at: list[str] = []
    for path, module in model.named_modules():
        numbered = [i for i, part in enumerate(path.split(".")) if part.isdigit()]
        if not numbered:
            continue
        if hasattr(module, "experts"):
            raise ValueError(f"sparsify: {type(model).__name__} already has experts, at {path}.experts; it is sparse")
        found = next((block for layout in LAYOUTS if (block := layout(path, module)) is not None), None)
        if found is not None:
            stacks.setdefault(".".join(path.split(".")[: numbered[0]]), []).append(found)
        elif any(isinstance(child, nn.Linear | Conv1D) for child in module.children()):
            looked_at.append(f"{path} ({type(module).__name__})")
    if not stacks:
        looked_at.sort(key=lambda line: [int(part) for part in line.split(" ")[0].split(".") if part.isdigit()])
        raise ValueError(
            f"sparsify: no feed-forward block is known in {type(model).__name__}. Looked at: "
            f"{', '.join(looked_at[:8]) or 'nothing'}. Add its layout to shunter.hf.blocks.LAYOUTS, or put "
            "shunter.MoE into the model yourself"
        )
    return list(stacks.values())
