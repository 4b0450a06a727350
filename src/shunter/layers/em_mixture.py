"""Mixtures of experts as they began: a tree of softmax gates over linear Gaussian experts, fitted by EM or by SGD."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..routers.soft import HME

__all__ = ["LinearMixture", "log_joint"]


def log_joint(log_gates: Tensor, outputs: Tensor, target: Tensor, variance: Tensor | float = 1.0) -> Tensor:
    """log g_i + log N(target; output_i, variance_i), (T, E): the joint density of expert and target.

    Its logsumexp over experts is the log-likelihood, whose maximum makes experts compete for tokens (the squared error
    of the mixed output makes them cooperate); its softmax is the posterior of the experts.

    Args:
        log_gates: (T, E) logarithms of the gates; the logits of the routers soft and hme, after log_softmax.
        outputs: (T, E, o) of any experts.
        target: (T, o).
        variance: of each of the o numbers, one for all or (E,).

    Source: Jacobs et al. 1991 (Adaptive Mixtures of Local Experts), equation 1.3 with variance 1.
    """
    variance = torch.as_tensor(variance, dtype=outputs.dtype, device=outputs.device)
    distance = (outputs - target[:, None]).square().sum(-1)
    return log_gates - 0.5 * (distance / variance + target.shape[-1] * (2 * math.pi * variance).log())


class LinearMixture(nn.Module):
    """p(y | x) = sum_i g_i(x) N(y; A_i x + b_i, s_i I): E linear experts under a softmax or a tree of softmaxes.

    Fit it by `fit` (expectation maximisation), or by gradients: minimise -mixture.log_likelihood(x, y).mean().

    Args:
        dim: d, the width of x.
        outputs: o, the width of y.
        num_experts: E.
        branching: of the router `hme`; None is a single softmax.
        min_variance: s never falls below it: a single sample could make the likelihood infinite.
        device, dtype: of the parameters; EM wants torch.float64.

    Raises:
        ValueError: where `outputs` or `min_variance` is not positive, and for a tree that has not E leaves.

    Source: Jordan and Jacobs 1994 (Hierarchical Mixtures of Experts and the EM Algorithm), sections 2 to 4.

    >>> mixture = LinearMixture(dim=3, outputs=1, num_experts=4, branching=2, dtype=torch.float64)
    >>> trace = mixture.fit(x, y)  # the mean log-likelihood after each round
    """

    gate: HME

    def __init__(
        self,
        dim: int,
        outputs: int,
        num_experts: int,
        *,
        branching: int | Sequence[int] | None = None,
        min_variance: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if outputs < 1 or min_variance <= 0:
            raise ValueError(f"LinearMixture: outputs {outputs} and min_variance {min_variance} must be positive")
        levels = [num_experts] if branching is None else branching
        self.gate = HME(dim, num_experts, branching=levels, router_bias=True, device=device, dtype=dtype)
        self.weight = nn.Parameter(torch.randn(num_experts, outputs, dim, device=device, dtype=dtype) * dim**-0.5)
        self.bias = nn.Parameter(torch.randn(num_experts, outputs, device=device, dtype=dtype))
        self.log_variance = nn.Parameter(torch.zeros(num_experts, device=device, dtype=dtype))
        self.min_variance = min_variance

    def experts(self, x: Tensor) -> Tensor:
        """The output (T, E, o) of each expert for x (T, d)."""
        return torch.einsum("td,eod->teo", x, self.weight) + self.bias

    def forward(self, x: Tensor) -> Tensor:
        """The mean (T, o) of y for x (T, d)."""
        return torch.einsum("te,teo->to", self.gate.score(x).exp(), self.experts(x))

    def joint(self, x: Tensor, y: Tensor) -> Tensor:
        """`log_joint` (T, E) of x (T, d) and y (T, o)."""
        return log_joint(self.gate.score(x), self.experts(x), y, self.variance)

    @property
    def variance(self) -> Tensor:
        """s (E,)."""
        return self.log_variance.exp().clamp_min(self.min_variance)

    def log_likelihood(self, x: Tensor, y: Tensor) -> Tensor:
        """log p(y | x) (T,) in nats."""
        return self.joint(x, y).logsumexp(-1)

    def posterior(self, x: Tensor, y: Tensor) -> Tensor:
        """p(i | x, y) (T, E): which expert made y."""
        return self.joint(x, y).softmax(-1)

    @torch.no_grad()
    def fit(self, x: Tensor, y: Tensor, rounds: int = 200, tolerance: float = 1e-7) -> list[float]:
        """Expectation maximisation from the present parameters; the likelihood never falls.

        The columns of x are standardised inside, whatever their sizes. New parameters are drawn for standard columns:
        where taking the present ones for such gains more than 10 nats a sample, it starts there.

        Args:
            x: (T, d).
            y: (T, o).
            rounds: at most so many.
            tolerance: rounds end when the mean log-likelihood rises by less.

        Returns:
            The mean log-likelihood before the first and after each round.

        Raises:
            ValueError: where x and y do not fit each other or the mixture, or are not finite.
        """
        count, outputs, dim = y.shape[0], self.weight.shape[1], self.weight.shape[2]
        if x.shape != (count, dim) or y.shape != (count, outputs) or not count:
            raise ValueError(
                f"fit: x has shape {tuple(x.shape)} and y {tuple(y.shape)}; they must be (T, {dim}) and (T, {outputs})"
            )
        if not bool(x.isfinite().all() and y.isfinite().all()):
            raise ValueError("fit: x or y has values that are not finite; leave those rows out")
        middle, size = x.mean(0), x.std(0, correction=0)
        size = torch.where(size > 0, size, 1.0)
        drawn = {name: value.clone() for name, value in self.state_dict().items()}
        self._rescale(middle, size)
        x = (x - middle) / size
        trace = [self._start(x, y, drawn)]
        for _ in range(rounds):
            posterior = self.posterior(x, y)
            self._fit_gates(x, posterior)
            self._fit_experts(x, y, posterior)
            trace.append(float(self.log_likelihood(x, y).mean()))
            if trace[-1] - trace[-2] < tolerance:
                break
        self._rescale(-middle / size, 1 / size)
        return trace

    def _start(self, x: Tensor, y: Tensor, drawn: dict[str, Tensor]) -> float:
        """The mean log-likelihood of standard x and y to start from, by the present parameters or by those drawn."""
        likelihood = float(self.log_likelihood(x, y).mean())
        present = {name: value.clone() for name, value in self.state_dict().items()}
        self.load_state_dict(drawn)
        spread = float((y - y.mean(0)).square().mean().sqrt()) or 1.0
        self.weight.mul_(spread)
        self.bias.mul_(spread).add_(y.mean(0))
        self.log_variance.add_(2 * math.log(spread))
        other = float(self.log_likelihood(x, y).mean())
        if other > likelihood + 10 or not math.isfinite(likelihood):
            return other
        self.load_state_dict(present)
        return likelihood

    def _rescale(self, middle: Tensor, size: Tensor) -> None:
        """Change the parameters so that of (x - middle) / size they make what they now make of x (T, d)."""
        bias = self.gate.bias
        assert bias is not None
        bias.add_(self.gate.weight @ middle)
        self.gate.weight.mul_(size)
        self.bias.add_(self.weight @ middle)
        self.weight.mul_(size)

    def _fit_experts(self, x: Tensor, y: Tensor, posterior: Tensor) -> None:
        """Least squares weighted by the posterior (T, E), and the variance that is left."""
        x = _with_one(x)
        root = posterior.T.sqrt()[..., None]
        solved = torch.linalg.pinv(root * x) @ (root * y)
        self.weight.copy_(solved[:, :-1].mT)
        self.bias.copy_(solved[:, -1])
        distance = (torch.einsum("td,edo->teo", x, solved) - y[:, None]).square().sum(-1)
        mass = posterior.sum(0)
        variance = (posterior * distance).sum(0) / (y.shape[1] * mass)
        self.log_variance.copy_(torch.where(mass > 0, variance, self.variance).clamp_min(self.min_variance).log())

    def _fit_gates(self, x: Tensor, posterior: Tensor) -> None:
        """A few steps of iteratively reweighted least squares at every node of the tree."""
        x = _with_one(x)
        weight, bias = self.gate.weight, self.gate.bias
        assert bias is not None
        rows = torch.cat([weight, bias[:, None]], dim=1)
        first, nodes = 0, 1
        for width in self.gate.widths:
            branches = posterior.unflatten(1, (width, -1)).sum(-1).unflatten(1, (nodes, -1))
            size = width // nodes
            for node in range(nodes):
                own = slice(first + node * size, first + (node + 1) * size)
                rows[own] = _logistic_steps(rows[own], x, branches[:, node])
            first, nodes = first + width, width
        weight.copy_(rows[:, :-1])
        bias.copy_(rows[:, -1])


def _with_one(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_ones(x.shape[0], 1)], dim=1)


def _logistic_steps(rows: Tensor, x: Tensor, target: Tensor, steps: int = 3) -> Tensor:
    """Newton steps from rows (b, D) towards the maximum of sum target (T, b) * log softmax(x rows^T); none falls."""

    def value(rows: Tensor) -> Tensor:
        return (target * (x @ rows.T).log_softmax(-1)).sum()

    best = value(rows)
    mass = target.sum(1, keepdim=True)
    for _ in range(steps):
        probs = (x @ rows.T).softmax(-1)
        slope = (target - mass * probs).T @ x
        spread = mass[..., None] * (probs.diag_embed() - probs[:, :, None] * probs[:, None])
        curvature = torch.einsum("tab,td,tc->adbc", spread, x, x).flatten(2).flatten(0, 1)
        step = (torch.linalg.pinv(curvature, hermitian=True) @ slope.flatten()).reshape(rows.shape)
        for _ in range(30):
            after = value(rows + step)
            if after > best:
                break
            step = step / 2
        else:
            break
        rows, best = rows + step, after
    return rows
