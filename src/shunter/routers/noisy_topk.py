"""Tokens choose, with learned noise: the router of the Outrageously Large Neural Networks, flat and hierarchical."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import losses
from ..context import NO_CONTEXT, Context
from ..routing import Routing
from .base import Router, largest

__all__ = ["HierarchicalNoisyTopK", "NoisyTopK"]


class NoisyTopK(Router):
    """Noisy top-k gating: H = x W_g + N(0, 1) * softplus(x W_noise) ranks, a softmax over the k best weighs.

    Both matrices start at zero, so that the first choices are noise alone, and balanced. Noise is for training only.
    The logits are (T, 3 E): clean, noisy, and the standard deviation of the noise, so that a decision and its losses
    can be repeated from plain numbers.

    Args:
        top_k: k, at least 2: with one choice the softmax over the chosen is the constant 1.
        noise_epsilon: the least standard deviation of the noise.
        importance_loss: coefficient of CV(importance)^2, the importance summed over the gates of the chosen.
        load_loss: coefficient of CV(load)^2, the load a smooth estimate of how many tokens an expert gets.
        **options: of `Router`.

    Raises:
        ValueError: where top_k is not in 2..E.

    Source: Shazeer et al. 2017 (Outrageously Large Neural Networks), section 2.1, equations 3 to 5; section 4 and
        appendix A for the losses. The coefficients are those of its language models.
    """

    chooses: ClassVar[str] = "tokens"
    source: ClassVar[str] = "Shazeer et al. 2017"

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        top_k: int = 2,
        noise_epsilon: float = 1e-2,
        importance_loss: float = 0.1,
        load_loss: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_experts, importance_loss=importance_loss, **options)
        if not 2 <= top_k <= num_experts:
            raise ValueError(
                f"noisy top-k gating needs top_k between 2 and num_experts, {num_experts}; got {top_k} (with one "
                "choice the softmax over the chosen is always 1, and the router gets no gradient)"
            )
        if noise_epsilon <= 0:
            raise ValueError(f"noise_epsilon {noise_epsilon} must be positive: the load divides by the noise")
        self.top_k = top_k
        self.noise_epsilon = noise_epsilon
        self.coefficients["load_loss"] = load_loss
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(num_experts, dim, **place))
        self.noise_weight = nn.Parameter(torch.empty(num_experts, dim, **place))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set both matrices to zero (appendix A: initial balance)."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.noise_weight)

    @property
    def score_width(self) -> int:
        """3 E: clean logits, noisy logits, and the standard deviation of the noise."""
        return 3 * self.num_experts

    def score(self, x: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        """Clean logits, noisy logits and standard deviations (T, 3 E) of x (T, d), in at least float32."""
        return self._noisy_logits(x, self.weight, self.noise_weight)

    def _noisy_logits(self, x: Tensor, weight: Tensor, noise_weight: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(dtype)
            clean = F.linear(x, weight.to(dtype))
            std = F.softplus(F.linear(x, noise_weight.to(dtype))) + self.noise_epsilon
            noisy = clean + torch.randn_like(clean) * std if self.training else clean
        return torch.cat([clean, noisy, std], dim=-1)

    def probs(self, logits: Tensor) -> Tensor:
        """The softmax (T, E) of the noisy logits over all experts."""
        return logits.chunk(3, dim=-1)[1].softmax(-1)

    def choose(self, logits: Tensor, context: Context) -> Routing:
        """The k largest noisy logits of each row, weighted by a softmax over them."""
        _, noisy, _ = logits.chunk(3, dim=-1)
        index, weight = _gates(noisy, self.top_k)
        return Routing.from_topk(index, weight, self.num_experts, check=False)

    def loss_terms(self, logits: Tensor, routing: Routing, context: Context) -> dict[str, Callable[[], Tensor]]:
        """Importance of the gates, load, z-loss of the clean logits, and the losses of `Router`."""
        clean, noisy, std = logits.chunk(3, dim=-1)
        return {
            **super().loss_terms(logits, routing, context),
            "importance_loss": lambda: losses.cv_squared(_importance(routing)),
            "load_loss": lambda: losses.load_loss(clean, noisy, std, self.top_k, context.mask),
            "z_loss": lambda: losses.z_loss(clean, context.mask),
        }

    def extra_repr(self) -> str:
        """d, E and k, for `print(model)`."""
        return f"dim={self.dim}, num_experts={self.num_experts}, top_k={self.top_k}"


class HierarchicalNoisyTopK(NoisyTopK):
    """Two levels of noisy top-k gating: first over groups of experts, then over the experts of each chosen group.

    The weight of an expert is the product of its two gates. Groups are runs of E / num_groups experts. The logits are
    (T, 3 G + 3 E): the three parts of `NoisyTopK` for the groups, then for the experts.

    Args:
        num_groups: G, how many groups; it divides E.
        top_groups: how many groups a token takes, at least 2.
        top_k: how many experts a token takes in each of its groups, at least 2.
        **options: of `NoisyTopK`.

    Raises:
        ValueError: where the sizes do not fit each other.

    Source: Shazeer et al. 2017, appendix B, equations 12 to 14.
    """

    example_options: ClassVar[dict[str, Any]] = {"num_groups": 2}

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        num_groups: int | None = None,
        top_groups: int = 2,
        top_k: int = 2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        if num_groups is None or num_groups < 1 or num_experts % num_groups:
            raise ValueError(f"num_groups {num_groups} must be given and divide num_experts, {num_experts}")
        size = num_experts // num_groups
        if not (2 <= top_groups <= num_groups and 2 <= top_k <= size):
            raise ValueError(
                f"top_groups {top_groups} must be between 2 and num_groups, {num_groups}, and top_k {top_k} between 2 "
                f"and the {size} experts of a group"
            )
        super().__init__(dim, num_experts, top_k=top_k, device=device, dtype=dtype, **options)
        self.num_groups = num_groups
        self.top_groups = top_groups
        self.top_k_in_group = top_k
        self.top_k = top_groups * top_k
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.group_weight = nn.Parameter(torch.zeros(num_groups, dim, **place))
        self.group_noise_weight = nn.Parameter(torch.zeros(num_groups, dim, **place))

    def reset_parameters(self) -> None:
        """Set all matrices to zero."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    @property
    def score_width(self) -> int:
        """3 G + 3 E."""
        return 3 * (self.num_groups + self.num_experts)

    def score(self, x: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        """The three parts for the groups, then for the experts (T, 3 G + 3 E), in at least float32."""
        groups = self._noisy_logits(x, self.group_weight, self.group_noise_weight)
        return torch.cat([groups, self._noisy_logits(x, self.weight, self.noise_weight)], dim=-1)

    def _split(self, logits: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        groups, experts = logits.split([3 * self.num_groups, 3 * self.num_experts], dim=-1)
        return groups.chunk(3, dim=-1), experts.chunk(3, dim=-1)

    def probs(self, logits: Tensor) -> Tensor:
        """The product (T, E) of the softmax over groups and the softmax over the experts of each group."""
        (_, group, _), (_, expert, _) = self._split(logits)
        within = expert.unflatten(-1, (self.num_groups, -1)).softmax(-1)
        return (group.softmax(-1)[..., None] * within).flatten(-2)

    def choose(self, logits: Tensor, context: Context) -> Routing:
        """The best experts of the best groups, weighted by the product of their gates."""
        (_, group_noisy, _), (_, expert_noisy, _) = self._split(logits)
        group, group_gate = _gates(group_noisy, self.top_groups)
        within = expert_noisy.unflatten(-1, (self.num_groups, -1))
        size = within.shape[-1]
        within = within.gather(1, group[..., None].expand(*group.shape, size))
        expert, gate = _gates(within.reshape(-1, size), self.top_k_in_group)
        shape = (*group.shape, self.top_k_in_group)
        index = (group[..., None] * size + expert.reshape(shape)).flatten(1)
        weight = (group_gate[..., None] * gate.reshape(shape)).flatten(1)
        return Routing.from_topk(index, weight, self.num_experts, check=False)

    def loss_terms(self, logits: Tensor, routing: Routing, context: Context) -> dict[str, Callable[[], Tensor]]:
        """As `NoisyTopK`; the load of an expert is its group's load times its share of the group's tokens."""
        groups, experts = self._split(logits)
        return {
            **super().loss_terms(torch.cat(experts, dim=-1), routing, context),
            "load_balancing_loss": lambda: losses.load_balancing_loss(
                self.probs(logits), routing, context.mask, self.balance_choices
            ),
            "load_loss": lambda: losses.cv_squared(self._load(groups, experts, context.mask).flatten()),
            "z_loss": lambda: losses.z_loss(groups[0], context.mask) + losses.z_loss(experts[0], context.mask),
        }

    def _load(self, groups: tuple[Tensor, ...], experts: tuple[Tensor, ...], mask: Tensor | None) -> Tensor:
        """Load_H (G, E / G) of equation 13."""
        clean, noisy, std = groups
        in_group = losses.selection_probability(clean, noisy, std, self.top_groups)
        chosen = torch.zeros_like(in_group).scatter(1, largest(noisy.detach(), self.top_groups), 1.0)
        if mask is not None:
            in_group, chosen = in_group.masked_fill(~mask[:, None], 0), chosen.masked_fill(~mask[:, None], 0)
        size = self.num_experts // self.num_groups
        clean, noisy, std = (part.reshape(-1, size) for part in experts)
        in_expert = losses.selection_probability(clean, noisy, std, self.top_k_in_group)
        in_expert = in_expert.reshape(-1, self.num_groups, size)
        if mask is not None:
            in_expert = in_expert.masked_fill(~mask[:, None, None], 0)
        share = (chosen[..., None] * in_expert).sum(0) / chosen.sum(0).clamp_min(1)[:, None]
        return in_group.sum(0)[:, None] * share


def _gates(noisy: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """G(x): the k largest of each row (T, k), and a softmax over them."""
    index = largest(noisy.detach(), top_k)
    return index, noisy.gather(-1, index).softmax(-1)


def _importance(routing: Routing) -> Tensor:
    """(E,): the summed weights of each expert, those that capacity dropped included."""
    total = routing.weight.new_zeros(routing.num_experts).index_add(0, routing.expert, routing.weight)
    if routing.dropped is not None:
        total = total.index_add(0, routing.dropped.expert, routing.dropped.weight)
    return total
