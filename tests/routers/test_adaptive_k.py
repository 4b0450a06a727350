"""As many experts as a token needs: top-p by its definition, ReLU by its loss and its controller."""

import pytest
import torch
from torch import nn

from shunter.routers.registry import create

from . import contract


@pytest.mark.parametrize("check", contract.CHECKS)
@pytest.mark.parametrize(
    "name, options",
    [
        ("top_p", {}),
        ("top_p", {"threshold": 0.8, "max_experts": 3}),
        ("relu", {"sparsity_loss": 0.1}),
        ("relu", {"balance": False, "load_balancing_loss": 0.1}),
    ],
)
def test_contract(name, options, check):
    check(name, options, contract.plain)


@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.9, 1.0])
def test_top_p_takes_the_fewest_experts_that_reach_p(threshold):
    router = create("top_p", 6, 8, threshold=threshold)
    logits = 2 * torch.randn(60, 8, dtype=torch.float64)
    matrix = router.assign(logits).dense()
    probs = logits.softmax(-1)
    assert torch.equal(matrix, torch.where(matrix > 0, probs, 0)), "the weights are the probabilities"
    total, fewest = matrix.sum(1), torch.where(matrix > 0, matrix, torch.inf).amin(1)
    assert (total >= threshold - 1e-12).all()
    assert (total - fewest < threshold + 1e-12).all(), "without its least expert a token falls short"
    assert (fewest >= torch.where(matrix > 0, 0, probs).amax(1)).all(), "the best are taken"


@pytest.mark.parametrize("options", [{}, {"threshold": 0.7, "init_scale": 1.0}, {"max_experts": 3}, {"threshold": 1.0}])
@pytest.mark.parametrize("experts", [8, 24, 64])
def test_what_top_p_will_take_is_known_before(experts, options):
    """But for the last expert, which a token takes whole or not; the mean of the draws is within a hundredth or two."""
    routers = [create("top_p", 128, experts, **options) for _ in range(20)]
    taken = sum(r.assign(r.score(torch.randn(100, 128))).token.numel() for r in routers) / 2000
    assert abs(routers[0].experts_per_token - taken) < 1 + 0.05 * taken


def test_unsure_tokens_take_more_experts():
    router = create("top_p", 6, 8, threshold=0.5)
    sure, unsure = torch.zeros(1, 8), torch.zeros(1, 8)
    sure[0, 3] = 5.0
    assert [router.assign(h).token.numel() for h in (sure, unsure)] == [1, 4]


def test_relu_steers_to_its_target():
    """By experts that give way to the loss one after the other, evenly in the logarithm of its coefficient."""
    router = create("relu", 6, 8, target_experts=2.0, growth=1.03)
    assert router.experts_per_token == 2, "before the first step it is the target"
    start, history = router.coefficient.clone(), []
    for _ in range(40):
        logits = (torch.arange(8) / 10 + 0.05 - (router.coefficient / start).log()).expand(5, 8)
        router.observe(logits, router.assign(logits))
        router.update()
        history.append(router.experts_per_token)
    assert history == sorted(history, reverse=True) and history[0] == 8
    assert history[-5:] == [2] * 5, "where it stays"


def test_the_relu_coefficient_follows_the_load_once_a_step():
    router = create("relu", 6, 4, target_experts=1.0)
    start = float(router.coefficient)
    dense, empty = torch.ones(10, 4), -torch.ones(10, 4)
    router.observe(dense, router.assign(dense))
    router.observe(dense, router.assign(dense))
    router.update()
    assert float(router.coefficient) == pytest.approx(start * 1.2)
    router.update()
    assert float(router.coefficient) == pytest.approx(start * 1.2), "nothing was seen"
    router.observe(empty, router.assign(empty))
    router.update()
    assert float(router.coefficient) == pytest.approx(start)
    assert router.experts_per_token == 0


def test_the_relu_loss_weighs_experts_by_their_load():
    logits = torch.tensor([[2.0, -1.0, 1.0], [3.0, -1.0, -2.0]], dtype=torch.float64)
    router = create("relu", 6, 3, target_experts=1.0, sparsity_loss=0.5).double()
    found = router.losses(logits, router.assign(logits))["sparsity_loss"]
    # Loads 2, 0, 1 of 2 tokens, times E / k = 3; mean weights 2.5, 0, 0.5.
    assert float(found) == pytest.approx(0.5 * 3 * (2.5 * 2 / 2 + 0.5 * 1 / 2))


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("top_p", {"threshold": 0.0}, r"in \(0, 1\]"),
        ("top_p", {"max_experts": 9}, "between 1 and num_experts"),
        ("relu", {"target_experts": 9}, "at most num_experts"),
        ("relu", {"growth": 1.0}, "above 1"),
    ],
)
def test_errors(name, options, message):
    with pytest.raises(ValueError, match=message):
        create(name, 6, 8, **options)


def test_casting_keeps_the_state_exact():
    router = create("relu", 6, 8)
    assert nn.Module.to(router, torch.bfloat16).coefficient.dtype == torch.float32
