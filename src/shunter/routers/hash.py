"""Fixed by hashing: vocabulary ids or the position decide the expert of a token, by a table drawn before training."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from .. import capacity
from ..context import Context
from ..routing import Routing
from .fixed import Fixed

__all__ = ["BigramHash", "Hash", "PositionHash", "PreviousTokenHash"]

Spread = Literal["dispersed", "clustered"]


class Hash(Fixed):
    """Hash layer: a fixed table sends each vocabulary id to one expert, with weight 1; nothing is learned.

    The table (V,), or (N, V) with N hashes, is a buffer: it is saved, loaded and moved with the layer.

    With num_hashes N > 1 it is a MultiHash layer: the hidden vector of the feed-forward layer has N segments, each
    chosen by a hash of its own among E / N, so that a few tables' accidents even out. A segment is an expert here: hash
    n has the experts n * E / N to (n + 1) * E / N - 1, and the layer's output is the sum of the N.

    Args:
        vocab_size: V, the number of ids.
        frequencies: (V,) how often each id occurs in the training text. Given, the table is balanced: ids are dealt out
            by falling frequency to the expert with the least so far, which balances tokens, not ids. Further hashes
            deal in random order.
        embeddings: (V, w) an embedding of each id. Given, ids are clustered by it, as many clusters as experts.
        spread: what the clusters are for: "dispersed" spreads the ids of each evenly over the experts, so that similar
            ids differ in expert; "clustered" gives each an expert.
        num_hashes: N, which divides E.
        seed: of the table. Without frequencies and embeddings it is random.
        **options: of `Router`.

    Raises:
        ValueError: where vocab_size is missing, or what is given does not fit it; for an id outside the table.

    Source: Roller et al. 2021 (Hash Layers for Large Sparse Models), section 3.
    """

    source: ClassVar[str] = "Roller et al. 2021"
    needs: ClassVar[tuple[str, ...]] = ("token_ids",)
    unsaved_options: ClassVar[tuple[str, ...]] = ("frequencies", "embeddings")
    example_options: ClassVar[dict[str, Any]] = {"vocab_size": 256}

    table: Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        vocab_size: int | None = None,
        frequencies: Tensor | Sequence[float] | None = None,
        embeddings: Tensor | None = None,
        spread: Spread = "dispersed",
        num_hashes: int = 1,
        seed: int = 0,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_experts, **options)
        if vocab_size is None or vocab_size < 1:
            raise ValueError(f"{type(self).__name__} needs vocab_size=, the number of token ids; got {vocab_size}")
        if spread not in get_args(Spread):
            raise ValueError(f"spread {spread!r} is unknown; choose from {', '.join(get_args(Spread))}")
        if num_hashes < 1 or num_experts % num_hashes:
            raise ValueError(f"num_hashes {num_hashes} must divide num_experts, {num_experts}")
        if frequencies is not None and embeddings is not None:
            raise ValueError("hash: frequencies balance the table and embeddings cluster it; give one of them")
        self.vocab_size = vocab_size
        self.top_k = num_hashes
        generator = torch.Generator("cpu").manual_seed(seed)
        each = num_experts // num_hashes
        if frequencies is not None:
            counts = _frequencies(frequencies, vocab_size)
            orders = [counts.argsort(descending=True, stable=True)]
            orders += [torch.randperm(vocab_size, generator=generator, device="cpu") for _ in range(1, num_hashes)]
            tables = [_deal(counts, order, each) for order in orders]
        elif embeddings is not None:
            points = _embeddings(embeddings, vocab_size, each)
            tables = [_cluster(points, each, spread, generator) for _ in range(num_hashes)]
        else:
            tables = [_random(each, vocab_size, generator) for _ in range(num_hashes)]
        self.register_buffer("table", (tables[0] if num_hashes == 1 else torch.stack(tables)).to(device))
        # Drawn last, so that the same seed gives all hashes of ids the same table.
        self._draw_more(generator, device)

    def _draw_more(self, generator: torch.Generator, device: torch.device | str | None) -> None:
        """Draw what the hash needs besides its table."""

    def experts_of(self, context: Context) -> Tensor:
        """The experts (T, N) of each token by its id, one of each hash."""
        return self.among(self.look_up(self.table, self.require(context, "token_ids", self.vocab_size)))

    def look_up(self, table: Tensor, ids: Tensor) -> Tensor:
        """The entries (T, N) of a table of the shape of `table`."""
        return table.reshape(self.top_k, -1)[:, ids].T

    def among(self, bins: Tensor) -> Tensor:
        """The experts (T, N) of bins (T, N), each in 0..E/N-1: every hash has experts of its own."""
        return bins + torch.arange(self.top_k, device=bins.device) * (self.num_experts // self.top_k)

    def choose(self, logits: Tensor, context: Context) -> Routing:
        """The expert of each hash, with weight 1; each is a first choice, as hashes do not compete."""
        return replace(super().choose(logits, context), choice=None)

    def capacity(self, num_tokens: int) -> int | None:
        """The slots C of one expert for T real tokens, which each hash spreads over its own E / N experts."""
        factor = self.present_capacity_factor
        if factor is None:
            return None
        each = self.num_experts // self.top_k
        return capacity.capacity(num_tokens, each, 1, factor, self.capacity_formula)

    @property
    def leak(self) -> str | None:
        """As with one choice: no hash competes with another."""
        if self.present_capacity_factor is None or self.capacity_order == "position":
            return None
        return super().leak

    def extra_repr(self) -> str:
        """E, V and N, for `print(model)`."""
        return f"num_experts={self.num_experts}, vocab_size={self.vocab_size}, num_hashes={self.top_k}"


class PreviousTokenHash(Hash):
    """Hash layer by the token before; the first of a sequence has an expert of its own. Padding is no token.

    It reads earlier ids of the sequence: decode with use_cache=False, as a cache would hide them.

    Args:
        **options: of `Hash`; the table is of the id of the token before.

    Raises:
        ValueError: where a cache hides the token before.

    Source: Roller et al. 2021, section 3 (previous token hash).
    """

    needs: ClassVar[tuple[str, ...]] = ("token_ids", "sequence")

    first: Tensor

    def _draw_more(self, generator: torch.Generator, device: torch.device | str | None) -> None:
        first = _random(self.num_experts // self.top_k, self.top_k, generator)
        self.register_buffer("first", first.to(device))

    def experts_of(self, context: Context) -> Tensor:
        """The experts (T, N) of each token by the token before."""
        return self.among(self.of_previous(self.table, context))

    def of_previous(self, table: Tensor, context: Context) -> Tensor:
        """The entries (T, N) of a table for the token before each token, `first` where there is none.

        Raises:
            ValueError: where a cache hides that token.
        """
        previous = _previous(self.require(context, "token_ids", self.vocab_size), context)
        if context.position is not None and not torch.compiler.is_compiling():
            numbers, sequence = self.require(context, "sequence").unique(return_inverse=True)
            begin = context.position.new_zeros(numbers.numel())
            begin = begin.scatter_reduce(0, sequence, context.position, "amin", include_self=False)
            if bool((begin > 0).any()):
                raise ValueError(
                    f"{type(self).__name__} goes by the token before, which a cache hides: pass use_cache=False"
                )
        return torch.where(previous[:, None] < 0, self.first, self.look_up(table, previous.clamp_min(0)))


class BigramHash(PreviousTokenHash):
    """Hash layer by a token and the one before: the bins of both by tables of their own, added modulo E / N.

    The tables are random and independent, so any two (even three) bigrams are as independent as with a table of all
    V * V pairs, which would be too large.

    Args:
        **options: of `Hash`; frequencies and embeddings are of the token, not of the one before.

    Source: Roller et al. 2021, section 3 (bigram hash); Carter and Wegman 1979 (tabulation hashing).
    """

    previous_table: Tensor

    def _draw_more(self, generator: torch.Generator, device: torch.device | str | None) -> None:
        super()._draw_more(generator, device)
        table = _random(self.num_experts // self.top_k, self.table.numel(), generator)
        self.register_buffer("previous_table", table.reshape(self.table.shape).to(device))

    def experts_of(self, context: Context) -> Tensor:
        """The experts (T, N) of each token and the token before."""
        own = self.look_up(self.table, self.require(context, "token_ids", self.vocab_size))
        return self.among((own + self.of_previous(self.previous_table, context)) % (self.num_experts // self.top_k))


class PositionHash(Fixed):
    """Hash layer by the place in the sequence: positions are dealt out at random, evenly.

    Args:
        num_positions: the most tokens of a sequence; positions are 0 to num_positions - 1.
        seed: of the table, a buffer that is saved with the layer.
        **options: of `Router`.

    Raises:
        ValueError: where num_positions is missing; for a position outside the table.

    Source: Roller et al. 2021, section 3 (position hash).
    """

    source: ClassVar[str] = "Roller et al. 2021"
    needs: ClassVar[tuple[str, ...]] = ("position",)
    example_options: ClassVar[dict[str, Any]] = {"num_positions": 4096}

    table: Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        num_positions: int | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_experts, **options)
        if num_positions is None or num_positions < 1:
            raise ValueError(f"PositionHash needs num_positions=, the most tokens of a sequence; got {num_positions}")
        shuffled = torch.randperm(num_positions, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
        self.register_buffer("table", (shuffled % num_experts).to(device))

    def experts_of(self, context: Context) -> Tensor:
        """The table's expert (T, 1) of each position."""
        return self.table[self.require(context, "position", self.table.numel())][:, None]


