"""Domains that nobody labelled: all domains' experts predict, and are mixed by how well each explains the text so far.

A model whose layers have the router `domain` (DEMix layers), or a model for each domain, predicts the next token once
for each domain j; the mixture is p(x_t | x_<t) = sum_j p(x_t | x_<t, j) p(j | x_<t), and p(j | x_<t) follows from a
prior by Bayes' rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from ..moe import moe_layers, tell

__all__ = [
    "DomainMixture",
    "Mixture",
    "Predict",
    "Prior",
    "by_domain",
    "log_probs_by_domain",
    "posterior",
    "token_log_likelihoods",
]

Predict = Callable[..., Tensor]
"""predict(domain, input_ids=(B, L), …) -> (B, L, V): the logits of the token after each, by the experts of a domain."""

Prior = Literal["uniform", "updating", "cached"]


def posterior(log_likelihood: Tensor, prior: Tensor, window: int | None = None) -> Tensor:
    """p(j | x_<t) before each token and after the last, (..., N + 1, D): rows sum to 1, the first is the prior.

    With the whole past the mixture's loss over N tokens is at most that of the best domain plus -ln(its prior).

    Args:
        log_likelihood: (..., N, D) floating point, log p(x_t | x_<t, j) of each token by each domain's experts; zeros
            where a token is not to count.
        prior: (..., D), positive, sums to 1.
        window: how many of the last tokens count: None takes all, as Bayes' rule does; 1 is what the paper's code does;
            0 leaves the prior as it is.

    Raises:
        ValueError: where the window is negative.

    Source: Gururangan et al. 2021 (DEMix Layers), section 5.
    """
    if window is not None and window < 0:
        raise ValueError(f"posterior: window {window} must be at least 0, or None for the whole past")
    dtype = torch.promote_types(log_likelihood.dtype, torch.float32)
    evidence = torch.nn.functional.pad(log_likelihood.to(torch.float64).cumsum(-2), (0, 0, 1, 0))
    if window is not None:
        then = (torch.arange(evidence.shape[-2], device=evidence.device) - window).clamp_min(0)
        evidence = evidence - evidence[..., then, :]
    return (evidence + prior.to(evidence.dtype).log()[..., None, :]).softmax(-1).to(dtype)


class Mixture(NamedTuple):
    """What `DomainMixture` predicts.

    Args:
        log_probs: (B, L, V) at least float32, log p of the token after each.
        belief: (B, L, D), the weight of each domain in it, p(j | x_<=t).
    """

    log_probs: Tensor
    belief: Tensor


class DomainMixture:
    """The next token's distribution as the mixture of all domains' predictions.

    Args:
        predict: the logits by the experts of one domain: `by_domain(model)`, or any function of (domain, input_ids=…).
        num_domains: D.
        prior: with what belief a sequence begins: "uniform"; "updating", the running average of what was believed at
            the end of the sequences before it; "cached", the same average over the sequences that `observe` was shown,
            fixed from then on.
        update_rate: the weight of the newest sequence in the running average; the paper's 0.3.
        window: how many of the last tokens a belief rests on (see `posterior`); None takes the sequence so far.
        top_k: how many domains predict a token: of its belief the k largest weights stay, the first of equal ones, and
            sum to 1 again. None keeps all.

    Attributes:
        prior: (D,) float64, the present one.

    Raises:
        ValueError: for an unknown prior, or impossible values.

    Source: Gururangan et al. 2021 (DEMix Layers), section 5; for a whole model a domain, Li et al. 2022
    (Branch-Train-Merge).
    """

    def __init__(
        self,
        predict: Predict,
        num_domains: int,
        prior: Prior = "uniform",
        *,
        update_rate: float = 0.3,
        window: int | None = None,
        top_k: int | None = None,
    ) -> None:
        if prior not in get_args(Prior):
            raise ValueError(f"prior {prior!r} is unknown; choose from {', '.join(get_args(Prior))}")
        if top_k is not None and not 1 <= top_k <= num_domains:
            raise ValueError(f"DomainMixture: top_k {top_k} must be from 1 to num_domains {num_domains}")
        if num_domains < 1 or not 0 < update_rate <= 1:
            raise ValueError(
                f"DomainMixture: num_domains {num_domains} must be at least 1, update_rate {update_rate} in (0, 1]"
            )
        self.predict, self.num_domains, self.kind = predict, num_domains, prior
        self.update_rate, self.window, self.top_k = update_rate, window, top_k
        self.prior = torch.full((num_domains,), 1 / num_domains, dtype=torch.float64)
        self._sum, self._weight = torch.zeros(num_domains, dtype=torch.float64), 0.0

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Mixture:
        """The mixture for sequences (B, L) of token ids; an updating prior then takes them in, in order.

        Runs `predict` D times and holds D (B, L, V) tensors.

        Args:
            input_ids: (B, L) int64.
            attention_mask: (B, L), 1 at real tokens; padding tells nothing of the domain.
            **inputs: what else `predict` takes.
        """
        if attention_mask is not None:
            inputs["attention_mask"] = attention_mask
        each = log_probs_by_domain(self.predict, input_ids, [inputs] * self.num_domains)
        following = input_ids[:, 1:, None, None].expand(-1, -1, self.num_domains, 1)
        likelihood = each[:, :-1].gather(-1, following)[..., 0]
        if attention_mask is not None:
            real = attention_mask.to(torch.bool)
            likelihood = likelihood.masked_fill(~(real[:, 1:] & real[:, :-1])[..., None], 0)
        belief = self.believe(likelihood)
        return Mixture((each + belief.log()[..., None]).logsumexp(-2), belief)

    def believe(self, log_likelihood: Tensor) -> Tensor:
        """The weights (B, N + 1, D) of the domains before each token and after the last, by the present prior.

        An updating prior then takes the sequences in, in order.

        Args:
            log_likelihood: (B, N, D), as of `posterior`.
        """
        belief = posterior(log_likelihood, self.prior.to(log_likelihood.device), self.window)
        if self.kind == "updating":
            self._take(belief[:, -1])
        if self.top_k is None:
            return belief
        kept = belief.sort(dim=-1, descending=True, stable=True).indices[..., : self.top_k]
        belief = torch.zeros_like(belief).scatter(-1, kept, belief.gather(-1, kept))
        return belief / belief.sum(-1, keepdim=True)

    def observe(self, batches: Iterable[Tensor]) -> None:
        """Set the cached prior from sequences like those to come, (B, L) batches of token ids; 100 do in the paper.

        Each begins with the uniform prior.

        Raises:
            ValueError: where the prior is not "cached".
        """
        for input_ids in batches:
            self.observe_likelihood(token_log_likelihoods(self.predict, self.num_domains, input_ids))

    def observe_likelihood(self, log_likelihood: Tensor) -> None:
        """As `observe`, of sequences whose log-likelihoods (B, N, D) by each domain's experts are known.

        Raises:
            ValueError: where the prior is not "cached".
        """
        if self.kind != "cached":
            raise ValueError(f'observe: the prior is {self.kind!r}; make the mixture with prior="cached"')
        beginner = DomainMixture(self.predict, self.num_domains, window=self.window)
        self._take(beginner.believe(log_likelihood)[:, -1])

    def _take(self, beliefs: Tensor) -> None:
        """Bring the prior up to date with what was believed at the end of sequences (B, D)."""
        for belief in beliefs.to("cpu", torch.float64):
            self._sum = (1 - self.update_rate) * self._sum + belief
            self._weight = (1 - self.update_rate) * self._weight + 1
        if self._weight:
            # A domain that was ruled out once must be able to come back.
            mean = (self._sum / self._weight).clamp_min(torch.finfo(torch.float32).tiny)
            self.prior = mean / mean.sum()


@torch.no_grad()
def token_log_likelihoods(predict: Predict, num_domains: int, input_ids: Tensor) -> Tensor:
    """log p(x_t | x_<t, j) of all tokens (B, L) but the first by each domain's experts, (B, L - 1, D), float32 or more.

    It is all that losses of mixtures depend on: that of a token is -log sum_j belief_j p(x_t | x_<t, j).
    """
    following = input_ids[:, 1:, None]
    return torch.cat(
        [_log_probs(predict, i, input_ids, {})[:, :-1].gather(-1, following) for i in range(num_domains)], -1
    )


def log_probs_by_domain(predict: Predict, input_ids: Tensor, inputs: Sequence[dict[str, Any]]) -> Tensor:
    """log p of what follows on each token (B, L) by each domain's experts, (B, L, D, V), float32 or more.

    Args:
        predict: the logits by the experts of one domain.
        input_ids: (B, L) int64.
        inputs: of each domain, what else `predict` takes.
    """
    return torch.stack([_log_probs(predict, i, input_ids, more) for i, more in enumerate(inputs)], -2)


def _log_probs(predict: Predict, domain: int, input_ids: Tensor, inputs: dict[str, Any]) -> Tensor:
    logits = predict(domain, input_ids=input_ids, **inputs)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def by_domain(model: nn.Module) -> Predict:
    """A model's predictions by domain: its `MoE` layers are told that every token is of that domain.

    Args:
        model: a causal language model, of Hugging Face or any whose forward returns logits (B, L, V) or an object that
            has them. Put it in evaluation mode first.

    Raises:
        ValueError: where no layer of the model asks for a domain.
    """
    if not any("domain" in layer.decider.required for layer in moe_layers(model).values()):
        raise ValueError('by_domain: no layer of this model has a router that needs domain; use router="domain"')

    def predict(domain: int, **inputs: Any) -> Tensor:
        with tell(model, domain=torch.tensor(domain)):
            output = model(**inputs)
        return output if isinstance(output, Tensor) else output.logits

    return predict
