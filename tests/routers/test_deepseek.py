"""DeepSeek: the balance within sequences by its equations, and the bias that no gradient moves."""

import pytest
import torch

from shunter import MoE
from shunter.context import Context
from shunter.routers.registry import create

from . import contract


def _sequences(tokens):
    return Context(sequence=torch.arange(tokens) // 4)


@pytest.mark.parametrize("check", contract.CHECKS)
def test_contract(check):
    check("deepseek", {"top_k": 3, "expert_groups": 4, "top_groups": 2}, _sequences)


def test_its_loss_balances_within_sequences():
    router = create("deepseek", 6, 4, top_k=1, renormalize="no", sequence_balance_loss=1.0, scaling_factor=1.0)
    logits = torch.randn(12, 4, dtype=torch.float64)
    sequence = torch.arange(12) // 6
    routing = router.assign(logits, Context(sequence=sequence))
    expected = 0.0
    for s in range(2):
        h = logits[6 * s : 6 * s + 6]
        probs = h.sigmoid() / h.sigmoid().sum(1, keepdim=True)
        share = torch.bincount(h.argmax(1), minlength=4) / 6
        expected += float(4 * (share * probs.mean(0)).sum()) / 2
    found = router.losses(logits, routing, Context(sequence=sequence))
    assert list(found) == ["sequence_balance_loss"]
    assert float(found["sequence_balance_loss"]) == pytest.approx(expected)


def test_its_bias_balances_what_is_skewed():
    """Tokens that prefer an expert each, as many each, where one expert is liked by all and another by none."""
    router = create("deepseek", 6, 4, top_k=1, renormalize="no", scaling_factor=1.0)
    logits = (4 * torch.eye(4) - 2 + torch.tensor([2.5, 0.0, 0.0, -2.5])).repeat(5, 1)[torch.randperm(20)]
    counts = []
    for _ in range(200):
        routing = router.assign(logits, _sequences(20))
        router.observe(logits, routing, _sequences(20))
        router.update()
        counts.append(routing.counts.tolist())
    assert counts[0] == [10, 5, 5, 0] and counts[-1] == [5] * 4


def test_its_loss_counts_the_bare_scores():
    """DeepSeek-V3, equations 17 to 20, written out: f counts the top k of s, which neither bias nor groups move."""
    tokens, experts, k = 14, 8, 2
    options = {"expert_groups": 4, "top_groups": 1, "sequence_balance_loss": 0.3}
    router = create("deepseek", 6, experts, top_k=k, **options).train()
    router.selection_bias.copy_(torch.randn(experts) * 3)
    logits = torch.randn(tokens, experts, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([True] * 5 + [False] * 2 + [True] * 7)
    known = Context(sequence=torch.arange(tokens) // 7, mask=mask)
    routing = router.assign(logits, known)
    s = logits.sigmoid()
    expected = 0
    for rows in (range(5), range(7, 14)):
        f = torch.zeros(experts, dtype=torch.float64)
        for t in rows:
            f[s[t].argsort(descending=True)[:k]] += experts / (k * len(rows))
        p = sum(s[t] / s[t].sum() for t in rows) / len(rows)
        expected = expected + 0.3 * (f * p).sum() / 2
    found = router.losses(logits, routing, known)["sequence_balance_loss"]
    assert torch.allclose(found, expected)
    slopes = [torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (found, expected)]
    assert torch.allclose(*slopes)


def test_a_layer_knows_its_sequences():
    layer = MoE(6, 8, 4, "deepseek", top_k=2, sequence_balance_loss=1.0)
    x = torch.randn(3, 5, 6)
    layer(x)
    logits = layer.router.score(x.reshape(15, 6))
    known = Context(sequence=torch.arange(15) // 5)
    expected = layer.router.losses(logits, layer.router.assign(logits, known), known)
    assert torch.allclose(layer.losses["sequence_balance_loss"], expected["sequence_balance_loss"])
    layer(x[0])
