"""A language model of two LSTM layers with experts between them: token ids in, logits of the next tokens out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..moe import MoE

__all__ = ["ExpertLSTM", "State"]

State = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Hidden and cell states, (1, B, d) each, of both layers."""


class ExpertLSTM(nn.Module):
    """Embedding, LSTM, experts, LSTM, softmax: each layer's output is dropped out and added to what it was given.

    The experts are applied to each time step alone, all steps together as one batch of tokens; their output passes a
    sigmoid.

        model = ExpertLSTM(vocab_size=10000, dim=512, hidden=1024, num_experts=256, num_groups=16)
        logits, state = model(ids)
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()) + shunter.aux_loss(model)

    Args:
        vocab_size: V.
        dim: d, of the embedding and both LSTMs.
        hidden: f, of each expert.
        num_experts: E.
        router: by default hierarchical gating, whose num_groups is an option.
        dropout: of every layer's output.
        **options: of the router.

    Source: Shazeer et al. 2017 (Outrageously Large Neural Networks), section 5.1 and appendices B and C.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        hidden: int,
        num_experts: int,
        *,
        router: str = "hierarchical_noisy_topk",
        dropout: float = 0.1,
        **options: Any,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, dim)
        self.lower, self.upper = (nn.LSTM(dim, dim, batch_first=True) for _ in range(2))
        self.experts = MoE(dim, hidden, num_experts, router, activation="relu", causal=True, **options)
        self.head = nn.Linear(dim, vocab_size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids: Tensor, state: State | None = None, mask: Tensor | None = None) -> tuple[Tensor, State]:
        """Logits (B, S, V) of the tokens after ids (B, S), and the state to go on from.

        Args:
            ids: int64.
            state: of the tokens before; None at the beginning.
            mask: (B, S), True at real tokens; padding belongs at the end, and takes no expert.
        """
        below, above = (None, None) if state is None else state
        x = self.dropout(self.embedding(ids))
        made, below = self.lower(x, below)
        x = x + self.dropout(made)
        x = x + self.dropout(torch.sigmoid(self.experts(x, mask=mask)))
        made, above = self.upper(x, above)
        return self.head(x + self.dropout(made)), (below, above)
