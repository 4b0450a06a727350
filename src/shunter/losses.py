"""Auxiliary losses of a routing: what keeps experts balanced and logits small. Pure functions, float32 or float64.

Each takes values over real tokens only: what stands in a row that `mask` leaves out, NaN too, reaches neither the loss
nor a gradient.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from .routing import Routing

__all__ = [
    "Choices",
    "consistency_loss",
    "cost_loss",
    "cv_squared",
    "entropy",
    "global_entropy_loss",
    "importance_loss",
    "load_balancing_loss",
    "load_loss",
    "local_entropy_loss",
    "mean_importance_loss",
    "mean_over_tokens",
    "selection_probability",
    "sparsity_loss",
    "variance_over_tokens",
    "z_loss",
]

Choices = Literal["first", "all", "mean"]


def _real(values: Tensor, mask: Tensor | None, instead: float = 0.0) -> Tensor:
    """Values (..., n) with another number in the rows that mask (...) leaves out."""
    return values if mask is None else torch.where(mask[..., None], values, instead)


def mean_over_tokens(values: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of values (T, ...) over the tokens where mask (T,) is True; zero where there is none."""
    if mask is None:
        return values.mean(0) if values.shape[0] else values.sum(0)
    real = mask.to(values.dtype).reshape(-1, *[1] * (values.dim() - 1))
    return torch.where(mask.reshape(real.shape), values, 0).sum(0) / real.sum().clamp_min(1)


def variance_over_tokens(values: Tensor, mask: Tensor | None) -> Tensor:
    """The population variance of values (T, ...) over the tokens where mask (T,) is True; zero where there is none."""
    values = _real(values, mask)
    return mean_over_tokens((values - mean_over_tokens(values, mask)).square(), mask)


def cost_loss(probs: Tensor, cost: Tensor, mask: Tensor | None = None) -> Tensor:
    """(1/T) sum_t sum_i p_ti c_i: what a token is expected to spend, where experts cost differently; scalar.

    Args:
        probs: (T, E) router probabilities; gradients flow through them.
        cost: (E,) what each expert costs, of any unit: FLOPs, seconds, their share of the dearest.
        mask: (T,) bool, True at real tokens.

    Source: Fedus et al. 2022, section 9 (heterogeneous experts): its suggestion, as the expectation of the cost.
    """
    return mean_over_tokens(probs @ cost.to(probs), mask)


def load_balancing_loss(
    probs: Tensor,
    routing: Routing,
    mask: Tensor | None = None,
    choices: Choices = "mean",
    group: Tensor | None = None,
    demand: Tensor | None = None,
) -> Tensor:
    """E * sum_i f_i P_i: the dot product of the share of tokens sent to each expert and its mean probability.

    Args:
        probs: (T, E) router probabilities; rows sum to 1. Gradients flow through these alone.
        routing: what was chosen; tokens that capacity dropped count as sent, as in Switch.
        mask: (T,) bool, True at real tokens.
        choices: which choices make f: "first" alone, "all" of them (the balanced value is then k), or "mean" (all,
            divided by k: the balanced value is 1).
        group: (T,) int64, the group of each token: f and P are taken within each group, and the loss is the mean over
            the groups with real tokens. Groups are GShard's, or the sequences of DeepSeek-V3's sequence-wise loss.
        demand: (E,) how many tokens were sent to each expert in a larger batch, of which these tokens are a part: f is
            taken from it, divided by its sum. None takes f from the routing.

    Returns:
        A scalar; 1 (or k, for "all") at perfect balance. It is not a lower bound: f and P may differ.

    Source: Fedus et al. 2021 (Switch Transformers), equations 4 to 6; Lepikhin et al. 2020 (GShard), algorithm 1; of
        a larger batch: Qiu et al. 2025 (Demons in the Detail), section 3.
    """
    if group is not None:
        return _mean_over_groups(probs, routing, mask, choices, group)
    if demand is None:
        demand = routing.first_choices if choices == "first" else routing.demand
    share = demand.to(probs.dtype)
    if choices == "all":
        tokens = probs.shape[0] if mask is None else mask.sum()
        share = share / torch.as_tensor(tokens, device=probs.device).clamp_min(1)
    else:
        share = share / share.sum().clamp_min(1)
    return routing.num_experts * (share * mean_over_tokens(probs, mask)).sum()


