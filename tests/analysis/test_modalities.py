"""Which experts each modality uses: a planted collapse is seen, an even use is not one."""

import math
import random

import pytest
import torch

from shunter.analysis.modalities import COLLAPSED, modality_use


def test_the_numbers_are_those_of_a_count_token_by_token():
    for _ in range(20):
        tokens, k, experts, modalities = random.randint(1, 60), random.randint(1, 3), random.randint(3, 9), 3
        index = torch.stack([torch.randperm(experts)[:k] for _ in range(tokens)])
        index = torch.where(torch.rand(tokens, k) < 0.3, -1, index)
        modality = torch.randint(-1, modalities, (tokens,))
        found = modality_use(index, modality, experts, modalities)
        for number, row in enumerate(found):
            mine = [index[t].tolist() for t in range(tokens) if modality[t] == number]
            taken = [e for chosen in mine for e in chosen if e >= 0]
            shares = [taken.count(e) / max(1, len(taken)) for e in range(experts)]
            assert row.shares == pytest.approx(shares)
            entropy = -sum(s * math.log(s) for s in shares if s > 0)
            assert row.effective == pytest.approx(math.exp(entropy) if taken else 0.0)
            alone = [all(e < 0 for e in chosen) for chosen in mine]
            assert row.unserved == pytest.approx(sum(alone) / max(1, len(alone)))


def test_a_planted_collapse_of_one_modality_is_seen():
    tokens, experts = 400, 8
    modality = (torch.arange(tokens) % 4 == 0).long()  # one in four is a word
    even = torch.arange(tokens) // 2 % experts
    image, text = modality_use(even[:, None], modality, experts, 2)
    assert not image.collapsed and not text.collapsed
    planted = torch.where(modality == 1, 5, even)
    image, text = modality_use(planted[:, None], modality, experts, 2)
    assert text.collapsed and text.shares[5] == 1 and text.effective == pytest.approx(1)
    assert not image.collapsed and image.effective > COLLAPSED
    nothing = torch.where(modality == 1, -1, even)
    image, text = modality_use(nothing[:, None], modality, experts, 2)
    assert text.collapsed and text.effective == 0 and text.unserved == 1, "whose tokens no expert takes"
