"""Mixtures fitted by EM: against densities of scipy, weighted least squares of numpy, planted pieces."""

import copy

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.stats import multivariate_normal
from torch.nn import functional as F

from shunter.layers.em_mixture import LinearMixture, _logistic_steps, log_joint


def _mixture(dim=3, outputs=2, experts=4, **options):
    mixture = LinearMixture(dim, outputs, experts, dtype=torch.float64, **options)
    for parameter in mixture.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return mixture


def _data(tokens=60, dim=3, outputs=2):
    return torch.randn(tokens, dim, dtype=torch.float64), torch.randn(tokens, outputs, dtype=torch.float64)


@pytest.mark.parametrize("branching", [None, 2])
def test_the_posterior_is_bayes_rule(branching):
    mixture = _mixture(branching=branching)
    x, y = _data(20)
    posterior, likelihood = mixture.posterior(x, y).detach(), mixture.log_likelihood(x, y).detach()
    gates = mixture.gate.assign(mixture.gate.score(x)).dense().detach()
    weight, bias, variance = (v.detach().numpy() for v in (mixture.weight, mixture.bias, mixture.variance))
    for t in range(20):
        joint = [
            float(gates[t, e])
            * multivariate_normal.pdf(y[t].numpy(), weight[e] @ x[t].numpy() + bias[e], variance[e] * np.eye(2))
            for e in range(4)
        ]
        assert np.allclose(posterior[t], np.array(joint) / sum(joint), atol=1e-12)
        assert likelihood[t].item() == pytest.approx(np.log(sum(joint)), abs=1e-10)
    means = np.einsum("td,eod->teo", x.numpy(), weight) + bias
    assert np.allclose(mixture(x).detach(), np.einsum("te,teo->to", gates.numpy(), means), atol=1e-12)


def test_experts_compete_for_targets():
    """The gradient at an expert's output is its posterior times its own error, not times that of the mixed output."""
    gates = torch.randn(7, 3, dtype=torch.float64).log_softmax(-1)
    outputs = torch.randn(7, 3, 2, dtype=torch.float64, requires_grad=True)
    target = torch.randn(7, 2, dtype=torch.float64)
    joint = log_joint(gates, outputs, target)
    (grad,) = torch.autograd.grad(-joint.logsumexp(-1).sum(), outputs)
    expected = joint.softmax(-1)[..., None] * (outputs - target[:, None])
    assert torch.allclose(grad, expected, atol=1e-12)


@pytest.mark.parametrize("experts, branching", [(3, None), (4, 2), (6, (3, 2))])
def test_the_likelihood_never_falls(experts, branching):
    x, y = _data(80)
    mixture = _mixture(experts=experts, branching=branching)
    trace = mixture.fit(x, y, rounds=60, tolerance=-1.0)
    assert len(trace) == 61 and trace[-1] > trace[0]
    assert min(after - before for before, after in zip(trace, trace[1:], strict=False)) > -1e-9
    assert trace[-1] == pytest.approx(mixture.log_likelihood(x, y).mean().item(), abs=1e-12)


def test_experts_are_fitted_by_weighted_least_squares():
    mixture = _mixture()
    x, y = _data()
    posterior = mixture.posterior(x, y).detach()
    with torch.no_grad():
        mixture._fit_experts(x, y, posterior)
    design = np.c_[x.numpy(), np.ones(60)]
    for e in range(4):
        root = np.sqrt(posterior[:, e].numpy())[:, None]
        solved = np.linalg.lstsq(root * design, root * y.numpy(), rcond=None)[0]
        assert np.allclose(mixture.weight[e].detach(), solved[:3].T, atol=1e-9)
        assert np.allclose(mixture.bias[e].detach(), solved[3], atol=1e-9)
        left = (posterior[:, e].numpy()[:, None] * (y.numpy() - design @ solved) ** 2).sum() / posterior[:, e].sum() / 2
        assert mixture.variance[e].item() == pytest.approx(float(left), rel=1e-9)


def test_gates_are_fitted_by_logistic_regression():
    x, target = torch.randn(50, 3, dtype=torch.float64), torch.rand(50, 4, dtype=torch.float64)
    rows = _logistic_steps(torch.randn(4, 3, dtype=torch.float64), x, target, steps=30)

    def loss(flat):
        logits = x.numpy() @ flat.reshape(4, 3).T
        return -(target.numpy() * (logits - np.log(np.exp(logits).sum(1, keepdims=True)))).sum()

    best = minimize(loss, np.zeros(12)).fun
    assert loss(rows.numpy().ravel()) == pytest.approx(best, rel=1e-7)


def test_every_node_of_a_tree_learns_its_own_branches():
    """Planted gates over experts that are told apart by their outputs: EM finds the gates' probabilities."""
    x = 2 * torch.randn(3000, 2, dtype=torch.float64)
    planted = _mixture(2, 1, 4, branching=2)
    with torch.no_grad():
        planted.weight.zero_()
        planted.bias.copy_(torch.tensor([[-30.0], [-10.0], [10.0], [30.0]]))
        planted.log_variance.fill_(-2.0)
    gates = planted.gate.score(x).exp().detach()
    y = planted.bias.detach()[torch.multinomial(gates, 1)[:, 0]] + 0.1 * torch.randn(3000, 1, dtype=torch.float64)
    found = _mixture(2, 1, 4, branching=2)
    with torch.no_grad():
        found.weight.copy_(planted.weight)
        found.bias.copy_(planted.bias)
        found.log_variance.zero_()
    found.fit(x, y)
    assert (found.gate.score(x).exp() - gates).abs().mean() < 0.05


