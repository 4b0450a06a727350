"""What is known of a layer's T tokens besides their hidden states: padding, ids, task, sequence, forced experts."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["NO_CONTEXT", "Context", "with_sequence"]


@dataclass(frozen=True)
class Context:
    """What a router may know of the tokens besides their hidden states.

    Args:
        mask: (T,) bool, True at real tokens, False at padding; None where all are real.
        token_ids: (T,) int64 vocabulary ids.
        task: (T,) int64 task of each token.
        domain: (T,) int64 domain of each token's document.
        language: (T,) int64 language of each token.
        modality: (T,) int64 modality of each token (text, image, speech, ...).
        sequence: (T,) int64 number of the sequence that each token belongs to; tokens of one are in order.
        position: (T,) int64 place of each token in its sequence.
        embedding: (T, w) floating point, what another network knows of each token (SpeechMoE's shared embedding).
        experts: (T, k) int64, the experts that each token takes, best first and -1 for none: a decision forced or
            replayed, which leaves the router the weights alone.
    """

    mask: Tensor | None = None
    token_ids: Tensor | None = None
    task: Tensor | None = None
    domain: Tensor | None = None
    language: Tensor | None = None
    modality: Tensor | None = None
    sequence: Tensor | None = None
    position: Tensor | None = None
    embedding: Tensor | None = None
    experts: Tensor | None = None

    def num_real(self, num_tokens: int) -> int:
        """T without padding."""
        return num_tokens if self.mask is None else int(self.mask.sum())

    def forced(self, num_experts: int) -> tuple[Tensor, Tensor]:
        """The forced experts (T, k), 0 in place of -1, and the mask (T, k) of those that there are.

        Raises:
            ValueError: where one is not in -1..E-1, or comes twice in a row.
        """
        assert self.experts is not None
        experts = self.experts.to(torch.int64)
        if experts.numel() and (int(experts.min()) < -1 or int(experts.max()) >= num_experts):
            bad = int(experts[(experts < -1) | (experts >= num_experts)][0])
            raise ValueError(f"experts {bad} is out of range; experts are 0 to {num_experts - 1}, and -1 for none")
        row = experts.sort(dim=-1).values
        again = (row[:, 1:] == row[:, :-1]) & (row[:, 1:] >= 0)
        if bool(again.any()):
            token = int(again.any(-1).nonzero()[0])
            raise ValueError(f"experts of token {token} are {experts[token].tolist()}; an expert may come once only")
        return experts.clamp_min(0), experts >= 0


NO_CONTEXT = Context()


def with_sequence(context: Context, x: Tensor) -> Context:
    """A layer's context; which sequence each token is in taken from the shape (B, ..., d) of its input if not told."""
    if context.sequence is not None or x.dim() < 3:
        return context
    length = x.shape[1:-1].numel()
    return replace(context, sequence=torch.arange(x.shape[0], device=x.device).repeat_interleave(length))
