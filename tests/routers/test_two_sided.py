"""Two-sided routing: its two exact limits, stability by brute force, and deferred acceptance by hand."""

import itertools

import pytest
import torch

from shunter.context import Context
from shunter.routers.registry import create
from shunter.routers.two_sided import deferred_acceptance

from ..test_capacity import LOGITS
from . import contract

SORTS = [
    {},
    {"top_k": 4, "rounds": 3, "capacity_factor": 1.0, "load_balancing_loss": 0.1, "z_loss": 0.1},
    {"top_k": 3, "rounds": None, "capacity_factor": 0.7, "eval_capacity_factor": 2.0},
    {"top_k": 2, "capacity_factor": None, "rounds": None},
]


@pytest.mark.parametrize("check", contract.CHECKS)
@pytest.mark.parametrize("options", SORTS)
def test_contract(options, check):
    check("two_sided", options, contract.plain)


def _logits(tokens, experts, ties=False):
    return torch.randint(3, (tokens, experts)).float() if ties else 2 * torch.randn(tokens, experts)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("tokens, experts, factor", [(33, 8, 2.0), (7, 5, 1.3), (64, 4, 0.5), (3, 6, 2.0), (0, 4, 1.0)])
def test_with_all_experts_as_choices_one_round_is_expert_choice(tokens, experts, factor, ties):
    logits = _logits(tokens, experts, ties)
    context = Context(mask=torch.rand(tokens) < 0.8)
    ours = create("two_sided", 6, experts, top_k=experts, capacity_factor=factor)
    theirs = create("expert_choice", 6, experts, capacity_factor=factor)
    assert torch.equal(ours.assign(logits, context).dense(), theirs.assign(logits, context).dense())


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("rounds", [1, 2, None])
@pytest.mark.parametrize("factor", [None, 1000.0])
def test_without_a_capacity_it_is_top_m_token_choice(rounds, factor, ties):
    logits = _logits(40, 8, ties)
    for top_k in (1, 3, 8):
        ours = create("two_sided", 6, 8, top_k=top_k, capacity_factor=factor, rounds=rounds).assign(logits)
        theirs = create("topk", 6, 8, top_k=top_k, renormalize="no").assign(logits)
        assert torch.equal(ours.dense(), theirs.dense())


def test_golden_one_round():
    """C = 3 and two applications each: of four applicants expert 0 turns away the one that likes it least."""
    routing = create("two_sided", 6, 4, top_k=2, capacity_factor=2.0).assign(LOGITS)
    chosen = [set(routing.token[routing.expert == e].tolist()) for e in range(4)]
    assert chosen == [{0, 2, 4}, {1, 3, 4}, {2, 3, 5}, {5}]


def _prefers(values, one, other):
    """Whether index one comes before other: the larger value, or the lower index."""
    return (-values[one], one) < (-values[other], other)


def _blocking_pair(scores, pairs, top_k, slots):
    scores, pairs = scores.tolist(), pairs.tolist()
    columns = list(zip(*scores, strict=True))
    for t, e in itertools.product(range(len(scores)), range(len(scores[0]))):
        if pairs[t][e]:
            continue
        mine = [other for other, held in enumerate(pairs[t]) if held]
        theirs = [other for other, row in enumerate(pairs) if row[e]]
        if (len(mine) < top_k or any(_prefers(scores[t], e, other) for other in mine)) and (
            len(theirs) < slots or any(_prefers(columns[e], t, other) for other in theirs)
        ):
            return t, e
    return None


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(
    "tokens, experts, top_k, slots", [(12, 4, 1, 3), (12, 4, 2, 3), (15, 6, 3, 4), (9, 5, 5, 2), (30, 3, 2, 40)]
)
def test_to_the_end_it_is_stable(tokens, experts, top_k, slots, ties):
    """And that is seen: one round is not, of (12, 4, 2, 3) in one draw of three, so it takes draws until one is not."""
    blocked = 0
    one_is_enough = slots > tokens or top_k == experts
    for draw in range(200):
        if draw >= 10 and (blocked or one_is_enough):
            break
        scores = _logits(tokens, experts, ties).softmax(-1)
        pairs = deferred_acceptance(scores, top_k, slots)
        assert pairs.sum(1).max() <= top_k and pairs.sum(0).max() <= slots
        assert _blocking_pair(scores, pairs, top_k, slots) is None
        blocked += _blocking_pair(scores, deferred_acceptance(scores, top_k, slots, 1), top_k, slots) is not None
    assert blocked or one_is_enough, "one round is not stable, so the check sees instability"


def test_the_stable_result_is_unique_among_all():
    """Of all matchings of 4 tokens and 3 experts within the quotas one is stable, the one found."""
    top_k, slots = 2, 2
    scores = torch.randn(4, 3, dtype=torch.float64).softmax(-1)
    rows = [row for row in itertools.product((0, 1), repeat=3) if sum(row) <= top_k]
    stable = []
    for rest in itertools.product(rows, repeat=4):
        if max(map(sum, zip(*rest, strict=True))) <= slots:
            pairs = torch.tensor(rest, dtype=torch.bool)
            if _blocking_pair(scores, pairs, top_k, slots) is None:
                stable.append(pairs)
    assert len(stable) == 1 and torch.equal(stable[0], deferred_acceptance(scores, top_k, slots))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("tokens, experts, top_k, slots", [(200, 16, 2, 20), (100, 8, 4, 30), (64, 8, 8, 9)])
