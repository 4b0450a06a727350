"""LoRA of experts: peft's function and gradients, without the product; its files; nothing untrained without a word."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

peft = pytest.importorskip("peft")

from peft.tuners.lora import layer  # noqa: E402

from shunter import Routing, from_pretrained, moe_layers, record, replay, sparsify  # noqa: E402
from shunter.errors import UserError  # noqa: E402
from shunter.hf.observe.taps import taps  # noqa: E402
from shunter.training.adapters import ParamWrapper, check_trained, expert_lora, group_lora  # noqa: E402
from shunter.training.roles import parameter_groups, roles, train_only  # noqa: E402
from tests.hf.families import build  # noqa: E402
from tests.training.test_pruning import wake  # noqa: E402

FAMILIES = ["qwen3_moe", "gpt_oss", "nemotron_h", "deepseek_v3", "mixtral"]


def base(kind):
    if kind == "ours":
        model = sparsify(build("mistral"), 8, "topk", top_k=2)
    elif kind == "ours with biases":
        model = sparsify(build("gpt2", n_layer=2, n_embd=32, n_head=4), 4, "topk", num_shared_experts=1)
    else:
        model = build(kind)
    return wake(model).double().eval()


def draw(model):
    """Adapters that change something: peft starts the second matrix at zero."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_(std=0.2)
    return model


def as_peft(model):
    """The same model with peft's own forward, on transformers' own loop."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, ParamWrapper):
            module.__class__ = layer.ParamWrapper
    return model


def eager(model):
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model


def call(wrapper, tokens=40):
    """Random arguments of a layer's experts, in float64."""
    experts = wrapper.get_base_layer()
    up = experts.gate_up_proj if hasattr(experts, "gate_up_proj") else experts.up_proj
    size, dim = experts.num_experts, up.shape[1 if getattr(experts, "is_transposed", False) else 2]
    x = torch.randn(tokens, dim, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(tokens, 2, dtype=torch.float64, requires_grad=True)
    index = torch.rand(tokens, size).argsort(1)[:, :2]
    if hasattr(experts, "activation"):
        return (x, weight), (x, Routing.from_topk(index, weight, size))
    return (x, weight), (x, index, weight)


@pytest.mark.parametrize("kind", [*FAMILIES, "ours", "ours with biases"])
def test_function_and_gradients_are_those_of_peft(kind, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # gates that compute in float32 whatever comes in
    model = draw(expert_lora(eager(base(kind)), r=3, lora_alpha=5, use_rslora=kind == "mixtral").double())
    ours = [module for module in model.modules() if isinstance(module, ParamWrapper)]
    theirs = [as_peft(wrapper) for wrapper in ours]
    assert len(ours) == len(taps(model))
    for one, other in zip(ours, theirs, strict=True):
        inputs, arguments = call(one)
        upstream = torch.randn_like(inputs[0])
        found = []
        for wrapper in (one, other):
            out = wrapper(*arguments)
            wanted = [*inputs, *(p for n, p in wrapper.named_parameters() if "lora_" in n)]
            found.append([out, *torch.autograd.grad(out, wanted, upstream, retain_graph=True)])
        assert len(found[0]) == 7
        for mine, expected in zip(*found, strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-12)
        one.enable_adapters(False)
        assert (one(*arguments) - found[0][0]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "ours"])
def test_files_are_those_of_peft(kind, tmp_path, monkeypatch):
    def logits(model):
        """In float64, where no choice hangs on rounding."""
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "float", torch.Tensor.double)
            return eager(copy.deepcopy(model).double())(input_ids=ids).logits

    plain = base(kind).float()
    plain.save_pretrained(tmp_path / "base")
    model = draw(expert_lora(copy.deepcopy(plain), r=2, target_modules=["q_proj"]))
    ids = torch.randint(64, (2, 9))
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    load = from_pretrained if kind == "ours" else AutoModelForCausalLM.from_pretrained
    loaded = peft.PeftModel.from_pretrained(load(str(tmp_path / "base")), tmp_path / "adapter").eval()
    assert not any(isinstance(module, ParamWrapper) for module in loaded.modules())
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-4)
    assert group_lora(loaded) == len(taps(plain))
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-4)
    merged = model.merge_and_unload()
    assert type(merged) is type(plain)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-3, atol=1e-3)
    merged.save_pretrained(tmp_path / "merged")
    again = load(str(tmp_path / "merged")).eval()
    torch.testing.assert_close(logits(again), expected, rtol=1e-3, atol=1e-3)


