"""Bugs that sparse-expert software is known to have had, each as the property that it broke."""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from shunter import MoE, Routing, update_routers
from shunter.experts import Weights
from shunter.experts.choice import get
from shunter.routers.registry import create, find
from tests.properties.test_ranks import STATEFUL

KNOWN = {"task": 2, "domain": 2}


@pytest.mark.parametrize("name", STATEFUL)
def test_padding_moves_no_state_of_a_router(name):
    """As selection biases moved by the load of padding."""
    layer = MoE(6, 5, 4, create(name, 6, 4, **STATEFUL[name])).train()
    twin = copy.deepcopy(layer)
    x, real = torch.randn(40, 6), torch.arange(40) < 25
    known = {key: torch.randint(size, (40,)) for key, size in KNOWN.items() if key in find(name).needs}
    with torch.random.fork_rng():
        layer(x, mask=real, **known)
    twin(x[real], **{key: value[real] for key, value in known.items()})
    for one in (layer, twin):
        update_routers(one)
    for (key, value), other in zip(layer.router.named_buffers(), twin.router.buffers(), strict=True):
        assert torch.allclose(value, other), key


def test_a_layer_without_a_selection_bias_does_not_keep_others_from_theirs():
    biased, plain = (MoE(6, 5, 4, "topk", top_k=2, selection_bias=bias).train() for bias in (True, False))
    model = torch.nn.Sequential(plain, biased, copy.deepcopy(plain), copy.deepcopy(biased))
    model(torch.randn(50, 6))
    update_routers(model)
    for layer in (model[1], model[3]):
        counts = layer.routing.demand.float()
        expected = layer.router.bias_update_rate * (counts.mean() - counts).sign()
        assert torch.equal(layer.router.selection_bias, expected)


@pytest.mark.parametrize("experts", [255, 256, 257, 300, 32767, 32768, 40000, 70000])
def test_numbers_of_experts_that_no_small_integer_holds(experts):
    """As indices kept in 8 or 16 bits."""
    tokens, k = 50, 3
    index = torch.stack([torch.randperm(experts)[:k] for _ in range(tokens)])
    index[0, 0] = experts - 1
    index[0, 1:] = torch.tensor([0, 1])
    weight = torch.rand(tokens, k)
    routing = Routing.from_topk(index, weight, experts)
    triples = sorted((int(e), t, float(w)) for t in range(tokens) for e, w in zip(index[t], weight[t], strict=True))
    found = zip(routing.expert.tolist(), routing.token.tolist(), routing.weight.tolist(), strict=True)
    assert list(found) == triples
    assert int(routing.counts.sum()) == tokens * k and routing.counts.numel() == experts


def test_offsets_beyond_two_to_the_31_in_the_triton_kernels():
    """One tile far into a tensor, of which only that much is ever touched: offsets of 32 bits would wrap."""
    triton = get("triton")
    x, chosen = torch.randn(3, 8).half(), torch.full((3, 1), 8)
    routing = Routing.from_topk(chosen, torch.ones(3, 1), 9)
    near = Weights(torch.randn(9, 10, 8).half(), torch.randn(9, 8, 5).half())
    if refusal := triton.refuses(x, near):
        pytest.skip(refusal)
    apart = 2**28  # which 32 bits hold, but not eight times
    up = torch.empty(8 * apart + 80, dtype=torch.float16).as_strided((9, 10, 8), (apart, 8, 1))
    up[8] = near.up[8]
    with torch.no_grad():
        found = triton.run(x, Weights(up, near.down), routing)
        assert torch.equal(found, triton.run(x, near, routing))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_random_order_of_capacity_is_the_same_again_under_checkpointing(reentrant):
    layer = MoE(6, 5, 4, "topk", top_k=2, capacity_factor=0.5, capacity_order="random").double().train()
    x = torch.randn(40, 6, dtype=torch.float64)
    gradients = []
    for run in (layer, lambda y: checkpoint(layer, y, use_reentrant=reentrant)):
        given = x.clone().requires_grad_()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            out = run(given)
            kept = layer.routing.dense()
            torch.rand(7)  # somebody else draws before the backward
            out.square().sum().backward()
        gradients.append(given.grad)
        assert torch.equal(layer.routing.dense(), kept)
    assert torch.equal(*gradients)
