"""Experts of domains and held-out text in: the loss by domain under each way of mixing them, or text continued."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ..data.windows import EvalDomain, TextData
from ..hf.tokens import cache_argument, takes_cache
from ..layers.domain_mixture import DomainMixture, Predict, log_probs_by_domain, token_log_likelihoods

__all__ = [
    "CACHED",
    "OWN",
    "WAYS",
    "cached_prior",
    "caches",
    "continue_ids",
    "likelihoods",
    "losses",
    "mixed",
    "set_apart",
]

CACHED = 100
"""Windows of a domain that a cached prior is made of; the paper's number."""

OWN = "the label’s own"
"""What no mixing is called: the domain is known."""

WAYS: dict[str, dict[str, Any]] = {
    "uniform prior": {},
    "updating prior": {"prior": "updating"},
    "cached prior": {"prior": "cached"},
    "last token alone": {"window": 1},
}
"""Options of `DomainMixture`; the last is what the paper's code does."""


def set_apart(data: TextData, windows: int) -> tuple[list[EvalDomain], dict[str, Tensor]]:
    """The first held-out windows of each domain, and those behind them, for cached priors: by name, (W, L) int64."""
    first, rest = [], {}
    for domain in data.eval:
        labels = {name: label[:windows] for name, label in domain.labels.items()}
        first.append(replace(domain, input_ids=domain.input_ids[:windows], labels=labels))
        rest[domain.name] = domain.input_ids[windows : windows + CACHED]
    return first, rest


def likelihoods(
    predict: Predict, num_domains: int, windows: Mapping[str, Tensor], batch: int = 32
) -> dict[str, Tensor]:
    """log p of each token but the first by each domain's experts, (W, L - 1, D), of the windows of each domain."""
    return {
        name: torch.cat([token_log_likelihoods(predict, num_domains, some) for some in ids.split(batch)])
        for name, ids in windows.items()
        if len(ids)
    }


def cached_prior(likelihood: Tensor, window: int | None = None) -> Tensor:
    """The prior (D,) float64 that windows with these log-likelihoods (W, N, D) leave, the last counting most.

    Source: Gururangan et al. 2021 (DEMix Layers), section 5.
    """
    mixture = _mixture(likelihood.shape[-1], prior="cached", window=window)
    mixture.observe_likelihood(likelihood)
    return mixture.prior


def mixed(likelihood: Tensor, cache: Tensor | None = None, **options: Any) -> Tensor:
    """The loss (W,) in nats per token of a mixture on windows with log-likelihoods (W, N, D), one after another.

    Args:
        likelihood: of each domain's experts.
        cache: the same of the windows that a cached prior is made of.
        **options: of `DomainMixture`.
    """
    mixture = _mixture(likelihood.shape[-1], **options)
    if cache is not None and mixture.kind == "cached":
        mixture.observe_likelihood(cache)
    beliefs = torch.cat([mixture.believe(one) for one in likelihood.split(1)])
    return -(beliefs[:, :-1].log() + likelihood).logsumexp(-1).mean(-1)


def losses(
    each: Mapping[str, Tensor], cache: Mapping[str, Tensor], own: Mapping[str, int], top_k: int | None = None
) -> dict[str, dict[str, float]]:
    """The loss in nats per token by way of mixing and domain; without windows for a cached prior there is none.

    Args:
        each: log-likelihoods (W, N, D) of the held-out windows of each domain.
        cache: the same of the windows for cached priors.
        own: which experts are a domain's, for those that have some.
        top_k: of `DomainMixture`.
    """
    found = {OWN: {name: -float(each[name][..., place].mean()) for name, place in own.items()}}
    for way, options in WAYS.items():
        cached = options.get("prior") == "cached"
        found[way] = {
            name: float(mixed(likelihood, cache.get(name), top_k=top_k, **options).mean())
            for name, likelihood in each.items()
            if not cached or name in cache
        }
    return {way: by_domain for way, by_domain in found.items() if len(by_domain) == len(each)}


def caches(models: Sequence[PreTrainedModel]) -> list[dict[str, Any]] | None:
    """Empty keys and values for the model of each domain, as it is given them; None where one may not have them.

    Which may not, says `shunter.hf.tokens.takes_cache`.
    """
    if not all(map(takes_cache, models)):
        return None
    return [{cache_argument(model): DynamicCache(config=model.config), "use_cache": True} for model in models]


@torch.no_grad()
def continue_ids(
    mixture: DomainMixture,
    ids: Tensor,
    new_tokens: int,
    temperature: float,
    kept: Sequence[dict[str, Any]] | None = None,
) -> Tensor:
    """Token ids (1, L) continued by so many tokens; temperature 0 takes the likeliest.

    Args:
        mixture: of the experts of all domains.
        ids: to go on from.
        new_tokens: how many more.
        temperature: of the sampling.
        kept: of each domain its empty cache (`caches`), so that it sees a token once; None predicts all anew for each.
    """
    likelihood = seen = None
    for _ in range(new_tokens):
        if kept is None:
            log_probs = mixture(ids).log_probs[:, -1]
        else:
            given = ids if seen is None else ids[:, -1:]
            each = log_probs_by_domain(mixture.predict, given, kept)
            seen = each if seen is None else torch.cat([seen[:, -1:], each], 1)
            told = ids[:, ids.shape[1] - seen.shape[1] + 1 :, None, None].expand(-1, -1, mixture.num_domains, 1)
            newest = seen[:, :-1].gather(-1, told)[..., 0]
            likelihood = newest if likelihood is None else torch.cat([likelihood, newest], 1)
            log_probs = (seen[:, -1] + mixture.believe(likelihood)[:, -1].log()[..., None]).logsumexp(-2)
        if temperature:
            following = torch.multinomial((log_probs / temperature).softmax(-1), 1)
        else:
            following = log_probs.argmax(-1, keepdim=True)
        ids = torch.cat([ids, following], -1)
    return ids


def _mixture(num_domains: int, **options: Any) -> DomainMixture:
    """A mixture that is asked for beliefs alone."""

    def predict(domain: int, **inputs: Tensor) -> Tensor:
        raise NotImplementedError

    return DomainMixture(predict, num_domains, **options)
