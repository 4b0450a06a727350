"""Soft MoE against its equations, sequence by sequence and slot by slot."""

import math

import pytest
import torch

import shunter
from shunter import MoE
from shunter.context import Context
from shunter.routers.registry import create

from ..helpers import by_tokens
from . import contract

SORTS = [{}, {"slots_per_expert": 3}, {"normalize": False, "slots_per_expert": 2, "z_loss": 0.1}]


@pytest.mark.parametrize("check", contract.CHECKS)
@pytest.mark.parametrize("options", SORTS)
def test_contract(options, check):
    check("soft_moe", options, lambda tokens: Context(sequence=torch.arange(tokens) // 5))


def _layer(slots, dtype=torch.float64, **options):
    layer = MoE(6, 5, 4, router="soft_moe", slots_per_expert=slots, activation="geglu", dtype=dtype, **options)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    return layer


def _by_equations(layer, x):
    """One sequence x (L, d): X~ = D^T X, Y~_s = f_e(X~_s), Y = C Y~, with D, C softmaxes over columns and rows."""
    router, slots = layer.router, layer.router.slots_per_expert
    phi = router.weight
    if router.scale is not None:
        unit = x / x.square().sum(-1, keepdim=True).sqrt()
        logits = unit @ (router.scale * phi / phi.square().sum(-1, keepdim=True).sqrt()).T
    else:
        logits = x @ phi.T
    dispatch = logits.exp() / logits.exp().sum(0, keepdim=True)
    combine = logits.exp() / logits.exp().sum(1, keepdim=True)
    expert = torch.arange(logits.shape[1]) // slots
    rows = by_tokens(dispatch.T @ x, layer.experts.weights, torch.eye(layer.num_experts, dtype=x.dtype)[expert])
    return combine @ rows, combine.unflatten(1, (-1, slots)).sum(-1)


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("normalize", [True, False])
def test_the_layer_is_the_papers_equations_for_every_sequence(slots, normalize):
    layer = _layer(slots, normalize=normalize)
    x = torch.randn(3, 7, 6, dtype=torch.float64)
    out = layer(x)
    for i in range(3):
        expected, weights = _by_equations(layer, x[i])
        assert torch.allclose(out[i], expected, atol=1e-12)
        assert torch.allclose(layer.routing.dense()[7 * i : 7 * i + 7], weights, atol=1e-12)
    assert layer.routing.counts.tolist() == [21] * 4, "the matrix is dense"
    assert torch.allclose(layer.routing.dense().sum(-1), torch.ones(21, dtype=torch.float64))


def test_sequences_of_any_length_and_order_do_not_mix():
    layer = _layer(2)
    sequence = torch.tensor([5, 2, 5, 9, 2, 5, 5, 2])
    mask = torch.tensor([1, 1, 0, 0, 1, 1, 1, 1]).bool()
    x = torch.randn(8, 6, dtype=torch.float64)
    out = layer(torch.where(mask[:, None], x, torch.nan), sequence=sequence, mask=mask)
    assert (out[~mask] == 0).all(), "sequence 9 has no real token at all"
    for number in (5, 2):
        own = (sequence == number) & mask
        assert torch.allclose(out[own], _by_equations(layer, x[own])[0], atol=1e-12)


def test_padding_is_outside_the_dispatch_softmax():
    layer = _layer(2)
    x = torch.randn(2, 6, 6, dtype=torch.float64)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[0, 4:] = False
    short = layer(x[:1, :4])
    x.requires_grad_()
    assert torch.allclose(layer(x, mask=mask)[:1, :4], short, atol=1e-12)
    layer(x, mask=mask).square().sum().backward()
    assert (x.grad[~mask] == 0).all() and (x.grad[mask] != 0).all()


def test_gradients():
    layer = _layer(2, backend="reference")
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    assert torch.autograd.gradcheck(lambda x: layer(x, mask=mask), x)
    parameters = list(layer.router.parameters())
    assert torch.autograd.gradcheck(lambda *_: layer(x.detach(), mask=mask), parameters)


def test_later_tokens_change_earlier_ones_and_causal_models_refuse():
    layer = _layer(1)
    x = torch.randn(1, 6, 6, dtype=torch.float64)
    before = layer(x)
    x[0, -1] += 1
    assert not torch.allclose(layer(x)[0, 0], before[0, 0]) and layer.router.leak
    with pytest.raises(ValueError, match="every slot is a mixture of all tokens"):
        MoE(6, 5, 4, router="soft_moe", causal=True)


@pytest.mark.parametrize("length", [4, 16])
def test_experts_compute_their_slots_whatever_the_length(length):
    layer = _layer(2)
    seen = []
    layer.experts.register_forward_pre_hook(lambda module, args: seen.append(args[1].counts.tolist()))
    layer(torch.randn(3, length, 6, dtype=torch.float64))
    assert seen == [[6] * 4]  # S = 2 for each of 3 sequences
    assert layer.router.experts_for(length) == 8 / length


@pytest.mark.parametrize("shape", [(0, 6), (2, 0, 6), (0, 3, 6), (1, 6)])
def test_hardly_any_tokens(shape):
    layer = _layer(2)
    out = layer(torch.randn(shape, dtype=torch.float64))
    assert out.shape == shape and out.isfinite().all()


def test_reduced_precision_mixes_in_float32():
    layer = _layer(2, dtype=torch.float32)
    x = torch.randn(2, 50, 6)
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = layer(x)
    assert rounded.dtype == torch.bfloat16
    assert (rounded - exact).norm() < 0.02 * exact.norm()


def test_in_an_encoder_it_says_what_it_is():
    text = MoE(6, 5, 4, router="soft_moe").explain()
    assert "mixtures of all tokens" in text and "Causal-safe: no" in text
    assert shunter.routers.find("soft_moe").chooses == "slots"


@pytest.mark.parametrize(
    "options, message",
    [({"slots_per_expert": 0}, "must be at least 1"), ({"capacity_factor": 1.0}, "no token is sent to an expert")],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        create("soft_moe", 6, 4, **options)


@pytest.mark.parametrize("shape", [(3, 7), (0, 7), (3, 0), (7,), (2, 3, 4)])
def test_rows_of_the_input_are_sequences_as_if_they_were_told(shape):
    layer, x = MoE(6, 5, 4, router="soft_moe", slots_per_expert=2), torch.randn(*shape, 6)
    mask = torch.rand(shape) < 0.8
    told = torch.arange(shape[0] if len(shape) > 1 else 1).repeat_interleave(math.prod(shape[1:] or shape))
    assert torch.equal(layer(x, mask=mask), layer(x, mask=mask, sequence=told.reshape(shape)))


@pytest.mark.parametrize("strict", [False, True])
def test_a_layer_is_exported_and_compiled_whole(strict):
    layer, x, other = MoE(6, 5, 4, router="soft_moe").eval(), torch.randn(3, 7, 6), torch.randn(3, 7, 6)
    exported = torch.export.export(layer, (x,), strict=strict).module()
    for each in (x, other):
        assert torch.allclose(exported(each), layer(each), atol=1e-6)
    assert torch.allclose(torch.compile(layer, fullgraph=True, backend="eager")(other), layer(other), atol=1e-6)
