"""SpeechMoE: a router that also reads an embedding shared by all layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import losses
from ..context import Context
from ..routing import Routing
from .topk import TopK

__all__ = ["Speech"]


class Speech(TopK):
    """SpeechMoE routing: the router reads the hidden state and what an embedding network knows of the frame.

    The embedding network is shared by all layers and trained outside (by CTC in the paper); pass its output as
    `embedding=`. With num_domains the domain (or accent) of the utterance enters too (SpeechMoE2).

    Args:
        embedding_dim: the width of `embedding`.
        num_domains: how many domains or accents; 0 leaves them out. `domain` ids are 0 to num_domains - 1.
        sparsity_loss: coefficient of the sparsity L1 loss; 0.15 as in the reference configuration.
        mean_importance_loss: coefficient of the mean importance loss; 0.15 likewise.
        **options: of `TopK`, `LinearRouter` and `Router`; top-1, weighted by the raw probability.

    Raises:
        ValueError: where embedding_dim is missing, or the embedding has another width.

    Source: You et al. 2021 (SpeechMoE), section 3; You et al. 2022 (SpeechMoE2), section 3.
    """

    source: ClassVar[str] = "You et al. 2021"
    example_options: ClassVar[dict[str, Any]] = {"embedding_dim": 8}
    needs: ClassVar[tuple[str, ...]] = ("embedding",)

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        embedding_dim: int | None = None,
        num_domains: int = 0,
        top_k: int = 1,
        sparsity_loss: float = 0.15,
        mean_importance_loss: float = 0.15,
        load_balancing_loss: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        if embedding_dim is None or embedding_dim < 1:
            raise ValueError(f"speech routing needs embedding_dim=, the width of the embedding; got {embedding_dim}")
        options.update(load_balancing_loss=load_balancing_loss, device=device, dtype=dtype)
        super().__init__(dim, num_experts, top_k=top_k, **options)
        self.embedding_dim = embedding_dim
        self.num_domains = num_domains
        self.coefficients["sparsity_loss"] = sparsity_loss
        self.coefficients["mean_importance_loss"] = mean_importance_loss
        # A linear map of a concatenation is a sum of linear maps; that of a domain's embedding is a row of a table.
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.embedding_weight = nn.Parameter(torch.empty(num_experts, embedding_dim, **place))
        self.domain_logits = nn.Parameter(torch.zeros(num_domains, num_experts, **place)) if num_domains else None
        std = (self.init_scale / (dim + embedding_dim)) ** 0.5
        for weight in (self.weight, self.embedding_weight):
            nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)

    @property
    def required(self) -> tuple[str, ...]:
        """The embedding, and the domain where the router reads it."""
        return ("embedding", "domain") if self.num_domains else self.needs

    def project(self, x: Tensor, context: Context) -> Tensor:
        """The linear map (T, E) of x (T, d), the embedding (T, w) and the domain.

        Raises:
            ValueError: for an embedding of another shape.
        """
        embedding = self.require(context, "embedding")
        if embedding.shape != (x.shape[0], self.embedding_dim):
            raise ValueError(
                f"Speech: embedding has shape {tuple(embedding.shape)}; it must be {(x.shape[0], self.embedding_dim)}"
            )
        logits = super().project(x, context)
        logits = logits + F.linear(embedding.to(logits.dtype), self.embedding_weight.to(logits.dtype))
        if self.domain_logits is not None:
            domain = self.require(context, "domain", self.num_domains)
            logits = logits + self.domain_logits.to(logits.dtype)[domain]
        return logits

    def loss_terms(self, logits: Tensor, routing: Routing, context: Context) -> dict[str, Callable[[], Tensor]]:
        """Sparsity, mean importance, and the losses of `Router`."""
        probs = self.probs(logits)
        return {
            **super().loss_terms(logits, routing, context),
            "sparsity_loss": lambda: losses.sparsity_loss(probs, context.mask),
            "mean_importance_loss": lambda: losses.mean_importance_loss(probs, context.mask, self.groups(logits)),
        }
