"""What came after the review: null experts, cosine, top-p, ReLU, DeepSeek, forced and uniform routings."""

import pytest
import torch
from torch import nn

from shunter import MoE
from shunter.context import Context
from shunter.routers.registry import create

from . import contract


def _sequences(tokens):
    return Context(sequence=torch.arange(tokens) // 4)


def _experts(tokens):
    rows = [torch.randperm(contract.EXPERTS)[:3] for _ in range(tokens)]
    experts = torch.stack(rows) if rows else torch.zeros(0, 3, dtype=torch.int64)
    return Context(experts=experts.masked_fill(torch.rand(experts.shape) < 0.2, -1))


SORTS = [
    ("null_experts", {"num_null": 3}, contract.plain),
    ("null_experts", {"num_null": 2, "identity": False, "top_k": 3, "selection_bias": True}, contract.plain),
    ("cosine", {"z_loss": 0.1}, contract.plain),
    ("cosine", {"top_k": 2, "projection_dim": 3}, contract.plain),
    ("top_p", {}, contract.plain),
    ("top_p", {"threshold": 0.8, "max_experts": 3}, contract.plain),
    ("relu", {"sparsity_loss": 0.1}, contract.plain),
    ("relu", {"balance": False, "load_balancing_loss": 0.1}, contract.plain),
    ("deepseek", {"top_k": 3, "expert_groups": 4, "top_groups": 2}, _sequences),
    ("forced", {}, _experts),
    ("uniform", {"top_k": 3}, contract.plain),
]


@pytest.mark.parametrize("check", contract.CHECKS)
@pytest.mark.parametrize("name, options, context", SORTS)
def test_contract(name, options, context, check):
    check(name, options, context)


def test_null_choices_weigh_the_token_itself():
    layer = MoE(6, 8, 4, "null_experts", top_k=2, num_null=3, activation="relu").double()
    x = torch.randn(20, 6, dtype=torch.float64)
    with torch.no_grad():
        layer.router.weight /= layer.router.weight.norm(dim=1, keepdim=True)
        x[0] = layer.router.weight[4]  # of rows of one length the nearest is itself: a null choice
    logits = layer.router.score(x)
    weight, index = logits.softmax(-1).topk(2)
    weight = weight / weight.sum(-1, keepdim=True)
    expected = torch.zeros_like(x)
    for t in range(20):
        for w, e in zip(weight[t], index[t].tolist(), strict=True):
            if e >= 4:
                expected[t] += w * x[t]
            else:
                weights = layer.experts.weights
                expected[t] += w * (weights.down[e] @ (weights.up[e] @ x[t]).relu())
    assert torch.allclose(layer(x), expected)
    assert (index >= 4).any() and layer.routing.num_experts == 4
    zero = MoE(6, 8, 4, "null_experts", top_k=2, num_null=3, identity=False)
    with torch.no_grad():
        zero.router.weight[:4] = 0
        zero.router.weight[4:] = 1
    assert not zero(torch.ones(5, 6)).any(), "zero experts add nothing"


def test_null_columns_count_in_the_losses_and_the_bias():
    router = create("null_experts", 6, 4, top_k=1, num_null=2, selection_bias=True, renormalize="no")
    logits = torch.randn(30, 6)
    share = torch.bincount(logits.argmax(1), minlength=6) / 30
    expected = 6 * (share * logits.softmax(-1).mean(0)).sum()
    routing = router.assign(logits)
    assert torch.allclose(router.losses(logits, routing)["load_balancing_loss"] / 0.01, expected)
    router.observe(logits, routing)
    assert torch.equal(router.observed, torch.bincount(logits.argmax(1), minlength=6).float())
    router.update()
    assert router.selection_bias.shape == (6,)


@pytest.mark.parametrize("formula", ["review", "deepspeed"])
def test_null_choices_cost_nothing(formula):
    """What a token costs counts the experts that compute; an even share of E + Z columns is what a slot is of."""
    options = {"capacity_factor": 1.0, "capacity_formula": formula}
    layer = MoE(6, 8, 4, "null_experts", top_k=3, num_null=8, num_shared_experts=1, **options).train()
    assert layer.router.experts_per_token == pytest.approx(3 * 4 / 12), "before the first step an even share"
    assert layer.router.capacity(120) == {"review": 10, "deepspeed": 30}[formula]
    mask = torch.rand(5, 20) < 0.7
    mask[0, 0] = True
    for _ in range(2):
        x = torch.randn(5, 20, 6)
        layer(x, mask=mask)
    logits = layer.router.score(x[mask])
    index = logits.topk(3).indices
    layer.router.uses.zero_()
    layer(x, mask=mask)
    layer.router.update()
    computed = float((index < 4).sum()) / int(mask.sum())
    assert layer.router.experts_per_token == pytest.approx(computed)
    one = 2 * 3 * 6 * 8  # FLOPs of a token in one expert
    assert layer.flops_per_token(20)["experts"] == pytest.approx(one * (computed + 1))
    everything = sum(p.numel() for p in layer.experts.parameters())
    assert layer.inactive_parameters(20) == pytest.approx(everything * (1 - computed / 4))
    layer.router.update()
    assert layer.router.experts_per_token == pytest.approx(computed), "nothing was seen"


def test_cosine_ignores_lengths_and_learns_its_temperature():
    router = create("cosine", 6, 4)
    x = torch.randn(10, 6)
    assert torch.allclose(router.score(x), router.score(7 * x), atol=1e-4)
    before = router.score(x)
    with torch.no_grad():
        router.weight.mul_(3)
    assert torch.allclose(router.score(x), before, atol=1e-4)
    assert before.abs().max() <= 1 / 0.07 + 1e-3
    with torch.no_grad():
        router.log_temperature.fill_(-100.0)
    assert router.score(x).abs().max() <= 1 / 0.01 + 1e-3, "the temperature has a floor"
    router.score(x).square().sum().backward()
    assert router.projection.grad.abs().sum() > 0


@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.9, 1.0])
def test_top_p_takes_the_fewest_experts_that_reach_p(threshold):
    router = create("top_p", 6, 8, threshold=threshold)
    logits = 2 * torch.randn(60, 8, dtype=torch.float64)
    matrix = router.assign(logits).dense()
    probs = logits.softmax(-1)
    assert torch.equal(matrix, torch.where(matrix > 0, probs, 0)), "the weights are the probabilities"
    total, fewest = matrix.sum(1), torch.where(matrix > 0, matrix, torch.inf).amin(1)
    assert (total >= threshold - 1e-12).all()
    assert (total - fewest < threshold + 1e-12).all(), "without its least expert a token falls short"
    assert (fewest >= torch.where(matrix > 0, 0, probs).amax(1)).all(), "the best are taken"


