"""Every family's experts under "shunter": output and every gradient against the definition in float64."""

import copy
import math
from pathlib import Path

import pytest
import torch
import transformers
from tools.families import build, experts_classes, table

import shunter.hf.backend
from shunter.experts.backends.numba import bridge as numba
from tests.helpers import error_of_another_order, relative_error

CLASSES = [experts for classes in experts_classes().values() for experts in classes]
TOKENS, TOP_K = 256, 3


def _fill(module):
    """Parameters at the scale of a trained layer, none of them zero or one."""
    for parameter in module.parameters():
        fan_in = 1 if parameter.dim() < 3 else parameter.shape[-2 if module.is_transposed else -1]
        with torch.no_grad():
            parameter.copy_(torch.randn_like(parameter) * fan_in**-0.5)
    return module


def _definition(module, x, index, weight):
    """sum over a token's choices of w * norm(down(gate(up(x)))), every expert on every token; id E adds nothing."""
    name = "gate_up_proj" if module.has_gate else "up_proj"
    up, down = getattr(module, name), module.down_proj
    if module.is_transposed:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    h = torch.einsum("td,ead->tea", x, up)
    h = h + getattr(module, f"{name}_bias") if module.has_bias else h
    a = module._apply_gate(h) if module.has_gate else module.act_fn(h)
    y = torch.einsum("tef,edf->ted", a, down)
    y = y + module.down_proj_bias if module.has_bias else y
    y = module.post_expert_norm(y) if module.has_post_expert_norm else y
    matrix = x.new_zeros(x.shape[0], module.num_experts + 1).scatter_add(1, index, weight)
    return torch.einsum("te,ted->td", matrix[:, :-1], y)


def _gradients(run, module, x, index, weight, grad):
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    out = run(module, x, index, weight)
    wanted = {"x": x, "weight": weight, **dict(module.named_parameters())}
    values = torch.autograd.grad(out, list(wanted.values()), grad.to(out.dtype))
    return {"output": out.detach(), **dict(zip(wanted, values, strict=True))}


def _under(name):
    def run(module, x, index, weight):
        module.config._experts_implementation = name
        return module(x, index, weight)

    return run


def _exact(module, x, index, weight, grad, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)  # gates that compute in float32 whatever comes in
        return _gradients(
            _definition, copy.deepcopy(module).double(), x.double(), index, weight.double(), grad.double()
        )


def _inputs(module, dtype, index=None):
    d = module.down_proj.shape[-1 if module.is_transposed else 1]
    x, grad = torch.randn(TOKENS, d, dtype=torch.float64), torch.randn(TOKENS, d, dtype=torch.float64)
    if index is None:
        index = torch.rand(TOKENS, module.num_experts).topk(TOP_K).indices
    weight = torch.rand(TOKENS, TOP_K, dtype=torch.float64) + 0.1
    return x.to(dtype), index, weight.to(dtype), grad.to(dtype)


