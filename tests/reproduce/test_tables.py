"""Lifts of tables 2 and 3 against planted experts."""

import pytest
import torch

pytest.importorskip("pydantic")
pytest.importorskip("transformers")

from shunter.reproduce.tables import kind_lifts


def test_a_planted_expert_of_a_kind_is_found_and_chance_is_not():
    tokens, experts, kinds = 8000, 8, 5
    label = torch.multinomial(torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05]), tokens, replacement=True)
    index = torch.randint(experts - 1, (tokens, 1))
    found, chance = kind_lifts(index, label, experts, kinds)
    assert (found < 2 * chance).all(), "experts that know nothing of kinds"
    index[label == 3] = experts - 1  # and nothing else goes there
    found, chance = kind_lifts(index, label, experts, kinds)
    assert found[3] == pytest.approx(tokens / float((label == 3).sum()))
    assert found[3] > 4 * chance[3]
    index[label == 3] = 0  # one expert among others takes all of the kind, and as many others as before
    found, chance = kind_lifts(index, label, experts, kinds)
    share = float(((index[:, 0] == 0) & (label == 3)).sum() / (index[:, 0] == 0).sum())
    assert found[3] == pytest.approx(share * tokens / float((label == 3).sum()))


def test_a_nearly_idle_expert_does_not_count():
    label = torch.randint(2, (4000,))
    index = torch.randint(7, (4000, 1))
    index[:3] = 7
    label[:3] = 1
    found, _ = kind_lifts(index, label, 8, 2)
    assert found.max() < 1.5
