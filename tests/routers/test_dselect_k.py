"""DSelect-k: golden selectors, the bound k, exact zeros, and where the gate can no longer learn."""

import pytest
import torch

from shunter.routers.dselect_k import smooth_step
from shunter.routers.registry import create

from . import contract

SORTS = [{}, {"per_example": False, "top_k": 3}, {"gamma": 3.0, "top_k": 1}]


@pytest.mark.parametrize("check", contract.CHECKS)
@pytest.mark.parametrize("options", SORTS)
def test_contract(options, check):
    check("dselect_k", options, contract.plain)


def test_golden():
    assert smooth_step(torch.tensor([-9.0, -0.5, -0.25, 0.0, 0.25, 0.5, 9.0])).tolist() == pytest.approx(
        [0, 0, 0.15625, 0.5, 0.84375, 1, 1]
    )
    router = create("dselect_k", 6, 8, top_k=1)
    selector = router.selectors(torch.tensor([[0.25, -0.25, 0.0, 0.0]]))[0, 0]
    expected = [0.065918, 0.065918, 0.012207, 0.012207, 0.355957, 0.355957, 0.065918, 0.065918]
    assert selector.tolist() == pytest.approx(expected, abs=1e-6)
    assert selector.sum().item() == pytest.approx(1)


def test_smooth_step_is_smooth():
    t = torch.linspace(-1.0, 1.0, 41, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: smooth_step(t, 1.5), t, atol=1e-4)
    (slope,) = torch.autograd.grad(smooth_step(t, 1.5).sum(), t)
    assert (slope[t.detach().abs() >= 0.75] == 0).all() and (slope[t.detach().abs() < 0.74] > 0).all()


@pytest.mark.parametrize("experts", [1, 2, 5, 8, 12, 16])
def test_weights_sum_to_one_for_powers_of_two(experts):
    router = create("dselect_k", 6, experts, top_k=min(2, experts))
    logits = torch.randn(40, router.score_width, dtype=torch.float64) * 0.3
    total = router.probs(logits).sum(-1)
    if experts & (experts - 1) == 0:
        assert torch.allclose(total, torch.ones_like(total))
    else:
        assert (total <= 1 + 1e-12).all() and (total < 0.999).any()


def test_decided_selectors_spell_their_experts():
    """k = 2 decided selectors use at most 2 experts, or one where they agree; every expert can be spelled."""
    router = create("dselect_k", 6, 8, top_k=2)
    for first in range(8):
        for second in range(8):
            digits = [[(e >> (2 - j)) & 1 for j in range(3)] for e in (first, second)]
            decisions = torch.tensor(digits).flatten() * 2.0 - 1
            logits = torch.cat([decisions, torch.tensor([0.0, 1.0])])[None]
            routing = router.assign(logits)
            assert set(routing.expert.tolist()) == {first, second}
            assert routing.weight.sum().item() == pytest.approx(1)
            p = torch.tensor([0.0, 1.0]).softmax(0)
            if first != second:
                assert torch.allclose(routing.dense()[0, [first, second]], p)


def test_it_starts_dense_and_a_large_start_cannot_learn():
    router = create("dselect_k", 6, 8)
    x = torch.randn(20, 6)
    assert router.assign(router.score(x)).token.numel() == 160, "early in training every expert is used"
    router.bias.data[:6] = 2.0
    router.weight.data[:6] = 0.0
    logits = router.score(x)
    router.assign(logits).dense()[:, 7].sum().backward()
    assert router.bias.grad[:6].eq(0).all(), "outside the step the gradient is exactly zero"


def test_static_weights_are_the_same_for_all_tokens():
    router = create("dselect_k", 6, 8, per_example=False)
    matrix = router.assign(router.score(torch.randn(9, 6))).dense()
    assert torch.equal(matrix, matrix[:1].expand(9, 8))
    assert router.weight is None