def test_several_adapters_add_up():
    model = draw(expert_lora(eager(base("qwen3_moe")), r=2).double())
    targets = model.peft_config["default"].target_parameters
    model.add_adapter("more", peft.LoraConfig(r=4, lora_alpha=3, target_modules=[], target_parameters=targets))
    draw(model.double())
    group_lora(model)
    model.base_model.set_adapter(["default", "more"])
    ids = torch.randint(64, (2, 9))
    torch.testing.assert_close(model(input_ids=ids).logits, as_peft(model)(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_no_tensor_of_the_size_of_the_stack_is_made():
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    model = base("qwen3_moe").float()
    stacks = {p.shape for n, p in model.named_parameters() if ".experts." in n}
    model = draw(expert_lora(model, r=2))
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    class Watch(TorchDispatchMode):
        made = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in tree_leaves(out):
                if isinstance(tensor, torch.Tensor) and tensor.shape in stacks:
                    self.made += tensor.untyped_storage().data_ptr() not in own
            return out

    ids = torch.randint(64, (2, 9))
    for each, expected in (model, False), (as_peft(model), True):
        own |= {p.untyped_storage().data_ptr() for p in each.parameters()}
        with Watch() as watch:
            each(input_ids=ids).logits.sum().backward()
        assert bool(watch.made) == expected


def test_a_step_trains_adapters_of_experts_alone(monkeypatch):
    """Against a gradient the loss falls, if the step is short enough."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    model = expert_lora(base("qwen3_moe"), r=2).double()
    of = roles(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name and of[name] == "expert" for name in trained)
    ids = torch.randint(64, (2, 9))
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for halvings in range(20):
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.requires_grad:
                    p.copy_(before[name]).sub_(p.grad, alpha=0.5**halvings)
            if model(input_ids=ids, labels=ids).loss < loss:
                break
    else:
        pytest.fail("no step against the gradient lowers the loss")
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in trained if "lora_B" in name}  # that of the others is 0 while these are


@pytest.mark.parametrize("as_peft_has_it", [False, True])
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "ours"])
def test_decisions_are_recorded_under_adapters(kind, as_peft_has_it):
    """Adapters at their start change nothing: neither what the model says nor which experts its tokens take."""
    plain, ids = base(kind).float(), torch.randint(64, (2, 9))
    with record(plain) as expected:
        plain(input_ids=ids)
    model = expert_lora(copy.deepcopy(plain), r=2)
    model = as_peft(model) if as_peft_has_it else model
    with record(model) as found, replay(model, expected):
        model(input_ids=ids)
    assert found.experts.shape[:2] == (18, len(taps(plain)))
    assert torch.equal(found.experts.sort(-1).values, expected.experts.sort(-1).values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_and_in_half_precision(dtype):
    model = draw(expert_lora(base("qwen3_moe").float(), r=2))
    ids = torch.randint(64, (2, 9))
    with record(model) as taken:
        exact = model(input_ids=ids).logits
    with replay(model, taken), torch.autocast("cpu", dtype):  # a choice that hangs on rounding would move a token
        found = model(input_ids=ids).logits
    assert (found - exact).norm() < 0.2 * exact.norm()
    half = draw(expert_lora(base("qwen3_moe").to(dtype), r=2))
    half(input_ids=ids).logits.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in half.parameters() if p.requires_grad)


def test_what_would_train_nothing_of_the_experts_is_an_error():
    model = base("qwen3_moe").float()
    model.model.norm.requires_grad_(False)
    before = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    for r in (0, -1, 2.0, True):
        with pytest.raises(UserError, match=f"rank r={r} must be an integer of at least 1"):
            expert_lora(model, r=r)
    for options in {"lora_alpha": 0}, {"lora_alpha": -1.0}, {"alpha_pattern": {"down_proj": 0}}:
        with pytest.raises(UserError, match="alpha=.* must be a number above 0, or nothing is learned"):
            expert_lora(model, r=1, **options)
    refused = [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}, {"init_lora_weights": "pissa"}]
    unheeded = [{"layers_to_transform": [0]}, {"layers_to_transform": 0}, {"exclude_modules": r".*layers\.1\..*"}]
    for options in refused + unheeded:
        with pytest.raises(UserError, match=next(iter(options))):
            expert_lora(model, r=1, target_modules=["q_proj"], **options)
        assert not any("lora" in name for name, _ in model.named_modules())
    with pytest.raises(UserError, match="nothing of the experts .* is trained, but attention"):
        expert_lora(model, r=1, target_parameters=None, target_modules=["q_proj"], modules_to_save=["gate"])
    with pytest.raises(UserError, match="model.layers.1.mlp is trained, and 1 other"):
        expert_lora(model, r=1, target_parameters=["layers.0.mlp.experts.down_proj"])
    with pytest.raises(UserError, match="positive integer"):  # at the second of its layers
        expert_lora(model, r=1, target_modules=["q_proj", "k_proj"], rank_pattern={"k_proj": 0})
    assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == before
    assert not hasattr(model, "peft_config")
    with pytest.raises(UserError, match="no experts in one stack"):
        expert_lora(build("jetmoe"), r=1)
    adapted = expert_lora(base("qwen3_moe").float(), r=1)
    train_only(adapted, "attention")
    with pytest.raises(UserError, match="nothing of the experts"):
        check_trained(adapted)


def test_groups_of_a_model_with_adapters_leave_what_they_wrap_frozen():
    model = expert_lora(base("qwen3_moe").float(), r=1)
    wanted = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for group in parameter_groups(model, 1e-3) for name in group["names"]} == wanted
    train_only(model, "expert")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == wanted
    with pytest.raises(UserError, match="requires a gradient"):
        parameter_groups(model, 1e-3, "norm")


def test_ours_know_their_layers_under_adapters():
    sparse = sparsify(build("mistral"), 4, "topk", num_shared_experts=1, load_balancing_loss=0.01)
    spent = {name: layer.flops_per_token(9) for name, layer in moe_layers(sparse).items()}
    model = expert_lora(sparse, r=2)
    assert list(spent.values()) == [layer.flops_per_token(9) for layer in moe_layers(model).values()]
    model.train()
    ids = torch.randint(64, (2, 9))
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(layer.routing is not None and layer.losses for layer in moe_layers(model).values())


@pytest.mark.parametrize("kind, name", [("qwen3_moe", "gate"), ("jamba", "router"), ("ours", "router")])
def test_routers_that_are_trained_whole_beside_the_adapters_are_routers(kind, name):
    plain = base(kind).float()
    model = expert_lora(plain, r=2, modules_to_save=[name])
    of, parameters = roles(model), dict(model.named_parameters())
    routers = {path for path in of if f".{name}." in path}
    assert {of[path] for path in routers} == {"router"} == {r for path, r in of.items() if "modules_to_save" in path}
    for tap in taps(model).values():
        used = next(p for p in tap.router.parameters())
        assert any(used is parameters[path] for path in routers if "modules_to_save" in path) and used.requires_grad
    with model.disable_adapter():
        assert not any(p.requires_grad for tap in taps(model).values() for p in tap.router.parameters())
    ids = torch.randint(64, (2, 7))
    before = model(input_ids=ids).logits
    with torch.no_grad():
        for path in routers:
            if "modules_to_save" in path and path.endswith("weight"):
                parameters[path].neg_()
    assert float((model(input_ids=ids).logits - before).abs().max()) > 1e-3
    train_only(model, "router")
    assert {path for path, p in model.named_parameters() if p.requires_grad} == {
        path for path in routers if "original_module" not in path
    }
