"""Modular networks: what is chosen is what runs, the E-step never loses, EM finds the modules that made the data."""

import itertools

import pytest
import torch
from torch import nn

from shunter.layers.modular_network import ModularLayer, ModularNetwork, ViterbiEM


def gaussian(output, y):
    return -0.5 * ((output - y) ** 2).sum(-1) / 0.05


def make(dim=4, modules=3, choices=2, layers=2):
    def layer():
        return ModularLayer([nn.Linear(dim, dim) for _ in range(modules)], nn.Linear(dim, choices * modules), choices)

    return ModularNetwork([layer(), nn.Tanh(), *(layer() for _ in range(layers - 1))])


def test_chosen_modules_are_added_up_and_their_probabilities_multiplied():
    network = make().double()
    x, choices = torch.randn(6, 4, dtype=torch.float64), torch.randint(3, (6, 2, 2))
    choices[0] = 1  # one module twice
    found = network(x, choices)
    for b in range(6):
        row, probability = x[b], 1.0
        for number, layer in enumerate((network.layers[0], network.layers[2])):
            probs = layer.controller(row).reshape(2, 3).softmax(-1)
            taken = choices[b, number].tolist()
            probability *= (probs[0, taken[0]] * probs[1, taken[1]]).item()
            row = layer.pool[taken[0]](row) + layer.pool[taken[1]](row)
            row = row.tanh() if number == 0 else row
        torch.testing.assert_close(found.output[b], row)
        assert found.log_prob[b].exp().item() == pytest.approx(probability)
    ran = []
    for i, module in enumerate(network.layers[0].pool):
        module.register_forward_hook(lambda m, a, out, i=i: ran.append((i, len(out))))
    network(x, torch.full((6, 2, 2), 2))
    assert ran == [(2, 12)], "modules that nobody chose do not run"


def test_an_e_step_never_loses_and_finds_the_best_of_all():
    network = make()
    with torch.no_grad():
        for layer in (network.layers[0], network.layers[2]):
            for parameter in layer.controller.parameters():
                parameter.mul_(0.01)  # each of the 81 compositions is as likely: 2000 samples miss one with 1e-11
    x, y = torch.randn(5, 4), torch.randn(5, 4)
    em = ViterbiEM(network, gaussian, 5)
    rows, scores = torch.arange(5), []
    for _ in range(40):
        scores.append(em.e_step(rows, x, y, samples=50))
        assert len(scores) < 2 or bool((scores[-1] >= scores[-2] - 1e-5).all())
    every = [torch.tensor(c).reshape(2, 2).expand(5, 2, 2) for c in itertools.product(range(3), repeat=4)]
    best = torch.stack([em.score(network(x, choices), y) for choices in every]).max(0).values
    torch.testing.assert_close(scores[-1], best)
    assert em.loss(rows, x, y).item() == pytest.approx(-scores[-1].mean().item(), rel=1e-4)


def test_em_finds_the_modules_of_the_data():
    """y is x or -x, by its first number: the controller finds which, and modules that begin near enough what they are.

    From farther off EM climbs to the nearest summit, which may be another.
    """
    maps = torch.stack([torch.eye(4), -torch.eye(4)])
    x = torch.randn(300, 4)
    x[:, 0] += x[:, 0].sign()
    truth = (x[:, 0] > 0).long()
    y = torch.einsum("bij,bj->bi", maps[truth], x)
    modules = [nn.Linear(4, 4) for _ in maps]
    with torch.no_grad():
        for module, planted in zip(modules, maps, strict=True):
            module.weight.mul_(0.2).add_(planted)
    network = ModularNetwork([ModularLayer(modules, nn.Linear(4, 2))])
    em, optimizer = ViterbiEM(network, gaussian, 300), torch.optim.Adam(network.parameters(), 0.05)
    rows = torch.arange(300)
    for _ in range(150):
        em.e_step(rows, x, y, samples=4)
        optimizer.zero_grad()
        em.loss(rows, x, y).backward()
        optimizer.step()
    assert (network(x).choices[:, 0, 0] == truth).double().mean() > 0.95
    for module, planted in zip(modules, maps, strict=True):
        assert (module.weight - planted).abs().max() < 0.1
    batch, each = network.entropies(x)[0]
    assert batch > 0.6 and each < 0.2, "both modules are used, and each input is sure of its own"


def test_what_cannot_be():
    with pytest.raises(ValueError, match="0 modules"):
        ModularLayer([], nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"must give \(B, K M\), \(3, 2\)"):
        ModularNetwork([ModularLayer([nn.Linear(4, 4)] * 2, nn.Linear(4, 3))])(torch.randn(3, 4))
    with pytest.raises(ValueError, match="there must be one, alike"):
        ModularNetwork([nn.Linear(4, 4)])
    em = ViterbiEM(make(), gaussian, 3)
    with pytest.raises(ValueError, match="call e_step"):
        em.loss(torch.arange(3), torch.randn(3, 4), torch.randn(3, 4))
