"""Every backend computes what a loop over tokens does, with every gradient, in every dtype, at every edge."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shunter import MoE, Routing
from shunter.experts import ACTIVATIONS, Backend, Experts, Weights, backend_names, choose, register
from shunter.experts import cpu as memory
from shunter.experts import cpu as products
from shunter.experts.autograd import Plan
from shunter.experts.backends import numba as loops_backend
from shunter.experts.backends import padded, triton
from shunter.experts.backends.numba import bridge as numba
from shunter.experts.backends.numba import onednn
from shunter.experts.choice import get
from tests.experts.conftest import needs_loops
from tests.helpers import by_tokens, error_of_another_order, random_routing, random_weights, relative_error

# Backends that run on any CPU input; others have files of their own.
FAST = ["padded", "grouped_mm", pytest.param("numba", marks=needs_loops)]
CPU = ["reference", *FAST]
# With the Triton backend, whose interpreter is slow, where one run says it all; the rest is in its own file.
FUSED = [*FAST, pytest.param("triton", marks=pytest.mark.skipif(not triton.INSTALLED, reason="needs triton"))]
# What a backend computes in for inputs of float64 where it does not take them, and how near it then comes.
SINGLE = {"grouped_mm", "numba"}


# Numba compiles the numba loops for each activation and dtype, which takes seconds: two stand for all. The others'
# passes have a test of their own.
COMPILED = {(torch.float32, "swiglu"), (torch.float32, "gelu"), (torch.bfloat16, "swiglu"), (torch.float16, "swiglu")}


def _skip_uncompiled(backend, activation, dtype=torch.float32):
    if backend == "numba" and (dtype, activation) not in COMPILED:
        pytest.skip("another activation stands for it")
    if backend == "numba" and dtype == torch.bfloat16 and onednn.addresses() is not None:
        pytest.skip("test_bfloat16_products.py has it; to widen bfloat16 is for other processors, and as with float16")


def _tolerance(backend):
    return 1e-4 if backend in SINGLE else 1e-9


def _leaves(x, routing, weights):
    named = {"x": x, "weight": routing.weight, "up": weights.up, "down": weights.down}
    named |= {"up_bias": weights.up_bias, "down_bias": weights.down_bias}
    return {name: value for name, value in named.items() if value is not None}


def _poison_scratch():
    for buffer, _ in memory._HELD.buffers.values():
        buffer.fill_(255)  # as floating point, in any format: NaN


def _run(name, x, weights, routing, grad):
    """Output and gradients by name, from fresh leaves."""
    if name in SINGLE and x.dtype == torch.float64:
        x, weights, routing = _to(torch.float32, x, weights, routing)
        return {k: v.double() for k, v in _run(name, x, weights, routing, grad.float()).items()}
    copy = {k: v.detach().clone().requires_grad_() for k, v in _leaves(x, routing, weights).items()}
    w = Weights(copy["up"], copy["down"], copy.get("up_bias"), copy.get("down_bias"), weights.activation)
    _poison_scratch()
    y = get(name).run(copy["x"], w, routing.with_weight(copy["weight"]))
    _poison_scratch()
    y.backward(grad)
    return {"y": y.detach(), **{k: v.grad for k, v in copy.items()}}


def _to(dtype, x, weights, routing):
    parts = [
        None if v is None else v.detach().to(dtype)
        for v in (weights.up, weights.down, weights.up_bias, weights.down_bias)
    ]
    score = torch.promote_types(dtype, torch.float32)
    return x.to(dtype), Weights(*parts, weights.activation), routing.with_weight(routing.weight.to(score))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("backend", CPU)
def test_equal_to_a_loop_over_tokens_in_float64(backend, activation, bias):
    _skip_uncompiled(backend, activation)
    weights = random_weights(5, 6, 7, activation, bias)
    x = torch.randn(11, 6, dtype=torch.float64)
    routing = random_routing(11, 5)
    expected = by_tokens(x, weights, routing.dense())
    found = _run(backend, x, weights, routing, torch.zeros_like(x))["y"]
    assert torch.allclose(found, expected, atol=1e-5 if backend in SINGLE else 1e-12)


@pytest.mark.parametrize("backend", ["reference", "padded"])
@pytest.mark.parametrize(
    "activation, bias",
    [("swiglu", False), ("geglu_tanh", True), ("gelu", True), ("silu", False), ("quick_gelu", True), ("relu2", False)],
)
def test_gradcheck(backend, activation, bias):
    weights = random_weights(3, 4, 3, activation, bias)
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    routing = random_routing(6, 3, density=0.6)
    score = routing.weight.detach().requires_grad_()
    inputs = [x, score, *(v for v in (weights.up, weights.down, weights.up_bias, weights.down_bias) if v is not None)]

    def function(x, score, *parts):
        return get(backend).run(x, Weights(*parts, *[None] * (4 - len(parts)), activation), routing.with_weight(score))

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 7, 17, 64, 257])
@pytest.mark.parametrize("experts, density", [(1, 1.0), (4, 0.0), (4, 0.5), (13, 0.1), (64, 0.05)])
def test_edges_equal_the_reference_with_every_gradient(backend, tokens, experts, density):
    weights = random_weights(experts, 5, 3, "swiglu", bias=tokens % 2 == 1)
    x, grad = torch.randn(tokens, 5, dtype=torch.float64), torch.randn(tokens, 5, dtype=torch.float64)
    routing = random_routing(tokens, experts, density)
    expected = _run("reference", x, weights, routing, grad)
    found = _run(backend, x, weights, routing, grad)
    for name, value in expected.items():
        assert found[name] is not None and torch.allclose(found[name], value, atol=_tolerance(backend)), name


@pytest.fixture(
    params=[(padded.CHUNK_BYTES, 1, True, 512), (2000, 4, True, 7), (2000, 4, False, 64), (1, 4, False, 1)],
    ids=["one chunk", "chunks", "chunks widened", "single experts widened"],
)
def chunks(request, monkeypatch):
    """How a backend goes through the experts: all at once, a few, one by one, with slots left over, in blocks of rows.

    And whether padded products in half precision run in that, or in float32.
    """
    size, step, half, rows = request.param
    monkeypatch.setattr(products, "FAST", dict.fromkeys(products.FAST, half))
    monkeypatch.setattr(padded, "CHUNK_BYTES", size)
    monkeypatch.setattr(padded, "_step", lambda x, routing: step)
    monkeypatch.setattr(loops_backend, "BLOCK_ROWS", rows)


@settings(max_examples=60)
@given(
    tokens=st.integers(0, 40), experts=st.integers(1, 12), dim=st.integers(1, 9), hidden=st.integers(1, 9),
    activation=st.sampled_from(list(ACTIVATIONS)), bias=st.booleans(), density=st.floats(0, 1), one=st.booleans(),
    chunk=st.sampled_from([1, 400, 2**20]), step=st.sampled_from([1, 4]), columns=st.sampled_from([1, 2, 512]),
    rows=st.sampled_from([1, 2, 7, 512]), threads=st.integers(1, 9),
)  # fmt: skip
@pytest.mark.parametrize("backend", FAST)
def test_any_shape_equals_the_reference(
    backend, tokens, experts, dim, hidden, activation, bias, density, one, chunk, step, columns, rows, threads
):
    if backend == "numba":
        activation = "swiglu" if ACTIVATIONS[activation][1] else "gelu"
    weights = random_weights(experts, dim, hidden, activation, bias)
    x, grad = torch.randn(tokens, dim, dtype=torch.float64), torch.randn(tokens, dim, dtype=torch.float64)
    if one:  # everything to one expert
        index = torch.full((tokens, 1), experts - 1)
        routing = Routing.from_topk(index, torch.rand(tokens, 1, dtype=torch.float64), experts)
    else:
        routing = random_routing(tokens, experts, density)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(padded, "CHUNK_BYTES", chunk)
        patch.setattr(padded, "PANEL_COLUMNS", columns)
        patch.setattr(loops_backend, "BLOCK_ROWS", rows)
        patch.setattr(loops_backend._Numba, "plan", lambda *given: Plan(threads, ()))
        patch.setattr(padded, "_step", lambda x, routing: step)
        expected, found = (_run(name, x, weights, routing, grad) for name in ("reference", backend))
    for name, value in expected.items():
        assert torch.allclose(found[name], value, atol=_tolerance(backend)), name


@settings(max_examples=200)
@given(
    counts=st.lists(st.integers(0, 60), min_size=1, max_size=40), threads=st.integers(1, 9),
    row_bytes=st.sampled_from([1, 2**14, 2**17, 2**20]), step=st.sampled_from([1, 8]),
)  # fmt: skip
def test_chunks_of_experts_have_room_and_share_out_evenly(counts, threads, row_bytes, step):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: threads)
        groups = padded._groups(counts, row_bytes, step)
    assert groups[-1][1] == len(counts)
    assert [first for first, _, _ in groups] == [0, *(last for _, last, _ in groups[:-1])]
    for first, last, slots in groups:
        own = counts[first:last]
        assert max(own) <= slots < max(own) + step and slots % step == 0
        assert len(own) == 1 or len(own) * max(own) * row_bytes <= padded.CHUNK_BYTES
        # What is left before an expert that does not fit, or at the end, may be fewer than the threads.
        assert len(own) % threads == 0 or len(own) < threads or last == len(counts)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 1e-3])
@pytest.mark.parametrize("activation, bias", [("swiglu", False), ("gelu", True)])
def test_error_against_float64_is_that_of_the_reference(backend, dtype, scale, activation, bias, chunks):
    _skip_uncompiled(backend, activation, dtype)
    weights = random_weights(6, 32, 24, activation, bias)
    x = torch.randn(200, 32, dtype=torch.float64) * scale
    grad = torch.randn(200, 32, dtype=torch.float64)
    routing = random_routing(200, 6)
    rounded = _to(dtype, x, weights, routing)
    low = grad.to(dtype)
    exact = _run("reference", *_to(torch.float64, *rounded), low.double())
    reference, found = (_run(name, *rounded, low) for name in ("reference", backend))
    for name, value in exact.items():
        ours, theirs = relative_error(found[name], value), relative_error(reference[name], value)
        assert ours <= error_of_another_order(theirs, dtype), (name, ours, theirs)


def test_the_error_test_would_see_a_broken_backend():
    """A kernel that forgets the combine weights of one expert fails the comparison above."""
    weights, x, routing = random_weights(6, 32, 24), torch.randn(200, 32, dtype=torch.float64), random_routing(200, 6)
    broken = routing.with_weight(torch.where(routing.expert == 3, torch.ones_like(routing.weight), routing.weight))
    exact = get("reference").run(x, weights, routing)
    assert relative_error(get("reference").run(x, weights, broken), exact) > 0.01


@pytest.mark.parametrize("backend", FAST)
def test_uninitialised_memory_is_never_read(backend, chunks, monkeypatch):
    """Not where a backend allocates, nor in the scratch memory that it finds as the last run left it."""
    weights, routing = random_weights(9, 6, 5, bias=True), random_routing(50, 9, 0.2)
    routing = routing.masked(routing.expert != 4)  # which nothing but zeros must come from
    x, grad = torch.randn(50, 6, dtype=torch.float64), torch.randn(50, 6, dtype=torch.float64)
    clean = _run(backend, x, weights, routing, grad)
    new_empty, empty_like, scratch = torch.Tensor.new_empty, torch.empty_like, memory.scratch
    poison = lambda t: t.fill_(float("nan")) if t.is_floating_point() else t  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poison(new_empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))
    for module in (padded, loops_backend):
        monkeypatch.setattr(module, "scratch", lambda *a, **k: poison(scratch(*a, **k)))
    poisoned = _run(backend, x, weights, routing, grad)
    for name, value in clean.items():
        assert torch.equal(poisoned[name], value), name


@pytest.mark.parametrize("backend", FUSED)
def test_an_unrouted_token_touches_nothing(backend):
    """Not even with NaN: its rows belong to no expert."""
    weights, routing = random_weights(4, 6, 5), random_routing(30, 4)
    routing = routing.masked(routing.token != 0)
    x, grad = torch.randn(30, 6, dtype=torch.float64), torch.randn(30, 6, dtype=torch.float64)
    clean = _run(backend, x, weights, routing, grad)
    x[0] = float("nan")
    found = _run(backend, x, weights, routing, grad)
    for name, value in clean.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("backend", FAST)
def test_a_broken_token_stays_with_its_experts(backend, chunks):
    """NaN in a token of expert 0 reaches no gradient of another expert, padded slots included."""
    weights = random_weights(6, 6, 5, bias=True)
    index = torch.cat([torch.zeros(1, 1), torch.randint(1, 6, (40, 1))]).long()
    routing = Routing.from_topk(index, torch.rand(41, 1, dtype=torch.float64), 6)
    x, grad = torch.randn(41, 6, dtype=torch.float64), torch.randn(41, 6, dtype=torch.float64)
    clean = _run(backend, x, weights, routing, grad)
    x[0] = float("nan")
    found = _run(backend, x, weights, routing, grad)
    for name in ("up", "down", "up_bias", "down_bias"):
        assert torch.equal(found[name][1:], clean[name][1:]), name


@pytest.mark.parametrize("backend", FUSED)
def test_strided_input_and_gradient(backend):
    weights, routing = random_weights(4, 6, 5), random_routing(20, 4)
    wide = torch.randn(6, 40, dtype=torch.float64)
    x, grad = wide.T[::2], torch.randn(1, 6, dtype=torch.float64).expand(20, 6)
    found = _run(backend, x, weights, routing, grad)
    plain = _run(backend, x.contiguous(), weights, routing, grad.contiguous())
    for name, value in plain.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("frozen", [("x",), ("up", "down"), ("weight",), ("x", "up"), ("x", "up", "weight"), ("down",)])
@pytest.mark.parametrize("recompute", [False, True])
def test_frozen_parts_get_no_gradient_and_change_no_other(backend, frozen, recompute):
    weights, routing = random_weights(4, 6, 5, bias=True), random_routing(20, 4)
    x, grad = torch.randn(20, 6, dtype=torch.float64), torch.randn(20, 6, dtype=torch.float64)
    if backend in SINGLE:
        (x, weights, routing), grad = _to(torch.float32, x, weights, routing), grad.float()
    whole = _run(backend, x, weights, routing, grad)
    parts = {k: v.detach().clone().requires_grad_(k not in frozen) for k, v in _leaves(x, routing, weights).items()}
    w = Weights(parts["up"], parts["down"], parts["up_bias"], parts["down_bias"], weights.activation)
    y = get(backend).run(parts["x"], w, routing.with_weight(parts["weight"]), recompute=recompute)
    _poison_scratch()
    y.backward(grad)
    for name, part in parts.items():
        assert part.grad is None if name in frozen else torch.allclose(part.grad, whole[name], atol=1e-6), name


@pytest.mark.parametrize("backend", FUSED)
def test_what_is_kept_for_the_backward(backend):
    weights = random_weights(8, 16, 12, dtype=torch.float32)
    routing = random_routing(64, 8, dtype=torch.float32)
    x = torch.randn(64, 16, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        get(backend).run(x, weights, routing)
    given = {v.data_ptr() for v in (x, weights.up, weights.down, routing.weight)}
    extra = [t for t in kept if t.data_ptr() not in given and t.is_floating_point()]
    assert sum(t.numel() for t in extra) <= routing.token.numel() * 2 * 12


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputing_keeps_less_and_gives_the_same_bits(backend, dtype, chunks):
    _skip_uncompiled(backend, "swiglu", dtype)
    experts = Experts(8, 16, 12, bias=True, backend=backend, dtype=dtype)
    routing = random_routing(64, 8, dtype=torch.float32)
    x, grad = torch.randn(64, 16, dtype=dtype, requires_grad=True), torch.randn(64, 16, dtype=dtype)
    if get(backend).refuses(x, experts.weights):
        pytest.skip("products of its own dtype are not what it has")
    found, kept = [], []
    for recompute in (False, True):
        experts.recompute = recompute
        score = routing.weight.detach().requires_grad_()
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            y = experts(x, routing.with_weight(score))
        kept.append({t.data_ptr(): t.numel() for t in saved if t.is_floating_point()})
        found.append([y, *torch.autograd.grad(y, [x, score, *experts.parameters()], grad)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    if backend != "reference":  # which counts what checkpointing keeps inside
        given = {t.data_ptr() for t in (x, *experts.parameters())}
        kept = [sum(n for where, n in floats.items() if where not in given) for floats in kept]
        assert kept[0] - kept[1] == routing.token.numel() * 24 and kept[1] <= routing.token.numel()


def test_a_layer_recomputes_where_asked_to():
    layer = MoE(8, 4, 3, "topk", recompute=True, num_shared_experts=1)
    assert layer.experts.recompute and layer.shared_experts.recompute
    assert not MoE(8, 4, 3, "topk").experts.recompute


@pytest.mark.parametrize("backend", FAST)
def test_the_same_bits_every_time(backend):
    weights, routing = random_weights(8, 16, 12, dtype=torch.float32), random_routing(300, 8, dtype=torch.float32)
    x, grad = torch.randn(300, 16), torch.randn(300, 16)
    first = _run(backend, x, weights, routing, grad)
    for _ in range(3):
        again = _run(backend, x, weights, routing, grad)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("backend", FAST)
def test_training_goes_on_after_inference_mode(backend):
    """Whose tensors may not be written to outside of it: scratch memory is not of them."""
    weights, x = random_weights(3, 8, 7, dtype=torch.float32), torch.randn(20, 8)
    memory._HELD.buffers.clear()
    for tokens in (20, 30):
        with torch.inference_mode():
            get(backend).run(torch.randn(tokens, 8), weights, random_routing(tokens, 3, dtype=torch.float32))
        get(backend).run(x, weights, random_routing(20, 3, dtype=torch.float32)).sum().backward()


@pytest.mark.parametrize("outer", ["sum", "square"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("backend", FUSED)
def test_second_derivatives_are_those_of_the_reference(backend, bias, outer):
    """Of the gradient of x, of which the combine weights are made too; also where that of the output is constant."""
    weights = random_weights(3, 4, 3, bias=bias, dtype=torch.float32)
    routing = random_routing(6, 3, dtype=torch.float32)
    router = torch.randn(4, requires_grad=True)
    x = torch.randn(6, 4, requires_grad=True)
    routing = routing.with_weight(routing.weight * (x @ router)[routing.token])
    parts = [p for p in (x, router, weights.up, weights.down, weights.up_bias) if p is not None]

    def penalty(name):
        y = get(name).run(x, weights, routing)
        y = y.sum() if outer == "sum" else y.square().sum()
        (grad,) = torch.autograd.grad(y, x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), parts, retain_graph=True)

    for got, expected in zip(penalty(backend), penalty("reference"), strict=True):
        assert torch.allclose(got, expected, rtol=1e-3, atol=1e-4 * max(1.0, float(expected.abs().max())))


def test_autocast_computes_in_the_autocast_dtype():
    experts = Experts(4, 8, 8, bias=True)
    routing = random_routing(10, 4, dtype=torch.float32)
    x = torch.randn(10, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = experts(x, routing)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32 and experts.down_proj.grad.dtype == torch.float32
    assert relative_error(y, experts(x, routing)) < 0.02


@pytest.mark.parametrize("half", [False, True])
def test_products_in_half_precision_run_in_float32_where_the_processor_has_none(half, monkeypatch):
    monkeypatch.setattr(products, "FAST", dict.fromkeys(products.FAST, half))
    monkeypatch.setattr(numba, "INSTALLED", False)
    used = []
    bmm = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, *rest, **out: used.append(a.dtype) or bmm(a, *rest, **out))
    layer = MoE(8, 4, 3, "topk", top_k=2, dtype=torch.bfloat16)
    layer(torch.randn(40, 8, dtype=torch.bfloat16)).sum().backward()
    assert set(used) == {torch.bfloat16 if half else torch.float32}
    assert ("products run in torch.float32" in layer.explain()) is not half


def test_choice_is_explained_and_refusals_are_errors():
    weights = random_weights(4, 6, 5)
    x = torch.randn(3, 6, dtype=torch.float64)
    backend, why = choose("auto", x, weights)
    assert backend.name in backend_names() and why
    register(Backend("never", get("reference").run, lambda x, w: "it never runs", "refuses"))
    try:
        with pytest.raises(ValueError, match="backend 'never' cannot run this: it never runs"):
            choose("never", x, weights)
    finally:
        from shunter.experts import choice as backends

        backends._BACKENDS.pop("never")
    with pytest.raises(ValueError, match="'fast' is unknown; choose auto, "):
        choose("fast", x, weights)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda e, r: e(torch.randn(3, 4), r), r"x has shape \(3, 4\); it must be \(3, 8\)"),
        (lambda e, r: e(torch.randn(4, 8), r), r"it must be \(3, 8\)"),
        (lambda e, r: e(torch.randn(3, 8).double(), r), "torch.float64 on cpu, the parameters are torch.float32"),
        (lambda e, r: e(torch.randn(3, 8), random_routing(3, 7)), "the routing has 7 experts, the layer 5"),
        (lambda e, r: Experts(5, 8, 0), "must be at least 1"),
        (lambda e, r: Experts(5, 8, 4, activation="tanh"), "'tanh' is unknown; choose from swiglu"),
        (lambda e, r: Experts(5, 8, 4, backend="fast"), "'fast' is unknown"),
    ],
)
def test_errors_say_what_is_allowed(call, message):
    with pytest.raises(ValueError, match=message):
        call(Experts(5, 8, 4), random_routing(3, 5, dtype=torch.float32))
