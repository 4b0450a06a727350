"""Expert prototyping is a sum of Switch layers."""

import pytest
import torch

from shunter import MoE
from shunter.context import Context
from shunter.routers.registry import create

from . import contract

SORTS = [{}, {"num_prototypes": 4, "slots": "1x"}, {"num_prototypes": 1, "z_loss": 0.1, "capacity_order": "batch"}]


@pytest.mark.parametrize("check", contract.CHECKS)
@pytest.mark.parametrize("options", SORTS)
def test_contract(options, check):
    check("prototypes", options, contract.plain)


@pytest.mark.parametrize("factor", [None, 0.7, 1.25])
@pytest.mark.parametrize("order", ["position", "probability"])
def test_a_sum_of_switch_layers(factor, order):
    """Outputs, gradients, drops and losses, for k = 2 prototypes of 3 experts."""
    options = {"capacity_factor": factor, "capacity_order": order, "load_balancing_loss": 0.3, "z_loss": 0.2}
    whole = MoE(6, 4, 6, router="prototypes", num_prototypes=2, **options).double().train()
    parts = [
        MoE(6, 4, 3, router="switch", policy="argmax", eval_capacity_factor=None, **options).double().train()
        for _ in range(2)
    ]
    for g, part in enumerate(parts):
        rows = slice(3 * g, 3 * g + 3)
        part.router.weight.data.copy_(whole.router.weight[rows])
        for key, value in part.experts.named_parameters():
            value.data.copy_(whole.experts.get_parameter(key)[rows])
    x = torch.randn(21, 6, dtype=torch.float64)
    mask = torch.rand(21) < 0.9
    out, outs = whole(x, mask=mask), [part(x, mask=mask) for part in parts]
    assert torch.allclose(out, sum(outs))
    for name, value in whole.losses.items():
        assert torch.allclose(value, sum(part.losses[name] for part in parts)), name
    out.square().sum().backward()
    sum(outs).square().sum().backward()
    assert torch.allclose(whole.router.weight.grad, torch.cat([part.router.weight.grad for part in parts]))
    drops = [0 if m.routing.dropped is None else m.routing.dropped.token.numel() for m in (whole, *parts)]
    assert drops[0] == sum(drops[1:])


def test_one_prototype_is_switch():
    prototypes = create("prototypes", 6, 4, num_prototypes=1).train()
    switch = create("switch", 6, 4, policy="argmax").train()
    logits = torch.randn(30, 4)
    mask = torch.rand(30) < 0.8
    context = Context(mask=mask)
    a, b = prototypes.assign(logits, context), switch.assign(logits, context)
    assert torch.equal(a.dense(), b.dense())
    losses = [r.losses(logits, routing, context) for r, routing in ((prototypes, a), (switch, b))]
    assert torch.allclose(losses[0]["load_balancing_loss"], losses[1]["load_balancing_loss"], rtol=1e-6)


def test_slots():
    one, k = (create("prototypes", 6, 8, num_prototypes=4, slots=s, capacity_factor=1.0) for s in ("1x", "kx"))
    assert (one.capacity(64), k.capacity(64)) == (8, 32)


def test_each_token_has_one_expert_of_each_prototype():
    router = create("prototypes", 6, 12, num_prototypes=3, capacity_factor=None)
    routing = router.assign(torch.randn(40, 12))
    matrix = routing.dense().reshape(40, 3, 4)
    assert ((matrix > 0).sum(-1) == 1).all()
    assert router.leak is None and router.experts_per_token == 3
    assert torch.equal(routing.first_choices, routing.counts), "each is the first choice of its own prototype"


def test_no_prototype_waits_for_another():
    router = create("prototypes", 6, 4, capacity_factor=0.5)
    assert router.leak is None
    for _ in range(20):
        logits = torch.randn(16, 4)
        other = logits.clone()
        other[8:] = torch.randn(8, 4)
        assert torch.equal(router.assign(logits).dense()[:8], router.assign(other).dense()[:8])


@pytest.mark.parametrize("options, message", [({"num_prototypes": 3}, "must divide"), ({"slots": "2x"}, "1x, kx")])
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        create("prototypes", 6, 4, **options)
