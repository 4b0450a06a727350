"""The Triton backend, in the interpreter where there is no GPU: what every backend is held to, in small tiles."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from shunter import MoE, Routing
from shunter.experts import ACTIVATIONS, Experts, Weights, choose
from shunter.experts.backends import triton
from shunter.experts.backends.triton import blocks
from shunter.experts.choice import get
from tests.experts.backends.test_backends import _leaves, _run, _to
from tests.helpers import TIME_LIMIT, by_tokens, error_of_another_order, random_routing, random_weights, relative_error

pytestmark = pytest.mark.skipif(not triton.INSTALLED, reason="needs triton")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """All memory that the backend allocates starts as NaN."""
    new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like
    poison = lambda t: t.fill_(float("nan")) if t.is_floating_point() else t  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poison(new_empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 16, so that small problems have many of them, and groups of them that are not full."""
    monkeypatch.setattr(blocks, "LARGEST", dict.fromkeys(blocks.LARGEST, (16, 16, 16)))


def _case(tokens, experts, dim, hidden, activation="swiglu", bias=True, density=0.5):
    weights = random_weights(experts, dim, hidden, activation, bias)
    x, grad = (torch.randn(tokens, dim, dtype=torch.float64) for _ in range(2))
    if density == "one":
        index = torch.full((tokens, 1), experts - 1)
        return x, weights, Routing.from_topk(index, torch.rand(tokens, 1, dtype=torch.float64), experts), grad
    return x, weights, random_routing(tokens, experts, density), grad


def _compare(x, weights, routing, grad):
    """Output and every gradient are the reference's; in float64, or no further from float64 than the reference is."""
    found, expected = (_run(name, x, weights, routing, grad) for name in ("triton", "reference"))
    exact = _run("reference", *_to(torch.float64, x, weights, routing), grad.double())
    for name, value in exact.items():
        assert found[name].shape == value.shape and found[name].dtype == expected[name].dtype, name
        if x.dtype == torch.float64:
            assert torch.allclose(found[name], value, rtol=1e-10, atol=1e-11), name
        else:
            ours, theirs = relative_error(found[name], value), relative_error(expected[name], value)
            assert ours <= error_of_another_order(theirs, x.dtype), (name, ours, theirs)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equal_to_a_loop_over_tokens_in_float64(activation):
    x, weights, routing, _ = _case(11, 5, 6, 7, activation, bias=torch.rand(()) < 0.5)
    with torch.no_grad():
        found = get("triton").run(x, weights, routing)
    assert torch.allclose(found, by_tokens(x, weights, routing.dense()), atol=1e-12)


@pytest.mark.parametrize(
    "sizes",
    [(0, 4, 5, 3, 0.5), (1, 1, 1, 1, 1.0), (5, 3, 8, 4, 0.0), (31, 5, 35, 19, 0.4), (33, 3, 17, 16, "one")],
    ids=str,
)
def test_edges_equal_the_reference_with_every_gradient(sizes, small_tiles):
    *sizes, density = sizes
    _compare(*_case(*sizes, density=density))