@pytest.mark.parametrize("per_example", [True, False])
def test_the_entropy_loss_leads_to_exact_selectors(per_example):
    """A selector's bits are independent, and the entropy of each pushes it on to the side on which it begins."""
    router = create("dselect_k", 6, 8, per_example=per_example, entropy_loss=0.2).train()
    with torch.no_grad():
        leaning = torch.empty_like(router.bias).uniform_(0.05, 0.3)
        router.bias.copy_(torch.where(torch.rand_like(leaning) < 0.5, leaning, -leaning))
        if per_example:
            router.weight.zero_()
    optimizer = torch.optim.Adam(router.parameters(), lr=0.03)
    x = torch.ones(4, 6)
    first = router.selectors(router.score(x)).argmax(-1)
    for _ in range(100):
        logits = router.score(x)
        loss = router.losses(logits, router.assign(logits))["entropy_loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    selectors = router.selectors(router.score(x))
    assert torch.equal(selectors, torch.nn.functional.one_hot(first, selectors.shape[-1]).to(selectors))
    per_token = torch.bincount(router.assign(router.score(x)).token, minlength=4)
    assert (per_token <= 2).all(), "exactly 0 or 1: at most k experts"


def test_losses_written_out():
    router = create("dselect_k", 6, 5, top_k=2, entropy_loss=0.3, reachability_loss=0.7).train()
    logits = torch.rand(7, router.score_width, dtype=torch.float64) * 0.7 - 0.35
    selectors = router.selectors(logits)
    losses = router.losses(logits, router.assign(logits))
    entropy = sum(-float(r * r.log()) for r in selectors.flatten() if r > 0) / 7
    assert losses["entropy_loss"].item() == pytest.approx(0.3 * entropy)
    unreachable = sum(1 / float(r.sum()) for row in selectors for r in row) / 7
    assert losses["reachability_loss"].item() == pytest.approx(0.7 * unreachable)
    assert "reachability_loss" not in create("dselect_k", 6, 8).train().losses(
        torch.zeros(3, 8), create("dselect_k", 6, 8).assign(torch.zeros(3, 8))
    )


def test_a_selector_that_decides_for_an_expert_that_is_not_there_has_a_finite_loss():
    """E = 24: the codes 24 to 31 are no expert's. The loss is the paper's 1 / r where it can be, and falls in r."""
    router = create("dselect_k", 6, 24, top_k=1, entropy_loss=0.0).train()
    # First digit 1 for certain, the second with S(t): the weight on experts that exist is 1 - S(t).
    second = torch.linspace(-0.6, 0.6, 200, dtype=torch.float64)
    found = []
    for t in second:
        decisions = torch.tensor([9.0, 0, -9, -9, -9, 0], dtype=torch.float64)
        decisions[1] = t
        logits = decisions[None].requires_grad_()
        loss = router.losses(logits, router.assign(logits))["reachability_loss"]
        (slope,) = torch.autograd.grad(loss, logits)
        assert loss.isfinite() and slope.isfinite().all()
        found.append(loss.item())
        there = 1 - float(smooth_step(t))
        if there > 0.011:
            assert found[-1] == pytest.approx(1 / there)
        elif 0 < there:
            assert slope[0, 1] > 0, "a step down the slope brings the expert back"
    assert found == sorted(found) and found[-1] == pytest.approx(200)


def test_training_without_a_power_of_two_experts_stays_finite():
    router = create("dselect_k", 6, 24).train()
    optimizer = torch.optim.SGD(router.parameters(), lr=3.0)
    for _ in range(60):
        x = torch.randn(32, 6)
        logits = router.score(x)
        routing = router.assign(logits)
        loss = (routing.dense() * torch.randn(32, 24)).sum() + sum(router.losses(logits, routing).values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(router.parameters(), 1.0)
        optimizer.step()
        assert loss.isfinite() and all(parameter.isfinite().all() for parameter in router.parameters())


@pytest.mark.parametrize("options", [{"top_k": 0}, {"top_k": 9}, {"gamma": 0.0}])
def test_errors(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        create("dselect_k", 6, 8, **options)
