"""States of a language model and the tokens that followed them to next-token probabilities of states like these.

kNN-LM: Khandelwal et al. 2020, Generalization through Memorization. Fedus et al. 2022, section 9.
"""

from __future__ import annotations

import math
from typing import Any

import faiss
import numpy as np
import torch
from torch import Tensor

__all__ = ["Datastore", "best_mixture", "mixed_loss", "neighbour_probability"]

SHARES = torch.linspace(0, 0.98, 50, dtype=torch.float64)
"""The weights of the neighbours that `best_mixture` tries."""
_CODES = 256  # values of a byte


class Datastore:
    """Keys and the token that followed each, searched for the keys that are nearest to a query.

    Args:
        keys: (n, d), taken as float32.
        tokens: (n,) int64, not negative.
        cells: into how many cells keys are sorted, of which the nearest are searched; None keeps all keys as they are,
            and search is exact.
        probes: how many cells are searched.
        code_bytes: what a key is compressed to, by product quantisation: a byte for each d / code_bytes of its numbers.

    Raises:
        ValueError: for shapes that do not fit, keys that are not finite, fewer of them than a code has values, and a
            `code_bytes` that does not divide d.

    Source: Khandelwal et al. 2020, section 2; Jégou et al. 2011 for the compressed form, without residuals.
    """

    def __init__(
        self, keys: Tensor, tokens: Tensor, cells: int | None = None, probes: int = 16, code_bytes: int = 16
    ) -> None:
        if keys.dim() != 2 or tokens.shape != keys.shape[:1] or not len(keys):
            raise ValueError(
                f"Datastore: keys must be (n, d) and tokens (n,), n at least 1, not {tuple(keys.shape)} and "
                f"{tuple(tokens.shape)}"
            )
        count, dim = keys.shape
        if not bool(keys.isfinite().all()):
            raise ValueError("Datastore: a key is not finite")
        if int(tokens.min()) < 0:
            raise ValueError("Datastore: a token is negative")
        self.dim, self.probes, self.code_bytes = dim, probes, code_bytes
        flat = faiss.IndexFlatL2(dim)
        self.cells = cells
        self.index: Any = faiss.IndexIDMap(flat)
        if cells is not None:
            if count < max(cells, _CODES) or not 1 <= probes <= cells:
                raise ValueError(
                    f"Datastore: {count} keys in {cells} cells, of which {probes} are searched: there must be at least "
                    f"{_CODES} keys, as many as cells, and as many cells as are searched"
                )
            if code_bytes < 1 or dim % code_bytes:
                raise ValueError(f"Datastore: code_bytes {code_bytes} must divide the width of the keys, {dim}")
            self.index = faiss.IndexIVFPQ(flat, dim, cells, code_bytes, 8)
            self.index.by_residual = False  # one table of distances a query, not one a cell
            self.index.nprobe = probes
            for clustering in (self.index.cp, self.index.pq.cp):
                clustering.min_points_per_centroid, clustering.max_points_per_centroid = 1, 64
        rows = _rows(keys)
        if cells is not None:
            self.index.train(rows)
        self.index.add_with_ids(
            rows, tokens.cpu().numpy().astype(np.int64)
        )  # the token is all that is kept of an entry

    def search(self, queries: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Squared distances (Q, count) float32 of the nearest keys, the nearest first, and their tokens (Q, count).

        Args:
            queries: (Q, d).
            count: k. Where fewer are found the rest have the token -1.

        Raises:
            ValueError: for queries of another width, or not finite, and a count below 1.
        """
        if queries.dim() != 2 or queries.shape[1] != self.dim or count < 1:
            raise ValueError(
                f"Datastore.search: queries must be (Q, {self.dim}) and count at least 1, not {tuple(queries.shape)} "
                f"and {count}"
            )
        if not bool(queries.isfinite().all()):
            raise ValueError("Datastore.search: a query is not finite")
        distances, tokens = self.index.search(_rows(queries), count)
        return torch.from_numpy(distances), torch.from_numpy(tokens)

    @property
    def num_bytes(self) -> int:
        """Of the store as a file: codes or keys, tokens (eight bytes each), centroids."""
        return int(faiss.serialize_index(self.index).nbytes)

    def flops_per_query(self, queries: Tensor) -> float:
        """Of a search, the mean over queries (Q, d): a multiply-add counts as 2; choosing the nearest is left out.

        Compressed, those are the distances to the centroids of all cells and of all codes, and for each key in a cell
        that is searched `code_bytes` additions.
        """
        if self.cells is None:
            return 2.0 * self.dim * self.index.ntotal
        _, searched = self.index.quantizer.search(_rows(queries), self.probes)
        sizes = np.array([self.index.invlists.list_size(cell) for cell in range(self.cells)])
        met = float(sizes[searched].sum(1).mean())
        return 2.0 * self.dim * (self.cells + _CODES) + self.code_bytes * met


def _rows(x: Tensor) -> Any:
    return np.ascontiguousarray(x.detach().cpu().float().numpy())


def neighbour_probability(distances: Tensor, tokens: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """The probability that its neighbours give each target: their softmax by distance, summed over those of its token.

    Args:
        distances: (Q, k) squared.
        tokens: (Q, k) int64, -1 for none.
        targets: (Q,) int64.
        temperature: that distances are divided by, above 0.

    Returns:
        (Q,) float64; 0 where there is no neighbour.

    Raises:
        ValueError: for a temperature that is not above 0.

    Source: Khandelwal et al. 2020, equation 2.
    """
    if not temperature > 0:
        raise ValueError(f"neighbour_probability: the temperature must be above 0, not {temperature}")
    scores = (-distances.double() / temperature).masked_fill(tokens < 0, -math.inf)
    weights = scores.softmax(1).nan_to_num(0.0)
    return (weights * (tokens == targets[:, None])).sum(1)


def mixed_loss(model: Tensor, neighbours: Tensor, share: float) -> Tensor:
    """The loss in nats, (Q,), of targets that model and neighbours give these probabilities (Q,), mixed.

    Args:
        model: by the language model.
        neighbours: by `neighbour_probability`.
        share: the weight of the neighbours, λ, from 0 to 1.

    Raises:
        ValueError: for another share.

    Source: Khandelwal et al. 2020, equation 3.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"mixed_loss: the share must be from 0 to 1, not {share}")
    return -(share * neighbours + (1 - share) * model).log()


def best_mixture(model: Tensor, distances: Tensor, tokens: Tensor, targets: Tensor) -> tuple[float, float]:
    """The share and the temperature at which the mean of `mixed_loss` is least, on predictions set apart for that.

    Args:
        model: (Q,) float64, the probability that the language model gives each target.
        distances, tokens, targets: as of `neighbour_probability`.

    Returns:
        One of `SHARES`, and a power of two times the median distance.
    """
    found = distances[tokens >= 0]
    middle = float(found.median()) if len(found) else 1.0
    best = (math.inf, 0.0, 1.0)
    for exponent in range(-9, 3):
        temperature = max(middle, 1e-12) * 2.0**exponent
        neighbours = neighbour_probability(distances, tokens, targets, temperature)
        for share in SHARES.tolist():
            best = min(best, (float(mixed_loss(model, neighbours, share).mean()), share, temperature))
    return best[1], best[2]
