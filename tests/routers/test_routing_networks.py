"""Routing networks: an agent for each task, and what it earns for sharing."""

import itertools

import pytest
import torch

from shunter import MoE, Routing, aux_loss, give_reward, moe_layers, update_routers
from shunter.context import Context
from shunter.moe.calls import Call
from shunter.routers.policy_gradient import Decision
from shunter.routers.registry import create

from . import contract

TASKS = 3
SORTS = [
    {},
    {"policy": "linear", "baseline": "head", "entropy_bonus": 0.01, "collaboration": 0.0},
    {"baseline": "parameter", "load_balancing_loss": 0.01, "capacity_factor": 1.0},
    {"learner": "wpl", "entropy_bonus": 0.01},
]


def _tasks(tokens):
    return Context(task=torch.randint(TASKS, (tokens,)))


@pytest.mark.parametrize("check", contract.CHECKS)
@pytest.mark.parametrize("options", SORTS)
def test_contract(options, check):
    if options.get("policy") == "linear" and check is contract.gradients_are_right:
        pytest.skip("no gradient goes through the hidden states on purpose; see below")
    check("routing_networks", {"num_tasks": TASKS, **options}, _tasks)


@pytest.mark.parametrize("policy", ["tabular", "linear"])
def test_a_token_follows_the_agent_of_its_task(policy):
    router = create("routing_networks", 6, 4, num_tasks=TASKS, policy=policy).double()
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    task = torch.randint(TASKS, (9,))
    logits = router.score(x, Context(task=task))
    for t in range(9):
        expected = router.table[task[t]] if policy == "tabular" else router.weight[4 * task[t] : 4 * task[t] + 4] @ x[t]
        assert torch.allclose(logits[t], expected)
    logits.sum().backward()
    assert x.grad is None, "the policy does not train what is below it"
    if policy == "tabular":
        assert torch.allclose(router.table.grad.sum(1), 4.0 * torch.bincount(task, minlength=TASKS).double())


@pytest.mark.parametrize("policy", ["tabular", "linear"])
def test_the_estimator_is_unbiased_by_enumeration(policy):
    """Two layers, two tokens: over all trajectories it is the gradient of the expected return, collaboration included.

    The return of a decision is the final reward and the collaboration rewards from it on, each divided by 2 layers.
    """
    rho = 0.7
    layers = [create("routing_networks", 5, 3, num_tasks=TASKS, policy=policy, collaboration=rho) for _ in range(2)]
    context = Context(task=torch.tensor([0, 2]))
    x = torch.randn(2, 5, dtype=torch.float64)
    for router in layers:
        router.double()
        for parameter in router.parameters():
            torch.nn.init.normal_(parameter)
        router.usage.copy_(torch.rand(3).softmax(0))
    # Each token's final reward depends on the blocks that it took in both layers.
    final = torch.randn(2, 3, 3, dtype=torch.float64)
    probs = [router.score(x, context).softmax(-1) for router in layers]
    joint = probs[0][:, :, None] * probs[1][:, None, :]
    use = [router.usage.double() / 2 * rho for router in layers]
    value = (joint * (final + use[0][:, None] + use[1][None, :])).sum((1, 2)).mean()
    leaves = [p for router in layers for p in router.parameters()]
    exact = torch.autograd.grad(value, leaves)
    mean = [torch.zeros_like(p) for p in leaves]
    for actions in itertools.product(range(3), repeat=4):
        taken = torch.tensor(actions).reshape(2, 2)  # layer, token
        model = torch.nn.ModuleList(MoE(5, 4, 3, router=router) for router in layers)
        for moe, index in zip(model, taken, strict=True):
            routing = Routing.from_topk(index[:, None], torch.ones(2, 1, dtype=torch.float64), 3)
            moe._last = Call({}, Decision(x, moe.router.score(x, context), routing, context))
        chance = torch.stack([p.detach().gather(1, a[:, None]) for p, a in zip(probs, taken, strict=True)]).prod()
        give_reward(model, final[torch.arange(2), taken[0], taken[1]])
        for total, grad in zip(mean, torch.autograd.grad(aux_loss(model), leaves), strict=True):
            total -= chance * grad
    for got, expected in zip(mean, exact, strict=True):
        assert torch.allclose(got, expected, atol=1e-9)


