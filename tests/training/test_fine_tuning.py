"""Expert dropout in every kind of experts, scaled gradients of experts, and routers that autocast leaves in float32."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shunter import MoE, from_pretrained, moe_layers, routers, sparsify
from shunter.errors import UserError
from shunter.training.fine_tuning import expert_dropout, scale_expert_gradients
from tests.helpers import by_tokens, deviation
from tests.hf.families import build


def test_dropout_takes_hidden_units_of_experts_and_nothing_else():
    p, tokens, hidden = 0.4, 2000, 16
    moe = MoE(8, hidden, 2, "topk", top_k=1, expert_dropout=p, activation="relu").double()
    x = torch.rand(tokens, 8, dtype=torch.float64) + 0.1
    w = moe.experts.weights
    for matrix in (w.up, w.down):
        torch.nn.init.ones_(matrix)  # hidden units are equal, and an output is the sum of what is left of them
    dropped = moe.train()(x)
    whole = by_tokens(x, w, moe.routing.dense())
    units = (dropped / whole * hidden * (1 - p)).detach()
    assert torch.allclose(units, units[:, :1].round().expand_as(units))  # of the hidden units, not of the outputs
    assert abs(float(units[:, 0].mean()) / hidden - (1 - p)) < deviation(tokens * hidden)
    torch.testing.assert_close(moe.eval()(x), whole)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "shunter"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3", "nemotron_h"])
def test_dropout_in_any_family_under_any_implementation(family, implementation):
    model = build(family)
    model.set_experts_implementation(implementation)
    ids = torch.randint(64, (2, 8))
    whole = model(ids).logits
    assert expert_dropout(model, 0.5) == len([m for m in model.modules() if hasattr(m, "_apply_gate")])
    for name in ("attention_dropout", "resid_pdrop"):
        assert not getattr(model.config, name, 0.0)
    torch.testing.assert_close(model(ids).logits, whole)
    model.train()
    assert (model(ids).logits - whole).abs().max() > 1e-6
    expert_dropout(model, 0.0)
    torch.testing.assert_close(model(ids).logits, whole, rtol=1e-4, atol=1e-5)


def test_dropout_is_saved_with_a_model_of_ours(tmp_path):
    model = sparsify(build("mistral"), 4, "topk")
    expert_dropout(model, 0.25)
    model.save_pretrained(tmp_path)
    assert [layer.experts.dropout for layer in moe_layers(from_pretrained(tmp_path)).values()] == [0.25] * 3


@pytest.mark.parametrize("probability", [-0.1, 1.0, float("nan")])
def test_impossible_dropout(probability):
    with pytest.raises(UserError, match="at least 0 and below 1"):
        expert_dropout(build("mixtral"), probability)
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        MoE(8, 8, 2, expert_dropout=probability)


def test_the_two_definitions_of_scaled_gradients():
    # The gradient of a mean over E ranks' tokens is the summed one over E.
    experts = 9
    moe = MoE(8, 16, experts, "topk", top_k=3).double()
    x = torch.randn(30, 8, dtype=torch.float64)

    def gradients(relative_to):
        model = copy.deepcopy(moe)
        undo = scale_expert_gradients(model, relative_to) if relative_to else None
        model(x).square().mean().backward()
        if undo:
            undo()
        return {name: p.grad for name, p in model.named_parameters()}

    mean = gradients(None)
    for relative_to, expected in ("sum", experts**0.5), ("mean", experts**-0.5):
        for name, grad in gradients(relative_to).items():
            torch.testing.assert_close(grad, mean[name] * (expected if "experts" in name else 1))
    summed = {name: grad * experts for name, grad in mean.items()}
    torch.testing.assert_close(gradients("sum")["experts.down_proj"], summed["experts.down_proj"] / experts**0.5)
    with pytest.raises(UserError, match='must be "sum" or "mean"'):
        scale_expert_gradients(moe, "rank")


def test_under_adam_a_factor_acts_by_clipping_alone():
    moe = MoE(8, 16, 16, "topk", top_k=2).double()
    batches = [torch.randn(30, 8, dtype=torch.float64) for _ in range(3)]

    def trained(optimizer, scaled, clip=None):
        model = copy.deepcopy(moe)
        if scaled:
            scale_expert_gradients(model, "mean")
        steps = optimizer(model.parameters())
        for x in batches:
            steps.zero_grad()
            model(x).square().mean().backward()
            if clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            steps.step()
        return model.experts.down_proj.detach()

    def sgd(parameters):
        return torch.optim.SGD(parameters, lr=0.1)

    def adam(parameters):
        return torch.optim.Adam(parameters, lr=0.01, eps=1e-300)

    assert (trained(sgd, True) - trained(sgd, False)).abs().max() > 1e-4
    torch.testing.assert_close(trained(adam, True), trained(adam, False), rtol=1e-9, atol=1e-12)
    # What is clipped changes from step to step, and with it the moments.
    assert (trained(adam, True, clip=1e-3) - trained(adam, False, clip=1e-3)).abs().max() > 1e-6


class _Results(TorchDispatchMode):
    """The dtypes of the floating results of every operation, from those of the router's input on."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.dtypes.append((str(function), tensor.dtype))
        return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "router",
    [
        "switch", "topk", "noisy_topk", "expert_choice", "deepseek", "base", "gshard", "hierarchical_noisy_topk",
        "vmoe", "prototypes", "dense_to_sparse", "dselect_k", "two_sided", "sinkhorn", "hme", "cosine", "top_p", "relu",
    ],
)  # fmt: skip
def test_no_operation_of_a_router_is_in_half_precision_under_autocast(router, dtype):
    moe = MoE(16, 32, 16, router, **routers.find(router).example_options).train()
    x = torch.randn(12, 16).to(dtype)  # as the layer before left it
    found = []

    def watch(module, args):
        mode = _Results()
        found.append(mode)
        mode.__enter__()

    moe.router.register_forward_pre_hook(watch)
    moe.router.register_forward_hook(lambda *_: found[-1].__exit__(None, None, None))
    with torch.autocast("cpu", dtype):
        out = moe(x)
    ops = found[0].dtypes
    assert ops and not [op for op in ops if op[1].itemsize < 4]
    assert out.dtype == dtype and moe.routing.weight.dtype == torch.float32
    out.float().square().mean().backward()
    assert moe.router.weight.grad is None or moe.router.weight.grad.dtype == torch.float32
