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


@pytest.mark.parametrize(
    "name, dimension", [("up", 0), ("up", 1), ("up", 2), ("down", 0), ("down", 1), ("down", 2), ("x", 0), ("x", 1)]
)
def test_offsets_beyond_two_to_the_31_in_the_triton_kernels(name, dimension):
    """One tile of a tensor spread so wide that offsets of 32 bits would wrap; few of its pages are ever touched."""
    triton = get("triton")
    near = {"x": torch.randn(9, 9), "up": torch.randn(9, 18, 9), "down": torch.randn(9, 9, 9)}
    near = {key: value.half() for key, value in near.items()}
    routing = Routing.from_topk(torch.full((9, 1), 8), torch.ones(9, 1), 9)
    if refusal := triton.refuses(near["x"], Weights(near["up"], near["down"])):
        pytest.skip(refusal)
    tensor, apart = near[name], 2**28  # which 32 bits hold, but not eight times
    strides = [apart if i == dimension else stride for i, stride in enumerate(tensor.stride())]
    room = (tensor.shape[dimension] - 1) * apart + tensor.numel()
    far = near | {name: torch.empty(room, dtype=torch.float16).as_strided(tensor.shape, strides).copy_(tensor)}
    with torch.no_grad():
        found = [triton.run(given["x"], Weights(given["up"], given["down"]), routing) for given in (near, far)]
    assert torch.equal(*found)


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
