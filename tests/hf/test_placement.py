"""Which blocks become sparse, and layers of other parts: residual, extra MLP, experts that differ; saved or refused."""

import copy
import json

import pytest
import torch

import shunter
from shunter.analysis.ledger import ledger
from shunter.errors import UserError
from shunter.hf.quantising import quantize
from shunter.hf.sparsifying import Placement
from shunter.training.pruning import prune

FAMILIES = ["llama", "gpt2", "bert"]
KINDS = {
    "residual": {"residual": True},
    "extra_mlp": {"extra_mlp": True},
    "mixed": {"operations": ["swiglu 40", "gelu 8 x2", "identity", "constant"], "cost_loss": 0.1},
    "all": {"residual": True, "extra_mlp": True, "operations": ["gelu", "relu 9", "zero", "identity"]},
}


def _chosen(words, length, **rest):
    stack = list(range(length))
    return Placement.parse(words, **rest).choose([stack])


def test_placements_by_hand():
    assert _chosen("every 2", 5) == [(1, 1), (3, 1)] == _chosen("", 5, every=2)
    assert _chosen("last 2", 5) == [(3, 1), (4, 1)]
    assert _chosen("every 2, last 1", 6) == [(5, 1)]
    assert _chosen("pyramid", 3) == [(0, 1), (1, 1), (2, 2)]
    assert _chosen("every 2, last 4, pyramid", 12) == [(5, 1), (7, 1), (9, 2), (11, 2)]
    assert _chosen("pyramid", 5, layers=[0, 4]) == [(0, 1), (4, 2)]


@pytest.mark.parametrize(("dim", "experts", "billions"), [(1024, 32, 4.0), (2048, 64, 31.0)])
def test_a_pyramid_has_the_published_parameters(dim, experts, billions):
    """350M+PR-MoE-32/64 has 4B parameters, 1.3B+PR-MoE-64/128 has 31B (Rajbhandari et al. 2022, table 3)."""
    dense = 24 * 12 * dim**2 + (50257 + 2048) * dim
    wanted = dense + sum((times * experts) * 8 * dim**2 for _, times in _chosen("every 2, pyramid", 24))
    assert wanted / 1e9 == pytest.approx(billions, rel=0.12)


@pytest.mark.parametrize(
    ("words", "rest", "message"),
    [
        ("second", {}, "unknown"),
        ("every 0", {}, "unknown"),
        ("last 1, last 2", {}, "twice"),
        ("last 1", {"every": 2}, "give one"),
        ("last 1", {"layers": [1]}, "give one"),
        ("last 1, pyramid", {}, "needs two"),
        ("every 9", {}, "leaves no block"),
    ],
)
def test_wrong_placements_are_one_line(words, rest, message):
    with pytest.raises(UserError, match=message) as error:
        _chosen(words, 4, **rest)
    assert "\n" not in str(error.value)


def test_a_pyramid_is_saved_as_it_is(build, tmp_path):
    model = shunter.sparsify(build("llama"), 2, "topk", top_k=2, placement="pyramid")
    assert [layer.num_experts for layer in shunter.moe_layers(model).values()] == [2, 4]
    model.save_pretrained(tmp_path)
    loaded = shunter.from_pretrained(str(tmp_path))
    assert [layer.num_experts for layer in shunter.moe_layers(loaded).values()] == [2, 4]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", FAMILIES)
def test_learnt_saved_loaded_and_refused(architecture, kind, build, inputs, tmp_path):
    model = shunter.sparsify(build(architecture), 4, "topk", top_k=2, **KINDS[kind])
    batch = inputs(architecture, batch=4, length=9)
    model.train()(**batch).loss.backward()
    learnt = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.isfinite().all()}
    assert learnt == {n for n, _ in model.named_parameters()}
    model.eval().save_pretrained(tmp_path)
    loaded = shunter.from_pretrained(str(tmp_path)).eval()
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, loaded(**batch).logits)
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again/config.json").read_text()) == json.loads(
        (tmp_path / "config.json").read_text()
    )
    if architecture == "llama":
        with pytest.raises(UserError, match="no other format") as error:
            shunter.export(str(tmp_path), str(tmp_path / "native"), to="mixtral")
        assert "\n" not in str(error.value)


