"""Routers that learn by reward: the estimator against exact gradients, what it moves, and what it finds."""

import copy
import itertools

import pytest
import torch

from shunter import MoE, Routing, aux_loss, give_reward, moe_layers
from shunter.context import Context
from shunter.routers.policy_gradient import Decision
from shunter.routers.registry import create

from ..helpers import deviation
from . import contract

SORTS = [
    ("reinforce", {}),
    ("reinforce", {"baseline": "parameter", "capacity_factor": 1.0}),
    ("reinforce", {"baseline": "none", "load_balancing_loss": 0.0}),
]


@pytest.mark.parametrize("check", contract.CHECKS)
@pytest.mark.parametrize("name, options", SORTS)
def test_contract(name, options, check):
    check(name, options, contract.plain)


def _decide(router, x, actions):
    """The decision of taking given experts (T,)."""
    routing = Routing.from_topk(actions[:, None], torch.ones(len(actions), 1, dtype=x.dtype), router.num_experts)
    return Decision(x, router.score(x), routing, Context())


def _policy_gradient(router, x, actions, cost):
    """The gradient of the policy loss in the router's weights, where each action has its reward."""
    reward = -cost.gather(1, actions[:, None])[:, 0]
    loss = router.reward_losses(_decide(router, x, actions), reward)["policy_loss"]
    return torch.autograd.grad(loss, router.weight)[0]


@pytest.mark.parametrize("baseline", ["none", "parameter", "head"])
def test_the_estimator_is_unbiased_by_enumeration(baseline):
    """Over all actions of three tokens, weighted by their probabilities, it is the gradient of the expected cost."""
    tokens, experts, dim = 3, 4, 5
    router = create("reinforce", dim, experts, baseline=baseline, load_balancing_loss=0.0).double()
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(tokens, dim, dtype=torch.float64)
    cost = torch.randn(tokens, experts, dtype=torch.float64)
    probs = router.score(x).softmax(-1)
    (exact,) = torch.autograd.grad((probs * cost).sum(-1).mean(), router.weight)
    mean = torch.zeros_like(exact)
    for actions in itertools.product(range(experts), repeat=tokens):
        actions = torch.tensor(actions)
        chance = probs.detach().gather(1, actions[:, None]).prod()
        mean += chance * _policy_gradient(router, x, actions, cost)
    assert (mean - exact).abs().max() < 1e-6 * exact.abs().max()


def test_draws_are_from_the_policy_and_evaluation_takes_the_best():
    router = create("reinforce", 5, 4)
    logits = torch.randn(1, 4)
    n = 40_000
    counts = router.train().assign(logits.expand(n, 4)).counts
    probs = logits.softmax(-1)[0]
    assert (counts / n - probs).abs().max() < deviation(n, 4)
    assert int(router.eval().assign(logits).expert) == int(logits.argmax())


def _spread(router, x, cost):
    """The mean and the total variance of the estimator over the actions of one token, exactly."""
    probs = router.score(x).softmax(-1)[0].detach()
    grads = [_policy_gradient(router, x, torch.tensor([e]), cost) for e in range(len(probs))]
    mean = sum(p * g for p, g in zip(probs, grads, strict=True))
    return mean, sum(p * (g - mean).square().sum() for p, g in zip(probs, grads, strict=True))


def test_a_baseline_leaves_the_mean_and_lowers_the_variance():
    router = create("reinforce", 5, 4, baseline="parameter").double()
    torch.nn.init.normal_(router.weight)
    x = torch.randn(1, 5, dtype=torch.float64)
    cost = 7 + torch.rand(1, 4, dtype=torch.float64)  # as cross-entropies are: far from zero
    without, noisy = _spread(router, x, cost)
    expected = (router.score(x).softmax(-1) * cost).sum().detach()
    with torch.no_grad():
        router.value_bias.fill_(-expected)
    with_it, quiet = _spread(router, x, cost)
    assert torch.allclose(with_it, without, atol=1e-12)
    assert quiet < noisy / 10


