"""Mixing the domains' predictions: Bayes' rule, what it guarantees, and that it finds the domain of a text."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import shunter
from shunter import MoE
from shunter.layers.domain_mixture import DomainMixture, by_domain, posterior, token_log_likelihoods

DOMAINS, VOCAB = 3, 7
UNIFORM = torch.full((DOMAINS,), 1 / DOMAINS, dtype=torch.float64)
IDS = [torch.zeros(1, 2, dtype=torch.int64)]


@pytest.mark.parametrize("window", [None, 0, 1, 3])
def test_the_posterior_is_bayes_rule_written_out(window):
    likelihood = torch.rand(2, 6, DOMAINS, dtype=torch.float64)
    prior = torch.rand(DOMAINS, dtype=torch.float64).softmax(0)
    found = posterior(likelihood.log(), prior, window)
    assert found.shape == (2, 7, DOMAINS)
    for b, t in itertools.product(range(2), range(7)):
        start = 0 if window is None else max(0, t - window)
        weight = prior * likelihood[b, start:t].prod(0)
        assert torch.allclose(found[b, t], weight / weight.sum())


def _loss(likelihood, belief):
    """The loss of the mixture over a sequence, in nats."""
    return -(belief[:-1] * likelihood.exp()).sum(-1).log().sum()


def test_the_mixture_loses_at_most_the_prior_to_the_best_domain():
    for _ in range(50):
        likelihood = -3 * torch.rand(40, DOMAINS, dtype=torch.float64)
        prior = torch.rand(DOMAINS, dtype=torch.float64).softmax(0)
        mixed = _loss(likelihood, posterior(likelihood, prior))
        assert (mixed <= -likelihood.sum(0) - prior.log() + 1e-9).all()
        # It is Bayes' evidence itself.
        assert torch.allclose(mixed, -torch.logsumexp(likelihood.sum(0) + prior.log(), 0))


def test_only_the_whole_past_has_that_guarantee():
    """The last token alone, as in the paper's code, is no Bayes' rule: a domain a bit better all along never wins."""
    likelihood = torch.tensor([[0.5, 0.4, 0.4]], dtype=torch.float64).log().expand(200, 3)
    best = -likelihood[:, 0].sum()
    assert _loss(likelihood, posterior(likelihood, UNIFORM)) <= best + math.log(DOMAINS) + 1e-9
    assert _loss(likelihood, posterior(likelihood, UNIFORM, window=1)) > best + 10 * math.log(DOMAINS)


class _Chains:
    """Every domain a Markov chain with favourite successors of its own, and the predictor that knows it.

    A token tells its domain by over 3.5 nats in the mean and within 5.5 in any case, so 300 of them tell it by more
    than 10 but in exp(-2 * 1040^2 / (300 * 11^2)) of all texts.
    """

    def __init__(self, domains=DOMAINS):
        favourite = torch.stack([torch.eye(VOCAB).roll(domain + 1, dims=1) for domain in range(domains)])
        self.logits = torch.rand(domains, VOCAB, VOCAB) / 2 + 5 * favourite

    def __call__(self, domain, input_ids, **inputs):
        return self.logits[domain][input_ids]

    def text(self, domain, length):
        ids = [torch.randint(VOCAB, (1,))]
        for _ in range(length - 1):
            ids.append(torch.multinomial(self.logits[domain][ids[-1][0]].softmax(-1), 1))
        return torch.cat(ids)


def test_the_mixture_is_the_weighted_sum_of_the_predictions():
    chains = _Chains()
    ids = torch.randint(VOCAB, (2, 9))
    log_probs, belief = DomainMixture(chains, DOMAINS)(ids)
    assert log_probs.shape == (2, 9, VOCAB) and belief.shape == (2, 9, DOMAINS)
    tables = chains.logits.double().softmax(-1)
    for b in range(2):
        weight = UNIFORM
        for t in range(9):
            if t:
                weight = weight * tables[:, ids[b, t - 1], ids[b, t]]
                weight = weight / weight.sum()
            expected = (weight[:, None] * tables[:, ids[b, t]]).sum(0)
            assert torch.allclose(belief[b, t].double(), weight, atol=1e-6)
            assert torch.allclose(log_probs[b, t].double().exp(), expected, atol=1e-6)


def test_a_text_is_known_by_its_own_domain():
    chains = _Chains()
    ids = torch.stack([chains.text(domain, 400) for domain in range(DOMAINS)])
    belief = DomainMixture(chains, DOMAINS)(ids).belief
    assert (belief[:, -1].diagonal() > 0.999).all()
    assert torch.allclose(belief[:, 0], UNIFORM.float().expand(DOMAINS, -1))


def test_one_domain_is_its_model():
    chains = _Chains(1)
    ids = torch.randint(VOCAB, (2, 9))
    assert torch.allclose(DomainMixture(chains, 1)(ids).log_probs, chains(0, ids).log_softmax(-1), atol=1e-6)


def test_padding_tells_nothing():
    chains = _Chains()
    ids = torch.randint(VOCAB, (1, 8))
    mixture = DomainMixture(chains, DOMAINS)
    alone = mixture(ids)
    for left in (True, False):
        padded = F.pad(ids, (3, 0) if left else (0, 3), value=VOCAB - 1)
        mask = F.pad(torch.ones_like(ids), (3, 0) if left else (0, 3))
        both = mixture(padded, mask)
        own = slice(3, None) if left else slice(0, 8)
        assert torch.allclose(both.log_probs[:, own], alone.log_probs, atol=1e-6)
        assert torch.allclose(both.belief[:, -1], alone.belief[:, -1])


def test_priors_are_uniform_updating_or_cached():
    chains = _Chains()
    # Few tokens, or the belief is the same before the last one.
    first, second = (torch.stack([chains.text(domain, 4) for domain in pair]) for pair in ((2, 1), (0, 1)))
    uniform, updating = (DomainMixture(chains, DOMAINS, prior) for prior in ("uniform", "updating"))
    cached = DomainMixture(chains, DOMAINS, "cached")
    ends = uniform(first).belief[:, -1].double()
    uniform(second)
    assert torch.allclose(uniform.prior, UNIFORM)
    updating(first)
    # The newest has weight 0.3, the one before 0.3 * 0.7, and they sum to 1.
    expected = (0.7 * ends[0] + ends[1]) / 1.7
    assert torch.allclose(updating.prior, expected, atol=1e-6)
    assert torch.allclose(updating(second).belief[:, 0].double(), expected.expand(2, -1), atol=1e-6)
    assert not torch.allclose(updating.prior, expected)
    cached.observe([first[:1], first[1:]])
    assert torch.allclose(cached.prior, expected, atol=1e-6)
    assert torch.allclose(cached(second).belief[:, 0].double(), expected.expand(2, -1), atol=1e-6)
    cached(second)
    assert torch.allclose(cached.prior, expected, atol=1e-6)


def test_a_domain_that_was_ruled_out_comes_back():
    chains = _Chains()
    mixture = DomainMixture(chains, DOMAINS, "updating", update_rate=1.0)
    mixture(chains.text(0, 2000)[None])
    assert mixture(chains.text(1, 2000)[None]).belief[0, -1, 1] > 0.99


def test_a_fixed_mixture_is_the_prior_alone():
    chains = _Chains()
    mixture = DomainMixture(chains, DOMAINS, "cached", window=0)
    mixture.observe([chains.text(0, 50)[None]])
    belief = mixture(chains.text(1, 50)[None]).belief
    assert torch.allclose(belief.double(), mixture.prior.expand_as(belief))


def test_of_a_belief_the_largest_weights_stay():
    chains = _Chains()
    ids = torch.randint(VOCAB, (2, 9))
    whole = DomainMixture(chains, DOMAINS)(ids)
    torch.testing.assert_close(DomainMixture(chains, DOMAINS, top_k=DOMAINS)(ids), whole)
    two, one = (DomainMixture(chains, DOMAINS, top_k=k)(ids) for k in (2, 1))
    least = F.one_hot(whole.belief.flip(-1).argmin(-1), DOMAINS).flip(-1)
    expected = whole.belief * (1 - least)
    torch.testing.assert_close(two.belief, expected / expected.sum(-1, keepdim=True))
    best = whole.belief.argmax(-1)
    assert torch.equal(one.belief, F.one_hot(best, DOMAINS).float())
    each = torch.stack([chains(j, ids).log_softmax(-1) for j in range(DOMAINS)], -2)
    chosen = each.gather(-2, best[..., None, None].expand(*best.shape, 1, VOCAB))[..., 0, :]
    torch.testing.assert_close(one.log_probs, chosen)


def test_losses_follow_from_the_likelihoods_of_the_tokens():
    chains = _Chains()
    ids = torch.randint(VOCAB, (3, 9))
    likelihood = token_log_likelihoods(chains, DOMAINS, ids)
    assert likelihood.shape == (3, 8, DOMAINS)
    for options in ({}, {"window": 1}, {"top_k": 2}, {"prior": "updating"}):
        whole, bare = DomainMixture(chains, DOMAINS, **options), DomainMixture(chains, DOMAINS, **options)
        for _ in range(2):  # the second begins with another prior where it is updating
            log_probs, belief = whole(ids)
            found = bare.believe(likelihood)
            torch.testing.assert_close(found, belief)
            expected = log_probs[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
            torch.testing.assert_close((found[:, :-1].log() + likelihood).logsumexp(-1), expected)


class _Model(nn.Module):
    """A bigram model with one DEMix layer."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 16)
        self.moe = MoE(16, 32, DOMAINS, router="domain")
        self.head = nn.Linear(16, VOCAB)

    def forward(self, input_ids):
        x = self.embed(input_ids)
        return self.head(x + self.moe(x))


