"""What only the numba backend has: shares by thread, products called from loops, its activations and its rounding."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shunter.experts import ACTIVATIONS, choose
from shunter.experts.autograd import Plan
from shunter.experts.backends import numba as loops_backend
from shunter.experts.backends.numba import bridge as numba
from shunter.experts.choice import get
from tests.experts.conftest import needs_loops
from tests.helpers import random_routing, random_weights, relative_error


def _bounds(counts, shares):
    with numba.ready() as loops:
        return loops.bounds(np.concatenate([[0], np.cumsum(counts)]).astype(np.int64), shares).tolist()


@needs_loops
@settings(max_examples=300)
@given(
    counts=st.lists(st.sampled_from([0, 0, 1, 2, 5, 40, 41, 300, 3000]), min_size=1, max_size=40),
    shares=st.integers(1, 17),
)
def test_shares_are_about_equal(counts, shares):
    """In rows, to which reading and writing an expert's matrices adds some."""
    found, offsets = _bounds(counts, shares), [0, *np.cumsum(counts).tolist()]
    assert len(found) == shares + 1 and found[0] == 0 and found[-1] == offsets[-1] and found == sorted(found)
    matrices, work = 16, []
    for start, end in zip(found, found[1:], strict=False):
        inside = [min(end, last) - max(start, first) for first, last in zip(offsets, offsets[1:], strict=False)]
        work.append(sum(rows + matrices for rows in inside if rows > 0))
    mean = sum(n + matrices for n in counts if n) / shares
    assert max(work) <= mean * (1 + 2 / 32) + 2 * matrices + 2


@needs_loops
def test_a_share_ends_with_an_expert_that_ends_about_there():
    assert _bounds([100, 103, 97, 100], 2) == [0, 203, 400]
    assert _bounds([400], 2) == [0, 200, 400]


@needs_loops
@pytest.mark.parametrize("turned_a", [False, True])
@pytest.mark.parametrize("turned_b", [False, True])
@pytest.mark.parametrize("m, k, n", [(1, 1, 1), (1, 5, 3), (4, 1, 2), (3, 7, 1), (17, 13, 11), (64, 33, 130)])
def test_products_of_any_layout(turned_a, turned_b, m, k, n):
    a, b = torch.randn(m, k), torch.randn(k, n)
    given_a = a.T.contiguous().numpy().T if turned_a else a.numpy()
    given_b = b.T.contiguous().numpy().T if turned_b else b.numpy()
    with numba.ready() as loops:
        found = torch.from_numpy(loops.product(given_a, given_b))
    # The bound of any order of k products and sums in float32.
    assert ((found - a.double() @ b.double()).abs() <= (k + 1) * 2.0**-24 * (a.abs().double() @ b.abs().double())).all()


@needs_loops
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_torchs(dtype):
    """Every value of the dtype, what is between two of them, ties and their neighbours, and any bits at all."""
    exact = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    middle = (exact + exact.roll(-1)) / 2
    random = torch.randint(-(2**31), 2**31 - 1, (2**18,)).to(torch.int32).view(torch.float32)
    special = torch.tensor([math.inf, -math.inf, math.nan, 65519.996, 65520.0, 3.39e38, 3.4e38, 5.9e-8, 2.9e-8, 1e-45])
    values = torch.cat([exact, middle, random, special])
    values = torch.cat([values, values.nextafter(torch.tensor(math.inf)), values.nextafter(torch.tensor(-math.inf))])
    found = torch.empty(1, values.numel(), dtype=dtype)
    with numba.ready() as loops:
        loops._store_rounded(numba.array(values[None]), numba.array(found))
    expected = values.to(dtype)
    assert torch.equal(found[0].isnan(), expected.isnan())
    number = ~expected.isnan()
    assert torch.equal(found[0][number].view(torch.int16), expected[number].view(torch.int16))


def _passes(activation, h, da, weight):
    """The hidden state, the same times the weight, and the gradients of pre-activations and weight."""
    n, f = da.shape
    hidden, a, dh, inner = torch.empty(n, f), torch.empty(n, f), torch.empty(h.shape), torch.empty(n)
    with numba.ready() as loops:
        kind = loops.ACTIVATIONS[activation]
        loops._activate(kind, numba.array(h.float()), numba.array(hidden))
        loops._activate_backward(kind, *map(numba.array, (h, da.clone(), weight, a, dh, inner)))
    return hidden, a, dh, inner


@needs_loops
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale, n, f", [(1e-3, 3, 7), (1.0, 64, 33), (30.0, 257, 128)])
def test_passes_equal_those_of_float64(activation, dtype, scale, n, f):
    function, gated = ACTIVATIONS[activation]
    h = (torch.randn(n, 2 * f if gated else f) * scale).to(dtype)
    da, weight = torch.randn(n, f), torch.rand(n)
    exact = h.double().requires_grad_()
    hidden = function(exact[:, :f]) * exact[:, f:] if gated else function(exact)
    (dh,) = torch.autograd.grad(hidden, exact, da.double() * weight.double()[:, None], retain_graph=True)
    found, a, found_dh, inner = _passes(activation, h, da, weight)
    assert relative_error(found, hidden) < 3e-7
    assert relative_error(a, hidden * weight.double()[:, None]) < 3e-7
    # 1 - sigmoid(gate), times a gate of up to 17, is what float32 has few digits of; torch's own pass has no more.
    assert relative_error(found_dh, dh) < (3e-7 if scale <= 1 else 2e-6)
    products = da.double() * hidden
    assert ((inner.double() - products.sum(-1)).abs() <= 1e-6 * products.abs().sum(-1) + 1e-30).all()


