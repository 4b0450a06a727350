"""Shares and characteristic labels against counts by hand."""

import math

import pytest
import torch

from shunter.analysis.specialisation import MIN_COUNT, characteristic, label_counts, label_shares
from tests.helpers import random_index


def test_label_shares_against_counts():
    index, label = random_index(300, 5, 2), torch.randint(-1, 3, (300,))
    found = label_shares(label_counts(index, label, 5, 4))
    for which in range(4):
        mine = [e for row, m in zip(index.tolist(), label.tolist(), strict=True) if m == which for e in row if e >= 0]
        expected = [mine.count(e) / len(mine) if mine else 0.0 for e in range(5)]
        assert found[which].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("top", [3, 30])
def test_characteristic_labels_are_the_largest_terms_of_the_divergence(top):
    """Against the definition over Python's numbers: what an expert is sent, q, from the text, p: q ln(q / p)."""
    counts = torch.randint(0, 3 * MIN_COUNT, (30, 4))
    counts[0], counts[1] = torch.tensor([[MIN_COUNT, 0, 0, 0], [MIN_COUNT - 1, 0, 0, 0]])
    text = counts.sum(1) + torch.randint(5, (30,))
    for expert, found in enumerate(characteristic(counts, text, top)):
        sent, everything, terms = int(counts[:, expert].sum()), int(text.sum()), {}
        for label, count in enumerate(counts[:, expert].tolist()):
            q, p = count / sent, int(text[label]) / everything
            if count >= MIN_COUNT and q > p:
                terms[label] = q * math.log(q / p)
        for label, share, lift in found:
            assert share == pytest.approx(int(counts[label, expert]) / sent, rel=1e-5)
            assert lift == pytest.approx(share / (int(text[label]) / everything), rel=1e-5)
        best = sorted(terms.values(), reverse=True)[:top]
        assert [terms[label] for label, _, _ in found] == pytest.approx(best, rel=1e-4, abs=1e-6)