@pytest.mark.parametrize("policy", ["tabular", "linear"])
def test_the_weighted_policy_learner_written_out(policy):
    """Rosenbaum et al., algorithm 2: pi(a) moves by (R - average) (1 - pi(a)), or times pi(a) where R is less."""
    options = {"policy": policy, "learner": "wpl", "collaboration": 0.0, "return_decay": 0.8, "policy_loss": 3.0}
    moe = MoE(5, 4, 3, "routing_networks", num_tasks=TASKS, **options).double()
    router = moe.router
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)
    before = torch.randn(TASKS, 3)
    router.average_return.copy_(before)
    x, task = torch.randn(40, 5, dtype=torch.float64), torch.randint(TASKS, (40,))
    mask, rewarded = torch.rand(40) < 0.8, torch.rand(40) < 0.8
    mask[:2] = rewarded[:2] = True
    moe(x, task=task, mask=mask)
    action = moe.routing.dense().argmax(1)
    reward = torch.randn(40, dtype=torch.float64)
    give_reward(moe, reward, rewarded)
    # The policy as plain probabilities: the loss's slope in each is minus the update of algorithm 2.
    probs = router.score(x, Context(task=task)).softmax(-1).detach().requires_grad_()
    counted = (mask & rewarded).nonzero().flatten().tolist()
    update = torch.zeros_like(probs)
    returns = {}
    for t in counted:
        a, pi = int(action[t]), probs[t, action[t]].item()
        better = float(reward[t]) - float(before[task[t], a])
        update[t, a] = better * (pi if better < 0 else 1 - pi) / len(counted)
        returns.setdefault((int(task[t]), a), []).append(float(reward[t]))
    found = torch.autograd.grad(aux_loss(moe), list(router.parameters()))
    logits = router.score(x, Context(task=task))
    expected = torch.autograd.grad((-3.0 * update * logits.softmax(-1)).sum(), list(router.parameters()))
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other)
    update_routers(moe)
    after = before.clone()
    for (agent, a), values in returns.items():
        after[agent, a] = 0.8 * before[agent, a] + 0.2 * sum(values) / len(values)
    assert torch.allclose(router.average_return, after, atol=1e-5)
    update_routers(moe)
    assert torch.allclose(router.average_return, after, atol=1e-5), "nothing seen, nothing moved"


