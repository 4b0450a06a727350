"""Asynchronous training: one worker is synchronous to the bit, several train, and a set delay does what it says."""

import copy

import pytest
import torch
from torch import nn

from shunter import MoE, aux_loss
from shunter.errors import UserError
from shunter.training import hogwild as hogwild_module
from shunter.training.hogwild import delayed, hogwild

from ..helpers import TIME_LIMIT


@pytest.fixture(autouse=True)
def time_limit(monkeypatch):
    monkeypatch.setattr("shunter.training.hogwild._TIME_LIMIT", TIME_LIMIT)


def task(router):
    model = nn.Sequential(nn.Linear(6, 8), MoE(8, 12, 4, router), nn.Linear(8, 3))
    batches = [(torch.randn(16, 6), torch.randint(3, (16,))) for _ in range(12)]
    return model, batches


def loss(model, batch):
    x, target = batch
    return nn.functional.cross_entropy(model(x), target) + aux_loss(model)


def by_hand(model, batches, rate):
    """The same loop by torch's optimizer."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    for batch in batches:
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()


@pytest.mark.parametrize("router", ["switch", "topk", "expert_choice"])
def test_one_worker_is_synchronous_to_the_bit(router):
    model, batches = task(router)
    with torch.random.fork_rng():
        others = [copy.deepcopy(model) for _ in range(2)]
    state = torch.get_rng_state()
    staleness = hogwild(model, loss, batches, workers=1, learning_rate=0.3)
    torch.set_rng_state(state)
    delayed(others[0], loss, batches, staleness=0, learning_rate=0.3)
    torch.set_rng_state(state)
    by_hand(others[1], batches, 0.3)
    assert staleness == [0] * len(batches)
    for other in others:
        for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(ours, theirs)


def test_workers_of_different_experts_do_not_disturb_each_other_and_what_they_share_moves():
    """Whatever the order in which they come: an expert's updates are those of its worker alone, to the bit.

    Of the sum of a bias the gradient is 1. Each worker writes what it read less the rate, so that whoever writes last,
    and whatever is lost on the way, the bias falls by one update at least, and by all of them at most.
    """

    class Parted(nn.Module):
        def __init__(self):
            super().__init__()
            self.moe, self.bias = MoE(6, 8, 2, "domain"), nn.Parameter(torch.zeros(3))

        def loss(self, batch):
            x, expert = batch
            return (self.moe(x, domain=torch.full((len(x),), expert)) - x).square().mean() + self.bias.sum()

    model = Parted()
    other = copy.deepcopy(model)
    batches = [(torch.randn(16, 6), place % 2) for place in range(40)]
    staleness = hogwild(model, Parted.loss, batches, workers=2, learning_rate=0.25)
    delayed(other, Parted.loss, batches, learning_rate=0.25)
    for ours, theirs in zip(model.moe.parameters(), other.moe.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert bool(((model.bias <= -0.25) & (model.bias >= -0.25 * 40)).all())
    assert len(staleness) == 40 and all(0 <= updates <= 20 for updates in staleness)


def test_a_delay_is_the_recurrence_that_it_says():
    """Of the square of w the gradient is w: w_{t+1} = w_t - lr w_{t-s}."""
    for staleness in (0, 1, 3):
        model = nn.Linear(1, 1, bias=False).double()
        w = [model.weight.item()]
        delayed(model, lambda m, _: m.weight.square().sum() / 2, [None] * 20, staleness=staleness, learning_rate=0.2)
        for t in range(20):
            w.append(w[t] - 0.2 * w[max(0, t - staleness)])
        assert model.weight.item() == pytest.approx(w[-1])


def test_experts_without_tokens_are_not_written():
    """Another process may be writing them: rewriting what was read would undo that."""
    model = MoE(4, 6, 8, "topk", top_k=2)
    x = torch.randn(2, 4)
    gradients = hogwild_module._gradients(model, lambda m, x: m(x).square().sum(), x)
    touched = int((model.routing.counts > 0).sum())
    assert 2 <= touched < 8
    before = {name: parameter._version for name, parameter in model.named_parameters()}
    hogwild_module._update(model, gradients, 0.1)
    written = {name: parameter._version - before[name] for name, parameter in model.named_parameters()}
    assert written == {"router.weight": 1, "experts.gate_up_proj": touched, "experts.down_proj": touched}


@pytest.mark.parametrize("arguments", [{"workers": 0}, {"workers": -1}])
def test_what_cannot_be_is_refused(arguments):
    with pytest.raises(UserError, match="at least 1"):
        hogwild(nn.Linear(1, 1), loss, [], **arguments)
    with pytest.raises(UserError, match="negative"):
        delayed(nn.Linear(1, 1), loss, [], staleness=-1)


def test_a_worker_that_fails_is_an_error():
    with pytest.raises(RuntimeError, match="a worker ended"):
        hogwild(nn.Linear(1, 1), lambda m, _: m(torch.zeros(3)), [0], workers=1)
