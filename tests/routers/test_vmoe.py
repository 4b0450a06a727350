"""V-MoE: golden values, the load by Monte Carlo, and what batch priority keeps."""

import math

import pytest
import torch

from shunter.context import Context
from shunter.losses import cv_squared, selection_probability
from shunter.routers.registry import create

from ..helpers import deviation
from ..test_capacity import LOGITS
from . import contract

SORTS = [{}, {"capacity_order": "batch", "capacity_factor": 0.4, "z_loss": 0.1}, {"group_size": 5, "top_k": 1}]


@pytest.mark.parametrize("check", contract.CHECKS)
@pytest.mark.parametrize("options", SORTS)
def test_contract(options, check):
    check("vmoe", options, contract.plain)


def _twice(logits):
    return torch.cat([logits, logits], dim=1)


def test_the_paper_is_the_preset():
    router = create("vmoe", 6, 8)
    assert (router.noise_std, router.top_k, router.renormalize) == (1 / 8, 2, "no")
    assert {k: c for k, c in router.coefficients.items() if c} == {"importance_loss": 0.005, "load_loss": 0.005}
    assert create("vmoe", 6, 64).capacity(1024) == 36, "ceil(1024 * 2 * 1.05 / 64) up to a multiple of 4"


def test_golden_batch_priority_and_losses():
    router = create("vmoe", 6, 4, top_k=1, capacity_factor=4 / 3, capacity_formula="review", capacity_order="batch")
    routing = router.assign(_twice(LOGITS))
    assert LOGITS.softmax(-1).amax(-1).argsort(descending=True).tolist() == [2, 0, 5, 4, 1, 3]
    assert routing.token.sort().values.tolist() == [0, 2, 3, 5]
    two = create("vmoe", 6, 4, importance_loss=1.0, load_loss=1.0, noise_std=0.5).train()
    losses = two.losses(_twice(LOGITS), two.assign(_twice(LOGITS)))
    assert losses["importance_loss"].item() == pytest.approx(0.229348, abs=1e-6)
    threshold = LOGITS.double().topk(2).values[:, 1:]
    mean = (1 - torch.distributions.Normal(0, 1).cdf((threshold - LOGITS.double()) / 0.5)).mean(0)
    assert losses["load_loss"].item() == pytest.approx(cv_squared(mean).item(), rel=1e-5)


def test_golden_load_without_noise():
    """1 / E = 0.25: P(x, i) = Phi((h_i - the second largest h) / 0.25), here in plain numbers, no noise drawn."""
    load = [0.0] * 4
    for row in LOGITS.tolist():
        second = sorted(row)[-2]
        for i, h in enumerate(row):
            load[i] += 0.5 * (1 + math.erf((h - second) / 0.25 / math.sqrt(2)))
    mean = sum(load) / 4
    by_hand = sum((v - mean) ** 2 for v in load) / 4 / mean**2
    router = create("vmoe", 6, 4, load_loss=1.0).train()
    found = router.losses(_twice(LOGITS), router.assign(_twice(LOGITS)))["load_loss"].item()
    assert found == pytest.approx(by_hand, abs=1e-6) == pytest.approx(0.187400, abs=1e-6)


@pytest.mark.parametrize(
    "name, options",
    [
        ("vmoe", {}),
        ("vmoe", {"top_k": 1}),
        ("limoe", {"local_entropy_loss": 0.0, "global_entropy_loss": 0.0, "z_loss": 0.0}),
        ("topk", {"importance_loss": 0.3, "load_balancing_loss": 0.1}),
        ("speech", {"embedding_dim": 3, "sparsity_loss": 0.0}),
    ],
)
def test_losses_of_groups_are_those_of_each_group_alone(name, options):
    whole, alone = (create(name, 6, 4, group_size=size, **options).train() for size in (5, None))
    mask = torch.tensor([True] * 4 + [False] * 6 + [True] * 4)  # a group of padding alone in the middle
    logits = torch.randn(14, whole.score_width, dtype=torch.float64, requires_grad=True)

    def found(router, h, rows):
        known = Context(
            mask=mask[rows], modality=torch.zeros(len(h), dtype=torch.int64), embedding=torch.randn(len(h), 3)
        )
        return router.losses(h, router.assign(h, known), known)

    together = found(whole, logits, slice(None))
    parts = [found(alone, logits[rows], rows) for rows in (slice(0, 5), slice(10, 14))]
    assert together
    for key, value in together.items():
        expected = sum(part[key] for part in parts) / 2
        assert torch.allclose(value, expected), key
        slopes = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (value, expected)]
        assert torch.allclose(*slopes) and slopes[0].isfinite().all()
    joint = found(alone, logits, slice(None))
    assert any(abs((joint[key] - value).item()) > 1e-9 for key, value in together.items())


