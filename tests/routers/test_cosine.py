"""Cosine routing: scores by angle alone, a temperature that is learned and bounded."""

import pytest
import torch

from shunter.routers.registry import create

from . import contract


@pytest.mark.parametrize("check", contract.CHECKS)
@pytest.mark.parametrize(
    "options",
    [{"z_loss": 0.1}, {"top_k": 2, "projection_dim": 3}],
)
def test_contract(options, check):
    check("cosine", options, contract.plain)


def test_it_ignores_lengths_and_learns_its_temperature():
    router = create("cosine", 6, 4)
    x = torch.randn(10, 6)
    assert torch.allclose(router.score(x), router.score(7 * x), atol=1e-4)
    before = router.score(x)
    with torch.no_grad():
        router.weight.mul_(3)
    assert torch.allclose(router.score(x), before, atol=1e-4)
    assert before.abs().max() <= 1 / 0.07 + 1e-3
    with torch.no_grad():
        router.log_temperature.fill_(-100.0)
    assert router.score(x).abs().max() <= 1 / 0.01 + 1e-3, "the temperature has a floor"
    router.score(x).square().sum().backward()
    assert router.projection.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"temperature": 0.001}, "min_temperature"),
        ({"router_bias": True}, "no router_bias"),
        ({"projection_dim": 0}, "at least 1"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        create("cosine", 6, 8, **options)
