"""SparseFF and sparse queries, keys and values: against loops, their limits that are dense, and their costs."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from shunter.layers.terraformer import MultiplicativeDense, SparseFF, SparseQKV


def _layer(dim=6, hidden=20, block=5, rank=3, **options):
    layer = SparseFF(dim, hidden, block, rank, dtype=torch.float64, **options)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    return layer


def _by_units(layer, x):
    """Each token's output as a loop over blocks; no mask."""
    rows = []
    for token in x:
        y = layer.bias.clone()
        logits = layer.controller_out @ (layer.controller_in @ token) + layer.controller_bias
        for start in range(0, layer.hidden, layer.block):
            unit = start + int(logits[start : start + layer.block].argmax())
            y = y + (layer.up[unit] @ token).clamp_min(0) * layer.down[unit]
        rows.append(y)
    return torch.stack(rows)


def test_evaluation_equals_prediction_equals_a_loop():
    layer, x = _layer().eval(), torch.randn(9, 6, dtype=torch.float64)
    wanted = _by_units(layer, x)
    assert torch.allclose(layer.read_all(x), wanted)
    assert torch.allclose(layer.read_chosen(x), wanted)
    assert torch.allclose(layer(x.view(3, 3, 6)), wanted.view(3, 3, 6))
    assert torch.allclose(layer(x[:1]), wanted[:1])


def test_blocks_of_one_are_the_dense_network():
    layer, x = _layer(block=1), torch.randn(7, 6, dtype=torch.float64)
    dense = F.relu(x @ layer.up.T) @ layer.down + layer.bias
    assert torch.allclose(layer(x), dense) and torch.allclose(layer.eval()(x), dense)


def test_soft_masks_weight_units_by_their_probabilities():
    layer, x = _layer(hard_probability=0.0), torch.randn(7, 6, dtype=torch.float64)
    logits = x @ layer.controller_in.T @ layer.controller_out.T + layer.controller_bias
    mask = logits.view(7, 4, 5).softmax(-1).view(7, 20)
    assert torch.allclose(layer(x), (F.relu(x @ layer.up.T) * mask) @ layer.down + layer.bias)


def test_hard_masks_have_the_gradient_of_the_probabilities():
    layer, x = _layer(hard_probability=1.0, temperature=0.0), torch.randn(7, 6, dtype=torch.float64)
    out, weight = layer(x), torch.randn(7, 6, dtype=torch.float64)
    assert torch.allclose(out, _by_units(layer, x))
    (out * weight).sum().backward()
    logits = (x @ layer.controller_in.T @ layer.controller_out.T + layer.controller_bias).detach().view(7, 4, 5)
    mask = F.one_hot(logits.argmax(-1), 5).double().view(7, 20).requires_grad_()
    units = F.relu((x @ layer.up.T).detach() * mask)
    (slope,) = torch.autograd.grad((units @ layer.down.detach() * weight).sum(), mask)
    probs = logits.softmax(-1)
    slope = slope.view(7, 4, 5)
    by_hand = (probs * (slope - (probs * slope).sum(-1, keepdim=True))).view(7, 20)
    assert torch.allclose(layer.controller_bias.grad, by_hand.sum(0))
    assert torch.allclose(layer.controller_out.grad, by_hand.T @ (x @ layer.controller_in.T).detach())
    assert layer.controller_in.grad.abs().sum() > 0


def test_noise_draws_units_by_their_probabilities():
    """At temperature 1 the Gumbel trick samples from p: each share within Hoeffding's bound of 1e-13 for 20 means."""
    layer = _layer(hard_probability=1.0, temperature=1.0)
    with torch.no_grad():
        layer.controller_bias.div_(2)
        for parameter in (layer.controller_in, layer.up, layer.bias):
            parameter.zero_()
        layer.up[:, 0] = 1.0
        layer.down.zero_()
    count = 20_000
    x = F.one_hot(torch.zeros(count, dtype=torch.int64), 6).double()
    layer(x)[:, 0].sum().backward()
    drawn = layer.down.grad[:, 0]  # how often each unit was kept
    wanted = layer.controller_bias.detach().view(4, 5).softmax(-1).flatten()
    bound = (torch.tensor(2 * 20 / 1e-13).log() / (2 * count)).sqrt()
    assert ((drawn / count - wanted).abs() < bound).all()


