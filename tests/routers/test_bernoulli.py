"""Conditional computation: a coin for each expert and token, and what keeps the coins near their rate."""

import itertools

import pytest
import torch
from torch.distributions import Bernoulli as Coin

from shunter import MoE, Routing, aux_loss, give_reward
from shunter.context import Context
from shunter.routers.policy_gradient import Decision
from shunter.routers.registry import create

from ..helpers import deviation
from . import contract

QUIET = {"batch_rate_loss": 0.0, "token_rate_loss": 0.0, "variance_bonus": 0.0, "token_variance_bonus": 0.0}
DRAWN = ("evaluation_is_deterministic", "ties_go_to_the_lowest_expert", "state_is_saved_and_exact")


@pytest.mark.parametrize("check", contract.CHECKS)
@pytest.mark.parametrize(
    "options",
    [{}, {"evaluation": "threshold", "baseline": "head", "entropy_bonus": 0.1, "load_balancing_loss": 0.1},
     {"evaluation": "threshold", "capacity_factor": 1.0, "activation_rate": 0.6}],
)  # fmt: skip
def test_contract(options, check):
    if "evaluation" not in options and check.__name__ in DRAWN:
        pytest.skip("draws in evaluation too")
    check("bernoulli", options, contract.plain)


def _decide(router, x, on):
    routing = Routing.from_dense(torch.ones_like(on, dtype=x.dtype), mask=on)
    return Decision(x, router.score(x), routing, Context())


@pytest.mark.parametrize("baseline", ["none", "head"])
def test_the_estimator_is_unbiased_by_enumeration(baseline):
    """Over all sets of experts of two tokens it is the gradient of the expected reward, which a whole set earns."""
    router = create("bernoulli", 4, 3, baseline=baseline, **QUIET).double()
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 4, dtype=torch.float64)
    reward = torch.randn(2, 2, 2, 2, dtype=torch.float64)
    on = router.score(x).sigmoid()
    sets = list(itertools.product((0, 1), repeat=3))
    value = sum(
        (torch.tensor(s) * on + (1 - torch.tensor(s)) * (1 - on)).prod(-1) * reward[(slice(None), *s)] for s in sets
    ).mean()
    (exact,) = torch.autograd.grad(value, router.weight)
    mean = torch.zeros_like(exact)
    for chosen in itertools.product(sets, repeat=2):
        taken = torch.tensor(chosen).bool()
        chance = torch.where(taken, on, 1 - on).detach().prod()
        earned = torch.stack([reward[(t, *chosen[t])] for t in range(2)])
        loss = router.reward_losses(_decide(router, x, taken), earned)["policy_loss"]
        mean -= chance * torch.autograd.grad(loss, router.weight)[0]
    assert torch.allclose(mean, exact, atol=1e-9)


def test_draws_are_independent_coins():
    router = create("bernoulli", 5, 3)
    logits = torch.randn(1, 3)
    n = 40_000
    on = logits.sigmoid()[0]
    for training in (True, False):
        sets = router.train(training).assign(logits.expand(n, 3)).dense() @ torch.tensor([4.0, 2.0, 1.0])
        for number, chosen in enumerate(itertools.product((0, 1), repeat=3)):
            chance = torch.where(torch.tensor(chosen).bool(), on, 1 - on).prod()
            assert ((sets == number).float().mean() - chance).abs() < deviation(n, 16)


def test_the_threshold_takes_what_is_more_likely_on():
    router = create("bernoulli", 5, 3, evaluation="threshold").eval()
    assert router.assign(torch.tensor([[0.1, -0.1, 3.0], [-1.0, -2.0, 0.0]])).dense().tolist() == [[1, 0, 1], [0, 0, 0]]


def test_log_probability_and_entropy_are_those_of_the_coins():
    router = create("bernoulli", 6, 5, capacity_factor=0.5)
    logits = torch.randn(9, 5, dtype=torch.float64)
    logits[:, 0] = 40.0  # whom all tokens take, but for a chance of 4e-17
    routing = router.train().assign(logits)
    asked = routing.dense()
    assert routing.dropped.token.numel() > 0
    asked[routing.dropped.token, routing.dropped.expert] = 1
    coin = Coin(logits=logits)
    assert torch.allclose(router.log_prob(logits, routing), coin.log_prob(asked).sum(-1), atol=1e-6)
    assert torch.allclose(router.entropy(logits), coin.entropy().sum(-1), atol=1e-5)