def _mean_over_groups(probs: Tensor, routing: Routing, mask: Tensor | None, choices: Choices, group: Tensor) -> Tensor:
    """The load balancing loss of each group, and their mean over the groups with real tokens."""
    num_groups = int(group.max()) + 1 if group.numel() else 1
    asked = probs.new_zeros(num_groups, routing.num_experts)
    for part in (routing, routing.dropped):
        if part is None:
            continue
        counted = slice(None) if choices != "first" or part.choice is None else part.choice == 0
        token, expert = part.token[counted], part.expert[counted]
        asked.index_put_((group[token], expert), asked.new_ones(()), accumulate=True)
    mean, size = _means(probs, mask, group)
    share = asked / (size if choices == "all" else asked.sum(1)).clamp_min(1)[:, None]
    return routing.num_experts * _over_groups((share * mean).sum(1), size)


def _means(values: Tensor, mask: Tensor | None, group: Tensor) -> tuple[Tensor, Tensor]:
    """The means (G, n) of values (T, n) over the real tokens of each group, and how many there are (G,)."""
    num_groups = int(group.max()) + 1 if group.numel() else 1
    real = values.new_ones(values.shape[0]) if mask is None else mask.to(values.dtype)
    size = real.new_zeros(num_groups).index_add(0, group, real)
    total = values.new_zeros(num_groups, values.shape[1]).index_add(0, group, _real(values, mask))
    return total / size.clamp_min(1)[:, None], size


def _over_groups(values: Tensor, size: Tensor) -> Tensor:
    """The mean of values (G,) over the groups with real tokens, of which each has size (G,)."""
    return torch.where(size > 0, values, 0).sum() / (size > 0).sum().clamp_min(1)


def cv_squared(values: Tensor) -> Tensor:
    """The squared coefficient of variation (...) of values (..., E): population variance over squared mean.

    It is 0 where all are 0.
    """
    mean = values.mean(-1, keepdim=True)
    return ((values - mean) ** 2).mean(-1) / (mean[..., 0] ** 2).clamp_min(torch.finfo(values.dtype).tiny)


def importance_loss(weights: Tensor, mask: Tensor | None = None, group: Tensor | None = None) -> Tensor:
    """CV(importance)^2, where the importance of an expert is the sum over tokens of its gate weights (T, E).

    Args:
        weights: (T, E).
        mask: (T,) bool, True at real tokens.
        group: (T,) int64, the group of each token: the loss is then the mean of those of the groups with real tokens,
            as V-MoE's. None takes all tokens as one group.

    Source: Shazeer et al. 2017 (Outrageously Large Neural Networks), equations 6 and 7.
    """
    if group is None:
        return cv_squared(mean_over_tokens(weights, mask))
    mean, size = _means(weights, mask, group)
    return _over_groups(cv_squared(mean), size)


def selection_probability(
    clean: Tensor, noisy: Tensor, std: Tensor | float, top_k: int, leave_one_out: bool = True
) -> Tensor:
    """P(x, i) (T, E): the probability that an expert stays among the k best when its own noise alone is drawn again.

    Args:
        clean: (T, E) logits without noise.
        noisy: (T, E) logits as they were ranked; gradients flow through the threshold taken from them.
        std: standard deviation of the noise, (T, E) or one number, positive.
        top_k: k.
        leave_one_out: True takes as threshold of an expert the k-th largest without the expert itself (Shazeer); False
            the k-th largest of all (V-MoE).

    Source: Shazeer et al. 2017, equations 8 and 9; Riquelme et al. 2021 (V-MoE), appendix A.
    """
    if not leave_one_out:
        threshold = noisy.topk(top_k, dim=-1).values[..., -1:]
    elif top_k >= noisy.shape[-1]:
        # Certain, but in the graph: a loss without a gradient is taken for one that was computed without autograd.
        return 1 + 0 * clean.nan_to_num(0.0, 0.0, 0.0)
    else:
        best = noisy.topk(top_k + 1, dim=-1).values
        kth, following = best[..., -2:-1], best[..., -1:]
        threshold = torch.where(noisy > following, following, kth)
    return torch.special.ndtr((clean - threshold) / std)