def test_importance_is_of_the_clean_logits_and_choices_of_the_noisy():
    router = create("vmoe", 6, 4, importance_loss=1.0, capacity_factor=None).train()
    clean, noisy = torch.randn(2, 20, 4)
    logits = torch.cat([clean, noisy], dim=1)
    routing = router.assign(logits)
    index = noisy.topk(2).indices
    expected = torch.zeros(20, 4).scatter(1, index, noisy.softmax(-1).gather(1, index))
    assert torch.allclose(routing.dense(), expected), "softmax over all experts, then the top k, not renormalised"
    assert torch.allclose(router.losses(logits, routing)["importance_loss"], cv_squared(clean.softmax(-1).mean(0)))


def test_the_threshold_includes_the_expert_itself():
    """With the noise that was drawn kept as threshold, the load is a frequency of exceeding it."""
    clean = torch.randn(3, 5, dtype=torch.float64)
    noisy = clean + 0.2 * torch.randn_like(clean)
    p = selection_probability(clean, noisy, 0.2, 2, leave_one_out=False)
    draws = clean + 0.2 * torch.randn(200_000, 3, 5, dtype=torch.float64)
    share = (draws >= noisy.topk(2).values[:, 1:]).double().mean(0)
    assert (share - p).abs().max() < deviation(200_000, 15)
    assert not torch.allclose(p, selection_probability(clean, noisy, 0.2, 2))


@pytest.mark.parametrize("name", ["vmoe", "limoe"])
def test_the_router_starts_at_one_over_the_root_of_the_width(name):
    """A truncated normal of standard deviation 1 / sqrt(d), cut at two of them, which leaves 0.8796 of it."""
    weight = create(name, 256, 512).weight
    assert weight.std().item() == pytest.approx(0.8796 / 16, rel=0.02)
    assert weight.abs().max() <= 2 / 16
    assert create(name, 256, 64, init_scale=0.1).weight.abs().max() <= 2 / 16 * 0.1**0.5


def test_noise_has_standard_deviation_one_over_experts():
    router = create("vmoe", 6, 5).train()
    clean, noisy = router.score(torch.randn(20000, 6)).chunk(2, 1)
    assert (noisy - clean).std().item() == pytest.approx(0.2, rel=0.02)
    clean, noisy = router.eval().score(torch.randn(20, 6)).chunk(2, 1)
    assert torch.equal(clean, noisy)


@pytest.mark.parametrize("top_k", [1, 2])
def test_batch_priority_keeps_the_greatest_mass_of_first_choices(top_k):
    for factor in (0.3, 0.7):
        logits = _twice(torch.randn(60, 4, dtype=torch.float64) * 2)
        kept = {}
        for order in ("batch", "position"):
            router = create("vmoe", 6, 4, top_k=top_k, capacity_factor=factor / top_k, capacity_order=order)
            routing = router.assign(logits)
            kept[order] = torch.zeros(4, dtype=torch.float64).index_add(0, routing.expert, routing.weight)
            if order == "batch":
                first = routing.choice == 0
                probs = logits[:, :4].softmax(-1)
                for e in range(4):
                    asked = (probs.argmax(1) == e).nonzero().flatten()
                    best = asked[probs[asked].amax(1).argsort(descending=True)][: router.capacity(60)]
                    assert set(routing.token[first & (routing.expert == e)].tolist()) == set(best.tolist())
        if top_k == 1:
            assert (kept["batch"] >= kept["position"] - 1e-6).all()


def test_orders_agree_where_nothing_is_dropped():
    logits = _twice(torch.randn(30, 4))
    one, other = (
        create("vmoe", 6, 4, capacity_factor=4.0, capacity_order=order).assign(logits)
        for order in ("batch", "position")
    )
    assert one.dropped.token.numel() == 0 and torch.equal(one.dense(), other.dense())


def test_batch_priority_is_flagged_in_causal_models():
    router = create("vmoe", 6, 3, capacity_factor=0.3, capacity_order="batch")
    assert "later tokens" in router.leak
    changed = 0
    for _ in range(20):
        logits = torch.randn(20, 3)
        other = logits.clone()
        other[10:] *= 3
        before, after = (router.assign(_twice(h)).dense()[:10] for h in (logits, other))
        changed += not torch.equal(before, after)
    assert changed, "a future token changes an earlier output"


def test_errors():
    with pytest.raises(ValueError, match="must be positive"):
        create("vmoe", 6, 4, noise_std=0.0)
