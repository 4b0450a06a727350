"""Experts that a layer takes: a wrapper that provides what `RoutedExperts` states, and nothing else."""

import pytest
import torch

from shunter import MoE
from shunter.experts import ACTIVATIONS, RoutedExperts
from shunter.hf.checkpoints.layouts import Sizes
from shunter.hf.sparsifying import describe_layers
from tests.helpers import by_tokens


class Elsewhere(RoutedExperts):
    """Without parameters, as where the matrices are on other ranks."""

    def __init__(self, experts):
        super().__init__()
        self.num_experts, self.dim, self.hidden = experts.num_experts, experts.dim, experts.hidden
        self.activation, self.bias = experts.activation, experts.weights.up_bias is not None
        self.call = lambda x, routing: by_tokens(x, experts.weights, routing.dense())

    def forward(self, x, routing):
        return self.call(x, routing)

    def explain(self, num_tokens):
        return f"Elsewhere, {num_tokens} tokens."


@pytest.mark.parametrize("shared", [0, 2])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_layer_asks_a_wrapper_for_what_is_stated_alone(activation, bias, shared):
    plain = MoE(6, 5, 4, "topk", top_k=2, activation=activation, bias=bias, num_shared_experts=shared).double().train()
    layer = MoE(
        6, 5, 4, plain.router, activation=activation, bias=bias, num_shared_experts=shared,
        ready_experts=Elsewhere(plain.experts),
    ).double().train()  # fmt: skip
    if shared:
        layer.shared_experts = plain.shared_experts
    x = torch.randn(3, 7, 6, dtype=torch.float64)
    assert torch.allclose(layer(x), plain(x))
    for mine, theirs in zip(layer.explain(9).splitlines(), plain.explain(9).splitlines(), strict=True):
        assert mine == ("Elsewhere, 9 tokens." if theirs.startswith("Backend ") else theirs)
    assert layer.flops_per_token(7) == plain.flops_per_token(7)
    products = sum(p.numel() for p in plain.experts.parameters() if p.dim() == 3) / 4 * 2
    products += sum(p.numel() for p in plain.shared_experts.parameters() if p.dim() == 3) if shared else 0
    assert layer.flops_per_token(7)["experts"] == pytest.approx(2 * products)
    vars(plain.router)["options"] = {"top_k": 2}
    assert describe_layers(torch.nn.Sequential(layer)) == describe_layers(torch.nn.Sequential(plain))
    assert Sizes.of(layer) == Sizes.of(plain) and Sizes.of(layer).bias is bias
