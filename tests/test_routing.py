"""The routing type: its invariants, its ways in, its ways out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shunter import Routing

from .helpers import random_routing

sizes = st.tuples(st.integers(0, 12), st.integers(1, 9), st.data())


def _distinct(tokens, experts, k):
    return torch.stack([torch.randperm(experts)[:k] for _ in range(tokens)]) if tokens else torch.zeros(0, k).long()


@settings(max_examples=80)
@given(tokens=st.integers(0, 12), experts=st.integers(1, 9), data=st.data())
def test_from_topk_is_the_matrix_that_it_lists(tokens, experts, data):
    k = data.draw(st.integers(1, experts))
    index, weight = _distinct(tokens, experts, k), torch.rand(tokens, k)
    matrix = torch.zeros(tokens, experts).scatter(1, index, weight)
    routing = Routing.from_topk(index, weight, experts)
    assert torch.equal(routing.dense(), matrix)
    keys = (routing.expert * max(tokens, 1) + routing.token).tolist()
    assert keys == sorted(set(keys)), "sorted by expert, then token"
    assert torch.equal(index[routing.token, routing.choice], routing.expert), "choice is the rank of the expert"
    _check_derived(routing)


@settings(max_examples=80)
@given(tokens=st.integers(0, 12), experts=st.integers(1, 9), density=st.floats(0, 1))
def test_from_dense_is_the_matrix(tokens, experts, density):
    matrix = torch.rand(tokens, experts) * (torch.rand(tokens, experts) < density)
    routing = Routing.from_dense(matrix)
    assert torch.equal(routing.dense(), matrix)
    _check_derived(routing)


def _check_derived(routing):
    experts, tokens = routing.expert.tolist(), routing.token.tolist()
    assert routing.counts.tolist() == [experts.count(e) for e in range(routing.num_experts)]
    assert routing.offsets.tolist() == [sum(e < limit for e in experts) for limit in range(routing.num_experts + 1)]
    rows, offsets = routing.by_token
    for t in range(routing.num_tokens):
        mine = rows[offsets[t] : offsets[t + 1]].tolist()
        assert sorted(mine) == [i for i, token in enumerate(tokens) if token == t]
    assert offsets.tolist()[-1] == len(tokens)


def test_selecting_keeps_and_remembers():
    routing = random_routing(20, 6)
    once = torch.rand(routing.token.numel()) < 0.7
    kept = routing.select(once)
    twice = torch.rand(kept.token.numel()) < 0.5
    final = kept.select(twice)
    assert torch.equal(final.dense() + final.dropped.dense(), routing.dense())
    assert torch.equal(final.demand, routing.counts)
    final.check_values()
    final.dropped.check_values()


def test_keep_leaves_out_padding_and_choices():
    index, weight = _distinct(9, 5, 2), torch.rand(9, 2)
    keep = torch.rand(9, 2) < 0.5
    matrix = torch.zeros(9, 5).scatter(1, index, weight * keep)
    assert torch.equal(Routing.from_topk(index, weight, 5, keep=keep).dense(), matrix)
    rows = torch.rand(9) < 0.5
    matrix = torch.zeros(9, 5).scatter(1, index, weight) * rows[:, None]
    assert torch.equal(Routing.from_topk(index, weight, 5, keep=rows).dense(), matrix)


def test_other_weights_keep_the_triples():
    routing = random_routing(9, 5)
    _ = routing.by_token, routing.counts
    doubled = routing.with_weight(routing.weight * 2)
    assert torch.equal(doubled.dense(), routing.dense() * 2)
    _check_derived(doubled)


def test_gradients_reach_the_weights_through_the_matrix():
    weight = torch.rand(4, 2, dtype=torch.float64, requires_grad=True)
    index = _distinct(4, 3, 2)
    assert torch.autograd.gradcheck(lambda w: Routing.from_topk(index, w, 3).dense(), weight)


_T = torch.tensor


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"expert": _T([0, 3])}, "expert 3 is out of range; experts are 0 to 2"),
        ({"expert": _T([-1, 1])}, "expert -1 is out of range"),
        ({"token": _T([0, 4])}, "token 4 is out of range; tokens are 0 to 3"),
        ({"expert": _T([1, 0])}, "unsorted at triple 1"),
        ({"token": _T([1, 1]), "expert": _T([1, 1])}, "token 1 with expert 1 appears twice"),
        ({"weight": _T([1.0, float("nan")])}, "weight nan of token 2 with expert 1 is not finite"),
        ({"weight": _T([1.0, float("inf")])}, "weight inf"),
        ({"weight": _T([1, 1])}, "weight has dtype torch.int64"),
        ({"token": _T([0, 2], dtype=torch.int32)}, "token has dtype torch.int32"),
        ({"expert": _T([0])}, r"expert has shape \(1,\), token \(2,\)"),
        ({"weight": torch.ones(2, device="meta")}, "weight is on meta, token on cpu"),
    ],
)
def test_faults_are_named(fields, message):
    good = {"token": _T([0, 2]), "expert": _T([0, 1]), "weight": _T([0.5, 0.5])}
    Routing(**good, num_tokens=4, num_experts=3)
    with pytest.raises(ValueError, match=message):
        Routing(**(good | fields), num_tokens=4, num_experts=3)


def test_constructors_name_faults():
    with pytest.raises(ValueError, match="expert 5 is out of range; experts are 0 to 2"):
        Routing.from_topk(_T([[5]]), torch.ones(1, 1), 3)
    with pytest.raises(ValueError, match="appears twice"):
        Routing.from_topk(_T([[1, 1]]), torch.ones(1, 2), 3)
    with pytest.raises(ValueError, match=r"must both be \(T, k\)"):
        Routing.from_topk(_T([1]), torch.ones(1, 1), 3)
    with pytest.raises(ValueError, match=r"must be \(T, E\)"):
        Routing.from_dense(torch.ones(3))
