"""Noisy top-k gating: golden values, the load by Monte Carlo, the hierarchy written out."""

import pytest
import torch
from scipy.stats import norm

from shunter import MoE, aux_loss
from shunter.context import Context
from shunter.losses import cv_squared, load_loss, selection_probability
from shunter.routers.registry import create

from ..helpers import deviation
from ..test_capacity import LOGITS
from . import contract

SORTS = [
    ("noisy_topk", {"top_k": 2}),
    ("noisy_topk", {"top_k": 3, "capacity_factor": 1.0}),
    ("hierarchical_noisy_topk", {"num_groups": 2, "top_k": 2, "z_loss": 0.1, "load_balancing_loss": 0.1}),
]


@pytest.mark.parametrize("check", contract.CHECKS)
@pytest.mark.parametrize("name, options", SORTS)
def test_contract(name, options, check):
    check(name, options, contract.plain)


def _golden():
    router = create("noisy_topk", 6, 4, top_k=2, importance_loss=1.0, load_loss=1.0).train()
    logits = torch.cat([LOGITS, LOGITS, torch.full_like(LOGITS, 0.5)], dim=1)
    return router, logits


def test_golden_losses():
    router, logits = _golden()
    losses = router.losses(logits, router.assign(logits))
    assert losses["importance_loss"].item() == pytest.approx(0.266563, abs=1e-5), "0.355417 is the unbiased variance"
    load = torch.zeros(4, dtype=torch.float64)
    for row in LOGITS.double():
        for i in range(4):
            kth_of_the_others = torch.cat([row[:i], row[i + 1 :]]).topk(2).values[1]
            load[i] += norm.cdf(float(row[i] - kth_of_the_others) / 0.5)
    assert losses["load_loss"].item() == pytest.approx((load.std(correction=0) / load.mean()).item() ** 2, abs=1e-5)
    known = torch.tensor([4.225171, 4.282920, 2.065381, 1.508388])
    assert cv_squared(known).item() == pytest.approx(0.171093, abs=1e-5)


def test_losses_count_the_dropped():
    router, logits = _golden()
    tight = create("noisy_topk", 6, 4, top_k=2, importance_loss=1.0, load_loss=1.0, capacity_factor=2 / 3).train()
    routing = tight.assign(logits)
    assert routing.dropped.token.numel() > 0
    whole = router.losses(logits, router.assign(logits))
    for name, value in tight.losses(logits, routing).items():
        assert torch.allclose(value, whole[name])


def test_selection_probability_is_a_frequency():
    """P(x, i) is how often i stays in the top k when its own noise alone is drawn again."""
    tokens, experts, k, draws = 4, 5, 2, 100_000
    clean = torch.randn(tokens, experts, dtype=torch.float64)
    std = torch.rand(tokens, experts, dtype=torch.float64) + 0.3
    noisy = clean + torch.randn_like(clean) * std
    expected = selection_probability(clean, noisy, std, k)
    for i in range(experts):
        again = noisy.expand(draws, tokens, experts).clone()
        again[..., i] = clean[:, i] + torch.randn(draws, tokens, dtype=torch.float64) * std[:, i]
        share = (again.topk(k).indices == i).any(-1).double().mean(0)
        assert (share - expected[:, i]).abs().max() < deviation(draws, tokens * experts)


def test_selection_probability_without_a_choice_is_one():
    h = torch.randn(3, 4)
    assert selection_probability(h, h, 1.0, 4).eq(1).all()


def test_load_loss_has_right_gradients():
    # Where two noisy logits change places there is a kink: they are apart here.
    noisy = torch.stack([torch.randperm(4) for _ in range(5)]) + 0.9 * torch.rand(5, 4, dtype=torch.float64)
    parts = [torch.randn(5, 4, dtype=torch.float64).requires_grad_(), noisy.requires_grad_()]
    std = (torch.rand(5, 4, dtype=torch.float64) + 0.5).requires_grad_()
    assert torch.autograd.gradcheck(lambda c, n, s: load_loss(c, n, s, 2), (*parts, std))


def test_weights_are_a_softmax_over_the_chosen():
    router, logits = _golden()
    matrix = router.assign(logits).dense()
    kept = torch.full_like(LOGITS, -torch.inf).scatter(1, LOGITS.topk(2).indices, LOGITS.topk(2).values)
    assert torch.allclose(matrix, kept.softmax(-1))


