"""Modular networks: inputs in, outputs of layers that choose among modules out, and the EM that trains their choice."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["Composed", "ModularLayer", "ModularNetwork", "ViterbiEM"]


class ModularLayer(nn.Module):
    """M modules of which a controller chooses K for each input; their outputs are added up.

    Args:
        modules: M, which map (N, d) to (N, o); only those that are chosen run, on their inputs.
        controller: maps inputs (B, d) to logits (B, K M).
        choices: K.

    Raises:
        ValueError: for no modules, and for less than one choice.

    Source: Kirsch et al. 2018 (Modular Networks: Learning to Decompose Neural Computation), section 2.1.
    """

    def __init__(self, modules: Iterable[nn.Module], controller: nn.Module, choices: int = 1) -> None:
        super().__init__()
        self.pool, self.controller, self.choices = nn.ModuleList(modules), controller, choices
        if not len(self.pool) or choices < 1:
            raise ValueError(f"ModularLayer: {len(self.pool)} modules and choices {choices} must be at least 1")

    def log_probs(self, x: Tensor) -> Tensor:
        """The logarithm of each module's probability for each choice, (B, K, M).

        Raises:
            ValueError: where the controller gives another shape.
        """
        logits = self.controller(x)
        if logits.shape != (len(x), self.choices * len(self.pool)):
            raise ValueError(
                f"ModularLayer: the controller gives {tuple(logits.shape)}; it must give (B, K M), "
                f"({len(x)}, {self.choices * len(self.pool)})"
            )
        return logits.unflatten(-1, (self.choices, -1)).log_softmax(-1)

    def forward(self, x: Tensor, choice: Tensor) -> Tensor:
        """The sum of the outputs of the modules that are chosen, (B, o), for x (B, d) and choice (B, K)."""
        out: Tensor | None = None
        for i, module in enumerate(self.pool):
            row, _ = (choice == i).nonzero(as_tuple=True)
            if len(row):
                made = module(x[row])
                out = made.new_zeros(len(x), *made.shape[1:]) if out is None else out
                out = out.index_add(0, row, made)
        return self.pool[0](x) if out is None else out


@dataclass
class Composed:
    """What a modular network made of inputs.

    Args:
        output: (B, …).
        choices: (B, L, K), the modules of each layer.
        log_prob: (B,), the logarithm of the probability of these choices.
    """

    output: Tensor
    choices: Tensor
    log_prob: Tensor


class ModularNetwork(nn.Module):
    """Layers one after the other, of which some choose among modules, each by what comes to it.

    Args:
        layers: `ModularLayer` and any other modules; the modular ones choose equally many modules.

    Raises:
        ValueError: for no modular layer, and for some that choose differently many modules.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.widths = [layer.choices for layer in self.layers if isinstance(layer, ModularLayer)]
        if not self.widths or len(set(self.widths)) > 1:
            raise ValueError(
                f"ModularNetwork: its modular layers choose {self.widths} modules; there must be one, alike"
            )

    def forward(self, x: Tensor, choices: Tensor | None = None, sample: bool = False) -> Composed:
        """Compute x (B, d) by given choices (B, L, K); without, by samples or by the likeliest of each layer."""
        taken, log_prob, number = [], x.new_zeros(len(x)), 0
        for layer in self.layers:
            if not isinstance(layer, ModularLayer):
                x = layer(x)
                continue
            log_probs = layer.log_probs(x)
            if choices is not None:
                choice = choices[:, number]
            elif sample:
                choice = torch.distributions.Categorical(logits=log_probs).sample()
            else:
                choice = log_probs.argmax(-1)
            log_prob = log_prob + log_probs.gather(-1, choice[..., None])[..., 0].sum(-1)
            x = layer(x, choice)
            taken.append(choice)
            number += 1
        return Composed(x, torch.stack(taken, 1), log_prob)

    @torch.no_grad()
    def entropies(self, x: Tensor) -> Tensor:
        """(L, 2) in nats: of the mean probabilities over the batch, high where all modules are used, and the mean of
        each input's, low where the choice is sure. Modules have collapsed where both are low."""
        found = []
        for layer in self.layers:
            if isinstance(layer, ModularLayer):
                log_probs = layer.log_probs(x)
                mean = log_probs.exp().mean(0)
                each = -(log_probs.exp() * log_probs).sum(-1).mean()
                found.append(torch.stack([-torch.xlogy(mean, mean).sum(-1).mean(), each]))
                x = layer(x, log_probs.argmax(-1))
            else:
                x = layer(x)
        return torch.stack(found)


class ViterbiEM:
    """Generalised EM with hard choices: of each training example the best modules so far, and the loss that fits them.

        em = ViterbiEM(network, log_likelihood, num_examples=len(x))
        for rows in batches:
            em.e_step(rows, x[rows], y[rows], samples=10)
            em.loss(rows, x[rows], y[rows]).backward()  # and a step of any optimizer: the M-step

    Args:
        network: to be trained.
        log_likelihood: of targets given outputs: (output (B, …), y (B, …)) -> (B,) in nats.
        num_examples: N.

    Attributes:
        best: (N, L, K), of each example; -1 before its first E-step.

    Source: Kirsch et al. 2018, section 2.2 and algorithm 1.
    """

    def __init__(
        self, network: ModularNetwork, log_likelihood: Callable[[Tensor, Tensor], Tensor], num_examples: int
    ) -> None:
        self.network, self.log_likelihood = network, log_likelihood
        self.best = torch.full((num_examples, len(network.widths), network.widths[0]), -1)

    def score(self, composed: Composed, y: Tensor) -> Tensor:
        """log p(y | x, choices) + log p(choices | x), (B,)."""
        return self.log_likelihood(composed.output, y) + composed.log_prob

    @torch.no_grad()
    def e_step(self, rows: Tensor, x: Tensor, y: Tensor, samples: int = 10) -> Tensor:
        """Keep of each example's best choices and of samples those of the highest score; with fixed parameters, and a
        network without noise, the score never falls.

        Args:
            rows: (B,), which examples these are.
            x, y: (B, …).
            samples: S.

        Returns:
            The score (B,) of what is kept.

        Raises:
            ValueError: for less than one sample.
        """
        if samples < 1:
            raise ValueError(f"e_step: samples {samples} must be at least 1")
        best = self.best[rows].to(x.device)
        known = (best >= 0).all(-1).all(-1)
        top = x.new_full((len(x),), -torch.inf)
        if bool(known.any()):
            kept = self.network(x[known], best[known])
            top[known] = self.score(kept, y[known])
        for _ in range(samples):
            tried = self.network(x, sample=True)
            score = self.score(tried, y)
            better = (score > top) | (best < 0).any(-1).any(-1)
            best = torch.where(better[:, None, None], tried.choices, best)
            top = torch.where(better, score, top)
        self.best[rows] = best.to(self.best.device)
        return top

    def loss(self, rows: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Minus the mean score of the best choices, which modules and controllers descend.

        Raises:
            ValueError: where an example has had no E-step.
        """
        best = self.best[rows].to(x.device)
        if bool((best < 0).any()):
            raise ValueError("loss: an example has no choices yet; call e_step on it first")
        return -self.score(self.network(x, best), y).mean()
