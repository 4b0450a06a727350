"""Routers and experts inside of modules that bring, adapt or copy their weights: each call goes through the module."""

import copy

import accelerate
import pytest
import torch
from torch import nn

import shunter
from shunter.moe import MoE, RoutedLayer, aux_loss, update_routers

from ..hf.conftest import BUILD


class Copies(nn.Module):
    """The module and the copy that is trained in its place, whose attributes it hands on, as adapters keep them."""

    def __init__(self, module):
        super().__init__()
        self.original = module
        self.trained = copy.deepcopy(module)

    def forward(self, *args):
        return self.trained(*args)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("trained"), name)


def test_the_copy_that_is_called_is_the_one_that_learns():
    layer = MoE(8, 16, 4, "deepseek", top_k=2).train()
    layer.router = Copies(layer.router)
    out = layer(torch.randn(50, 8))
    (out.square().mean() + aux_loss(layer)).backward()
    update_routers(layer)
    assert layer.decider is layer.router.trained
    assert layer.router.trained.weight.grad is not None and layer.router.original.weight.grad is None
    assert layer.router.trained.selection_bias.abs().sum() > 0
    assert layer.router.original.selection_bias.abs().sum() == 0


def test_hooks_on_a_router_see_each_decision():
    layer = MoE(8, 16, 4, "topk", top_k=2)
    seen = []
    layer.router.register_forward_hook(lambda router, args, output: seen.append(output[1].token.numel()))
    for tokens in (3, 5):
        layer(torch.randn(tokens, 8))
    assert seen == [6, 10]


@pytest.mark.parametrize("tokens", [4, 100])
def test_a_router_learns_among_frozen_experts_and_inputs(tokens):
    layer = MoE(8, 16, 4, "topk", top_k=2).double()
    layer.experts.requires_grad_(False)
    x = torch.randn(tokens, 8, dtype=torch.float64)

    def loss(weight):
        return torch.func.functional_call(layer, {"router.weight": weight}, (x,)).square().sum()

    weight = layer.router.weight
    (grad,) = torch.autograd.grad(loss(weight), weight)
    step = torch.randn_like(weight)
    with torch.no_grad():
        ahead, behind = loss(weight + 1e-6 * step), loss(weight - 1e-6 * step)
    assert torch.allclose((grad * step).sum(), (ahead - behind) / 2e-6, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("part", ["router", "experts", "whole"])
@pytest.mark.parametrize("router", ["topk", "hash", "soft_moe", "reinforce"])
def test_weights_without_values_are_an_error(router, part):
    if (router, part) == ("hash", "router"):
        pytest.skip("its table alone")
    options = {"vocab_size": 50} if router == "hash" else {}
    layer = MoE(8, 16, 4, router, **options)
    {"router": layer.router, "experts": layer.experts, "whole": layer}[part].to("meta")
    with pytest.raises(ValueError, match="on the meta device"):
        layer(torch.randn(2, 3, 8), token_ids=torch.zeros(2, 3, dtype=torch.int64))


@pytest.mark.parametrize("router", ["topk", "deepseek", "hash"])
@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_an_offloaded_model_has_the_loss_of_training(offload, router, tmp_path):
    options = {} if router == "hash" else {"top_k": 2}
    model = shunter.sparsify(BUILD["llama"](), 4, router, **options).train()
    ids = torch.randint(1, 50, (2, 6))
    expected = model(ids, labels=ids).loss
    run = accelerate.cpu_offload if offload == "cpu" else accelerate.disk_offload
    where = {} if offload == "cpu" else {"offload_dir": str(tmp_path)}
    run(model, execution_device=torch.device("cpu"), offload_buffers=True, **where)
    assert torch.equal(model(ids, labels=ids).loss, expected)


def test_every_layer_finds_its_router():
    for layer in (MoE(8, 16, 4), MoE(8, 16, 4, "hme")):
        assert isinstance(layer, RoutedLayer) and layer.decider is layer.router