def test_the_weighted_policy_learner_finds_the_best_block_of_each_task():
    router = create("routing_networks", 4, 4, num_tasks=TASKS, learner="wpl", collaboration=0.0).train()
    best = torch.tensor([2, 0, 3])
    optimizer = torch.optim.Adam(router.parameters(), lr=0.05)
    for _ in range(300):
        context = Context(task=torch.randint(TASKS, (256,)))
        x = torch.randn(256, 4)
        logits = router.score(x, context)
        routing = router.assign(logits, context)
        right = routing.dense().argmax(1) == best[context.task]
        loss = router.reward_losses(Decision(x, logits, routing, context), 2.0 * right - 1)["policy_loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        router.update()
    assert router.table.softmax(-1)[torch.arange(TASKS), best].min() > 0.7


def test_the_collaboration_reward_is_rho_times_the_use_once():
    model = torch.nn.Sequential(*(MoE(6, 4, 4, "routing_networks", num_tasks=1, collaboration=0.5) for _ in range(2)))
    task = torch.zeros(7, dtype=torch.int64)
    x = torch.randn(7, 6)
    for layer in model:
        layer.router.usage.copy_(torch.rand(4).softmax(0))
        x = layer(x, task=task)
    earned = []
    for layer in reversed(model):
        action = layer.routing.dense().argmax(-1)
        earned.insert(0, 0.5 * layer.router.usage[action] / 2)
    expected = [
        layer.router.reward_losses(layer.decision, 1.0 + sum(earned[i:]))["policy_loss"]
        for i, layer in enumerate(model)
    ]
    give_reward(model, torch.ones(7))
    for layer, value in zip(model, expected, strict=True):
        assert torch.allclose(layer.losses["policy_loss"], value)


def test_use_is_a_running_average_over_all_tasks_that_moves_once_a_step():
    moe = MoE(6, 4, 4, router="routing_networks", num_tasks=TASKS, usage_decay=0.75, collaboration=1.0)
    assert moe.router.usage.tolist() == [0.25] * 4
    counts = torch.zeros(4)
    for _ in range(3):  # micro-batches
        mask = torch.rand(20) < 0.8
        moe(torch.randn(20, 6), task=torch.randint(TASKS, (20,)), mask=mask)
        counts += moe.routing.counts
        assert moe.routing.token.numel() == mask.sum() and moe.router.usage.tolist() == [0.25] * 4
    update_routers(moe)
    assert torch.allclose(moe.router.usage, 0.75 * 0.25 + 0.25 * counts / counts.sum())
    kept = moe.router.usage.clone()
    update_routers(moe)
    assert torch.equal(moe.router.usage, kept), "nothing seen, nothing moved"


def _train(collaboration, preference=0.0):
    """Two tasks with opposite targets, and two experts that do one each, x and -x; the reward is minus the loss."""
    moe = MoE(
        4, 8, 2, "routing_networks", num_tasks=2, collaboration=collaboration, usage_decay=0.9,
        baseline="parameter", baseline_loss=1.0, activation="relu",
    )  # fmt: skip
    both = torch.cat([torch.eye(4), -torch.eye(4)])
    with torch.no_grad():
        moe.experts.weights.up.copy_(both)
        moe.experts.weights.down.copy_(torch.stack([both.T, -both.T]))
        moe.router.table[:, 0] += preference
        moe.router.usage.copy_(moe.router.table[0].softmax(0))
    optimizer = torch.optim.Adam(moe.router.parameters(), lr=0.05)
    for _ in range(200):
        x, task = torch.randn(128, 4), torch.randint(2, (128,))
        target = x * (1 - 2 * task)[:, None]
        error = (moe(x, task=task) - target).square().mean(-1)
        give_reward(moe, -error)
        optimizer.zero_grad()
        aux_loss(moe).backward()
        optimizer.step()
        update_routers(moe)
    return moe.eval().router.table.argmax(-1).tolist(), float(error.detach().mean())


def test_tasks_that_disagree_part_and_collaboration_joins_them():
    """The wrong expert costs 4; the one that more tokens take is worth 50 times the difference of the shares."""
    tasks, error = _train(collaboration=0.0, preference=2.0)
    assert tasks == [0, 1] and error < 0.5
    assert _train(collaboration=50.0, preference=2.0)[0] == [0, 0]


def test_every_layer_of_a_model_is_rewarded():
    model = torch.nn.ModuleList(MoE(6, 4, 4, "routing_networks", num_tasks=2) for _ in range(3))
    x = torch.randn(2, 5, 6)
    for layer in model:
        x = layer(x, task=torch.tensor([0, 1]))
    give_reward(model, torch.tensor([1.0, -1.0]))
    aux_loss(model).backward()
    assert all(layer.router.table.grad.abs().sum() > 0 for layer in moe_layers(model).values())


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "needs num_tasks="),
        ({"num_tasks": 2, "policy": "neural"}, "choose from tabular, linear"),
        ({"num_tasks": 2, "collaboration": -1.0}, "collaboration -1.0 must be at least 0"),
        ({"num_tasks": 2, "usage_decay": 1.0}, r"usage_decay 1.0 in \[0, 1\)"),
        ({"num_tasks": 2, "learner": "q"}, "choose from reinforce, wpl"),
        ({"num_tasks": 2, "learner": "wpl", "baseline": "head"}, "leave baseline='head' out"),
        ({"num_tasks": 2, "jitter": 0.1}, "jitter would do nothing"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        create("routing_networks", 6, 4, **options)
    router = create("routing_networks", 6, 4, num_tasks=2)
    with pytest.raises(ValueError, match="task 2 is out of range; ids are 0 to 1"):
        router.score(torch.randn(1, 6), Context(task=torch.tensor([2])))
