"""Stochastic experts: who shares a draw, and the loss that makes experts agree."""

import pytest
import torch
from torch.nn import functional as F

from shunter import MoE, Routing
from shunter.context import Context
from shunter.losses import consistency_loss
from shunter.routers.registry import create

from ..helpers import deviation
from ..test_capacity import LOGITS
from . import contract

# Evaluation draws, so two evaluations are equal from equal random states alone.
CHECKS = [
    check
    for check in contract.CHECKS
    if check.__name__ not in ("evaluation_is_deterministic", "ties_go_to_the_lowest_expert", "state_is_saved_and_exact")
]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("options", [{}, {"level": "sentence", "eval_level": "batch"}, {"eval_level": "sentence"}])
def test_contract(options, check):
    check("thor", options, lambda tokens: Context(sequence=torch.arange(tokens) // 4))


def _draw(router, tokens, **known):
    routing = router.assign(torch.zeros(tokens, router.num_experts), Context(**known))
    assert routing.weight.eq(1).all() and routing.token.numel() == tokens, "one expert a token, without a gate"
    return routing.expert[routing.token.argsort()]


def _is_uniform(counts):
    return (counts / counts.sum() - 1 / counts.numel()).abs().max() < deviation(int(counts.sum()), counts.numel())


def test_a_training_forward_has_one_expert_for_the_whole_batch():
    """The review has two experts an input; the paper's code draws one for the batch, in each of two passes."""
    router = create("thor", 6, 4).train()
    seen = torch.zeros(4)
    for _ in range(2000):
        chosen = _draw(router, 9)
        assert (chosen == chosen[0]).all()
        seen[chosen[0]] += 1
    assert _is_uniform(seen)


def test_evaluation_draws_for_every_token():
    counts = torch.bincount(_draw(create("thor", 6, 8).eval(), 20000), minlength=8)
    assert _is_uniform(counts)


@pytest.mark.parametrize("training", [True, False])
def test_a_sentence_shares_its_draw(training):
    router = create("thor", 6, 8, level="sentence", eval_level="sentence").train(training)
    sequence = torch.arange(8000).repeat(3)[torch.randperm(24_000)] * 5
    chosen = _draw(router, 24_000, sequence=sequence)
    first = dict(zip(sequence.tolist(), chosen.tolist(), strict=True))
    assert all(first[number] == expert for number, expert in zip(sequence.tolist(), chosen.tolist(), strict=True))
    assert _is_uniform(torch.bincount(torch.tensor(list(first.values())), minlength=8))


def test_layers_draw_by_themselves_and_two_passes_differ():
    layers = [MoE(6, 5, 8, router="thor").train() for _ in range(2)]
    x = torch.randn(3, 4, 6)
    drawn = []
    for _ in range(60):
        for layer in layers:
            layer(x)
        drawn.append(tuple(int(layer.routing.expert[0]) for layer in layers))
    assert len(set(drawn)) > 8, "60 passes through two layers, each of 8 experts"
    layers[0].eval()
    assert not torch.equal(layers[0](x.repeat(1, 20, 1)), layers[0](x.repeat(1, 20, 1)))


def test_the_layer_knows_its_sentences():
    MoE(6, 5, 4, router="thor")(torch.randn(7, 6))
    sentences = MoE(6, 5, 4, router="thor", level="sentence")
    sentences(torch.randn(2, 7, 6))
    assert sentences.routing.counts.max() in (7, 14)
    sentences(torch.randn(7, 6))
    assert sentences.routing.counts.max() == 7, "one sentence"
    with pytest.raises(ValueError, match="Thor needs sequence"):
        sentences.router.assign(torch.randn(7, 4))


def test_golden_consistency():
    value = consistency_loss(LOGITS[:1], LOGITS[1:2])
    assert value.item() == pytest.approx(0.117930, abs=1e-6)


def test_consistency_is_the_mean_symmetric_divergence_of_real_tokens():
    one, other = torch.randn(2, 3, 5, 7, dtype=torch.float64) * 2
    mask = torch.rand(3, 5) < 0.6
    mask[0, 0] = True
    p, q = one.log_softmax(-1)[mask], other.log_softmax(-1)[mask]
    both = [F.kl_div(a, b, log_target=True, reduction="sum") for a, b in ((p, q), (q, p))]
    poisoned = torch.where(mask[..., None], one, torch.nan)
    for first in (one, poisoned):
        assert torch.isclose(consistency_loss(first, other, mask), sum(both) / 2 / mask.sum(), rtol=1e-10)
    assert torch.isclose(consistency_loss(other, one), consistency_loss(one, other), rtol=1e-10)
    assert consistency_loss(one, one + torch.randn(3, 5, 1)).abs() < 1e-12, "a shift of the logits is no disagreement"
    assert consistency_loss(one, other) > 0
    assert consistency_loss(one, other, torch.zeros(3, 5, dtype=torch.bool)) == 0


def test_consistency_has_right_gradients_for_both_passes():
    pair = [torch.randn(4, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda p, q: consistency_loss(p, q, torch.tensor([1, 0, 1, 1]).bool()), pair)


def test_consistency_is_finite_where_probabilities_underflow():
    """The logarithm of a softmax in float32 is -inf here, and the reference code's loss not a number."""
    one = torch.tensor([[0.0, 500.0, -300.0, -torch.inf]], requires_grad=True)
    other = torch.tensor([[400.0, 0.0, -300.0, -torch.inf]], requires_grad=True)
    for dtype in (torch.float32, torch.bfloat16):
        loss = consistency_loss(one.to(dtype), other.to(dtype))
        assert loss.dtype == torch.float32 and loss.item() == pytest.approx(450, rel=1e-2)
        for grad in torch.autograd.grad(loss, (one, other)):
            assert grad.isfinite().all()


def _mean_disagreement(layer, head, x):
    """The mean consistency loss over all ordered pairs of experts, an expert with itself included."""
    outs = []
    for expert in range(layer.num_experts):
        one = Routing.from_topk(torch.full((len(x), 1), expert), torch.ones(len(x), 1), layer.num_experts)
        outs.append(head(x + layer.experts(x, one)))
    return torch.stack([consistency_loss(p, q) for p in outs for q in outs]).mean()


def test_the_consistency_of_two_passes_is_the_disagreement_of_experts():
    """Over all draws of two passes, its gradient is that of the mean disagreement: along it, experts agree more."""
    x = torch.randn(16, 8)
    layer, head = MoE(8, 16, 3, router="thor", activation="relu").train(), torch.nn.Linear(8, 5)
    parameters = [*layer.experts.parameters(), *head.parameters()]
    found = {}
    while len(found) < layer.num_experts**2:
        passes, drawn = [], []
        for _ in range(2):
            passes.append(head(x + layer(x)))
            drawn.append(int(layer.routing.expert[0]))
        found[tuple(drawn)] = torch.autograd.grad(consistency_loss(*passes), parameters, materialize_grads=True)
    expected = torch.autograd.grad(_mean_disagreement(layer, head, x), parameters)
    for gradients, right in zip(zip(*found.values(), strict=True), expected, strict=True):
        assert torch.allclose(torch.stack(gradients).mean(0), right, atol=1e-6)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"level": "document"}, "choose from batch, sentence, token"),
        ({"eval_level": "document"}, "choose from batch, sentence, token"),
        ({"capacity_factor": 1.0}, "a capacity would drop it"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        create("thor", 6, 4, **options)
