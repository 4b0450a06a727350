"""Routers by which every token takes every expert: against dense mixtures written out."""

import pytest
import torch

from shunter import MoE, Routing
from shunter.context import Context
from shunter.routers.registry import create

from ..helpers import by_tokens
from . import contract

TASKS = 3


def _task(tokens):
    return Context(task=torch.randint(TASKS, (tokens,)))


SORTS = [
    ("soft", {}, contract.plain),
    ("soft", {"margin": 0.05, "importance_loss": 0.1, "router_bias": True}, contract.plain),
    ("hme", {}, contract.plain),
    ("hme", {"branching": (4, 2), "importance_loss": 0.1, "margin": 0.05}, contract.plain),
    ("mmoe", {"num_tasks": TASKS, "z_loss": 0.1}, _task),
]


@pytest.mark.parametrize("check", contract.CHECKS)
@pytest.mark.parametrize("name, options, context", SORTS)
def test_contract(name, options, context, check):
    check(name, options, context)


def _layer(name, experts=4, **options):
    layer = MoE(6, 5, experts, router=name, **options).double()
    for parameter in layer.router.parameters():
        torch.nn.init.normal_(parameter)
    return layer


def test_soft_is_the_dense_mixture():
    layer = _layer("soft")
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    gates = (x.reshape(10, 6) @ layer.router.weight.T).softmax(-1)
    expected = by_tokens(x.reshape(10, 6), layer.experts.weights, gates).reshape(x.shape)
    assert torch.allclose(layer(x), expected, atol=1e-12)
    assert layer.router.experts_per_token == 4 and layer.routing.counts.tolist() == [10] * 4


def test_soft_is_top_k_with_every_expert():
    layer = _layer("soft")
    other = MoE(6, 5, 4, router="topk", top_k=4, renormalize="no").double()
    other.load_state_dict({k: v for k, v in layer.state_dict().items() if k != "router.total"})
    x = torch.randn(7, 6, dtype=torch.float64)
    assert torch.allclose(layer(x), other(x), atol=1e-12)


def test_layers_have_right_gradients():
    for name, options, known in (("soft", {}, {}), ("hme", {}, {}), ("mmoe", {"num_tasks": TASKS}, {"task": TASKS})):
        layer = _layer(name, backend="reference", **options)
        known = {key: torch.randint(size, (5,)) for key, size in known.items()}
        parameters = list(layer.parameters())

        def run(x, *_, layer=layer, known=known):
            return layer(x, **known)

        assert torch.autograd.gradcheck(run, (torch.randn(5, 6, dtype=torch.float64, requires_grad=True), *parameters))


def test_the_gate_of_a_leaf_is_the_product_of_its_branches():
    router = create("hme", 6, 12, branching=(2, 3, 2)).double()
    torch.nn.init.normal_(router.weight)
    x = torch.randn(7, 6, dtype=torch.float64)
    root, middle, low = (x @ router.weight.T).split([2, 6, 12], dim=-1)
    gates = router.assign(router.score(x)).dense()
    for a in range(2):
        for b in range(3):
            for c in range(2):
                first = root.softmax(-1)[:, a]
                second = middle[:, 3 * a : 3 * a + 3].softmax(-1)[:, b]
                node = 3 * a + b
                third = low[:, 2 * node : 2 * node + 2].softmax(-1)[:, c]
                assert torch.allclose(gates[:, 2 * node + c], first * second * third, atol=1e-14)
    assert create("hme", 6, 8).widths == [2, 4, 8] and create("hme", 6, 9, branching=3).widths == [3, 9]


def test_a_tree_of_one_level_is_soft():
    flat, tree = create("soft", 6, 5).double(), create("hme", 6, 5, branching=5).double()
    tree.load_state_dict(flat.state_dict())
    x = torch.randn(9, 6, dtype=torch.float64)
    one, other = (router.assign(router.score(x)).dense() for router in (flat, tree))
    assert (one - other).abs().max() < 1e-10


def test_one_task_is_soft_and_each_task_has_its_gate():
    one = create("mmoe", 6, 4, num_tasks=1)
    flat = create("soft", 6, 4)
    flat.load_state_dict(one.state_dict())
    x = torch.randn(9, 6)
    assert torch.equal(one.score(x, Context(task=torch.zeros(9, dtype=torch.int64))), flat.score(x))
    router = create("mmoe", 6, 4, num_tasks=3)
    context = _task(9)
    expected = torch.stack([x[t] @ router.weight.view(3, 4, 6)[task].T for t, task in enumerate(context.task)])
    assert torch.allclose(router.score(x, context), expected, atol=1e-6)


def test_tasks_share_experts_not_gates():
    """A token of one task moves the experts and the gate of its own task alone."""
    layer = _layer("mmoe", num_tasks=3)
    layer(torch.randn(5, 6, dtype=torch.float64), task=torch.full((5,), 1)).sum().backward()
    grads = layer.router.weight.grad.view(3, 4, 6)
    assert grads[1].abs().min() > 0 and grads[0].eq(0).all() and grads[2].eq(0).all()
    assert layer.experts.down_proj.grad.abs().amax((1, 2)).min() > 0


def test_the_margin_rests_experts_that_are_ahead():
    router = create("soft", 6, 4, margin=2.0).train()
    logits = torch.randn(20, 4)
    plain = logits.softmax(-1)
    assert torch.equal(router.assign(logits).dense(), plain)
    routing = Routing.from_dense(torch.tensor([[3.0, 0.0, 0.0, 0.0], [2.0, 1.0, 1.0, 1.0]]))
    router.observe(logits, routing)
    assert torch.equal(router.assign(logits).dense(), plain), "only update moves the sums"
    router.update()
    assert router.total.tolist() == [5, 1, 1, 1], "the mean is 2: the first is 3 ahead"
    expected = plain.clone()
    expected[:, 0] = 0
    assert torch.allclose(router.assign(logits).dense(), expected / expected.sum(-1, keepdim=True), atol=1e-6)
    assert torch.equal(router.eval().assign(logits).dense(), plain)
    router.train().margin = None
    assert torch.equal(router.assign(logits).dense(), plain)


def test_the_margin_bounds_the_share_of_a_favourite():
    layer = MoE(6, 4, 4, router="soft", margin=50.0, router_bias=True).train()
    layer.router.bias.data[0] = 20.0
    for _ in range(100):
        layer(torch.randn(10, 6))
        layer.router.update()
    total = layer.router.total
    assert total.sum() == pytest.approx(1000, rel=1e-4)
    assert total.max() - total.mean() < 60 and total.min() > 100


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: create("soft", 6, 4, capacity_factor=1.0), "would drop tokens that every expert takes"),
        (lambda: create("soft", 6, 4, margin=-1), "must be at least 0"),
        (lambda: create("hme", 6, 6), "branching 2 gives no tree with 6 leaves"),
        (lambda: create("hme", 6, 4, branching=1), "gives no tree with 4 leaves"),
        (lambda: create("hme", 6, 4, branching=(2, 0)), "gives no tree with 4 leaves"),
        (lambda: create("hme", 6, 4, branching=()), "gives no tree with 4 leaves"),
        (lambda: create("mmoe", 6, 4), "needs num_tasks="),
        (lambda: create("mmoe", 6, 4, num_tasks=2).score(torch.zeros(1, 6)), "MMoE needs task; pass task="),
        (
            lambda: create("mmoe", 6, 4, num_tasks=2).score(torch.zeros(1, 6), Context(task=torch.tensor([2]))),
            "task 2 is out of range; ids are 0 to 1",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
