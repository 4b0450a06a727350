"""Foreseen experts against the choices of the later routers themselves, and what is read ahead because of them."""

import random

import torch
from torch import nn

from shunter.experts.foresight import LAYERS, Foresight
from shunter.experts.residency import Residency, Stacks, spilled


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)  # without near-ties


def test_it_is_what_the_later_routers_choose_for_the_same_tokens():
    d, top_k = 12, random.randint(1, 3)
    shapes = random.choices([6, 6, 9, None], k=12)
    biased = random.random() < 0.5
    routers = [None if e is None else (draw(e, d), draw(e) if biased and e == 6 else None) for e in shapes]
    foresight = Foresight(routers)
    for layer in range(len(routers)):
        ahead = [j for j in range(layer + 1, min(layer + LAYERS, len(routers) - 1) + 1) if routers[j] is not None]
        for tokens in (1, random.randint(2, 64)):
            x = draw(tokens, d)
            found = foresight.foresee(layer, x, top_k)
            # As far as routers are alike, without a gap, from the first that there is.
            alike = [
                j for i, j in enumerate(ahead) if j - ahead[0] == i and len({shapes[a] for a in ahead[: i + 1]}) < 2
            ]
            assert [layer + distance for distance, _ in found] == alike, shapes
            for distance, experts in found:
                weight, bias = routers[layer + distance]
                logits = x @ weight.T if bias is None else x @ weight.T + bias
                times = logits.topk(top_k).indices.flatten().bincount(minlength=len(weight))
                assert set(experts) == set(times.nonzero().flatten().tolist())
                assert tokens == 1 or times[experts].tolist() == sorted(times[experts].tolist(), reverse=True)
    assert foresight.foresee(0, torch.randn(0, d), 1) == [] == foresight.foresee(0, torch.randn(1, d + 1), 1)


def model_of(layers, experts, d, room):
    """Residency with room for so many experts of layers of them, their routers, and what is in the files."""
    routers = [torch.randn(experts, d) for _ in range(layers)]
    memory = Residency(0, Foresight([(router, None) for router in routers]))
    stacks = []
    for _ in range(layers):
        whole = torch.randn(experts, 64, 64)
        memory.add(Stacks(nn.Module(), spilled({"w": whole}), {"w": (whole.shape, whole.dtype, 0)}))
        stacks.append(whole)
    memory.memory = room * memory._layers[0].resident_bytes
    return memory, routers, stacks


def run(memory, routers, stacks, chosen, x):
    for layer, experts in enumerate(chosen):
        with memory.holding(layer, experts, x, len(experts)):
            for e in experts:
                assert torch.equal(memory._layers[layer].parameters["w"][e], stacks[layer][e])
            assert memory.used <= memory.memory


def test_what_is_foreseen_is_read_ahead_and_what_is_foreseen_wrongly_soon_is_not():
    layers, experts, d, tokens = 6, 16, 8, 40
    for right in (True, False):
        memory, routers, stacks = model_of(layers, experts, d, room=24)
        for _ in range(tokens):
            x = torch.randn(1, d)
            chosen = [(x @ router.T).topk(2, largest=right).indices[0].tolist() for router in routers]
            run(memory, routers, stacks, chosen, x)
        assert memory.hits + memory.misses == tokens * layers * 2
        read = memory.read_bytes // memory._layers[0].expert_bytes
        shares = [memory.foresight.share_right(distance) for distance in range(1, LAYERS + 1)]
        if right:
            assert min(shares) > 0.9 and memory.ahead > tokens
        else:  # after the first few, which show that they are wrong, what is read is what was missing
            assert max(shares) < 0.1 and memory.ahead == 0
            assert read <= memory.misses + 2 * (layers - 1)