@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name != "swiglu"])
def test_every_activation_has_its_gradient(activation):
    _compare(*_case(9, 2, 5, 6, activation, bias=False, density=0.8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_error_against_float64_is_that_of_the_reference(dtype, scale):
    x, weights, routing, grad = _case(30, 3, 40, 20)
    _compare(*_to(dtype, x * scale, weights, routing), grad.to(dtype))


def _without_the_last_tile(tiles):
    tiles[1, (tiles[1] < tiles[2]).nonzero()[-1]] = tiles[2].max()


def _without_the_last_rows(tiles):
    tiles[2] -= 1


def _next_expert(tiles):
    tiles[0] = (tiles[0] + 1) % 7


@pytest.mark.parametrize("fault", [_without_the_last_tile, _without_the_last_rows, _next_expert])
def test_a_broken_kernel_fails_the_same_comparison(fault, small_tiles, monkeypatch):
    expert_tiles = blocks.expert_tiles

    def broken(routing, rows):
        tiles = expert_tiles(routing, rows)
        fault(tiles)
        return tiles

    case = _case(25, 7, 5, 6, density=0.4)
    monkeypatch.setattr(blocks, "expert_tiles", broken)
    with pytest.raises(AssertionError):
        _compare(*case)


@pytest.mark.parametrize("activation, bias", [("swiglu", False), ("gelu", True)])
def test_gradcheck(activation, bias):
    x, weights, routing, _ = _case(4, 2, 4, 3, activation, bias, density=0.7)
    score = routing.weight.detach().requires_grad_()
    inputs = [
        x.requires_grad_(),
        score,
        *(v for k, v in _leaves(x, routing, weights).items() if k not in ("x", "weight")),
    ]

    def function(x, score, *parts):
        return get("triton").run(x, Weights(*parts, *[None] * (4 - len(parts)), activation), routing.with_weight(score))

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


@given(counts=st.lists(st.integers(0, 70), min_size=1, max_size=9), rows=st.sampled_from([16, 32, 64]))
def test_tiles_hold_every_triple_once(counts, rows):
    expert = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    token = torch.cat([torch.arange(count) for count in counts])
    routing = Routing(token, expert, torch.ones(len(token)), max(counts), len(counts))
    tiles = [tile for tile in blocks.expert_tiles(routing, rows).T.tolist() if tile[1] < tile[2]]
    held = [(e, triple) for e, start, end in tiles for triple in range(start, min(start + rows, end))]
    assert held == list(zip(expert.tolist(), range(len(token)), strict=True))


@pytest.mark.parametrize(
    "frozen", [("x", "up", "up_bias"), ("weight", "down"), ("x", "up", "weight", "up_bias", "down")]
)
def test_recomputing_and_frozen_parts(frozen):
    """With recompute the same bits; a frozen part gets no gradient and changes no other."""
    x, weights, routing, grad = _case(12, 4, 6, 5)
    whole = _run("triton", x, weights, routing, grad)
    parts = {k: v.detach().clone().requires_grad_(k not in frozen) for k, v in _leaves(x, routing, weights).items()}
    w = Weights(*(parts[k] for k in ("up", "down", "up_bias", "down_bias")), weights.activation)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = get("triton").run(parts["x"], w, routing.with_weight(parts["weight"]), recompute=True)
    given = {part.data_ptr() for part in parts.values()}
    assert not [t for t in saved if t.is_floating_point() and t.data_ptr() not in given]
    y.backward(grad)
    assert torch.equal(y, whole["y"])
    for name, part in parts.items():
        assert part.grad is None if name in frozen else torch.equal(part.grad, whole[name]), name


def test_the_same_bits_every_time_and_nan_stays_with_its_expert():
    index = torch.cat([torch.zeros(1, 1), torch.randint(1, 3, (20, 1))]).long()
    routing = Routing.from_topk(index, torch.rand(21, 1, dtype=torch.float64), 3)
    x, weights, _, grad = _case(21, 3, 6, 5)
    clean, again = (_run("triton", x, weights, routing, grad) for _ in range(2))
    assert all(torch.equal(clean[name], again[name]) for name in clean)
    x[0] = grad[0] = float("nan")
    found = _run("triton", x, weights, routing, grad)
    for name in ("up", "down", "up_bias", "down_bias"):
        assert found[name][0].isnan().any() and torch.equal(found[name][1:], clean[name][1:]), name


def test_weights_of_any_strides():
    x, weights, routing, grad = _case(30, 4, 7, 5)
    up, down = (part.detach().mT.contiguous().mT for part in (weights.up, weights.down))
    strided = Weights(up, torch.stack([down, down], -1)[..., 0], weights.up_bias[0].detach().expand(4, -1), None)
    plain = Weights(up.contiguous(), down.contiguous(), strided.up_bias.contiguous(), None)
    with torch.no_grad():
        assert torch.equal(get("triton").run(x, strided, routing), get("triton").run(x, plain, routing))
    parts = [up.requires_grad_(), down.requires_grad_()]
    gradients = torch.autograd.grad(get("triton").run(x, Weights(*parts), routing), parts, grad)
    expected = torch.autograd.grad(get("reference").run(x, Weights(*parts), routing), parts, grad)
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(gradients, expected, strict=True))


def test_a_routing_of_any_strides():
    x, weights, routing, grad = _case(12, 4, 7, 5)
    wide = torch.stack([routing.token, routing.token], 1)
    score = torch.stack([routing.weight, routing.weight * 0], 1)[:, 0].requires_grad_()
    strided = Routing(wide[:, 0], routing.expert, score, 12, 4)
    (found,) = torch.autograd.grad(get("triton").run(x, weights, strided), score, grad)
    assert torch.allclose(found, _run("reference", x, weights, routing, grad)["weight"], atol=1e-10)


def test_planning_never_waits_for_the_device():
    """Fake tensors have no values: whatever asked for one would raise."""
    with FakeTensorMode():
        x, expert = torch.empty(64, 16, dtype=torch.bfloat16), torch.zeros(128, dtype=torch.int64)
        routing = Routing(expert, expert, x.new_empty(128), 64, 4, check=False)
        (tiles,) = triton._Triton().plan(x, Weights(x.new_empty(4, 8, 16), x.new_empty(4, 16, 4)), routing).indices
        assert tiles.shape == (3, 128 // 32 + 4)
        with pytest.raises(Exception, match="local_scalar"):
            tiles[0, 0].item()


def test_one_graph_gives_the_same_bits():
    layer = MoE(8, 12, 2, "topk", top_k=1, backend="triton", bias=True)
    x, found = torch.randn(7, 8, requires_grad=True), []
    for call in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        y = call(x)
        found.append([y.detach(), *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")
def test_the_kernels_compile_for_an_h100():
    """What the interpreter takes, the compiler may not; it needs no GPU to say so."""
    script = Path(__file__).with_name("compile_for_gpu.py")
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path), "HOME": str(Path.home())}
    done = subprocess.run(
        [sys.executable, script, "90", "bfloat16"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=TIME_LIMIT,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert all(kernel["shared"] <= blocks.SHARED_MEMORY for kernel in found)
    products = {kernel["name"] for kernel in found if kernel["wgmma"]}
    assert any(kernel["name"] == "_coded_product_kernel" for kernel in found)
    found = [kernel for kernel in found if kernel["name"] != "_coded_product_kernel"]
    products -= {"_coded_product_kernel"}
    assert products == {"_hidden_kernel", "_product_kernel", "_down_backward_kernel", "_outer_kernel"}
    assert {kernel["name"] for kernel in found} - products == {"_sum_by_token_kernel", "_sum_by_expert_kernel"}


@pytest.fixture
def gpu(monkeypatch):
    """What `choose` asks of a machine with a GPU; the dictionary changes the answers."""
    from shunter.experts.backends.triton import kernels

    answers = {"capability": (9, 0)}
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: answers["capability"])
    return answers


def _on_cuda(dtype, dim=16, hidden=8):
    with FakeTensorMode():
        x = torch.empty(64, dim, dtype=dtype, device="cuda")
        return x, Weights(x.new_empty(4, 2 * hidden, dim), x.new_empty(4, dim, hidden))


def test_auto_takes_it_on_a_gpu_in_half_precision(gpu, monkeypatch):
    for dtype in (torch.bfloat16, torch.float16):
        assert choose("auto", *_on_cuda(dtype))[0].name == "triton"
    backend, why = choose("auto", *_on_cuda(torch.float32))
    assert backend.name == "grouped_mm" and "slower than cuBLAS" in why
    assert "not multiples of 8" in choose("auto", *_on_cuda(torch.bfloat16, hidden=9))[1]
    gpu["capability"] = (7, 5)
    backend, why = choose("auto", *_on_cuda(torch.float16))
    assert backend.name == "grouped_mm" and "8.0 and later, not for 7.5" in why
    with pytest.raises(
        ValueError, match="backend 'triton' cannot run this: .* in Triton's interpreter, with TRITON_INT"
    ):
        choose("triton", torch.zeros(3, 16), _on_cuda(torch.float32)[1])
    monkeypatch.setattr(triton, "INSTALLED", False)
    assert "pip install triton" in choose("auto", *_on_cuda(torch.bfloat16))[1]


def test_bfloat16_is_refused_in_the_interpreter():
    experts = Experts(4, 8, 8, backend="triton", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="interpreter computes bfloat16 wrongly"):
        experts(torch.randn(3, 8, dtype=torch.bfloat16), random_routing(3, 4))