def test_trained_domain_experts_find_the_domain():
    chains, model = _Chains(), _Model()
    labels = torch.arange(DOMAINS).repeat(8)
    ids = torch.stack([chains.text(int(domain), 64) for domain in labels])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        with shunter.tell(model, domain=labels):
            logits = model(ids)
        optimizer.zero_grad()
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
    fresh = torch.stack([chains.text(domain, 300) for domain in range(DOMAINS)])
    mixture = DomainMixture(by_domain(model.eval()), DOMAINS)
    log_probs, belief = mixture(fresh)
    assert (belief[:, -1].argmax(-1) == torch.arange(DOMAINS)).all()
    nats = F.nll_loss(log_probs[:, :-1].transpose(1, 2), fresh[:, 1:], reduction="none").sum(1)
    for domain in range(DOMAINS):
        own = F.cross_entropy(mixture.predict(domain, input_ids=fresh)[:, :-1].transpose(1, 2), fresh[:, 1:],
                              reduction="none").sum(1)  # fmt: skip
        assert (nats <= own + math.log(DOMAINS) + 1e-2).all()


def _llama():
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def test_a_hugging_face_model_is_told_its_domains():
    model = shunter.sparsify(_llama(), DOMAINS, "domain").eval()
    ids = torch.randint(1, 50, (2, 6))
    with pytest.raises(ValueError, match="needs domain"):
        model(ids)
    with shunter.tell(model, domain=torch.tensor([2, 0])):
        together = model(ids).logits
        assert all(layer.routing.counts.tolist() == [6, 0, 6] for layer in shunter.moe_layers(model).values())
    with pytest.raises(ValueError, match="needs domain"):
        model(ids)
    predict = by_domain(model)
    for row, domain in enumerate((2, 0)):
        assert torch.allclose(predict(domain, input_ids=ids)[row], together[row], atol=1e-5)
    mixture = DomainMixture(predict, DOMAINS)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    log_probs = mixture(ids, mask).log_probs
    assert torch.allclose(log_probs.exp().sum(-1), torch.ones(2, 6), atol=1e-5)
    assert torch.allclose(mixture(ids[1:, :4]).log_probs[0], log_probs[1, :4], atol=1e-4)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: posterior(torch.zeros(2, 3), UNIFORM, -1), ValueError, "window -1 must be at least 0"),
        (lambda: DomainMixture(_Chains(), 3, "learned"), ValueError, "choose from uniform, updating, cached"),
        (lambda: DomainMixture(_Chains(), 0), ValueError, "num_domains 0 must be at least 1"),
        (lambda: DomainMixture(_Chains(), 3, update_rate=0.0), ValueError, r"update_rate 0.0 in \(0, 1\]"),
        (lambda: DomainMixture(_Chains(), 3, top_k=4), ValueError, "top_k 4 must be from 1 to num_domains 3"),
        (lambda: DomainMixture(_Chains(), 3).observe(IDS), ValueError, 'make the mixture with prior="cached"'),
        (lambda: by_domain(MoE(4, 4, 2)), ValueError, "no layer of this model has a router that needs domain"),
        (lambda: shunter.tell(MoE(4, 4, 2), colour=UNIFORM).__enter__(), TypeError, "colour is not known of tokens"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