def _pieces(x, border, noise):
    """Two lines with a jump at x . border = 0, and the mixture that has planted them: y (T, 1), mixture."""
    piece = (x @ border > 0).to(torch.int64)
    slope = torch.stack([torch.linspace(3, -1, len(border)), torch.linspace(-2, 2, len(border))]).double()
    y = (slope[piece] * x).sum(1) + torch.tensor([1.0, -1.0], dtype=torch.float64)[piece]
    y = (y + noise * torch.randn_like(y))[:, None]
    planted = LinearMixture(len(border), 1, 2, dtype=torch.float64)
    with torch.no_grad():
        planted.weight.copy_(slope[:, None])
        planted.bias.copy_(torch.tensor([[1.0], [-1.0]]))
        planted.log_variance.fill_(2 * np.log(noise))
        planted.gate.weight.copy_(torch.stack([-20 * border, 20 * border]))
        planted.gate.bias.zero_()
    return y, planted, piece, slope


def test_two_linear_pieces_are_recovered():
    """Rounds that never lower the likelihood, from a mixture near the truth, end at the truth."""
    x = torch.randn(500, 2, dtype=torch.float64)
    border = F.normalize(torch.randn(2, dtype=torch.float64), dim=0)
    y, planted, piece, slope = _pieces(x, border, noise=0.05)
    best = copy.deepcopy(planted)
    with torch.no_grad():
        best.weight.add_(0.2 * torch.rand_like(best.weight))
        best.bias.add_(0.2 * torch.rand_like(best.bias))
        best.log_variance.fill_(0.0)
    best.fit(x, y)
    assert best.log_likelihood(x, y).mean() > planted.log_likelihood(x, y).mean() - 1e-6
    assert (best(x) - y).square().sum() / (y - y.mean()).square().sum() < 0.01
    assert (best.weight[:, 0] - slope).abs().max() < 0.1
    assert (best.posterior(x, y).argmax(-1) == piece).double().mean() > 0.97


SIZES = [[1.0, 1e3, 1e-3], [1e5, 1.0, 1e-5], [1e8, 1e-8, 1.0]]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("branching", [None, 2])
def test_the_units_of_the_columns_change_nothing(size, branching):
    """The same parameters in other units, and x in those units: the same likelihood after every round."""
    x, y = _data(80)
    size, middle = torch.tensor(size, dtype=torch.float64), torch.randn(3, dtype=torch.float64) * 5
    mixture, other = (_mixture(branching=branching) for _ in range(2))
    other.load_state_dict(mixture.state_dict())
    with torch.no_grad():
        for weight, bias in ((other.weight, other.bias), (other.gate.weight, other.gate.bias)):
            weight /= size
            bias -= weight @ (middle * size)
    traces = [m.fit(z, y, rounds=20, tolerance=-1.0) for m, z in ((mixture, x), (other, (x + middle) * size))]
    assert np.allclose(*traces, rtol=1e-6, atol=1e-6)
    assert torch.allclose(mixture(x), other((x + middle) * size), rtol=1e-4, atol=1e-4)
    assert traces[1][-1] == pytest.approx(other.log_likelihood((x + middle) * size, y).mean().item(), abs=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_columns_of_very_different_size_are_fitted_as_well_as_standard_ones(size):
    """From the mixture that made the data, in units of every size, the likelihood only rises."""
    x = torch.randn(400, 3, dtype=torch.float64)
    y, mixture, _, _ = _pieces(x, torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64), noise=0.05)
    before = mixture.log_likelihood(x, y).mean().item()
    size = torch.tensor(size, dtype=torch.float64)
    with torch.no_grad():
        for weight, bias in ((mixture.weight, mixture.bias), (mixture.gate.weight, mixture.gate.bias)):
            weight /= size
            bias -= weight @ (2 * size)
    assert mixture.fit((x + 2) * size, y)[-1] > before - 1e-6


def test_gradients_fit_too():
    mixture = _mixture(branching=2)
    x, y = _data(40)
    parameters = list(mixture.parameters())
    assert torch.autograd.gradcheck(lambda *_: mixture.log_likelihood(x[:5], y[:5]), parameters)
    before = mixture.log_likelihood(x, y).mean()
    gradients = torch.autograd.grad(before, parameters)
    start = [parameter.detach().clone() for parameter in parameters]
    for step in 0.5 ** torch.arange(40.0, dtype=torch.float64):
        with torch.no_grad():
            for parameter, old, gradient in zip(parameters, start, gradients, strict=True):
                parameter.copy_(old + step * gradient)
            if mixture.log_likelihood(x, y).mean() > before:
                return
    pytest.fail("no step along the gradient raises the likelihood")


def test_a_single_sample_does_not_make_the_likelihood_infinite():
    mixture = _mixture(experts=4, min_variance=1e-4)
    trace = mixture.fit(*_data(3))
    assert np.isfinite(trace).all() and mixture.variance.min() >= 1e-4 * 0.999


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: LinearMixture(3, 0, 2), "must be positive"),
        (lambda: LinearMixture(3, 1, 6, branching=4), "gives no tree with 6 leaves"),
        (lambda: LinearMixture(3, 1, 2).fit(torch.zeros(4, 2), torch.zeros(4, 1)), r"must be \(T, 3\) and \(T, 1\)"),
        (lambda: LinearMixture(3, 1, 2).fit(torch.zeros(4, 3), torch.zeros(4)), r"must be \(T, 3\) and \(T, 1\)"),
        (lambda: LinearMixture(3, 1, 2).fit(torch.zeros(4, 3) / 0, torch.zeros(4, 1)), "not finite"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
