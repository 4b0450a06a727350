"""Expert Gate: networks that learn one task each, in turn, and autoencoders of the tasks that say whose an input is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Autoencoder", "ExpertGate", "Way", "forgetting_loss"]

Way = Literal["scratch", "fine_tune", "without_forgetting"]


class Autoencoder(nn.Module):
    """What one task's features are like: an undercomplete autoencoder of a single ReLU layer.

    Features are standardised and squashed by a sigmoid; so is what it makes of them, and the error is the cross-entropy
    between the two. Errors of several autoencoders compare where all standardise alike: the cross-entropy of what is
    squashed far out is low, whoever reconstructs it.

    Args:
        dim: d, the width of the features.
        code: how many hidden units, fewer than d.

    Raises:
        ValueError: for a code of less than 1 or not below d.

    Source: Aljundi et al. 2017 (Expert Gate), section 3.1.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, dim: int, code: int) -> None:
        super().__init__()
        if not 0 < code < dim:
            raise ValueError(f"Autoencoder: code {code} must be at least 1 and below the features' width, {dim}")
        self.encoder, self.decoder = nn.Linear(dim, code), nn.Linear(code, dim)
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("deviation", torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction error (T,) of features x (T, d), in nats, summed over the d features."""
        standard = (x - self.mean) / self.deviation
        made = self.decoder(self.encoder(standard).relu())
        return F.binary_cross_entropy_with_logits(made, standard.sigmoid(), reduction="none").sum(-1)

    def fit(
        self, x: Tensor, steps: int = 300, batch: int = 256, lr: float = 1e-2, standard: Autoencoder | None = None
    ) -> None:
        """Learn the features x (T, d) of a task by Adam, standardised as another does it, or by themselves.

        Raises:
            ValueError: for features of another shape, and for numbers that are not finite.
        """
        if x.dim() != 2 or x.shape[1] != len(self.mean) or not len(x) or not bool(x.isfinite().all()):
            raise ValueError(
                f"Autoencoder: features have shape {tuple(x.shape)}; they must be (T, {len(self.mean)}), finite, T >= 1"
            )
        deviation = x.std(0, correction=0)
        self.mean.copy_(x.mean(0) if standard is None else standard.mean)
        self.deviation.copy_(torch.where(deviation > 0, deviation, 1.0) if standard is None else standard.deviation)
        optimizer = torch.optim.Adam(self.parameters(), lr)
        for _ in range(steps):
            optimizer.zero_grad()
            self(x[torch.randint(len(x), (batch,), device=x.device)]).mean().backward()
            optimizer.step()


class ExpertGate(nn.Module):
    """Experts for tasks that come one after the other; an input goes to the one whose autoencoder knows it best.

        gate = ExpertGate(dim=512, code=100)
        for images, labels in tasks:
            gate.learn(features(images), make=Net, train=lambda expert, way, parent: …)
        logits = gate(features(images), images)

    The first task's features say how those of all tasks are standardised.

    Args:
        dim: d, the width of the features that the gate goes by.
        code: of each autoencoder.
        temperature: of the gate's softmax.
        related: from which relatedness on a task is learned without forgetting rather than fine-tuned.

    Raises:
        ValueError: for a temperature that is not above 0.

    Source: Aljundi et al. 2017 (Expert Gate: Lifelong Learning with a Network of Experts), sections 3.2 to 3.4:
    temperature 2, relatedness 0.85.
    """

    def __init__(self, dim: int, code: int, *, temperature: float = 2.0, related: float = 0.85) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"ExpertGate: temperature {temperature} must be above 0")
        self.dim, self.code, self.temperature, self.related = dim, code, temperature, related
        self.autoencoders, self.experts = nn.ModuleList(), nn.ModuleList()

    def errors(self, features: Tensor) -> Tensor:
        """The reconstruction error of each task's autoencoder, (T, D). Raises ValueError before a task is learned."""
        if not self.autoencoders:
            raise ValueError("ExpertGate: no task has been learned; call learn first")
        return torch.stack([autoencoder(features) for autoencoder in self.autoencoders], -1)

    def probs(self, features: Tensor) -> Tensor:
        """How likely an input is of each task, (T, D): softmax of minus the errors over the temperature."""
        return (-self.errors(features) / self.temperature).softmax(-1)

    def relatedness(self, features: Tensor) -> Tensor:
        """How related the newest task, by its features (T, d), is to each one before, (D - 1,): at most about 1.

        1 - (error of the other's autoencoder - error of its own) / error of its own, of the mean errors.
        """
        *others, own = self.errors(features).mean(0)
        return torch.stack([1 - (other - own) / own for other in others]) if others else own.new_zeros(0)

    def learn(
        self,
        features: Tensor,
        make: Callable[[], nn.Module],
        train: Callable[[nn.Module, Way, nn.Module | None], None],
        *,
        steps: int = 300,
    ) -> tuple[Way, int | None]:
        """Add a task: its autoencoder, and an expert that begins as the most related one.

        Args:
            features: (T, d) of the task's training data.
            make: makes the first expert.
            train: trains an expert in place, given how and the expert that it began as: "scratch" (None),
                "fine_tune", or "without_forgetting", with `forgetting_loss` on what the parent said.
            steps: of the autoencoder.

        Returns:
            How the expert was trained, and the task that it began from.
        """
        autoencoder = Autoencoder(self.dim, self.code).to(features)
        first = self.autoencoders[0] if self.autoencoders else None
        assert first is None or isinstance(first, Autoencoder)
        autoencoder.fit(features, steps, standard=first)
        self.autoencoders.append(autoencoder)
        way: Way = "scratch"
        parent: int | None = None
        try:
            with torch.no_grad():
                known = self.relatedness(features)
            if len(known):
                parent = int(known.argmax())
                way = "without_forgetting" if float(known[parent]) > self.related else "fine_tune"
            before = None if parent is None else self.experts[parent]
            expert = make() if before is None else copy.deepcopy(before)
            train(expert, way, before)
        except BaseException:
            del self.autoencoders[-1]  # a task has both or neither
            raise
        self.experts.append(expert)
        return way, parent

    def forward(self, features: Tensor, inputs: Tensor | None = None) -> Tensor:
        """What the expert of each input's likeliest task makes of it, (T, …); no other expert runs.

        Args:
            features: (T, d), of the gate.
            inputs: (T, …), of the experts; None takes the features. The experts' outputs are of one shape.
        """
        inputs = features if inputs is None else inputs
        task = self.probs(features).argmax(-1)
        rows = [(task == i).nonzero()[:, 0] for i in range(len(self.experts))]
        outputs = [expert(inputs[own]) for expert, own in zip(self.experts, rows, strict=True) if len(own)]
        if not outputs:
            return self.experts[0](inputs)
        return torch.cat(outputs)[torch.cat(rows).argsort()]


def forgetting_loss(logits: Tensor, before: Tensor, temperature: float = 2.0) -> Tensor:
    """The cross-entropy between what a network said and what it says, both softened: what keeps it from forgetting.

    Args:
        logits, before: (T, C), now and of the network before, on the same inputs.
        temperature: divides both.

    Source: Li and Hoiem 2016 (Learning without Forgetting), equation 2.
    """
    said = (before.detach() / temperature).softmax(-1)
    return -(said * (logits / temperature).log_softmax(-1)).sum(-1).mean()
