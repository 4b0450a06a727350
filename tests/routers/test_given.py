"""Experts that the caller names, or that take turns."""

import pytest
import torch

from shunter import MoE
from shunter.context import Context
from shunter.routers.registry import create

from . import contract


def _experts(tokens):
    rows = [torch.randperm(contract.EXPERTS)[:3] for _ in range(tokens)]
    experts = torch.stack(rows) if rows else torch.zeros(0, 3, dtype=torch.int64)
    return Context(experts=experts.masked_fill(torch.rand(experts.shape) < 0.2, -1))


@pytest.mark.parametrize("check", contract.CHECKS)
@pytest.mark.parametrize(
    "name, options, context", [("forced", {}, _experts), ("uniform", {"top_k": 3}, contract.plain)]
)
def test_contract(name, options, context, check):
    check(name, options, context)


def test_forced_experts_share_a_token_equally():
    layer = MoE(6, 8, 4, "forced")
    x = torch.randn(2, 2, 6)
    layer(x, experts=torch.tensor([[[0, 3], [1, -1]], [[-1, -1], [2, 0]]]))
    expected = [[0.5, 0, 0, 0.5], [0, 1, 0, 0], [0, 0, 0, 0], [0.5, 0, 0.5, 0]]
    assert layer.routing.dense().tolist() == expected
    with pytest.raises(ValueError, match="needs experts"):
        layer(x)


def test_uniform_is_balanced_among_real_tokens():
    router = create("uniform", 6, 8, top_k=3)
    mask = torch.rand(64) < 0.6
    counts = router.assign(torch.zeros(64, 8), Context(mask=mask)).counts
    assert counts.sum() == 3 * mask.sum() and counts.max() - counts.min() <= 1
    assert not list(router.parameters())
    with pytest.raises(ValueError, match="between 1 and num_experts"):
        create("uniform", 6, 8, top_k=9)
