"""A compiled layer, in one graph without breaks, computes what the layer computes."""

import copy
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import shunter.hf
from shunter import MoE, aux_loss
from shunter.context import present
from shunter.experts import Experts, autograd
from shunter.experts.choice import get
from tests.helpers import TIME_LIMIT, random_routing, relative_error

LAYERS = {
    "topk": ("topk", {"top_k": 2}),
    "topk within capacity, biased": ("topk", {"top_k": 2, "capacity_factor": 1.0, "bias": True, "activation": "gelu"}),
    "topk recomputing, shared": ("topk", {"top_k": 3, "recompute": True, "num_shared_experts": 1}),
    "topk on grouped_mm": ("topk", {"top_k": 2, "backend": "grouped_mm"}),
    "switch": ("switch", {}),
    "expert_choice": ("expert_choice", {"capacity_factor": 2.0}),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def _pair(name, dtype, backend):
    torch._dynamo.reset()
    router, options = LAYERS[name]
    layer = MoE(16, 24, 4, router, dtype=dtype, **options)
    twin = copy.deepcopy(layer)
    return torch.compile(layer, fullgraph=True, backend=backend), layer, twin


def _clear(layer, dtype, tokens=60):
    """Random tokens whose choices no rounding turns: of eight times as many, those whose last choice is clearest."""
    x = torch.randn(8 * tokens, 16, dtype=dtype)
    k = layer.router.top_k
    best = layer.router.score(x).detach().topk(k + 1).values
    return x[(best[:, k - 1] - best[:, k]).argsort()[-tokens:]]


def _pass(call, layer, x, grad, **known):
    """Output, gradients of the input and the parameters, losses and counts, of one training pass."""
    torch.manual_seed(0)  # for the noise of the routers that have it
    x = x.detach().requires_grad_()
    y = call(x, **known)
    layer.zero_grad()
    ((y * grad).sum() + aux_loss(layer)).backward()
    gradients = {key: p.grad for key, p in layer.named_parameters()}
    return {"y": y.detach(), "x": x.grad, **gradients, "counts": layer.routing.counts, "loss": aux_loss(layer).detach()}


@pytest.mark.parametrize(
    "name, dtype", [*((name, "float32") for name in LAYERS), ("topk", "bfloat16"), ("switch", "bfloat16")]
)
def test_one_graph_gives_the_same_bits_forward_and_backward(name, dtype):
    compiled, layer, twin = _pair(name, DTYPES[dtype], "aot_eager")
    for tokens in (37, 50) if dtype == "bfloat16" else (37,):  # the second compiles for any number
        x, grad = torch.randn(2, tokens, 16, dtype=DTYPES[dtype]), torch.randn(2, tokens, 16, dtype=DTYPES[dtype])
        found, expected = _pass(compiled, layer, x, grad), _pass(twin, twin, x, grad)
        assert found["counts"].sum() > 0 and found.keys() == expected.keys()
        for key, value in expected.items():
            assert value is None or torch.equal(found[key], value), key


@pytest.mark.parametrize("name", ["topk", "switch"])
def test_padding_and_a_few_tokens_without_gradients(name):
    compiled, layer, twin = _pair(name, torch.float32, "aot_eager")
    x, grad, mask = torch.randn(40, 16), torch.randn(40, 16), torch.rand(40) < 0.7
    found, expected = (_pass(*pair, x, grad, mask=mask) for pair in ((compiled, layer), (twin, twin)))
    for key, value in expected.items():
        assert value is None or torch.equal(found[key], value), key
    layer.eval(), twin.eval()
    with torch.no_grad():
        for tokens in (1, 3):
            x = torch.randn(tokens, 16)
            assert torch.equal(compiled(x), twin(x))


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler")
@pytest.mark.parametrize(
    "name, dtype", [pytest.param("topk", "float32", marks=pytest.mark.slow), ("switch", "bfloat16")]
)
def test_inductor_gives_the_same_numbers(name, dtype):
    compiled, layer, twin = _pair(name, DTYPES[dtype], "inductor")
    layer.router.jitter = twin.router.jitter = 0.0  # its noise is another there
    x, grad = _clear(twin, DTYPES[dtype]), torch.randn(60, 16, dtype=DTYPES[dtype])
    found, expected = _pass(compiled, layer, x, grad), _pass(twin, twin, x, grad)
    for key, value in expected.items():
        assert relative_error(found[key], value) < 8 * torch.finfo(DTYPES[dtype]).eps, key


@pytest.mark.parametrize("backend", ["padded", "grouped_mm", "numba"])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_operator_is_what_it_says_to_the_compiler(backend, recompute):
    """torch's own checks: schema, shapes without data, gradients registered, the same under tracing."""
    experts = Experts(4, 8, 12, bias=True)
    routing = random_routing(20, 4, dtype=torch.float32)
    weights = experts.weights
    x, score = torch.randn(20, 8, requires_grad=True), routing.weight.requires_grad_()
    if refusal := get(backend).refuses(x, weights):
        pytest.skip(refusal)
    parts = (x, score, weights.up, weights.down, weights.up_bias, weights.down_bias)
    arguments = (*parts, list(routing.indices()), backend, "swiglu", not recompute)
    torch.library.opcheck(torch.ops.shunter.experts.default, arguments)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out, h = torch.ops.shunter.experts(*arguments)
    assert any(t.data_ptr() == h.data_ptr() for t in saved) == (not recompute)
    assert torch.equal(out, get(backend).run(x, weights, routing)) and h.shape[0] == (not recompute) * score.numel()


def test_every_kernel_has_a_backend_of_its_name():
    assert all(get(name).name == name for name in autograd._KERNELS)


@pytest.mark.parametrize("router", ["topk", pytest.param("hash", marks=pytest.mark.slow)])
@pytest.mark.parametrize("way", [pytest.param("the model", marks=pytest.mark.slow), "each block"])
def test_a_compiled_model_trains_as_the_model(way, router):
    """Padding and ids reach its routers, and its auxiliary losses its loss, step after step."""
    torch._dynamo.reset()
    shape = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24, "vocab_size": 50}
    dense = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", num_attention_heads=2, **shape))
    options = {"top_k": 2, "load_balancing_loss": 1.0} if router == "topk" else {}
    model = shunter.sparsify(dense, 4, router, **options).train()
    twin = copy.deepcopy(model)
    run = twin
    if way == "the model":
        run = torch.compile(twin, backend="aot_eager")
    else:
        for block in twin.model.layers:
            block.compile(backend="aot_eager")
    for _ in range(2):
        ids, mask = torch.randint(1, 50, (2, 6)), torch.ones(2, 6, dtype=torch.int64)
        mask[1, 3:] = 0
        batch = {"input_ids": ids, "attention_mask": mask, "labels": ids, "use_cache": False}
        losses = []
        for one, call in ((model, model), (twin, run)):
            one.zero_grad()
            losses.append(call(**batch).loss)
            losses[-1].backward()
        assert torch.allclose(*losses)
        for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert torch.allclose(p.grad, q.grad, atol=1e-6), name
        for one, other in zip(shunter.moe_layers(model).values(), shunter.moe_layers(twin).values(), strict=True):
            assert torch.equal(one.routing.counts, other.routing.counts)
        assert not present(), "a compiled forward leaves its scopes too"


