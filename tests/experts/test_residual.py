"""Experts that are a core and a residual each: sums written out, the dense model at zero, the core left alone."""

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import shunter
from shunter import MoE, Routing
from shunter.analysis.ledger import ledger
from shunter.errors import UserError
from shunter.experts import Experts, ResidualExperts
from shunter.hf.checkpoints.exporting import export
from shunter.training.roles import roles, train_only

E, D, HIDDEN = 3, 8, 12


def _drawn(**options):
    experts = ResidualExperts(E, D, HIDDEN, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn_like(parameter) / 3)
    return experts


def _written_out(experts, x, routing):
    """Each token through each of its experts by torch's own functions."""
    out = torch.zeros_like(x)
    gated = hasattr(experts, "gate_up_core")
    up = "gate_up" if gated else "up"
    for token, expert, weight in zip(routing.token.tolist(), routing.expert.tolist(), routing.weight, strict=True):
        w = {
            name: getattr(experts, f"{name}_core") + getattr(experts, f"{name}_residual")[expert]
            for name in (up, "down")
        }
        b = {
            name: getattr(experts, f"{name}_core_bias") + getattr(experts, f"{name}_residual_bias")[expert]
            if experts.bias
            else None
            for name in (up, "down")
        }
        h = F.linear(x[token], w[up], b[up])
        if gated:
            gate, value = h.chunk(2)
            h = F.silu(gate) * value
        else:
            h = F.gelu(h)
        out[token] = out[token] + weight * F.linear(h, w["down"], b["down"])
    return out


@pytest.mark.parametrize("activation, bias", [("swiglu", False), ("gelu", True)])
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_an_expert_is_the_sum_of_core_and_residual(activation, bias, backend):
    experts = _drawn(activation=activation, bias=bias, backend=backend)
    x = torch.randn(7, D, dtype=torch.float64, requires_grad=True)
    routing = Routing.from_topk(torch.rand(7, E).topk(2).indices, torch.rand(7, 2, dtype=torch.float64), E)
    wanted = torch.randn(7, D, dtype=torch.float64)
    found = {}
    for name, out in (("ours", experts(x, routing)), ("by hand", _written_out(experts, x, routing))):
        parameters = dict(experts.named_parameters()) | {"x": x}
        grads = torch.autograd.grad((out * wanted).sum(), list(parameters.values()))
        found[name] = [out, *grads]
        named = dict(zip(parameters, grads, strict=True))
        for key in [key for key in named if "_core" in key]:
            torch.testing.assert_close(named[key], named[key.replace("_core", "_residual")].sum(0))
    torch.testing.assert_close(found["ours"], found["by hand"])
    plain = experts.plain()
    assert type(plain) is Experts and torch.equal(plain(x, routing), experts(x, routing))


def _llama(**options):
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    dense = LlamaForCausalLM(config)
    sparse = copy.deepcopy(dense)
    shunter.sparsify(sparse, E, "topk", top_k=2, expert_weights="residual", **options)
    return dense.eval(), sparse.eval()


def _move(model, ids, **options):
    """A few steps on some ids; the optimizer."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **options)
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return optimizer


def test_without_residuals_the_model_is_the_dense_one():
    dense, sparse = _llama(init="copy")
    ids = torch.randint(50, (2, 9))
    torch.testing.assert_close(sparse(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-5)
    _move(sparse.train(), ids, lr=1e-2)
    assert (sparse.eval()(ids).logits - dense(ids).logits).abs().max() > 1e-2


def test_in_the_cheap_phase_the_core_and_its_optimizer_state_stay():
    dense, sparse = _llama(init="copy")
    ids = torch.randint(50, (2, 9))
    before = {name: value.clone() for name, value in sparse.state_dict().items()}
    of = roles(sparse)
    assert {name.rpartition(".")[2] for name, role in of.items() if role == "core"} == {"gate_up_core", "down_core"}
    train_only(sparse, "router,expert")
    optimizer = _move(sparse.train(), ids, lr=1e-2)
    held = sum(value.numel() for state in optimizer.state.values() for value in state.values() if value.dim())
    residuals, routers = 2 * E * 3 * 32 * 48, 2 * E * 32
    assert held == 2 * (residuals + routers), "two moments of each, and of nothing else"
    for name, value in sparse.state_dict().items():
        assert torch.equal(value, before[name]) == (of.get(name) not in ("router", "expert")), name
    train_only(sparse, "moe")
    assert all(p.requires_grad for name, p in sparse.named_parameters() if "core" in name)


def test_a_model_is_saved_with_its_core(tmp_path):
    _, sparse = _llama()
    ids = torch.randint(50, (2, 9))
    _move(sparse.train(), ids, lr=1e-2)
    sparse.eval().save_pretrained(tmp_path / "residual")
    again = shunter.from_pretrained(str(tmp_path / "residual")).eval()
    assert {name: value.tolist() for name, value in again.state_dict().items()} == {
        name: value.tolist() for name, value in sparse.state_dict().items()
    }
    assert torch.equal(again(ids).logits, sparse(ids).logits)
    with pytest.raises(UserError, match="are a core and residuals"):
        export(str(tmp_path / "residual"), tmp_path / "mixtral", "mixtral")
    shunter.plain_experts(again)
    assert torch.equal(again(ids).logits, sparse(ids).logits)
    again.save_pretrained(tmp_path / "plain")
    assert torch.equal(shunter.from_pretrained(str(tmp_path / "plain")).eval()(ids).logits, sparse(ids).logits)
    export(str(tmp_path / "plain"), tmp_path / "mixtral", "mixtral")
    shunter.quantize(sparse, 8)
    assert not any(isinstance(module, ResidualExperts) for module in sparse.modules())


def test_every_token_uses_the_core():
    dense, sparse = _llama()
    found, before = ledger(sparse, 16), ledger(dense, 16)
    matrices, routers = 3 * 32 * 48, 2 * E * 32
    assert found.params_total == before.params_total + 2 * E * matrices + routers
    assert found.params_active == pytest.approx(before.params_total + 2 * 2 * matrices + routers)
    assert found.flops["experts"] == pytest.approx(2 * 2 * 2 * matrices)


def test_errors():
    with pytest.raises(ValueError, match="expert_weights 'shared' is unknown; choose from separate, residual"):
        MoE(4, 4, 2, expert_weights="shared")
    with pytest.raises(ValueError, match="num_experts 0 must be at least 1"):
        ResidualExperts(0, 4, 4)