def _previous(ids: Tensor, context: Context) -> Tensor:
    """The id (T,) of the real token before each in its sequence, -1 where there is none."""
    assert context.sequence is not None
    order = context.sequence.argsort(stable=True)
    if context.mask is not None:
        order = order[context.mask[order]]
    sequence = context.sequence[order]
    previous = torch.full_like(ids, -1)
    previous[order[1:]] = torch.where(sequence[1:] == sequence[:-1], ids[order[:-1]], -1)
    return previous


def _random(num_experts: int, size: int, generator: torch.Generator) -> Tensor:
    return torch.randint(num_experts, (size,), generator=generator, device="cpu")


def _frequencies(frequencies: Tensor | Sequence[float], vocab_size: int) -> Tensor:
    counts = torch.as_tensor(frequencies, dtype=torch.float64, device="cpu")
    if counts.dim() != 1 or not bool(((counts >= 0) & counts.isfinite()).all()):
        raise ValueError("hash: frequencies must be one non-negative number for each token id")
    if counts.numel() != vocab_size:
        raise ValueError(f"hash: {counts.numel()} frequencies for {vocab_size} token ids; give one for each id")
    return counts


def _embeddings(embeddings: Tensor, vocab_size: int, clusters: int) -> Tensor:
    points = embeddings.detach().to("cpu", torch.float64)
    if points.dim() != 2 or points.shape[0] != vocab_size or not bool(points.isfinite().all()):
        raise ValueError(
            f"hash: embeddings have shape {tuple(points.shape)}; they must be finite, a row for each of the "
            f"{vocab_size} token ids"
        )
    if vocab_size < clusters:
        raise ValueError(f"hash: {vocab_size} token ids do not make {clusters} clusters; use fewer experts")
    return points