@pytest.mark.parametrize("baseline", ["parameter", "head"])
def test_the_baseline_regresses_on_the_reward_and_moves_nothing_else(baseline):
    router = create("reinforce", 5, 4, baseline=baseline, baseline_loss=0.5, policy_loss=0.0, entropy_bonus=0.0)
    x = torch.randn(200, 5, requires_grad=True)
    reward = x.detach() @ torch.randn(5) - 3 if baseline == "head" else torch.randn(200) - 3
    optimizer = torch.optim.SGD(router.parameters(), lr=0.3)
    before = router.weight.detach().clone()
    for _ in range(400):
        decision = _decide(router, x, torch.randint(4, (200,)))
        losses = router.reward_losses(decision, reward)
        assert list(losses) == ["baseline_loss"]
        optimizer.zero_grad()
        losses["baseline_loss"].backward()
        optimizer.step()
    expected = reward if baseline == "head" else reward.mean().expand(200)
    assert torch.allclose(router.value(x), expected, atol=1e-3)
    assert torch.equal(router.weight, before) and x.grad is None


@pytest.mark.parametrize("baseline", ["parameter", "head"])
def test_the_policy_loss_does_not_move_the_baseline(baseline):
    router = create("reinforce", 5, 4, baseline=baseline)
    loss = router.reward_losses(_decide(router, torch.randn(9, 5), torch.randint(4, (9,))), torch.randn(9))
    loss["policy_loss"].backward()
    assert router.value_bias.grad is None and router.weight.grad.abs().sum() > 0