def test_the_start_is_balanced_noise_and_evaluation_has_none():
    router = create("noisy_topk", 6, 8, top_k=2).train()
    x = torch.randn(20000, 6)
    clean, noisy, std = router.score(x).chunk(3, dim=-1)
    assert clean.eq(0).all() and torch.allclose(std, torch.tensor(2.0).log() + 1e-2)
    assert abs(noisy.std().item() / std[0, 0].item() - 1) < 0.02
    share = router.assign(router.score(x)).counts / 20000
    assert (share - 0.25).abs().max() < deviation(20000, 8)
    clean, noisy, std = router.eval().score(x).chunk(3, dim=-1)
    assert torch.equal(clean, noisy) and (std > 0).all(), "no noise, and a load that can be computed"
    losses = router.losses(router.score(x[:10]), router.assign(router.score(x[:10])))
    assert all(value.isfinite() for value in losses.values())


def test_noise_scales_with_the_input():
    router = create("noisy_topk", 1, 4, top_k=2).train()
    torch.nn.init.constant_(router.noise_weight, 1.0)
    _, noisy, std = router.score(torch.tensor([[-20.0], [3.0]]).repeat_interleave(20_000, 0)).chunk(3, dim=-1)
    expected = torch.nn.functional.softplus(torch.tensor([-20.0, 3.0])) + 1e-2
    assert torch.allclose(std[[0, -1], 0], expected)
    for rows, value in zip(noisy.chunk(2), expected, strict=True):
        assert rows.std().item() == pytest.approx(value.item(), rel=0.03)


def test_the_hierarchy_written_out():
    groups, size, tokens = 3, 4, 10
    router = create(
        "hierarchical_noisy_topk", 6, groups * size, num_groups=groups, top_groups=2, top_k=3, load_loss=1.0
    )
    router = router.double().train()
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)
    logits = router.score(torch.randn(tokens, 6, dtype=torch.float64))
    mask = torch.rand(tokens) < 0.7
    mask[0] = True
    routing = router.assign(logits, Context(mask=mask))
    top, inner = logits[:, : 3 * groups].chunk(3, 1), logits[:, 3 * groups :].chunk(3, 1)
    matrix = torch.zeros(tokens, groups * size, dtype=torch.float64)
    load_groups = torch.zeros(groups, dtype=torch.float64)
    load_within = torch.zeros(groups, size, dtype=torch.float64)
    members = torch.zeros(groups)
    for t in mask.nonzero().flatten().tolist():
        load_groups += selection_probability(*(part[t : t + 1] for part in top), 2)[0]
        chosen = top[1][t].topk(2)
        for g, gate in zip(chosen.indices.tolist(), chosen.values.softmax(0), strict=True):
            part = [p[t : t + 1, g * size : (g + 1) * size] for p in inner]
            best = part[1][0].topk(3)
            matrix[t, g * size + best.indices] = gate * best.values.softmax(0)
            load_within[g] += selection_probability(*part, 3)[0]
            members[g] += 1
    assert torch.allclose(routing.dense(), matrix)
    assert torch.allclose(routing.dense().sum(1)[mask], torch.ones(int(mask.sum()), dtype=torch.float64))
    losses = router.losses(logits, routing, Context(mask=mask))
    assert torch.allclose(losses["importance_loss"], 0.1 * cv_squared(matrix.sum(0)))
    load = load_groups[:, None] * load_within / members.clamp_min(1)[:, None]
    assert torch.allclose(losses["load_loss"], cv_squared(load.flatten()))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"top_k": 1}, "always 1, and the router gets no gradient"),
        ({"top_k": 9}, "between 2 and num_experts, 8"),
        ({"noise_epsilon": 0.0}, "must be positive"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        create("noisy_topk", 6, 8, **options)


@pytest.mark.parametrize("options", [{}, {"num_groups": 3}, {"num_groups": 2, "top_k": 5}, {"num_groups": 1}])
def test_errors_of_the_hierarchy(options):
    with pytest.raises(ValueError, match="num_groups"):
        create("hierarchical_noisy_topk", 6, 8, **options)


def test_groups_that_are_taken_whole_train():
    """With as many choices as experts in a group the load is certain: a loss without a slope, but with a graph."""
    moe = MoE(6, 5, 4, "hierarchical_noisy_topk", num_groups=2)
    (moe(torch.randn(9, 6)).sum() + aux_loss(moe)).backward()
    assert all(p.grad.isfinite().all() for p in moe.router.parameters())
