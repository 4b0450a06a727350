"""The decode backend: the reference's output for a few tokens, nothing of experts that nobody chose."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shunter import Routing
from shunter.experts import ACTIVATIONS, Experts, QuantisedExperts, Weights, choose
from shunter.experts.backends import decode
from shunter.experts.backends.decode import FEW_TOKENS, decode_choices
from shunter.experts.backends.numba import bridge as numba
from shunter.experts.choice import get
from tests.helpers import by_tokens, error_of_another_order, random_routing, random_weights, relative_error


@settings(max_examples=80)
@given(
    tokens=st.integers(0, 12), experts=st.integers(1, 9), dim=st.integers(1, 9), hidden=st.integers(1, 9),
    activation=st.sampled_from(list(ACTIVATIONS)), bias=st.booleans(), density=st.floats(0, 1), one=st.booleans(),
    panel_bytes=st.sampled_from([64, 2**20]),
)  # fmt: skip
def test_equal_to_a_loop_over_tokens(tokens, experts, dim, hidden, activation, bias, density, one, panel_bytes):
    weights = random_weights(experts, dim, hidden, activation, bias)
    x = torch.randn(dim, tokens, dtype=torch.float64).T
    routing = random_routing(tokens, experts, density)
    if one:
        index = torch.full((tokens, 1), experts - 1)
        routing = Routing.from_topk(index, torch.rand(tokens, 1, dtype=torch.float64), experts)
    with torch.no_grad(), mock.patch.object(decode, "PANEL_BYTES", panel_bytes):
        found = get("decode").run(x, weights, routing)
        assert torch.allclose(found, by_tokens(x, weights, routing.dense()), atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 1e-3])
@pytest.mark.parametrize("panel_bytes", [2**12, 2**20, None], ids=["panels", "whole", "compiled"])
@torch.no_grad()
def test_error_against_float64_is_that_of_the_reference(dtype, scale, panel_bytes, monkeypatch):
    """By torch's products, where matrices are read in panels and whole, and by the compiled loops."""
    monkeypatch.setattr(decode, "PANEL_BYTES", panel_bytes)
    monkeypatch.setattr(numba, "INSTALLED", numba.INSTALLED and panel_bytes is None)
    weights = random_weights(8, 128, 96)
    low = Weights(weights.up.to(dtype), weights.down.to(dtype))
    x = (torch.randn(32, 128, dtype=torch.float64) * scale).to(dtype)
    routing = random_routing(32, 8, 0.2, torch.float32)
    exact = get("reference").run(
        x.double(), Weights(low.up.double(), low.down.double()), routing.with_weight(routing.weight.double())
    )
    ours, theirs = (relative_error(get(name).run(x, low, routing), exact) for name in ("decode", "reference"))
    assert ours <= error_of_another_order(theirs, dtype)


@torch.no_grad()
def test_nothing_of_other_experts_or_tokens_enters():
    weights, x = random_weights(5, 6, 7), torch.randn(4, 6, dtype=torch.float64)
    index = torch.tensor([[0], [1], [1], [3]])
    routing = Routing.from_topk(index, torch.rand(4, 1, dtype=torch.float64), 5)
    clean = get("decode").run(x, weights, routing)
    for e in (2, 4):
        weights.up[e] = weights.down[e] = float("nan")
    assert torch.equal(get("decode").run(x, weights, routing), clean)
    x[1] = float("nan")
    found = get("decode").run(x, weights, routing)
    assert torch.equal(found[[0, 2, 3]], clean[[0, 2, 3]]) and found[1].isnan().all()


@pytest.mark.skipif(not numba.INSTALLED, reason="its loops need numba")
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16, "coded"])
@torch.no_grad()
def test_choices_that_the_loops_sort_give_the_bits_of_a_routing(kind):
    """Experts that a token names twice, unsorted and idle ones included; the rest is left to others."""
    dtype = kind if isinstance(kind, torch.dtype) else torch.bfloat16
    wide = random_weights(9, 128, 96, "swiglu", bias=True, dtype=torch.float32)
    weights = Weights(*(part.to(dtype) for part in (wide.up, wide.down, wide.up_bias, wide.down_bias)), "swiglu")
    if kind == "coded":
        weights = QuantisedExperts.of(wide, bits=[4, 8, 4] * 3).weights(dtype)
    for tokens, k in ((1, 1), (1, 8), (7, 3), (FEW_TOKENS, 2)):
        x, index = torch.randn(tokens, 128).to(dtype), torch.randint(9, (tokens, k))
        weight = torch.rand(tokens, k).to(dtype if k == 3 else torch.float32)
        expected = get("decode").run(x, weights, Routing.from_topk(index, weight, 9, check=False))
        found = decode_choices(x, weights, index, weight)
        assert torch.equal(found, expected) and found.dtype == dtype
        for wrong in (-1, 9):
            index[-1, 0] = wrong
            assert decode_choices(x, weights, index, weight) is None
    left = torch.zeros(FEW_TOKENS + 1, 1, dtype=torch.int64), torch.ones(FEW_TOKENS + 1, 1)
    assert decode_choices(torch.randn(FEW_TOKENS + 1, 128).to(dtype), weights, *left) is None
    assert decode_choices(x.expand(4, -1, -1)[:0, 0], weights, *(part[:0] for part in left)) is None
    with torch.enable_grad():
        assert decode_choices(x.requires_grad_(), weights, index.clamp(0, 8), weight) is None


def test_auto_takes_it_for_few_tokens_without_gradients_alone():
    weights = random_weights(4, 6, 5)
    few, many = torch.randn(FEW_TOKENS, 6, dtype=torch.float64), torch.randn(FEW_TOKENS + 1, 6, dtype=torch.float64)
    assert choose("auto", few, weights)[0].name == choose("auto", many, weights)[0].name == "padded"
    with torch.no_grad():
        assert choose("auto", few, weights)[0].name == "decode"
        assert choose("auto", many, weights)[0].name == "padded"
        assert Experts(4, 6, 5)(torch.randn(3, 6), random_routing(3, 4, dtype=torch.float32)).shape == (3, 6)
    with pytest.raises(ValueError, match="cannot run this: it has no backward; call it under torch.no_grad"):
        choose("decode", few, weights)


@pytest.mark.skipif(not numba.INSTALLED, reason="needs numba")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@torch.no_grad()
def test_the_loops_compute_every_activation_with_biases(activation):
    """From strided inputs too."""
    weights = random_weights(5, 8, 7, activation, bias=True, dtype=torch.float32)
    for bias in ("up_bias", "down_bias"):
        wide = getattr(weights, bias).repeat(1, 2)
        weights = replace(weights, **{bias: wide[:, : wide.shape[1] // 2]})
    x, routing = torch.randn(8, 9).T, random_routing(9, 5, dtype=torch.float32)
    assert numba.usable(weights.up, weights.down)
    assert relative_error(get("decode").run(x, weights, routing), by_tokens(x, weights, routing.dense())) < 1e-6


@torch.no_grad()
def test_the_loops_take_no_input_of_another_precision():
    """Its bits would be read as those of a half: torch's products refuse it instead."""
    weights, routing = random_weights(4, 6, 5, dtype=torch.float32), random_routing(9, 4)
    with pytest.raises(RuntimeError, match="dtype|scalar type"):  # by the product that a count of tokens takes
        get("decode").run(torch.randn(9, 6, dtype=torch.float64), weights, routing)