def test_a_token_costs_one_nth_of_the_network():
    layer, x = SparseFF(64, 256, block=16, rank=4).eval(), torch.randn(3, 64)
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        layer(x)
    dense = 2 * 2 * 64 * 256
    assert counted.get_total_flops() / 3 == layer.flops_per_token == dense / 16 + 2 * 4 * (64 + 256)


def test_a_loop_learns_it():
    layer = SparseFF(8, 32, block=4, rank=4)
    optimizer = torch.optim.Adam(layer.parameters(), 0.02)
    x = torch.randn(256, 8)
    target = x.flip(-1).abs()

    def loss():
        return (layer(x) - target).square().mean()

    with torch.no_grad():
        before = float(layer.eval() and loss())
    layer.train()
    for _ in range(300):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    with torch.no_grad():
        assert float(layer.eval() and loss()) < 0.7 * before


def test_a_multiplicative_layer_by_its_equation():
    layer, x = MultiplicativeDense(5, 6, 3, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    out = layer(x).view(4, 3, 2)
    for s in range(3):
        for m in range(2):
            wanted = sum(x[:, i] * layer.gate[s, i] * layer.projection[i, m] for i in range(5))
            assert torch.allclose(out[:, s, m], wanted + layer.bias[2 * s + m])
    assert sum(p.numel() for p in (layer.gate, layer.projection)) == 3 * 5 + 5 * 6 // 3


@pytest.mark.parametrize("modules", [1, 2, 3, 4, 6, 12])
def test_it_can_be_any_permutation(modules):
    layer, order = MultiplicativeDense(12, 12, modules, dtype=torch.float64), torch.randperm(12)
    width = 12 // modules
    with torch.no_grad():
        layer.gate.zero_()
        layer.projection.zero_()
        for place, source in enumerate(order):
            layer.gate[place // width, source] = 1.0
            layer.projection[source, place % width] = 1.0
    x = torch.randn(5, 12, dtype=torch.float64)
    assert torch.equal(layer(x), x[:, order])


def test_queries_keys_and_values_by_loops_and_step_by_step():
    layer = SparseQKV(8, 4, dtype=torch.float64)
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    whole = layer(x)
    mixed = layer.shared(x).view(2, 6, 4, 2)
    for conv, found in zip(layer.convolutions, whole[:3], strict=True):
        for place, module in ((0, 0), (3, 2), (5, 3)):
            wanted = conv.bias.expand(2, 2).clone()
            for back in range(3):
                for side in range(3):
                    t, s = place - 2 + back, module - 1 + side
                    if t >= 0 and 0 <= s < 4:
                        wanted = wanted + mixed[:, t, s] @ conv.weight[:, :, back, side].T
            assert torch.allclose(found.view(2, 6, 4, 2)[:, place, module], wanted)
    past, steps = None, []
    for place in range(6):
        step = layer(x[:, place : place + 1], past)
        past = step.past
        steps.append(step)
    for part in range(3):
        assert torch.allclose(torch.cat([step[part] for step in steps], 1), whole[part])
    later = x.clone()
    later[:, 4:] += 1
    assert all(torch.equal(a[:, :4], b[:, :4]) for a, b in zip(layer(later)[:3], whole[:3], strict=True))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SparseFF(8, 30, block=4), "must divide hidden"),
        (lambda: SparseFF(8, 32, block=4, hard_probability=1.5), "hard_probability"),
        (lambda: MultiplicativeDense(8, 9, 2), "must divide out"),
        (lambda: SparseQKV(8, 2, kernel=2), "odd"),
    ],
)
def test_impossible_sizes_are_one_line(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