@pytest.mark.parametrize("experts", CLASSES, ids=lambda c: c.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("compiled", [False, True], ids=["torch's products", "compiled loops"])
def test_a_family_is_as_exact_as_its_own_loop(experts, dtype, compiled, monkeypatch):
    module = _fill(build(experts)).to(dtype)
    if compiled and shunter.hf.backend.how(module) != "backends, swiglu":
        pytest.skip("compiled for no other activation here, which would take seconds for each")
    monkeypatch.setattr(numba, "SMALL", 0 if compiled else math.inf)  # which leaves small inputs to torch
    inputs = _inputs(module, dtype)
    ours = _gradients(_under("shunter"), module, *inputs)
    theirs = _gradients(_under("eager"), module, *inputs)
    grouped = _gradients(_under("grouped_mm"), module, *inputs)
    exact = _exact(module, *inputs, monkeypatch)
    for name, value in exact.items():
        assert ours[name].dtype == theirs[name].dtype and ours[name].shape == theirs[name].shape, name
        error, *others = (relative_error(values[name], value) for values in (ours, theirs, grouped))
        assert error <= error_of_another_order(max(others), dtype), f"{name}: {error:.2e}, transformers {others}"
        assert max(others) < (1e-5 if dtype is torch.float32 else 0.2), f"{name}: the definition is another"


# One class for each way that a module runs: on the backends, transposed, interleaved with bias, not gated, normed.
WAYS = ["Qwen3MoeExperts", "AriaExperts", "GptOssExperts", "NemotronHExperts", "MuseSparkExperts"]


@pytest.fixture(params=WAYS)
def way(request):
    """A float64 module of it."""
    return _fill(build(next(c for c in CLASSES if c.__name__ == request.param))).double()


@pytest.mark.parametrize("name", ["GptOssExperts", "DeepseekV4Experts", "Glm5NextTextExperts", "MiniMaxM3VLExperts"])
def test_limits_that_are_reached(name, monkeypatch):
    module = _fill(build(next(c for c in CLASSES if c.__name__ == name))).double()
    limits = [key for key in vars(module) if "limit" in key]
    for key in limits:
        setattr(module, key, 0.5)
    assert limits
    _assert_exact(module, _inputs(module, torch.float64), monkeypatch)


def _assert_exact(module, inputs, monkeypatch):
    ours, exact = _gradients(_under("shunter"), module, *inputs), _exact(module, *inputs, monkeypatch)
    for name, value in exact.items():
        bound = 1e-5 if module.has_post_expert_norm else 1e-12  # a norm computes in float32
        assert (ours[name] - value).norm() <= bound * value.norm(), name


@pytest.mark.parametrize("parallel", [False, True])
def test_experts_that_are_not_here_add_nothing(way, parallel, monkeypatch):
    way._is_expert_parallel = parallel
    index = torch.rand(TOKENS, way.num_experts + 1).topk(TOP_K).indices
    index[::5] = way.num_experts  # tokens that have no expert here at all
    assert (index == way.num_experts).sum() > TOKENS // 5 * TOP_K
    _assert_exact(way, _inputs(way, torch.float64, index), monkeypatch)


def test_an_expert_named_twice_counts_twice(way, monkeypatch):
    _assert_exact(way, _inputs(way, torch.float64, torch.randint(way.num_experts, (TOKENS, TOP_K))), monkeypatch)


@pytest.mark.parametrize("tokens", [0, 1, 2])
def test_few_tokens_leave_gradients_for_every_expert(way, tokens, monkeypatch):
    x, index, weight, grad = _inputs(way, torch.float64)
    _assert_exact(way, (x[:tokens], index[:tokens], weight[:tokens], grad[:tokens]), monkeypatch)


def test_all_tokens_with_one_expert(way, monkeypatch):
    index = torch.full((TOKENS, 1), 2)
    x, _, weight, grad = _inputs(way, torch.float64)
    _assert_exact(way, (x, index, weight[:, :1], grad), monkeypatch)


def test_weights_of_the_router_may_be_more_exact(way, monkeypatch):
    module = way.bfloat16()
    x, index, weight, grad = _inputs(module, torch.bfloat16)
    inputs = x, index, weight.float() + torch.rand_like(weight, dtype=torch.float32) * 1e-3, grad
    ours, theirs = (_gradients(_under(name), module, *inputs) for name in ("shunter", "eager"))
    exact = _exact(module, *inputs, monkeypatch)
    assert ours["weight"].dtype == torch.float32 and ours["output"].dtype == torch.bfloat16
    for name in ("output", "x", "weight"):
        bound = error_of_another_order(relative_error(theirs[name], exact[name]), ours[name].dtype)
        assert relative_error(ours[name], exact[name]) <= bound, name


def test_half_precision(way, monkeypatch):
    inputs = _inputs(way.half(), torch.float16)
    ours, exact = _gradients(_under("shunter"), way, *inputs), _exact(way, *inputs, monkeypatch)
    for name, value in exact.items():
        assert relative_error(ours[name], value) < 0.02, name


def test_autocast_computes_in_its_dtype_and_returns_the_given_one(way, monkeypatch):
    module = way.float()
    inputs = _inputs(module, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = _under("shunter")(module, *inputs[:3])
    exact = _exact(module, *inputs, monkeypatch)["output"]
    assert out.dtype == torch.float32
    assert 1e-4 < relative_error(out, exact) < 0.05  # computed in bfloat16, and right


def test_parameters_are_used_in_place(way):
    held = {p.untyped_storage().data_ptr() for p in way.parameters()}
    for value in shunter.hf.backend._parameters(way):
        assert value is None or value.untyped_storage().data_ptr() in held


def test_ids_out_of_range_are_refused(way):
    x, index, weight, _ = _inputs(way, torch.float64)
    for bad in (-1, way.num_experts + 1):
        index[3, 1] = bad
        with pytest.raises(ValueError, match=f"expert {bad} is out of range.* 0 to 4"):
            _under("shunter")(way, x, index, weight)


def test_the_activation_is_looked_at_anew(monkeypatch):
    module = _fill(build(CLASSES[0])).double()
    inputs = _inputs(module, torch.float64)
    _assert_exact(module, inputs, monkeypatch)
    for act in (torch.nn.GELU(), torch.nn.Tanh(), torch.nn.ReLU()):
        module.act_fn = act
        _assert_exact(module, inputs, monkeypatch)


def test_interleaved_weights_with_the_default_gate():
    module = _fill(build(CLASSES[0])).double()
    x, index, weight, _ = _inputs(module, torch.float64)
    expected = _under("shunter")(module, x, index, weight)
    module.is_concatenated = False
    with torch.no_grad():
        gate, up = module.gate_up_proj.chunk(2, dim=1)
        module.gate_up_proj.copy_(torch.stack([gate, up], 2).flatten(1, 2))
    assert torch.allclose(_under("shunter")(module, x, index, weight), expected)


def test_the_page_of_families_is_what_the_command_prints():
    page = (Path(__file__).resolve().parents[2] / "docs/families.md").read_text(encoding="utf-8")
    if f"transformers {transformers.__version__}:" not in page:
        pytest.skip("docs/families.md was made with another version of transformers")
    assert page == table(), "run python tools/families.py > docs/families.md"


@pytest.mark.parametrize("name", ["Qwen3MoeExperts", "GptOssExperts"])
def test_second_derivatives_are_those_of_its_own_loop(name):
    """On the backends (Qwen3) and around the module's own code (gpt-oss)."""
    module = _fill(build(next(c for c in CLASSES if c.__name__ == name))).double()
    x = torch.randn(7, module.gate_up_proj.shape[-2 if module.is_transposed else -1], dtype=torch.float64)
    index = torch.stack([torch.randperm(module.num_experts)[:2] for _ in range(7)])
    router = torch.randn(2, x.shape[1], dtype=torch.float64, requires_grad=True)
    x.requires_grad_()
    weight = (x @ router.T).softmax(-1)  # as a router's are, of the very rows that the experts take
    parts = [x, router, *module.parameters()]

    def penalty(way):
        (grad,) = torch.autograd.grad(_under(way)(module, x, index, weight).sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), parts, retain_graph=True, allow_unused=True)

    for got, expected in zip(penalty("shunter"), penalty("eager"), strict=True):
        expected = torch.zeros(()) if expected is None else expected
        assert torch.allclose(torch.zeros_like(expected) if got is None else got, expected, atol=1e-8)
