"""Routing by task, by sentence and by another network's embedding."""

import math

import pytest
import torch

from shunter import MoE
from shunter.context import Context
from shunter.losses import importance_loss, mean_importance_loss, sparsity_loss
from shunter.routers.registry import create

from ..test_capacity import LOGITS
from . import contract

TASKS, WIDTH = 5, 3


def _task(tokens):
    return Context(task=torch.randint(TASKS, (tokens,)))


def _sentence(tokens):
    return Context(sequence=torch.randint(4, (tokens,)) * 7)


def _speech(tokens):
    return Context(embedding=torch.randn(tokens, WIDTH), domain=torch.randint(2, (tokens,)))


SORTS = [
    ("task", {"num_tasks": TASKS}, _task),
    ("sentence", {}, _sentence),
    ("speech", {"embedding_dim": WIDTH}, _speech),
    ("speech", {"embedding_dim": WIDTH, "num_domains": 2, "capacity_factor": 1.0}, _speech),
]


@pytest.mark.parametrize("check", contract.CHECKS)
@pytest.mark.parametrize("name, options, context", SORTS)
def test_contract(name, options, context, check):
    check(name, options, context)


def test_a_task_has_the_same_experts_always():
    router = create("task", 6, 8, num_tasks=3).eval()
    context = Context(task=(torch.arange(50) % 3)[torch.randperm(50)])
    matrix = router.assign(router.score(torch.randn(50, 6), context), context).dense()
    for task in range(3):
        rows = matrix[context.task == task]
        assert (rows == rows[:1]).all()
        assert rows[0].nonzero().flatten().tolist() == router.experts_of(task)


def test_the_experts_of_a_task_alone_give_the_same_outputs():
    full = MoE(6, 4, 8, router="task", num_tasks=3).double().eval()
    x = torch.randn(10, 6, dtype=torch.float64)
    for task in range(3):
        chosen = full.router.experts_of(task)
        small = MoE(6, 4, len(chosen), router="task", num_tasks=1).double().eval()
        small.router.weight.data.copy_(full.router.weight[chosen])
        small.router.embedding.data.copy_(full.router.embedding[task : task + 1])
        for key, value in small.experts.named_parameters():
            value.data.copy_(full.experts.get_parameter(key)[chosen])
        out = small(x, task=torch.zeros(10, dtype=torch.int64))
        assert torch.allclose(out, full(x, task=torch.full((10,), task)), atol=1e-12)


def test_a_sentence_is_its_mean_over_real_tokens():
    router = create("sentence", 6, 4).double().eval()
    x = torch.randn(12, 6, dtype=torch.float64)
    context = Context(sequence=torch.tensor([3] * 5 + [9] * 7), mask=torch.tensor([1] * 4 + [0] + [1] * 7).bool())
    logits = router.score(x, context)
    expected = torch.stack([x[:4].mean(0), x[5:].mean(0)]) @ router.weight.T
    assert torch.allclose(logits[:5], expected[:1].expand(5, 4))
    assert torch.allclose(logits[5:], expected[1:].expand(7, 4))
    assert "later tokens" in router.leak


def test_the_layer_knows_its_sequences():
    moe = MoE(6, 4, 8, router="sentence").double().eval()
    x = torch.randn(3, 7, 6, dtype=torch.float64)
    moe(x)
    matrix = moe.routing.dense().reshape(3, 7, 8)
    assert torch.equal(matrix, matrix[:, :1].expand(3, 7, 8))
    alone = moe(x[1:2])
    assert torch.allclose(moe(x)[1:2], alone), "no sentence depends on its batch mates"


def test_speech_reads_the_concatenation():
    router = create("speech", 6, 4, embedding_dim=WIDTH, num_domains=2).double()
    router.domain_logits.data.normal_()
    x = torch.randn(9, 6, dtype=torch.float64)
    context = Context(embedding=torch.randn(9, WIDTH, dtype=torch.float64), domain=torch.randint(2, (9,)))
    one_hot = torch.nn.functional.one_hot(context.domain, 2).double()
    joint = torch.cat([router.weight, router.embedding_weight, router.domain_logits.T], dim=1)
    assert torch.allclose(router.score(x, context), torch.cat([x, context.embedding, one_hot], 1) @ joint.T)


def test_golden_speech_losses():
    p = LOGITS.softmax(-1)
    assert sparsity_loss(p).item() == pytest.approx(1.555547, abs=1e-6)
    assert mean_importance_loss(p).item() == pytest.approx(1.229348, abs=1e-6)
    assert mean_importance_loss(p).item() == pytest.approx(1 + importance_loss(p).item(), abs=1e-6)
    router = create("speech", 6, 4, embedding_dim=WIDTH, capacity_factor=None).train()
    losses = router.losses(LOGITS, router.assign(LOGITS, _speech(6)), _speech(6))
    assert {k: v.item() for k, v in losses.items()} == pytest.approx(
        {"sparsity_loss": 0.15 * 1.555547, "mean_importance_loss": 0.15 * 1.229348}, abs=1e-6
    )


def test_ranges_of_the_speech_losses():
    certain, even = torch.eye(4), torch.full((4, 4), 0.25)
    assert (sparsity_loss(certain).item(), sparsity_loss(even).item()) == (1, math.sqrt(4))
    one = torch.eye(4)[:1].expand(4, 4)
    assert (mean_importance_loss(one).item(), mean_importance_loss(even).item()) == (4, 1)
    for loss in (sparsity_loss, mean_importance_loss):
        h = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
        mask = torch.tensor([1, 0, 1, 1, 1], dtype=torch.bool)
        assert torch.autograd.gradcheck(lambda h, loss=loss, mask=mask: loss(h.softmax(-1), mask), h)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: create("task", 6, 4), "needs num_tasks="),
        (lambda: create("speech", 6, 4), "needs embedding_dim="),
        (lambda: create("task", 6, 4, num_tasks=2).score(torch.zeros(1, 6)), "Task needs task; pass task="),
        (
            lambda: create("task", 6, 4, num_tasks=2).score(torch.zeros(1, 6), Context(task=torch.tensor([-1]))),
            "task -1 is out of range; ids are 0 to 1",
        ),
        (lambda: create("sentence", 6, 4).score(torch.zeros(1, 6)), "needs sequence"),
        (
            lambda: create("speech", 6, 4, embedding_dim=2).score(
                torch.zeros(1, 6), Context(embedding=torch.zeros(1, 3))
            ),
            r"embedding has shape \(1, 3\); it must be \(1, 2\)",
        ),
        (
            lambda: create("speech", 6, 4, embedding_dim=2, num_domains=2).score(
                torch.zeros(1, 6), Context(embedding=torch.zeros(1, 2))
            ),
            "needs domain",
        ),
        (
            lambda: MoE(6, 4, 4, router="speech", embedding_dim=2)(torch.zeros(3, 6), embedding=torch.zeros(2, 2)),
            "embedding",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