@needs_loops
@pytest.mark.parametrize(
    "activation, relative, absolute",
    [
        ("silu", 4e-7, 1e-37),
        ("gelu", 8e-7, 2e-12),
        ("gelu_tanh", 2e-6, 2e-12),
        ("relu", 0, 0),
        ("quick_gelu", 2e-5, 1e-36),
    ],
)
def test_activations_at_every_magnitude(activation, relative, absolute):
    """Near float64, of which gelu itself has no more digits far below zero; NaN stays NaN, infinity infinity."""
    size = torch.cat([torch.linspace(0, 100, 10_001), torch.logspace(-30, 0, 1000)])
    x = torch.cat([size, -size[size <= 87]])
    found, _, slope, _ = _passes(activation, x[:, None], torch.ones(x.numel(), 1), torch.ones(x.numel()))
    exact = x.double().requires_grad_()
    value = ACTIVATIONS[activation][0](exact)
    (expected,) = torch.autograd.grad(value.sum(), exact)
    assert ((found[:, 0].double() - value).abs() <= relative * value.abs() + absolute).all()
    assert ((slope[:, 0].double() - expected).abs() <= 3e-6 * expected.abs() + 3e-7).all()
    extreme = torch.tensor([math.inf, 3e38, math.nan, 0.0, -0.0])
    found = _passes(activation, extreme[:, None], torch.ones(5, 1), torch.ones(5))[0][:, 0]
    assert found[0] == math.inf and found[1] == extreme[1] and found[2].isnan() and (found[3:] == 0).all()


@needs_loops
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [90, 900])
def test_an_expert_that_many_threads_share_has_the_same_gradients(dtype, tokens, monkeypatch):
    """Nearly those of one thread, and to the bit the same on every run."""
    weights = random_weights(3, 12, 10, bias=True, dtype=dtype)
    routing, x = random_routing(tokens, 3, dtype=torch.float32), torch.randn(tokens, 12).to(dtype)
    found = []
    for shares in (1, 7, 7):
        monkeypatch.setattr(loops_backend._Numba, "plan", lambda *given, n=shares: Plan(n, ()))
        parts = [weights.up, weights.down, weights.up_bias, weights.down_bias]
        found.append(torch.autograd.grad(get("numba").run(x, weights, routing).float().square().sum(), parts))
    for one, seven, again in zip(*found, strict=True):
        assert torch.equal(seven, again)
        assert relative_error(seven, one) < (1e-6 if dtype == torch.float32 else 4e-3)


@needs_loops
def test_torchs_own_products_keep_their_threads():
    """The loops keep MKL to the calling thread, which is torch's too, and then let it go."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        weights, x = random_weights(3, 12, 10, dtype=torch.float32), torch.randn(90, 12)
        get("numba").run(x, weights, random_routing(90, 3, dtype=torch.float32)).sum().backward()
        assert "mkl_get_max_threads() : 2" in torch.__config__.parallel_info()
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"INSTALLED": False}, "numba is not installed"),
        ({"mkl": SimpleNamespace(addresses=lambda: None)}, "call MKL, which this torch does not have"),
        ({"_running": lambda: False}, "numba does not work in this process"),
        ({"_running": lambda: True, "_right": lambda: False}, "came out wrong"),
    ],
)
def test_where_the_loops_cannot_run_padded_does(change, reason, monkeypatch):
    monkeypatch.setattr(numba, "INSTALLED", True)
    monkeypatch.setattr(numba.mkl, "addresses", lambda: (1, 1))
    for name, value in change.items():
        monkeypatch.setattr(numba, name, value)
    weights, x = random_weights(4, 6, 5, dtype=torch.float32), torch.randn(99, 6)
    backend, why = choose("auto", x, weights)
    assert backend.name == "padded" and reason in why
    with pytest.raises(ValueError, match=f"backend 'numba' cannot run this: .*{reason}"):
        choose("numba", x, weights)


@needs_loops
def test_few_numbers_and_few_experts_are_left_to_padded(monkeypatch):
    weights, x = random_weights(4, 6, 5, dtype=torch.float32), torch.randn(99, 6)
    assert choose("auto", x, weights)[0].name == "numba"
    monkeypatch.setattr(numba, "SMALL", x.numel() + 1)
    assert "594 numbers are few for threads" in choose("auto", x, weights)[1]
    monkeypatch.setattr(numba, "SMALL", x.numel())
    monkeypatch.setattr(numba, "threads", lambda: 5)
    assert "4 experts are fewer than its 5 threads" in choose("auto", x, weights)[1]


@pytest.mark.parametrize("strided", ["up", "down", "up_bias", "down_bias"])
def test_strided_matrices_and_other_dtypes_are_refused(strided):
    weights = random_weights(4, 6, 5, bias=True, dtype=torch.float32)
    own = getattr(weights, strided).detach()
    other = type(weights)(**{**vars(weights), strided: own.mT.contiguous().mT})
    assert "are not contiguous" in get("numba").refuses(torch.randn(9, 6), other)
    assert "float64" in get("numba").refuses(torch.randn(9, 6).double(), random_weights(4, 6, 5))


@needs_loops
def test_a_broken_product_is_noticed(monkeypatch):
    """As that of an MKL with integers of 64 bits would be."""
    with numba.ready() as loops:
        monkeypatch.setattr(loops, "product", lambda a, b: a @ b + 1)
    numba._right.cache_clear()
    try:
        assert "came out wrong" in numba.lacks()
    finally:
        monkeypatch.undo()
        numba._right.cache_clear()
    assert numba.lacks() is None