@pytest.mark.parametrize("options", [{}, {"threshold": 0.7, "init_scale": 1.0}, {"max_experts": 3}, {"threshold": 1.0}])
@pytest.mark.parametrize("experts", [8, 24, 64])
def test_what_top_p_will_take_is_known_before(experts, options):
    """But for the last expert, which a token takes whole or not; the mean of the draws is within a hundredth or two."""
    routers = [create("top_p", 128, experts, **options) for _ in range(20)]
    taken = sum(r.assign(r.score(torch.randn(100, 128))).token.numel() for r in routers) / 2000
    assert abs(routers[0].experts_per_token - taken) < 1 + 0.05 * taken


def test_unsure_tokens_take_more_experts():
    router = create("top_p", 6, 8, threshold=0.5)
    sure, unsure = torch.zeros(1, 8), torch.zeros(1, 8)
    sure[0, 3] = 5.0
    assert [router.assign(h).token.numel() for h in (sure, unsure)] == [1, 4]


def test_relu_steers_to_its_target():
    router = create("relu", 8, 8, target_experts=2.0, sparsity_loss=1e-3, growth=1.03)
    optimizer = torch.optim.Adam(router.parameters(), lr=0.01)
    assert router.experts_per_token == 2, "before the first step it is the target"
    history = []
    for _ in range(800):
        x = torch.randn(256, 8)
        x[:, 0] = 2  # a linear map cannot be sparse on inputs that are symmetric about 0
        logits = router.score(x)
        routing = router.assign(logits)
        worth = (routing.weight + 0.01).sqrt().sum() / 256
        optimizer.zero_grad()
        (sum(router.losses(logits, routing).values()) - worth).backward()
        optimizer.step()
        router.observe(logits, routing)
        router.update()
        history.append(router.experts_per_token)
    assert max(history) > 3
    assert 0.8 < sum(history[-400:]) / 400 < 3.2


