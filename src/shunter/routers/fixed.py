"""Fixed: what is known of a token before training names its expert; nothing is learned, every weight is 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..context import NO_CONTEXT, Context
from ..routing import Routing
from .base import Router

__all__ = ["Domain", "Fixed", "Language", "Unlearned"]


class Unlearned(Router):
    """A router without parameters: every logit is 0."""

    chooses: ClassVar[str] = "fixed"

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_experts, **options)

    def score(self, x: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        """Zeros (T, E): nothing is learned."""
        return x.new_zeros(x.shape[0], self.num_experts, dtype=torch.promote_types(x.dtype, torch.float32))

    def extra_repr(self) -> str:
        """d and E, for `print(model)`."""
        return f"dim={self.dim}, num_experts={self.num_experts}"


class Fixed(Unlearned):
    """A subclass names the experts of each token (`experts_of`), each with weight 1."""

    def experts_of(self, context: Context) -> Tensor:
        """The experts of each token, (T, k) int64, different within a row."""
        raise NotImplementedError

    def choose(self, logits: Tensor, context: Context) -> Routing:
        """The experts of each token, with weight 1."""
        index = self.experts_of(context)
        return Routing.from_topk(index, logits.new_ones(index.shape), self.num_experts, check=False)


class _Labelled(Fixed):
    """A router by a label of the token, which `needs` names; a table, saved with the layer, has its expert."""

    experts: Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        experts: Sequence[int] | None = None,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_experts, **options)
        chosen = range(num_experts) if experts is None else experts
        table = torch.as_tensor(chosen, dtype=torch.int64, device="cpu")
        if table.dim() != 1 or not table.numel() or int(table.min()) < 0 or int(table.max()) >= num_experts:
            raise ValueError(
                f"{type(self).__name__}: experts must name one expert, 0 to {num_experts - 1}, for each "
                f"{self.needs[0]}; got {experts}"
            )
        self.register_buffer("experts", table.to(device))

    def experts_of(self, context: Context) -> Tensor:
        """The expert (T, 1) of each token's label."""
        return self.experts[self.require(context, self.needs[0], self.experts.numel())][:, None]


class Domain(_Labelled):
    """DEMix: an expert for each domain of the documents, chosen by the document's label, in training and known text.

    Where the domain is not known, `shunter.domains` mixes the predictions of all of them by their posterior.

    Args:
        experts: the expert of each domain; None gives domain i the expert i.
        **options: of `Router`; dropless, as a batch may well be of one domain.

    Raises:
        ValueError: for a domain or an expert out of range.

    Source: Gururangan et al. 2021 (DEMix Layers), section 3.
    """

    source: ClassVar[str] = "Gururangan et al. 2021"
    needs: ClassVar[tuple[str, ...]] = ("domain",)


class Language(_Labelled):
    """Language-specific layers: an expert for each language, or for each group of languages.

    Args:
        experts: the expert of each language, the same for the languages of a group; None gives language i the expert i.
        **options: of `Router`; dropless, as a batch may well be of one language.

    Raises:
        ValueError: for a language or an expert out of range.

    Source: Fan et al. 2021 (Beyond English-Centric Multilingual Machine Translation), language-specific parameters.
    """

    source: ClassVar[str] = "Fan et al. 2021"
    needs: ClassVar[tuple[str, ...]] = ("language",)
