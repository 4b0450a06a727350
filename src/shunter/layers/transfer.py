"""Which of many experts to transfer to a new task: their features of its few examples in, a ranking by a proxy out."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

__all__ = ["choose_expert", "nearest_neighbour_accuracy"]


@torch.no_grad()
def nearest_neighbour_accuracy(features: Tensor, labels: Tensor, neighbours: int = 1) -> float:
    """How often the nearest other examples have an example's label: leave-one-out, Euclidean.

    Args:
        features: (N, d), finite; (N, …) is flattened.
        labels: (N,) integers from 0.
        neighbours: how many vote; of labels with as many votes the one of the nearest example wins.

    Raises:
        ValueError: for features that do not fit the labels or are not finite, and neighbours not in 1..N-1.
    """
    if len(features) != len(labels) or labels.dim() != 1 or not bool(features.isfinite().all()):
        raise ValueError(
            f"features have shape {tuple(features.shape)}, labels {tuple(labels.shape)}; they must be (N, d), "
            "finite, and (N,)"
        )
    if not 1 <= neighbours < len(labels):
        raise ValueError(f"neighbours {neighbours} must be from 1 to {len(labels) - 1}, the other examples")
    rows = features.flatten(1).double()
    # Not by products, by which equal ones of more than 25 have a distance.
    distance = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    distance.fill_diagonal_(torch.inf)
    voters = labels[distance.sort(dim=1, stable=True).indices[:, :neighbours]]
    votes = (voters[:, :, None] == voters[:, None, :]).sum(-1)
    winner = voters.gather(1, votes.argmax(1, keepdim=True))[:, 0]  # the first of the largest is the nearest
    return float((winner == labels).double().mean())


def choose_expert(
    experts: Mapping[str, Callable[[Tensor], Tensor]], x: Tensor, labels: Tensor, neighbours: int = 1
) -> dict[str, float]:
    """Experts by how well their features tell a new task's labels apart, best first; the first is to be fine-tuned.

    Nothing is trained: each expert runs once on the examples. Of equal ones the earlier is first.

    Args:
        experts: by name, each maps inputs (N, …) to features (N, d). Of a model whose layers go by domain that is
            the features under `shunter.tell(model, domain=torch.tensor(d))`; `shunter extract` makes the chosen one a
            dense model.
        x: (N, …), the new task's examples.
        labels: (N,).
        neighbours: of `nearest_neighbour_accuracy`.

    Raises:
        ValueError: where there is no expert, and as of `nearest_neighbour_accuracy`.

    Source: Puigcerver et al. 2020 (Scalable Transfer Learning with Expert Models), section 3.3: the nearest-neighbour
    proxy.
    """
    if not experts:
        raise ValueError("choose_expert: there are no experts to choose from")
    with torch.no_grad():
        found = {name: nearest_neighbour_accuracy(expert(x), labels, neighbours) for name, expert in experts.items()}
    return dict(sorted(found.items(), key=lambda entry: -entry[1]))
