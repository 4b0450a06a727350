"""LIMoE: golden entropies, when the global loss is zero, and that it prevents the collapse of a modality."""

import math

import pytest
import torch

from shunter.context import Context
from shunter.losses import entropy, global_entropy_loss, local_entropy_loss
from shunter.routers.registry import create

from ..test_capacity import LOGITS
from . import contract


def _context(tokens):
    return Context(modality=torch.randint(2, (tokens,)))


@pytest.mark.parametrize("check", contract.CHECKS)
@pytest.mark.parametrize("options", [{}, {"soft_minimum": [8, 1.5], "capacity_factor": None}])
def test_contract(options, check):
    check("limoe", options, _context)


def test_golden():
    p = LOGITS.softmax(-1)
    assert local_entropy_loss(p).item() == pytest.approx(1.036415, abs=1e-6)
    assert -entropy(p.mean(0)).item() == pytest.approx(-1.276910, abs=1e-6)
    assert global_entropy_loss(p, minimum=4).item() == pytest.approx(0.109384, abs=1e-6)
    assert global_entropy_loss(p, minimum=2).item() == 0


def test_the_global_loss_is_zero_iff_the_mean_has_the_entropy():
    for _ in range(200):
        p = (torch.randn(3, 6, dtype=torch.float64) * 3).softmax(-1)
        minimum = float(torch.rand(()) * 5 + 1)
        loss = global_entropy_loss(p, minimum=minimum)
        mean = p.mean(0)
        spread = -(mean * mean.log()).sum()
        assert (loss == 0) == (spread >= math.log(minimum))
        assert loss == pytest.approx(max(0.0, math.log(minimum) - spread.item()), abs=1e-12)


def test_directions():
    """The local loss sharpens each token; the global loss spreads the mean (a public copy has its sign wrong)."""
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    before = entropy(logits.softmax(-1))
    local_entropy_loss(logits.softmax(-1)).backward()
    sharper = (logits - 0.1 * logits.grad).softmax(-1)
    assert (entropy(sharper) < before).all()
    logits.grad = None
    global_entropy_loss(logits.softmax(-1), minimum=4).backward()
    assert entropy((logits - 0.1 * logits.grad).softmax(-1).mean(0)) > entropy(logits.softmax(-1).mean(0))


def test_losses_are_of_each_modality_over_its_real_tokens():
    router = create("limoe", 6, 4, num_modalities=3, soft_minimum=[4, 3, 2], z_loss=0.0).train()
    logits = torch.randn(30, 8, dtype=torch.float64)
    modality = torch.randint(2, (30,))  # the third is absent
    mask = torch.rand(30) < 0.8
    mask[:2], modality[:2] = True, torch.tensor([0, 1])
    context = Context(mask=mask, modality=modality)
    losses = router.losses(logits, router.assign(logits, context), context)
    p = logits[:, :4].softmax(-1)
    local, whole = 0.0, 0.0
    for m, minimum in ((0, 4), (1, 3)):
        part = p[mask & (modality == m)]
        local += -(part * part.log()).sum(1).mean()
        mean = part.mean(0)
        whole += max(0.0, math.log(minimum) + (mean * mean.log()).sum())
    assert torch.allclose(losses["local_entropy_loss"], 0.01 * local)
    assert torch.allclose(losses["global_entropy_loss"], 0.01 * torch.as_tensor(whole))


def test_zero_probabilities_have_finite_gradients():
    p = torch.tensor([[1.0, 0.0, 0.0]], requires_grad=True)
    (local_entropy_loss(p) + global_entropy_loss(p, minimum=3)).backward()
    assert p.grad.isfinite().all() and entropy(p.detach()).item() == 0


def test_the_global_loss_keeps_a_modality_on_several_experts():
    """Each modality is a narrow cloud that one expert leads: without the loss it goes there, with it it spreads."""
    results = {}
    x = torch.cat([torch.full((64, 6), 2.0), torch.full((64, 6), -2.0)]) + (torch.rand(128, 6) - 0.5) / 100
    context = Context(modality=torch.arange(2).repeat_interleave(64))
    start = torch.tensor([0.1, 0.05, -0.05, -0.1])[torch.randperm(4)][:, None].expand(4, 6)
    for coefficient in (0.0, 1.0):
        options = {"importance_loss": 0.0, "load_loss": 0.0, "z_loss": 0.0, "capacity_factor": None}
        router = create(
            "limoe", 6, 4, soft_minimum=3, global_entropy_loss=coefficient, local_entropy_loss=0.3, **options
        ).train()
        router.weight.data.copy_(start)
        optimizer = torch.optim.Adam(router.parameters(), lr=0.05)
        for _ in range(150):
            logits = router.score(x, context)
            loss = sum(router.losses(logits, router.assign(logits, context), context).values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        p = router.eval().score(x, context)[:, :4].softmax(-1).detach()
        results[coefficient] = [entropy(part.mean(0)).exp().item() for part in p.chunk(2)]
    assert max(results[0.0]) < 2 and min(results[1.0]) > 2.5, results


@pytest.mark.parametrize("soft_minimum", [0.5, 5, [2, 2, 2]])
def test_errors(soft_minimum):
    with pytest.raises(ValueError, match="one number from 1 to 4 for each of the 2 modalities"):
        create("limoe", 6, 4, soft_minimum=soft_minimum)
    router = create("limoe", 6, 4)
    with pytest.raises(ValueError, match="LIMoE needs modality"):
        router.assign(torch.zeros(3, 8))
    with pytest.raises(ValueError, match="modality 2 is out of range; ids are 0 to 1"):
        router.assign(torch.zeros(1, 8), Context(modality=torch.tensor([2])))