def test_a_contextual_bandit_finds_the_best_expert():
    """Ascent along the expected estimate, from a policy without preference: every action counts by its probability."""
    situations, experts = 8, 4
    router = create("reinforce", situations, experts, baseline="none", entropy_bonus=0.0, load_balancing_loss=0.0)
    torch.nn.init.zeros_(router.weight)
    x, best = torch.eye(situations), torch.randint(experts, (situations,))
    everywhere, actions = x.repeat_interleave(experts, 0), torch.arange(experts).repeat(situations)
    right = (actions == best.repeat_interleave(experts)).float()
    optimizer = torch.optim.SGD(router.parameters(), lr=situations * experts * 0.5)
    for _ in range(300):
        decision = _decide(router, everywhere, actions)
        chance = decision.logits.detach().softmax(-1).gather(1, actions[:, None])[:, 0]
        loss = sum(router.reward_losses(decision, chance * right).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    probs = router.eval().score(x).softmax(-1)
    assert (probs.gather(1, best[:, None]) > 0.95).all()
    assert torch.equal(router.assign(router.score(x)).dense().argmax(-1), best)


@pytest.mark.parametrize("name, options", SORTS)
def test_weights_are_one_and_the_loss_of_the_model_does_not_reach_the_router(name, options):
    for training in (True, False):
        moe = MoE(6, 4, 4, router=name, **options).train(training)
        x = torch.randn(30, 6)
        out = moe(x)
        assert (moe.routing.weight == 1).all()
        dense = torch.zeros_like(out)
        for t, e in zip(moe.routing.token.tolist(), moe.routing.expert.tolist(), strict=True):
            one = Routing.from_topk(torch.tensor([[e]]), torch.ones(1, 1), 4)
            dense[t] += moe.experts(x[t : t + 1], one)[0]
        assert torch.allclose(out, dense, atol=1e-5)
        out.square().sum().backward()
        assert all(p.grad is None for p in moe.router.parameters())


def test_an_expert_learns_from_its_own_tokens_alone():
    moe = MoE(6, 4, 4, router="reinforce").double()
    x = torch.randn(20, 6, dtype=torch.float64)
    out = moe(x)
    expert = moe.routing.dense().argmax(-1)
    chosen = int(expert[0])
    out[expert == chosen].square().sum().backward()
    for parameter in moe.experts.parameters():
        norms = parameter.grad.flatten(1).norm(dim=1)
        assert norms[chosen] > 0
        assert (norms[torch.arange(4) != chosen] == 0).all()


def test_dropped_actions_were_taken_too():
    router = create("reinforce", 6, 4, capacity_factor=0.25).train()
    logits = torch.randn(16, 4)
    routing = router.assign(logits)
    assert routing.dropped.token.numel() > 0
    asked = torch.zeros(16, dtype=torch.int64)
    for part in (routing, routing.dropped):
        asked[part.token] = part.expert
    assert torch.allclose(router.log_prob(logits, routing), logits.log_softmax(-1)[torch.arange(16), asked])


def test_entropy_is_of_the_policy():
    router = create("reinforce", 6, 4, entropy_bonus=0.5, load_balancing_loss=0.0)
    logits = torch.randn(9, 4)
    mask = torch.rand(9) < 0.7
    mask[0] = True
    context = Context(mask=mask)
    value = router.losses(logits, router.assign(logits, context), context)["entropy_bonus"]
    expected = torch.distributions.Categorical(logits=logits[mask]).entropy().mean()
    assert torch.allclose(value, -0.5 * expected)


def _two_layers():
    return torch.nn.Sequential(*(MoE(6, 4, 4, router="reinforce", load_balancing_loss=0.0) for _ in range(2)))


@pytest.mark.parametrize("form", ["tokens", "flat", "sequences", "one"])
def test_rewards_of_every_shape_reach_every_layer(form):
    model = _two_layers()
    model(torch.randn(3, 5, 6))
    full = torch.randn(3, 5)
    if form == "sequences":
        full = full[:, :1].expand(3, 5)
    elif form == "one":
        full = full[:1, :1].expand(3, 5)
    given = {"tokens": full, "flat": full.reshape(-1), "sequences": full[:, 0], "one": full[0, 0]}[form]
    decisions = [layer.decision for layer in moe_layers(model).values()]
    give_reward(model, given)
    for layer, decision in zip(moe_layers(model).values(), decisions, strict=True):
        expected = layer.router.reward_losses(decision, full.reshape(-1))
        assert set(expected) == {"policy_loss", "baseline_loss"}
        for key, value in expected.items():
            assert torch.equal(layer.losses[key], value)
    total = sum(value for layer in moe_layers(model).values() for value in layer.losses.values())
    assert torch.allclose(aux_loss(model), total)


def test_padding_and_tokens_without_a_reward_do_not_count():
    model = _two_layers().double()
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    padding = torch.ones(3, 5, dtype=torch.bool)
    padding[1, 3:] = False
    rewarded = torch.rand(3, 5) < 0.7
    rewarded[0, 0] = True
    moe = next(iter(moe_layers(model).values()))
    moe(x, mask=padding)
    decision, reward = moe.decision, torch.randn(3, 5, dtype=torch.float64)
    give_reward(moe, torch.where(rewarded, reward, torch.nan), rewarded)
    real = (padding & rewarded).reshape(-1)
    expected = (-moe.router.log_prob(decision.logits, decision.routing) * reward.reshape(-1))[real].mean()
    assert torch.allclose(moe.losses["policy_loss"], expected)
    aux_loss(moe).backward()
    assert all(p.grad.isfinite().all() for p in moe.router.parameters())


def test_a_reward_that_is_missing_or_does_not_fit_is_an_error():
    model = _two_layers()
    with pytest.raises(RuntimeError, match="no layer awaits a reward"):
        give_reward(model, torch.zeros(3, 5))
    model(torch.randn(3, 5, 6))
    with pytest.raises(RuntimeError, match="learns by reward and has none"):
        aux_loss(model)
    with pytest.raises(ValueError, match=r"reward has shape \(5, 3\); the tokens of a layer are \(3, 5\)"):
        give_reward(model, torch.zeros(5, 3))
    with pytest.raises(ValueError, match=r"mask has shape \(5,\)"):
        give_reward(model, torch.zeros(3, 5), torch.ones(5))
    give_reward(model, torch.zeros(3, 5))
    with pytest.raises(RuntimeError, match="no layer awaits a reward"):
        give_reward(model, torch.zeros(3, 5))
    assert aux_loss(model).requires_grad
    model.eval()(torch.randn(3, 5, 6))
    aux_loss(model)
    with pytest.raises(ValueError, match="baseline 'mean' is unknown"):
        create("reinforce", 6, 4, baseline="mean")
    assert "give_reward" in model[0].explain()


def test_a_layer_that_awaits_its_reward_can_be_copied():
    model = _two_layers()
    model(torch.randn(3, 5, 6))
    assert copy.deepcopy(model)[0].decision is None


def test_checkpointing_changes_no_gradient():
    model = _two_layers().double()
    x = torch.randn(3, 5, 6, dtype=torch.float64)

    def checkpointed():
        y = x
        for layer in model:
            y = torch.utils.checkpoint.checkpoint(layer, y, use_reentrant=False)
        return y

    grads = []
    for forward in (lambda: model(x), checkpointed):
        model.zero_grad()
        out = contract.seeded(forward)
        give_reward(model, -out.detach().square().mean(-1))
        (out.square().mean() + aux_loss(model)).backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for one, other in zip(*grads, strict=True):
        assert torch.allclose(one, other, atol=1e-12)
