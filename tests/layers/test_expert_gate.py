"""Expert Gate on tasks that come in turn, and the proxy that chooses an expert."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from shunter.layers.expert_gate import Autoencoder, ExpertGate, forgetting_loss
from shunter.layers.transfer import choose_expert, nearest_neighbour_accuracy


def tasks(count=3, examples=400, dim=24, rank=4):
    """Features in different subspaces around different means, with labels that each task has its own rule for."""
    for _ in range(count):
        basis, centre, rule = torch.randn(rank, dim), 2 * torch.randn(dim), torch.randn(dim)
        x = torch.randn(examples, rank) @ basis + centre + 0.1 * torch.randn(examples, dim)
        yield x, ((x - centre) @ rule > 0).long()


def test_the_error_is_the_cross_entropy_of_squashed_standard_features():
    autoencoder = Autoencoder(6, 2)
    x = torch.randn(9, 6) * 3 + 1
    autoencoder.fit(x, steps=3)
    mean, deviation = x.numpy().mean(0), x.numpy().std(0)
    for t in range(9):
        z = (x[t].numpy() - mean) / deviation
        w, b = autoencoder.encoder.weight.detach().numpy(), autoencoder.encoder.bias.detach().numpy()
        v, c = autoencoder.decoder.weight.detach().numpy(), autoencoder.decoder.bias.detach().numpy()
        made = 1 / (1 + np.exp(-(v @ np.maximum(w @ z + b, 0) + c)))
        target = 1 / (1 + np.exp(-z))
        error = -(target * np.log(made) + (1 - target) * np.log(1 - made)).sum()
        assert autoencoder(x[t : t + 1]).item() == pytest.approx(error, rel=1e-4)


def test_a_sequence_of_tasks_is_told_apart_and_solved():
    gate, seen = ExpertGate(24, 5), list(tasks())
    for number, (x, y) in enumerate(seen):

        def train(expert, way, parent, x=x, y=y, number=number):
            assert (parent is None) == (way == "scratch") == (number == 0)
            optimizer = torch.optim.Adam(expert.parameters(), 0.05)
            for _ in range(150):
                optimizer.zero_grad()
                nn.functional.cross_entropy(expert(x), y).backward()
                optimizer.step()

        gate.learn(x[:300], lambda: nn.Linear(24, 2), train)
    for number, (x, y) in enumerate(seen):
        held, labels = x[300:], y[300:]
        probs = gate.probs(held)
        assert (probs.argmax(-1) == number).double().mean() > 0.95
        errors = torch.stack([autoencoder(held) for autoencoder in gate.autoencoders]).double()
        shifted = torch.exp((errors.amin(0) - errors) / 2)
        torch.testing.assert_close(probs.double(), (shifted / shifted.sum(0)).T, rtol=1e-3, atol=1e-5)
        assert (gate(held).argmax(-1) == labels).double().mean() > 0.9
    mixed = torch.cat([x[300:310] for x, _ in seen])
    task = gate.probs(mixed).argmax(-1)
    one_by_one = torch.stack([gate.experts[t](row) for t, row in zip(task.tolist(), mixed, strict=True)])
    torch.testing.assert_close(gate(mixed), one_by_one)


def test_relatedness_and_the_way_of_learning():
    (x, _), (other, _) = tasks(2)
    gate, ways = ExpertGate(24, 5), []
    for features in (x, other, x + 0.01 * torch.randn_like(x)):
        ways.append(gate.learn(features, lambda: nn.Linear(24, 2), lambda *_: None))
    assert [way for way, _ in ways] == ["scratch", "fine_tune", "without_forgetting"]
    assert ways[1][1] == 0 and ways[2][1] == 0
    errors = [autoencoder(x).mean().item() for autoencoder in gate.autoencoders]
    expected = [1 - (errors[i] - errors[2]) / errors[2] for i in (0, 1)]
    assert gate.relatedness(x).tolist() == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(gate.experts[2].weight, gate.experts[0].weight)
    assert gate.experts[2] is not gate.experts[0]


def test_a_task_that_failed_leaves_nothing():
    gate = ExpertGate(24, 5)
    x, _ = next(tasks(1))

    def fail(*_):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        gate.learn(x, lambda: nn.Linear(24, 2), fail)
    assert len(gate.autoencoders) == len(gate.experts) == 0
    with pytest.raises(ValueError, match="no task has been learned"):
        gate(x)
    with pytest.raises(ValueError, match="code 24"):
        ExpertGate(24, 24).learn(x, lambda: nn.Linear(24, 2), fail)
    with pytest.raises(ValueError, match="finite"):
        gate.learn(x * math.nan, lambda: nn.Linear(24, 2), fail)


def test_forgetting_loss_is_the_softened_cross_entropy():
    now, before = torch.randn(7, 4, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64)
    root = np.exp(before.numpy()) ** 0.5, np.exp(now.numpy()) ** 0.5
    old, new = (r / r.sum(1, keepdims=True) for r in root)
    assert forgetting_loss(now, before).item() == pytest.approx(-(old * np.log(new)).sum(1).mean())


@pytest.mark.parametrize("neighbours", [1, 3])
def test_the_proxy_is_a_vote_of_the_nearest_others(neighbours):
    features, labels = torch.randn(40, 5), torch.randint(3, (40,))
    right = 0
    for i in range(40):
        far = [(float((features[i] - features[j]).square().sum()), j) for j in range(40) if j != i]
        votes = [int(labels[j]) for _, j in sorted(far)[:neighbours]]
        right += max(votes, key=lambda v: (votes.count(v), -votes.index(v))) == int(labels[i])
    assert nearest_neighbour_accuracy(features, labels, neighbours) == pytest.approx(right / 40)


def test_the_proxy_tells_near_examples_apart_however_far_they_are_from_zero():
    features = 1e6 + 1e-3 * torch.randn(20, 4, dtype=torch.float64).repeat_interleave(2, 0)  # two of each
    assert nearest_neighbour_accuracy(features, torch.arange(20).repeat_interleave(2)) == 1


def test_the_expert_that_sees_the_difference_is_chosen():
    x, labels = torch.randn(100, 8), torch.arange(100) % 2
    x[:, 3] += 8 * labels
    found = choose_expert({"blind": lambda x: x[:, :3], "sees": lambda x: x[:, 2:5]}, x, labels)
    assert list(found) == ["sees", "blind"] and found["sees"] > 0.9 > 0.8 > found["blind"]
    with pytest.raises(ValueError, match="neighbours 100 must be from 1 to 99"):
        nearest_neighbour_accuracy(x, labels, 100)
    with pytest.raises(ValueError, match="no experts"):
        choose_expert({}, x, labels)