def test_a_sparsified_model_compiles_in_one_graph():
    torch._dynamo.reset()
    shape = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24, "vocab_size": 50}
    dense = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", num_attention_heads=2, **shape))
    model = shunter.sparsify(dense, 4, "topk", top_k=2).eval()
    ids = torch.randint(1, 50, (2, 6))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(input_ids=ids, use_cache=False).logits, model(ids).logits, atol=1e-5)


FAMILIES = {
    "mixtral": {"num_local_experts": 4},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},  # its own code between products
}


def _family(name):
    shape = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24, "vocab_size": 50}
    config = AutoConfig.for_model(name, num_attention_heads=2, num_key_value_heads=1, **shape, **FAMILIES[name])
    model = AutoModelForCausalLM.from_config(config)
    model.set_experts_implementation("shunter")
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_compiles_in_one_graph_and_trains(name):
    torch._dynamo.reset()
    model = _family(name).train()
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    ids = torch.randint(1, 50, (2, 6))
    batch = {"input_ids": ids, "labels": ids, "use_cache": False}
    losses = [call(**batch).loss for call in (model, compiled)]
    assert torch.allclose(*losses)
    for loss in losses:
        loss.backward()
    for (key, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, atol=1e-6), key


@pytest.mark.parametrize("bias", [False, True])
def test_the_operator_of_products_is_what_it_says_to_the_compiler(bias):
    rows, weight = torch.randn(9, 4, requires_grad=True), torch.randn(3, 5, 4, requires_grad=True)
    parts = (rows, weight, torch.randn(3, 5, requires_grad=True) if bias else None, torch.tensor([0, 4, 4, 9]))
    torch.library.opcheck(torch.ops.shunter.products.default, parts)
    expected = torch.cat([rows[:4] @ weight[0].T, rows[4:] @ weight[2].T])
    if bias:
        expected = expected + torch.cat([parts[2][:1].expand(4, -1), parts[2][2:].expand(5, -1)])
    assert torch.allclose(torch.ops.shunter.products(*parts), expected, atol=1e-5)


COLD = """
import sys
import torch
import shunter.hf
from tests.hf.conftest import BUILD
from tests.properties.test_compile import _family

model = _family("mixtral") if sys.argv[1] == "family" else shunter.sparsify(BUILD["llama"](), 4, "topk", top_k=2)
model, ids = model.eval(), torch.randint(1, 50, (2, 6))
with torch.no_grad():
    more = {"use_cache": False, "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2])}
    found = torch.export.export(model, (ids,), more, strict=sys.argv[2] == "strict").module()
    assert torch.allclose(found(ids, **more).logits, model(ids, **more).logits, atol=1e-6)
"""


@pytest.mark.parametrize(
    "kind, how",
    [("family", "strict"), pytest.param("family", "traced", marks=pytest.mark.slow), ("sparsified", "traced")],
)
def test_a_model_is_exported_by_a_process_that_never_ran_one(kind, how):
    """What a function computes, and what this machine can, is found out beside the tracing."""
    run = subprocess.run([sys.executable, "-c", COLD, kind, how], capture_output=True, text=True, timeout=TIME_LIMIT)
    assert run.returncode == 0, run.stderr[-2000:]
