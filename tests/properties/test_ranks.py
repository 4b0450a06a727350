"""State that no gradient moves is the same on every rank, and what one process would have."""

import pytest
import torch
import torch.distributed as dist

from shunter import Routing, routers
from shunter.context import Context
from shunter.ranks import sum_over_ranks
from shunter.routers import Router
from shunter.routers.registry import create
from tests.helpers import on_ranks

# Every router that has such state.
STATEFUL = {
    "topk": {"selection_bias": True, "bias_update_rate": 0.5},
    "deepseek": {"top_k": 2, "bias_update_rate": 0.5},
    "top_p": {},
    "relu": {"target_experts": 1},
    "soft": {"margin": 1.0},
    "dense_to_sparse": {"anneal_steps": 5},
    "routing_networks": {"num_tasks": 2, "usage_decay": 0.5},
    "null_experts": {"selection_bias": True, "bias_update_rate": 0.5},
}
STEPS, TOKENS, EXPERTS = 2, 12, 4
# In the second step rank 1 has no token.
SHARES = [(slice(0, 5), slice(5, TOKENS)), (slice(0, TOKENS), slice(0, 0))]


def _observe(router, logits, matrix, rows):
    routing = Routing.from_dense(matrix[rows])
    router.observe(logits[rows], routing, Context())


def _states(cases, shares):
    """The state of each router after the steps, in which the shares are micro-batches."""
    found = {}
    for name, batches in cases.items():
        router = create(name, 6, EXPERTS, **STATEFUL[name]).train()
        for (logits, matrix), parts in zip(batches, shares, strict=True):
            for rows in parts:
                _observe(router, logits, matrix, rows)
            router.update()
        found[name] = {key: value.tolist() for key, value in router.named_buffers()}
    return found


def _share_of(rank, cases):
    return _states(cases, [(parts[rank],) for parts in SHARES])


def _sums(rank):
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    counts, more = torch.tensor([rank, 10 * rank]), torch.tensor([[rank * rank]])
    sum_over_ranks(counts, more, group=groups[rank // 2])
    router = create("topk", 6, 2, selection_bias=True, bias_update_rate=1.0)
    router.process_group = groups[rank // 2]
    router.observed += torch.tensor([1.0, 0.0]) if rank < 2 else torch.tensor([0.0, 1.0])
    router.update()
    return counts.tolist(), more.tolist(), router.selection_bias.tolist()


def test_sums_stay_within_their_group():
    """As with tensor parallelism, where the ranks of another group hold the same tokens."""
    first, second = ([1, 10], [[1]], [-1.0, 1.0]), ([5, 50], [[13]], [1.0, -1.0])
    assert on_ranks(_sums, 4) == [first, first, second, second]


def test_two_ranks_have_the_state_of_one():
    cases = {}
    known = Context(task=torch.zeros(TOKENS, dtype=torch.int64), sequence=torch.zeros(TOKENS, dtype=torch.int64))
    for name, options in STATEFUL.items():
        router = create(name, 6, EXPERTS, **options).train()
        cases[name] = []
        for _ in range(STEPS):
            logits = torch.randn(TOKENS, router.score_width)
            cases[name].append((logits, router.assign(logits, known).dense()))
    expected = _states(cases, SHARES)
    results = on_ranks(_share_of, 2, cases)
    for name in STATEFUL:
        assert results[0][name] == results[1][name], f"{name}: ranks drift apart"
        for key, value in expected[name].items():
            assert torch.allclose(torch.tensor(results[0][name][key]), torch.tensor(value)), f"{name}: {key}"


def test_no_stateful_router_is_left_out():
    moving = {name for name in routers.names() if routers.find(name).update is not Router.update}
    inherited = {name for name in moving if routers.find(name).update is routers.find("topk").update} - {"topk"}
    gates = {"hme", "mmoe"}  # the margin of soft
    assert moving - inherited - gates <= set(STATEFUL)


@pytest.mark.parametrize("name", STATEFUL)
def test_state_is_exact_and_saved(name):
    router = create(name, 6, EXPERTS, **STATEFUL[name]).bfloat16()
    floating = {key: value.dtype for key, value in router.named_buffers() if value.is_floating_point()}
    assert set(floating.values()) <= {torch.float32}
    assert set(router.state_dict()) - {key for key, _ in router.named_parameters()}, "state is in the state dict"