def test_a_gate_of_one_side_leaves_one_branch(build, inputs):
    """(1, 0) is plain top-1 of the same experts, (0, 1) the dense block."""
    dense = build("llama")
    plain = shunter.sparsify(copy.deepcopy(dense), 3, "switch", init="copy")
    model = shunter.sparsify(copy.deepcopy(dense), 3, "switch", init="copy", residual=True)
    batch = inputs("llama")
    for ours, theirs in zip(shunter.moe_layers(model).values(), shunter.moe_layers(plain).values(), strict=True):
        ours.router.load_state_dict(theirs.router.state_dict())
    with torch.no_grad():
        for side, other in ((0, plain), (1, dense)):
            for layer in shunter.moe_layers(model).values():
                layer.shared_gate.weight.zero_()
                layer.shared_gate.bias.copy_(torch.tensor([-1e4, -1e4]).index_fill(0, torch.tensor([side]), 0.0))
            real = (batch["labels"] != -100)[..., None]
            assert ((model(**batch).logits - other(**batch).logits) * real).abs().max() < 1e-5


def test_copies_in_both_branches_are_the_dense_model(build, inputs):
    dense = build("llama")
    model = shunter.sparsify(copy.deepcopy(dense), 4, "topk", top_k=2, init="copy", residual=True)
    batch = inputs("llama")
    with torch.no_grad():
        error = model(**batch).logits - dense(**batch).logits
    assert (error * (batch["labels"] != -100)[..., None]).abs().max() < 1e-5


def test_an_extra_mlp_by_hand():
    moe = shunter.MoE(6, 5, 3, "topk", top_k=2, extra_mlp=True, dtype=torch.float64).eval()
    plain = shunter.MoE(6, 5, 3, "topk", top_k=2, dtype=torch.float64).eval()
    plain.load_state_dict({n: p for n, p in moe.state_dict().items() if not n.startswith("extra")})
    x = torch.randn(7, 6, dtype=torch.float64)
    y = plain(x)
    z = x + y
    z = z / (z.square().mean(-1, keepdim=True) + 1e-6).sqrt() * moe.extra_norm.weight
    gate, up = (z @ moe.extra_mlp.gate_up_proj[0].T).chunk(2, -1)
    wanted = y + (torch.nn.functional.silu(gate) * up) @ moe.extra_mlp.down_proj[0].T
    assert torch.allclose(moe(x), wanted)


def test_dense_parts_are_in_the_ledger(build):
    def spent(**options):
        return ledger(shunter.sparsify(build("llama"), 4, "topk", top_k=1, **options), 8).flops["experts"]

    one = 2 * 3 * 32 * 48
    assert spent() == 2 * one
    assert spent(residual=True) == 2 * (2 * one + 2 * 2 * 32)
    assert spent(extra_mlp=True) == 4 * one


def test_experts_that_differ_are_not_pruned_and_cost_the_same_in_codes(build, inputs, tmp_path):
    model = shunter.sparsify(
        build("llama"), 4, "topk", top_k=2, operations=["swiglu 32", "gelu 64", "zero", "constant"]
    )
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="differ, and cannot stand in for each other"):
        prune(tmp_path / "model", tmp_path / "out", 2, "random")
    batch = inputs("llama")
    model(**batch)
    before = [layer.spent() for layer in shunter.moe_layers(model).values()]
    quantize(model, bits=8)
    for layer, spent in zip(shunter.moe_layers(model).values(), before, strict=True):
        assert torch.equal(layer.spent(), spent)
    model.save_pretrained(tmp_path / "coded")
    assert torch.equal(shunter.from_pretrained(str(tmp_path / "coded"))(**batch).logits, model(**batch).logits)


def test_copies_that_would_not_be_the_dense_block_are_refused(build):
    for options in ({"extra_mlp": True}, {"operations": ["identity"] * 2}, {"num_shared_experts": 1}):
        with pytest.raises(UserError, match="would not compute what the dense block does"):
            shunter.sparsify(build("llama"), 2, "topk", top_k=2, init="copy", **options)