def test_penalties_written_out():
    options = {"batch_rate_loss": 2.0, "token_rate_loss": 3.0, "variance_bonus": 5.0, "token_variance_bonus": 7.0}
    router = create("bernoulli", 6, 4, activation_rate=0.3, **options)
    logits = torch.randn(10, 4, dtype=torch.float64)
    mask = torch.rand(10) < 0.7
    mask[0] = True
    context = Context(mask=mask)
    losses = router.losses(torch.where(mask[:, None], logits, torch.nan), router.assign(logits, context), context)
    rows = [[1 / (1 + 2.718281828459045 ** -float(h)) for h in row] for row in logits[mask]]
    columns = list(zip(*rows, strict=True))
    means = [sum(c) / len(c) for c in columns]
    batch = sum((m - 0.3) ** 2 for m in means)
    token = sum((sum(r) / 4 - 0.3) ** 2 for r in rows) / len(rows)
    spread = sum(sum((v - m) ** 2 for v in c) / len(c) for c, m in zip(columns, means, strict=True))
    within = sum(sum((v - sum(r) / 4) ** 2 for v in r) / 4 for r in rows) / len(rows)
    expected = {"batch_rate_loss": 2 * batch, "token_rate_loss": 3 * token, "variance_bonus": -5 * spread}
    expected["token_variance_bonus"] = -7 * within
    assert set(losses) == set(expected)
    for key, value in expected.items():
        assert losses[key].item() == pytest.approx(value, rel=1e-4), key


@pytest.mark.parametrize("rate", [0.1, 0.25, 0.7])
def test_the_policy_starts_at_its_rate(rate):
    """The bias is the logit of the rate; the weights' small start moves the mean over tokens little."""
    router = create("bernoulli", 16, 24, activation_rate=rate)
    on = router.score(torch.zeros(1, 16)).sigmoid()
    assert torch.allclose(on, torch.full_like(on, rate))
    tokens = 4000
    x = torch.randn(tokens, 16)
    taken = router.train().assign(router.score(x)).demand.sum().item() / tokens / 24
    assert abs(taken - router.score(x).sigmoid().mean().item()) < deviation(24 * tokens)
    assert taken == pytest.approx(rate, abs=0.03)
    assert sum(c != 0 for key, c in router.coefficients.items() if key.endswith(("rate_loss", "variance_bonus"))) == 4


def test_the_penalties_lead_to_the_rate_and_to_tokens_that_differ():
    moe = MoE(8, 4, 8, router="bernoulli", policy_loss=0.0, activation_rate=0.25)
    optimizer = torch.optim.Adam(moe.router.parameters(), lr=0.05)
    x = torch.randn(256, 8)
    for _ in range(200):
        moe(x)
        give_reward(moe, torch.zeros(256))
        optimizer.zero_grad()
        aux_loss(moe).backward()
        optimizer.step()
    on = moe.router.score(x).sigmoid()
    assert (on.mean(0) - 0.25).abs().max() < 0.1 and on.var(0).min() > 0.05
    assert moe.router.experts_per_token == 2


def test_a_bandit_learns_which_experts_to_turn_on():
    """Reward: the number of experts that are as the sign of a hidden linear map asks."""
    router = create("bernoulli", 6, 4, baseline="head", **QUIET)
    teacher = torch.randn(4, 6)
    optimizer = torch.optim.Adam(router.parameters(), lr=0.05)
    for _ in range(300):
        x = torch.randn(512, 6)
        logits = router.score(x)
        routing = router.assign(logits)
        reward = ((routing.dense() > 0) == (x @ teacher.T > 0)).float().sum(-1)
        losses = router.reward_losses(Decision(x, logits, routing, Context()), reward)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    x = torch.randn(4000, 6)
    asked = x @ torch.nn.functional.normalize(teacher, dim=1).T
    clear = asked.abs() > 0.5  # by a margin, which what is learned from draws keeps
    assert ((router.score(x) > 0) == (asked > 0))[clear].float().mean() > 0.95


@pytest.mark.parametrize(
    "options, message",
    [({"activation_rate": 1.0}, "between 0 and 1"), ({"evaluation": "mean"}, "choose from sample, threshold")],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        create("bernoulli", 6, 4, **options)
