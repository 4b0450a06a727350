"""Decided globally: BASE against scipy and brute force, Sinkhorn against POT and its own marginals."""

import itertools

import ot
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from shunter.context import Context
from shunter.routers import assignment
from shunter.routers.assignment import balanced_assignment, transport_plan
from shunter.routers.registry import create

from ..test_capacity import LOGITS
from . import contract

SORTS = [
    ("base", {}),
    ("base", {"z_loss": 0.1, "load_balancing_loss": 0.01}),
    ("sinkhorn", {}),
    ("sinkhorn", {"top_k": 2, "epsilon": 0.3}),
]


@pytest.mark.parametrize("check", contract.CHECKS)
@pytest.mark.parametrize("name, options", SORTS)
def test_contract(name, options, check):
    check(name, options, contract.plain)


def _value(scores, expert):
    return float(scores[torch.arange(len(scores)), expert].sum())


def _best(scores):
    """The largest sum with at most ceil(T / E) tokens an expert, by scipy on repeated columns."""
    slots = -(-scores.shape[0] // scores.shape[1])
    wide = scores.repeat_interleave(slots, dim=1).numpy()
    return wide[linear_sum_assignment(wide, maximize=True)].sum()


@pytest.mark.parametrize("kind", ["random", "skewed", "low rank", "ties", "huge"])
def test_the_assignment_is_optimal_and_balanced(kind):
    for _ in range(25):
        experts = int(torch.randint(1, 9, ()))
        tokens = int(torch.randint(1, 70, ()))
        scores = torch.randn(tokens, experts, dtype=torch.float64)
        if kind == "skewed":
            scores += 10 * torch.randn(experts)
        elif kind == "low rank":
            scores = torch.randn(tokens, 2, dtype=torch.float64) @ torch.randn(2, experts, dtype=torch.float64)
        elif kind == "ties":
            scores = torch.randint(3, (tokens, experts), dtype=torch.float64)
        elif kind == "huge":
            scores *= 1e8
        expert = balanced_assignment(scores)
        count = torch.bincount(expert, minlength=experts)
        assert count.max() <= -(-tokens // experts)
        if tokens % experts == 0:
            assert (count == tokens // experts).all()
        assert _value(scores, expert) == pytest.approx(_best(scores), rel=1e-9, abs=1e-9)
        assert torch.equal(balanced_assignment(scores), expert), "the same every time"


@pytest.mark.parametrize("tokens, experts, alike", [(8, 64, 0), (9, 32, 2), (256, 16, 256), (60, 16, 40), (1, 50, 1)])
def test_tokens_that_fill_up_take_no_paths(tokens, experts, alike, monkeypatch):
    """Those to which all experts are alike, and those that fill experts up where they do not divide the tokens."""
    paths, taken = assignment._shortest_paths, []
    monkeypatch.setattr(assignment, "_shortest_paths", lambda *given: taken.append(1) or paths(*given))
    for spread in (1.0, 5.0):
        scores = torch.randn(tokens, experts, dtype=torch.float64) + spread * torch.randn(experts)
        scores[:alike] = torch.randn(alike, 1, dtype=torch.float64)
        expert = balanced_assignment(scores)
        assert torch.bincount(expert, minlength=experts).max() <= -(-tokens // experts)
        assert _value(scores, expert) == pytest.approx(_best(scores), rel=1e-9, abs=1e-9)
    assert len(taken) <= 2 * 2 * (tokens - alike)


@pytest.mark.parametrize("kind", ["largest", "ends", "smallest", "all sizes", "one large"])
def test_scores_at_the_ends_of_float32_are_assigned_optimally(kind):
    info = torch.finfo(torch.float32)
    for _ in range(25):
        tokens, experts = int(torch.randint(1, 70, ())), int(torch.randint(1, 9, ()))
        draw = torch.randn(tokens, experts)
        scores = {
            "largest": (torch.rand(tokens, experts) * 2 - 1) * info.max,
            "ends": draw.sign() * info.max,
            "smallest": torch.randint(-3, 4, (tokens, experts)) * 2.0**-149,
            "all sizes": draw * 10.0 ** torch.randint(-44, 38, (tokens, experts)),
            "one large": draw.index_fill(0, torch.tensor([0]), info.max),
        }[kind]
        assert scores.dtype == torch.float32 and bool(scores.isfinite().all())
        expert = balanced_assignment(scores)
        assert torch.bincount(expert, minlength=experts).max() <= -(-tokens // experts)
        wide = scores.double() / float(scores.abs().max().clamp_min(2.0**-149))
        assert _value(wide, expert) == pytest.approx(_best(wide), rel=1e-9, abs=1e-9)


def test_the_assignment_against_all_assignments():
    scores = torch.randn(6, 3, dtype=torch.float64)
    ways = set(itertools.permutations([0, 0, 1, 1, 2, 2]))
    best = max(ways, key=lambda way: _value(scores, torch.tensor(way)))
    assert balanced_assignment(scores).tolist() == list(best)


def test_golden_assignments():
    scores = LOGITS[:, :3]
    expert = balanced_assignment(scores)
    assert expert.tolist() == [0, 1, 0, 2, 1, 2]
    assert _value(scores, expert) == pytest.approx(10.0)
    router = create("base", 6, 3)
    assert router.assign(scores).dense().argmax(1).tolist() == [0, 1, 0, 2, 1, 2]
    assert router.eval().assign(scores).dense().argmax(1).tolist() == [0, 0, 0, 1, 0, 2], "greedy"
    assert transport_plan(scores).argmax(1).tolist() == [0, 1, 0, 2, 1, 2]


def test_a_score_that_is_not_finite_is_the_smallest():
    scores = torch.randn(8, 4, dtype=torch.float64) - 10  # so that a zero would be the largest
    scores[3, 1], scores[5, 2] = float("nan"), float("-inf")
    expert = balanced_assignment(scores)
    assert (torch.bincount(expert, minlength=4) == 2).all()
    filled = scores.where(scores.isfinite(), scores[scores.isfinite()].min())
    assert torch.equal(expert, balanced_assignment(filled))
    assert torch.equal(transport_plan(scores), transport_plan(filled))
    assert (torch.bincount(balanced_assignment(torch.full((6, 3), float("nan"))), minlength=3) == 2).all()


def test_padding_is_not_assigned():
    mask = torch.rand(33) < 0.7
    logits = torch.randn(33, 5, dtype=torch.float64)
    for name in ("base", "sinkhorn"):
        router = create(name, 6, 5)
        routing = router.assign(logits, Context(mask=mask))
        alone = router.assign(logits[mask])
        found, expected = routing.dense()[mask], alone.dense()
        assert torch.equal(found != 0, expected != 0)
        assert torch.allclose(found, expected, rtol=1e-12, atol=0)  # where a vector ends, its last bits differ
        assert not routing.dense()[~mask].any()


def test_weights_are_sigmoids_and_train_the_router():
    logits = torch.randn(8, 4, requires_grad=True)
    routing = create("base", 6, 4).assign(logits)
    assert torch.equal(routing.weight, logits.sigmoid()[routing.token, routing.expert])
    routing.weight.sum().backward()
    assert (logits.grad != 0).sum() == 8
    two = create("sinkhorn", 6, 4, top_k=2).assign(logits)
    assert torch.equal(two.weight, logits.softmax(-1)[two.token, two.expert])


@pytest.mark.parametrize("name, top_k", [("base", 1), ("sinkhorn", 1), ("sinkhorn", 2)])
def test_gradients_pass_the_chosen_weights_and_not_the_assignment(name, top_k):
    logits = torch.randn(8, 4, dtype=torch.float64, requires_grad=True)
    routing = create(name, 6, 4, **({} if name == "base" else {"top_k": top_k})).train().assign(logits)
    upstream = torch.randn(8 * top_k, dtype=torch.float64)
    (routing.weight * upstream).sum().backward()
    gates = (logits.sigmoid() if top_k == 1 else logits.softmax(-1))[routing.token, routing.expert]
    assert torch.equal(routing.weight, gates)
    assert torch.allclose(logits.grad, torch.autograd.grad((gates * upstream).sum(), logits)[0], atol=1e-12)
    assert not transport_plan(logits).requires_grad


def test_centroids_begin_orthogonal():
    weight = create("base", 16, 8).weight
    assert torch.allclose(weight @ weight.T, 0.01 * torch.eye(8), atol=1e-6)


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 5.0])
def test_the_plan_is_that_of_optimal_transport(epsilon):
    scores = torch.randn(24, 6, dtype=torch.float64)
    plan = transport_plan(scores, epsilon, iterations=20_000, tolerance=1e-12)
    assert torch.allclose(plan.sum(0), torch.full((6,), 1 / 6, dtype=torch.float64), atol=1e-10)
    assert torch.allclose(plan.sum(1), torch.full((24,), 1 / 24, dtype=torch.float64), atol=1e-12)
    rows, columns = torch.full((24,), 1 / 24), torch.full((6,), 1 / 6)
    theirs = ot.sinkhorn(
        rows.double().numpy(), columns.double().numpy(), -scores.numpy(), epsilon,
        method="sinkhorn_log", numItermax=100_000, stopThr=1e-14,
    )  # fmt: skip
    assert torch.allclose(plan, torch.from_numpy(theirs), atol=1e-8)


def test_a_cold_plan_is_the_exact_assignment():
    scores = torch.randn(12, 4, dtype=torch.float64)
    plan = transport_plan(scores, 0.005, iterations=100_000, tolerance=1e-10)
    assert float((plan * scores).sum() * 12) == pytest.approx(_best(scores), abs=1e-2)


def test_big_logits_do_not_overflow():
    scores = 1000 * torch.randn(32, 4)
    plan = transport_plan(scores, iterations=5)
    assert plan.isfinite().all() and torch.allclose(plan.sum(1), torch.full((32,), 1 / 32))


def test_training_leaks_and_evaluation_does_not():
    for name in ("base", "sinkhorn"):
        router = create(name, 6, 2)
        logits = torch.tensor([[0.1, 0.0], [0.0, 3.0]])
        later = torch.tensor([[0.1, 0.0], [3.0, 0.0]])
        assert "later tokens" in router.leak
        assert router.assign(logits).dense().argmax(1).tolist() == [0, 1]
        assert router.assign(later).dense().argmax(1).tolist() == [1, 0]
        router.eval()
        assert router.leak is None
        assert torch.equal(router.assign(logits).dense()[:1], router.assign(later).dense()[:1])


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("base", {"centroid_gain": 0.0}, "must be positive"),
        ("sinkhorn", {"epsilon": 0.0}, "must be positive"),
        ("sinkhorn", {"iterations": 0}, "at least 1"),
        ("sinkhorn", {"top_k": 5}, "between 1 and num_experts"),
    ],
)
def test_errors(name, options, message):
    with pytest.raises(ValueError, match=message):
        create(name, 6, 4, **options)