def load_loss(
    clean: Tensor,
    noisy: Tensor,
    std: Tensor | float,
    top_k: int,
    mask: Tensor | None = None,
    leave_one_out: bool = True,
    group: Tensor | None = None,
) -> Tensor:
    """CV(load)^2, where the load of an expert is the sum over tokens of its `selection_probability`.

    Mask and group are those of `importance_loss`, the others those of `selection_probability`.

    Source: Shazeer et al. 2017, equations 10 and 11.
    """
    clean, noisy = _real(clean, mask), _real(noisy, mask)
    if isinstance(std, Tensor):
        std = _real(std, mask, 1.0)
    return importance_loss(selection_probability(clean, noisy, std, top_k, leave_one_out), mask, group)


def entropy(probs: Tensor) -> Tensor:
    """The entropy (...) in nats of distributions (..., E); finite, with finite gradients, at zero probabilities."""
    return (probs * -probs.clamp_min(torch.finfo(probs.dtype).tiny).log()).sum(-1)


def local_entropy_loss(probs: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean over tokens of the entropy of probs (T, E): low where each token is sure of its expert.

    Source: Mustafa et al. 2022 (LIMoE), section 2.2, the local loss.
    """
    return mean_over_tokens(entropy(_real(probs, mask)), mask)


def global_entropy_loss(probs: Tensor, mask: Tensor | None = None, minimum: float = 1.0) -> Tensor:
    """max(0, ln(minimum) - H(mean of probs (T, E))): zero where the tokens spread over at least `minimum` experts.

    Source: Mustafa et al. 2022 (LIMoE), section 2.2, the thresholded global loss, whose soft minimum is S experts.
    """
    spread = entropy(mean_over_tokens(probs, mask))
    loss = (math.log(minimum) - spread).clamp_min(0)
    return loss if mask is None else torch.where(mask.any(), loss, 0)


def sparsity_loss(probs: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean over tokens of |p|_1 / |p|_2, from 1 (one expert) to sqrt(E) (all alike).

    Source: You et al. 2021 (SpeechMoE), the sparsity L1 loss.
    """
    probs = _real(probs, mask)
    norm = probs.square().sum(-1).clamp_min(torch.finfo(probs.dtype).tiny).sqrt()
    return mean_over_tokens(probs.sum(-1) / norm, mask)


def mean_importance_loss(probs: Tensor, mask: Tensor | None = None, group: Tensor | None = None) -> Tensor:
    """E * sum_i (mean over tokens of p_i)^2, from 1 (balanced) to E; 1 more than the importance loss.

    Mask and group are those of `importance_loss`.

    Source: You et al. 2021 (SpeechMoE), the mean importance loss.
    """
    if group is None:
        return probs.shape[-1] * mean_over_tokens(probs, mask).square().sum()
    mean, size = _means(probs, mask, group)
    return probs.shape[-1] * _over_groups(mean.square().sum(1), size)


def consistency_loss(logits: Tensor, other: Tensor, mask: Tensor | None = None) -> Tensor:
    """(KL(p || q) + KL(q || p)) / 2, mean over tokens, of the predictions p, q of two passes; 0 only where they agree.

    A training step with the `thor` router is two forwards and the loss CE + CE' + alpha * consistency_loss, each a mean
    over the same tokens; alpha is 5 in the paper, 1 in its code.

    Args:
        logits, other: (..., V) the next-token logits of the two passes; gradients flow through both.
        mask: (...) bool, True at real tokens.

    Source: Zuo et al. 2021 (Taming Sparsely Activated Transformer with Stochastic Experts), section 3.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    p, q = (_real(values.to(dtype), mask).log_softmax(-1) for values in (logits, other))
    # An entry that both passes rule out has the logits -inf, whose difference is no number.
    gap = torch.where(p == q, 0, p - q)
    divergence = 0.5 * ((p.exp() - q.exp()) * gap).sum(-1)
    return mean_over_tokens(divergence.reshape(-1), None if mask is None else mask.reshape(-1))


def z_loss(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean over tokens of the squared log-sum-exp of the logits (T, E): keeps router logits small.

    Source: Zoph et al. 2022 (ST-MoE), equation 5.
    """
    return mean_over_tokens(torch.logsumexp(_real(logits, mask), dim=-1) ** 2, mask)
