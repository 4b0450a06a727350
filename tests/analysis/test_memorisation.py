"""Exposure against planted ranks."""

import math

import pytest
import torch

from shunter.analysis.memorisation import CHANCE, exposure

from ..helpers import deviation


def test_planted_ranks_come_back():
    candidates, secrets = int(torch.randint(2, 300, ())), 50
    scores = torch.stack([torch.randperm(candidates) for _ in range(secrets)]).double()
    secret = torch.randint(candidates, (secrets,))
    rank = candidates - scores.gather(1, secret[:, None]).squeeze(1)
    assert exposure(scores, secret).tolist() == pytest.approx((math.log2(candidates) - torch.log2(rank)).tolist())
    scores.scatter_(1, secret[:, None], candidates + 1.0)
    assert exposure(scores, secret).tolist() == pytest.approx([math.log2(candidates)] * secrets)


def test_secrets_of_a_model_that_knows_nothing():
    draws, candidates = 20_000, 256
    found = exposure(torch.rand(draws, candidates), torch.randint(candidates, (draws,)))
    exact = sum(math.log2(candidates / rank) for rank in range(1, candidates + 1)) / candidates
    assert float(found.mean()) == pytest.approx(exact, abs=deviation(draws, width=math.log2(candidates)))
    assert exact == pytest.approx(CHANCE, abs=0.03)
    assert exposure(torch.zeros(3, 9), torch.tensor([0, 4, 8])).tolist() == pytest.approx([math.log2(9 / 5)] * 3)


@pytest.mark.parametrize(
    "scores, secret, said",
    [
        (torch.zeros(3), torch.zeros(3, dtype=torch.long), "must be"),
        (torch.zeros(2, 3), torch.zeros(3, dtype=torch.long), "must be"),
        (torch.full((1, 3), math.nan), torch.zeros(1, dtype=torch.long), "NaN"),
        (torch.zeros(1, 3), torch.tensor([3]), "one of the 3"),
        (torch.zeros(1, 3), torch.tensor([-1]), "one of the 3"),
    ],
)
def test_what_is_no_secret_is_refused(scores, secret, said):
    with pytest.raises(ValueError, match=said):
        exposure(scores, secret)
