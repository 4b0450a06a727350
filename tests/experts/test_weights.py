"""Experts whose matrices come one at a time, as quantised, sharded or offloaded ones do."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from shunter import MoE
from shunter.experts import ACTIVATIONS, Experts, ExpertWeights, choose
from shunter.experts.choice import get
from shunter.experts.weights import Matrices
from tests.helpers import random_routing, random_weights


class OnDisk(ExpertWeights):
    """Matrices that are read when they are asked for."""

    def __init__(self, weights, folder):
        self.path = folder / "experts.safetensors"
        parts = {"up": weights.up, "down": weights.down, "up_bias": weights.up_bias, "down_bias": weights.down_bias}
        self.names = [name for name, value in parts.items() if value is not None]
        save_file({name: parts[name].detach() for name in self.names}, self.path)
        self.num_experts, self.dim, self.hidden = weights.num_experts, weights.dim, weights.hidden
        self.activation, self.dtype, self.device = weights.activation, weights.dtype, weights.device
        self.read = []

    def expert(self, e):
        self.read.append(e)
        with safe_open(self.path, "pt") as file:
            found = {name: file.get_slice(name)[e].to(self.dtype) for name in self.names}
        return Matrices(*(found.get(name) for name in Matrices._fields))

    def to(self, dtype):
        self.dtype = dtype
        return self


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_backends_ask_for_the_experts_that_have_tokens_alone(activation, bias, tmp_path):
    weights = random_weights(6, 5, 4, activation, bias)
    routing, x = random_routing(9, 3), torch.randn(9, 5, dtype=torch.float64)
    routing = type(routing)(routing.token, 2 * routing.expert, routing.weight, 9, 6)
    lazy = OnDisk(weights, tmp_path)
    with torch.no_grad():
        expected = get("reference").run(x, weights, routing)
        # Not to the bit: products may go another way through memory that begins elsewhere.
        assert torch.allclose(get("reference").run(x, lazy, routing), expected, atol=1e-12)
        assert lazy.read == routing.counts.nonzero().flatten().tolist()
        assert torch.allclose(get("decode").run(x, lazy, routing), expected, atol=1e-12)
        backend, why = choose("auto", x, lazy)
    assert backend.name == "decode" and "one expert at a time" in why


def test_many_tokens_and_gradients_go_to_the_reference(tmp_path):
    lazy = OnDisk(random_weights(4, 6, 5, dtype=torch.float32), tmp_path)
    x = torch.randn(99, 6)
    assert choose("auto", x, lazy)[0].name == "reference"
    assert choose("auto", x[:3].requires_grad_(), lazy)[0].name == "reference"
    for name in ("numba", "padded", "grouped_mm", "triton"):
        with pytest.raises(ValueError, match=f"backend '{name}' cannot run this: .*OnDisk gives one expert at a time"):
            choose(name, x, lazy)


def test_a_layer_of_such_experts(tmp_path):
    class Offloaded(Experts):
        @property
        def weights(self):
            return self.lazy

    plain = MoE(6, 8, 4, "topk", top_k=2).eval()
    experts = Offloaded.__new__(Offloaded)
    experts.lazy = OnDisk(plain.experts.weights, tmp_path)
    vars(experts).update(vars(plain.experts))
    layer = MoE(6, 8, 4, plain.router, ready_experts=experts).eval()
    x = torch.randn(3, 6)
    with torch.no_grad():
        assert torch.allclose(layer(x), plain(x), atol=1e-5)
        assert "Backend decode" in layer.explain(8)
    x.requires_grad_()
    layer(x).sum().backward()
    grad, x.grad = x.grad, None
    plain(x).sum().backward()
    assert torch.allclose(grad, x.grad, atol=1e-5)


def test_sharded_parameters_are_refused_in_words():
    from torch.testing._internal.two_tensor import TwoTensor

    experts = Experts(2, 3, 4)
    experts.gate_up_proj = torch.nn.Parameter(TwoTensor(torch.randn(2, 8, 3), torch.randn(2, 8, 3)))
    with pytest.raises(ValueError, match="the parameters are of type TwoTensor"):
        experts(torch.randn(5, 3), random_routing(5, 2, dtype=torch.float32))