def test_to_the_end_it_takes_the_best_pair_that_is_left(tokens, experts, top_k, slots, ties):
    scores = _logits(tokens, experts, ties).softmax(-1)
    pairs = torch.zeros(tokens, experts, dtype=torch.bool)
    mine, theirs = [top_k] * tokens, [slots] * experts
    flat = scores.flatten().tolist()
    for at in sorted(range(len(flat)), key=lambda i: (-flat[i], i)):
        t, e = divmod(at, experts)
        if mine[t] and theirs[e]:
            pairs[t, e] = True
            mine[t] -= 1
            theirs[e] -= 1
    assert torch.equal(deferred_acceptance(scores, top_k, slots), pairs)


def _by_hand(scores, top_k, slots, rounds):
    """Gale and Shapley with quotas, token by token."""
    tokens, experts = scores.shape
    values, columns = scores.tolist(), scores.T.tolist()
    wishes = [sorted(range(experts), key=lambda e, t=t: (-values[t][e], e)) for t in range(tokens)]
    held = [[] for _ in range(experts)]
    for _ in range(rounds):
        for t in range(tokens):
            lacks = top_k - sum(t in of for of in held)
            applications, wishes[t] = wishes[t][:lacks], wishes[t][lacks:]
            for e in applications:
                held[e].append(("new", t))
        held = [[t[1] if isinstance(t, tuple) else t for t in of] for of in held]
        held = [sorted(of, key=lambda t, e=e: (-columns[e][t], t))[:slots] for e, of in enumerate(held)]
    pairs = torch.zeros(tokens, experts, dtype=torch.bool)
    for e, of in enumerate(held):
        pairs[of, e] = True
    return pairs


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("rounds", [1, 2, 3, 5])
def test_rounds_are_those_of_gale_and_shapley(rounds, ties):
    scores = _logits(40, 6, ties).softmax(-1)
    for top_k, slots in ((1, 5), (2, 8), (4, 10)):
        assert torch.equal(deferred_acceptance(scores, top_k, slots, rounds), _by_hand(scores, top_k, slots, rounds))


def test_further_rounds_never_leave_an_expert_worse_off():
    scores = _logits(60, 6).double().softmax(-1)
    before = torch.zeros(6)
    for rounds in (1, 2, 3, 4, None):
        pairs = deferred_acceptance(scores, 2, 12, rounds)
        value = (scores * pairs).sum(0)
        assert (value >= before - 1e-12).all()
        before = value


def test_slots_are_filled_where_tokens_want_them():
    """With room for all applications and every expert a possible choice, no token lacks an expert in the end."""
    for _ in range(5):
        logits = _logits(40, 8) + 3 * torch.randn(8)
        logits[:, :2] += 100.0  # all tokens apply first to two experts, who have 20 slots of the 80
        once, ever = (
            create("two_sided", 6, 8, top_k=2, capacity_factor=2.0, rounds=r).assign(logits) for r in (1, None)
        )
        assert once.token.numel() < ever.token.numel() and ever.counts.max() <= 10
        assert ever.token.numel() >= 80 - 2 * 8, "a token may lack an expert that it has already"


def test_padding_takes_no_part():
    mask = torch.rand(40) < 0.6
    logits = _logits(40, 6)
    logits[~mask] = float("nan")
    router = create("two_sided", 6, 6, rounds=None, capacity_factor=1.0)
    whole = router.assign(logits, Context(mask=mask)).dense()
    assert torch.equal(whole[mask], router.assign(logits[mask]).dense())


def test_tokens_without_scores_take_no_slot_from_others():
    router = create("two_sided", 6, 4, top_k=2, capacity_factor=1.0, rounds=None)
    logits = _logits(16, 4)
    others = torch.arange(16) != 5
    # C stays at 4: ceil(15 / 4) is ceil(16 / 4).
    clean = router.assign(logits[others]).dense()
    logits[5] = float("nan")
    assert torch.equal(router.assign(logits).dense()[others], clean)


def test_later_tokens_change_earlier_ones_and_leak_says_so():
    for rounds in (1, None):
        router = create("two_sided", 6, 4, rounds=rounds, capacity_factor=1.0)
        changed = False
        for _ in range(40):
            logits = _logits(16, 4)
            other = torch.cat([logits[:8], _logits(8, 4)])
            changed |= not torch.equal(router.assign(logits).dense()[:8], router.assign(other).dense()[:8])
        assert changed and "later tokens" in router.leak
    assert create("two_sided", 6, 4, capacity_factor=None).leak is None


def test_experts_may_be_permuted():
    order = torch.randperm(6)
    logits = torch.randn(24, 6, dtype=torch.float64)
    for rounds in (1, 2, None):
        router = create("two_sided", 6, 6, rounds=rounds, capacity_factor=1.0)
        assert torch.equal(router.assign(logits[:, order]).dense() > 0, router.assign(logits).dense()[:, order] > 0)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"top_k": 5}, "between 1 and num_experts, 4"),
        ({"rounds": 0}, "rounds 0 must be at least 1, or None"),
        ({"capacity_factor": 0.0}, "positive number"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        create("two_sided", 6, 4, **options)
