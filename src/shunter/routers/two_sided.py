"""Both choose: tokens apply to experts, experts take the best applicants; the review's proposal, stable in the end."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ..context import Context
from ..routing import Routing
from .base import largest
from .linear import LinearRouter

__all__ = ["TwoSided", "deferred_acceptance"]


class TwoSided(LinearRouter):
    """Two-sided routing: a token applies to its m best experts, an expert takes its C best applicants.

    Both rank by the softmax over experts, which is the weight too, not renormalised. With m = E and one round it is
    expert choice; without a capacity it is top-m token choice. With more rounds, tokens that were turned away apply to
    their next best experts, and experts replace the worst that they hold (deferred acceptance). Without a limit of
    rounds the result is stable: no token and expert would rather have each other than what they have.

    Rounds cost: for 4096 tokens and 64 experts one takes 0.01 s on one CPU core, all (some 70) take 0.1 to 0.2 s.

    Args:
        top_k: m, the most experts of a token.
        capacity_factor: C = ceil(capacity_factor * T / E) are the most tokens of an expert; None sets no limit.
        rounds: how often tokens apply, at least 1; None goes on until no token has an application left to make.
        **options: of `LinearRouter` and `Router`; the order of slots is the score, so capacity_order means nothing.

    Raises:
        ValueError: where top_k is not in 1..E, or rounds below 1.

    Source: Fedus et al. 2022 (A Review of Sparse Expert Models in Deep Learning), section 4.1, proposed there and not
    tried; the rounds are Gale and Shapley 1962 with quotas on both sides.
    """

    chooses: ClassVar[str] = "both"
    source: ClassVar[str] = "Fedus et al. 2022"

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        top_k: int = 2,
        capacity_factor: float | None = 2.0,
        rounds: int | None = 1,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_experts, capacity_factor=capacity_factor, **options)
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k {top_k} must be between 1 and num_experts, {num_experts}")
        if rounds is not None and rounds < 1:
            raise ValueError(f"two_sided: rounds {rounds} must be at least 1, or None for as many as it takes")
        self.top_k = top_k
        self.rounds = rounds

    def choose(self, logits: Tensor, context: Context) -> Routing:
        """The pairs of real tokens and experts that accept each other."""
        scores = logits.softmax(-1)
        # Whoever has no score is the last choice of all.
        ranked = scores.detach().nan_to_num(-1.0)
        real = slice(None) if context.mask is None else context.mask
        slots = self.capacity(context.num_real(logits.shape[0]))
        pairs = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
        pairs[real] = deferred_acceptance(ranked[real], self.top_k, slots, self.rounds)
        return Routing.from_dense(scores, mask=pairs, check=False)

    def limit(self, routing: Routing, logits: Tensor, context: Context) -> Routing:
        """The routing itself: the choice is already within capacity."""
        return routing

    @property
    def experts_per_token(self) -> float:
        """The most that a token can have on average: m, or what the slots allow."""
        return min(float(self.top_k), self.present_capacity_factor or float(self.top_k))

    @property
    def leak(self) -> str | None:
        """Where there is a capacity: tokens compete for it with later tokens."""
        if self.present_capacity_factor is None:
            return None
        return "two-sided routing lets later tokens take an expert's slots from earlier ones"


@torch.no_grad()
def deferred_acceptance(scores: Tensor, top_k: int, slots: int | None = None, rounds: int | None = None) -> Tensor:
    """Which pairs (T, E) bool of tokens and experts match, both preferring high scores, ties to the lowest index.

    In a round each token with fewer than top_k experts applies to the best ones that it has not applied to, for as many
    as it lacks; then each expert keeps the best `slots` of those it holds and those who apply.

    Args:
        scores: (T, E) floating point, not NaN.
        top_k: the most experts of a token.
        slots: the most tokens of an expert; None sets no limit.
        rounds: the most rounds; None goes on until no token lacks an expert that it has not applied to. The result is
            then stable, and the only stable one, as both sides read the same scores.

    Source: Gale and Shapley 1962 (College Admissions and the Stability of Marriage).
    """
    num_tokens, num_experts = scores.shape
    slots = num_tokens if slots is None else slots
    if rounds == 1:
        return _one_round(scores, top_k, min(slots, num_tokens))
    preference = scores.argsort(dim=1, descending=True, stable=True)
    queue = scores.T.contiguous().argsort(dim=1, descending=True, stable=True)
    place = torch.empty_like(queue)
    place.scatter_(1, queue, torch.arange(num_tokens, device=queue.device).expand_as(queue))
    columns = torch.arange(num_experts, device=queue.device)
    # What experts hold, in the order of their own preference: keeping the best is keeping the first.
    held = torch.zeros(num_experts, num_tokens, dtype=torch.bool, device=queue.device)
    applied = torch.zeros(num_tokens, dtype=torch.int64, device=queue.device)
    lacks = torch.full_like(applied, top_k)
    done = 0
    while rounds is None or done < rounds:
        token = ((lacks > 0) & (applied < num_experts)).nonzero().flatten()
        if not token.numel():
            break
        start, end = applied[token, None], (applied[token] + lacks[token]).clamp_max(num_experts)[:, None]
        row, column = ((columns >= start) & (columns < end)).nonzero(as_tuple=True)
        applicant = token[row]
        expert = preference[applicant, column]
        held[expert, place[expert, applicant]] = True
        lacks[token] -= (end - start).flatten()
        applied[token] = end.flatten()
        expert, behind = (held & (held.cumsum(1, dtype=torch.int32) > slots)).nonzero(as_tuple=True)
        held[expert, behind] = False
        turned_away = queue[expert, behind]
        lacks.index_add_(0, turned_away, torch.ones_like(turned_away))
        done += 1
    expert, at = held.nonzero(as_tuple=True)
    pairs = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    pairs[queue[expert, at], expert] = True
    return pairs


def _one_round(scores: Tensor, top_k: int, slots: int) -> Tensor:
    """The first round alone, whose applications and answers need no sorted queues."""
    pairs = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    asked = pairs.scatter(1, largest(scores, top_k), True)
    # Whoever did not apply comes behind every score.
    applied = scores.clamp_min(torch.finfo(scores.dtype).min).masked_fill(~asked, -torch.inf)
    best = largest(applied.T.contiguous(), slots)
    return asked & pairs.scatter(0, best.T, True)