def test_the_relu_coefficient_follows_the_load_once_a_step():
    router = create("relu", 6, 4, target_experts=1.0)
    start = float(router.coefficient)
    dense, empty = torch.ones(10, 4), -torch.ones(10, 4)
    router.observe(dense, router.assign(dense))
    router.observe(dense, router.assign(dense))
    router.update()
    assert float(router.coefficient) == pytest.approx(start * 1.2)
    router.update()
    assert float(router.coefficient) == pytest.approx(start * 1.2), "nothing was seen"
    router.observe(empty, router.assign(empty))
    router.update()
    assert float(router.coefficient) == pytest.approx(start)
    assert router.experts_per_token == 0


def test_the_relu_loss_weighs_experts_by_their_load():
    logits = torch.tensor([[2.0, -1.0, 1.0], [3.0, -1.0, -2.0]], dtype=torch.float64)
    router = create("relu", 6, 3, target_experts=1.0, sparsity_loss=0.5).double()
    found = router.losses(logits, router.assign(logits))["sparsity_loss"]
    # Loads 2, 0, 1 of 2 tokens, times E / k = 3; mean weights 2.5, 0, 0.5.
    assert float(found) == pytest.approx(0.5 * 3 * (2.5 * 2 / 2 + 0.5 * 1 / 2))


def test_deepseek_balances_within_sequences_and_by_its_bias():
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
    skewed = torch.randn(400, 4) + torch.tensor([2.0, 0.0, 0.0, -2.0])
    start = router.assign(skewed, _sequences(400)).counts.max()
    for _ in range(600):
        router.observe(skewed, router.assign(skewed, _sequences(400)), _sequences(400))
        router.update()
    assert router.assign(skewed, _sequences(400)).counts.max() < 120 < start


def test_deepseeks_sequence_loss_counts_the_bare_scores():
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


def test_forced_experts_share_a_token_equally():
    layer = MoE(6, 8, 4, "forced")
    x = torch.randn(2, 2, 6)
    layer(x, experts=torch.tensor([[[0, 3], [1, -1]], [[-1, -1], [2, 0]]]))
    expected = [[0.5, 0, 0, 0.5], [0, 1, 0, 0], [0, 0, 0, 0], [0.5, 0, 0.5, 0]]
    assert layer.routing.dense().tolist() == expected
    with pytest.raises(ValueError, match="needs experts"):
        layer(x)


def test_uniform_is_balanced_among_real_tokens():
    router = create("uniform", 6, 8, top_k=3)
    mask = torch.rand(64) < 0.6
    counts = router.assign(torch.zeros(64, 8), Context(mask=mask)).counts
    assert counts.sum() == 3 * mask.sum() and counts.max() - counts.min() <= 1
    assert not list(router.parameters())


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("null_experts", {"num_null": 0}, "at least 1"),
        ("null_experts", {"renormalize": "after_drop"}, "leave the null choices out"),
        ("cosine", {"temperature": 0.001}, "min_temperature"),
        ("cosine", {"router_bias": True}, "no router_bias"),
        ("cosine", {"projection_dim": 0}, "at least 1"),
        ("top_p", {"threshold": 0.0}, r"in \(0, 1\]"),
        ("top_p", {"max_experts": 9}, "between 1 and num_experts"),
        ("relu", {"target_experts": 9}, "at most num_experts"),
        ("relu", {"growth": 1.0}, "above 1"),
        ("uniform", {"top_k": 9}, "between 1 and num_experts"),
    ],
)
def test_errors(name, options, message):
    with pytest.raises(ValueError, match=message):
        create(name, 6, 8, **options)


def test_casting_keeps_the_state_exact():
    router = create("relu", 6, 8)
    assert nn.Module.to(router, torch.bfloat16).coefficient.dtype == torch.float32
