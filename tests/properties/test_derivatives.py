"""Derivatives of whole layers: second ones, forward mode, torch.func; right, or refused in one line."""

import copy

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jvp, vmap

from shunter.moe import MoE, aux_loss, update_routers
from shunter.routers.registry import create, find, names

KNOWN = {"token_ids": 50, "task": 2, "domain": 4, "language": 4, "modality": 2}
LEFT_OUT = {"thor", "bernoulli", "speech", "forced"}  # they draw, or need what another network decides


def _layer(router, backend):
    options = dict(find(router).example_options) | ({"top_k": 2} if router == "deepseek" else {})
    layer = MoE(6, 5, 4, create(router, 6, 4, **options), backend).double().eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


def _known(layer):
    return {name: torch.randint(KNOWN[name], (2, 3)) for name in layer.decider.required if name in KNOWN}


@pytest.mark.parametrize("router", [name for name in names() if name not in LEFT_OUT])
def test_second_derivatives_of_a_layer_are_those_of_the_reference(router):
    """Where the combine weights are made of the very rows that the experts take."""
    fast, slow = _layer(router, "padded"), None
    slow = copy.deepcopy(fast)
    slow.experts.backend = "reference"
    known = _known(fast)
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    second = [torch.autograd.functional.hessian(lambda a, m=m: m(a, **known).square().sum(), x) for m in (fast, slow)]
    assert torch.allclose(*second, rtol=1e-9, atol=1e-9 * float(second[1].abs().max() + 1))
    penalties = []
    for layer in (fast, slow):
        given = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(layer(given, **known).square().sum(), given, create_graph=True)
        parameters = [p for p in layer.parameters() if p.requires_grad]
        penalties.append(torch.autograd.grad(gradient.square().sum(), parameters, allow_unused=True))
    for one, other in zip(*penalties, strict=True):
        none = torch.zeros(())
        one, other = (none if value is None else value for value in (one, other))
        assert torch.allclose(one, other, atol=1e-9 * float(other.abs().max() + 1))


@pytest.mark.parametrize("router", ["topk", "switch", "soft_moe", "hash", "deepseek"])
def test_forward_mode_and_functional_derivatives(router):
    layer = _layer(router, "auto")
    known = _known(layer)
    x, tangent = torch.randn(2, 2, 3, 6, dtype=torch.float64)
    given = x.clone().requires_grad_()
    out = layer(given, **known)
    cotangent = torch.randn_like(out)
    (pulled,) = torch.autograd.grad(out, given, cotangent)
    _, pushed = jvp(lambda a: layer(a, **known), (x,), (tangent,))
    assert torch.allclose((pushed * cotangent).sum(), (pulled * tangent).sum())
    with forward_ad.dual_level():
        dual = layer(forward_ad.make_dual(x, tangent), **known)
        assert torch.allclose(forward_ad.unpack_dual(dual).tangent, pushed)
    small = {name: value[:1, :2] for name, value in known.items()}

    def energy(a):
        return layer(a, **small).square().sum()

    assert torch.allclose(hessian(energy)(x[:1, :2]), torch.autograd.functional.hessian(energy, x[:1, :2]))


def test_a_functional_step_trains_and_moves_the_state_of_the_router():
    layer = MoE(6, 5, 4, "deepseek", top_k=2).double().train()
    plain = copy.deepcopy(layer)
    x = torch.randn(20, 6, dtype=torch.float64)

    def loss(parameters):
        out = functional_call(layer, parameters, (x,))
        return out.square().mean() + aux_loss(layer)

    found = grad(loss)(dict(layer.named_parameters()))
    (plain(x).square().mean() + aux_loss(plain)).backward()
    for name, parameter in plain.named_parameters():
        assert torch.allclose(found[name], parameter.grad), name
    update_routers(layer)
    update_routers(plain)
    assert torch.equal(layer.router.selection_bias, plain.router.selection_bias)
    assert torch.equal(layer.routing.dense(), plain.routing.dense()), "what is kept outlives the transform"


@pytest.mark.parametrize("over", ["samples", "parameters"])
def test_vmap_is_refused_in_one_line(over):
    layer = _layer("topk", "auto")
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    with pytest.raises(ValueError, match="vmap cannot go over a layer") as caught:
        if over == "samples":
            vmap(layer)(x)
        else:
            weights = torch.randn(3, *layer.router.weight.shape, dtype=torch.float64)
            vmap(lambda w: functional_call(layer, {"router.weight": w}, (x[0],)))(weights)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("backend", ["auto", "padded", "grouped_mm"])
def test_gradients_of_several_outputs_at_once(backend):
    dtype = torch.float32 if backend == "grouped_mm" else torch.float64
    layer = _layer("topk", backend).to(dtype)
    x = torch.randn(5, 6, dtype=dtype, requires_grad=True)
    inputs = (x, *layer.parameters())
    out, each = layer(x), torch.randn(3, 5, 6, dtype=dtype)
    found = torch.autograd.grad(out, inputs, each, is_grads_batched=True, retain_graph=True)
    expected = zip(*(torch.autograd.grad(out, inputs, one, retain_graph=True) for one in each), strict=True)
    for value, one_by_one in zip(found, expected, strict=True):
        torch.testing.assert_close(value, torch.stack(one_by_one), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["padded", "grouped_mm", "numba", "decode"])
def test_a_backend_that_was_asked_for_refuses_transforms_in_one_line(backend):
    layer, x = _layer("topk", backend), torch.randn(5, 6, dtype=torch.float64)
    for run in (lambda: grad(lambda a: layer(a).sum())(x), lambda: jvp(layer, (x,), (x,))):
        with pytest.raises(ValueError, match=f"backend '{backend}' cannot run this: .*; take \"auto\" or") as said:
            run()
        assert "\n" not in str(said.value)