def _deal(counts: Tensor, order: Tensor, num_experts: int) -> Tensor:
    """The table (V,) of ids dealt in this order to the expert with the least counts so far."""
    table = torch.empty(counts.numel(), dtype=torch.int64, device="cpu")
    loads = [(0.0, expert) for expert in range(num_experts)]
    for token in order.tolist():
        load, expert = heapq.heappop(loads)
        table[token] = expert
        heapq.heappush(loads, (load + float(counts[token]), expert))
    return table


def _cluster(points: Tensor, num_experts: int, spread: Spread, generator: torch.Generator) -> Tensor:
    """The table (V,) of the clusters of points (V, w), or of a deal of each cluster's shuffled ids."""
    cluster = _k_means(points, num_experts, generator)
    if spread == "clustered":
        return cluster
    shuffled = torch.randperm(cluster.numel(), generator=generator, device="cpu")
    order = shuffled[cluster[shuffled].argsort(stable=True)]
    return torch.empty_like(cluster).scatter(0, order, torch.arange(cluster.numel(), device="cpu") % num_experts)


def _k_means(points: Tensor, clusters: int, generator: torch.Generator, rounds: int = 100) -> Tensor:
    """The cluster (V,) of each of points (V, w) after Lloyd's algorithm from random points; none is empty."""
    chosen = torch.randperm(points.shape[0], generator=generator, device="cpu")[:clusters]
    centres, before = points[chosen], None
    for _ in range(rounds):
        distance = torch.cdist(points, centres)
        nearest, cluster = distance.min(1)
        size = torch.bincount(cluster, minlength=clusters)
        for empty in (size == 0).nonzero().flatten().tolist():
            # The point farthest from its centre, of a cluster that can spare it, starts the empty one.
            far = int(torch.where(size[cluster] > 1, nearest, -1.0).argmax())
            size[cluster[far]] -= 1
            size[empty] += 1
            cluster[far], nearest[far] = empty, 0.0
        if before is not None and torch.equal(cluster, before):
            break
        before = cluster
        centres = torch.zeros_like(centres).index_add(0, cluster, points) / size[:, None]
    return cluster
