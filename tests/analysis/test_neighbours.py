"""kNN-LM against a brute-force oracle in numpy, and a mixture that was planted."""

import math

import numpy as np
import pytest
import torch

pytest.importorskip("faiss")

from shunter.analysis.neighbours import Datastore, best_mixture, mixed_loss, neighbour_probability

VOCABULARY = 7


def oracle(keys, tokens, query, k, temperature):
    """The next-token distribution of one query, (VOCABULARY,), by the definition: exp(-d / t) of the k nearest."""
    distances = [sum((float(a) - float(b)) ** 2 for a, b in zip(query, key, strict=True)) for key in keys]
    nearest = sorted(range(len(keys)), key=lambda i: distances[i])[:k]
    found = np.zeros(VOCABULARY)
    for i in nearest:
        found[int(tokens[i])] += math.exp((distances[nearest[0]] - distances[i]) / temperature)
    return found / found.sum()


def test_an_exact_store_is_the_definition(seed):
    torch.manual_seed(seed)
    keys, queries = torch.randn(60, 5), torch.randn(6, 5)
    tokens = torch.randint(VOCABULARY, (60,))
    store = Datastore(keys, tokens)
    distances, found = store.search(queries, 9)
    temperature = 0.3 + float(torch.rand(()))
    every = torch.stack(
        [neighbour_probability(distances, found, torch.full((6,), t), temperature) for t in range(VOCABULARY)], 1
    )
    expected = np.stack([oracle(keys, tokens, query, 9, temperature) for query in queries])
    np.testing.assert_allclose(every.numpy(), expected, atol=1e-4)
    assert torch.allclose(every.sum(1), torch.ones(6, dtype=torch.float64))
    assert store.flops_per_query(queries) == 2 * 5 * 60
    assert store.num_bytes >= 60 * (4 * 5 + 8)


def test_a_compressed_store_finds_what_the_exact_one_does(seed):
    """Clusters far apart, a token each: in whichever cell and code, the neighbours are of the query's own cluster."""
    torch.manual_seed(seed)
    centres = 20 * torch.eye(8)[:VOCABULARY]
    tokens = torch.randint(VOCABULARY, (1500,))
    keys = centres[tokens] + 0.3 * torch.randn(1500, 8)
    targets = torch.randint(VOCABULARY, (40,))
    queries = centres[targets] + 0.3 * torch.randn(40, 8)
    store = Datastore(keys, tokens, cells=12, probes=3, code_bytes=4)
    distances, found = store.search(queries, 10)
    assert (neighbour_probability(distances, found, targets, 1.0) > 0.999).all()
    assert (distances[:, 1:] >= distances[:, :-1]).all()
    entries, centroids = 1500 * (4 + 8), 4 * 8 * (12 + 256)
    assert entries + centroids <= store.num_bytes <= entries + centroids + 16 * 12 + 2000
    least, most = 2 * 8 * (12 + 256), 2 * 8 * (12 + 256) + 4 * 1500
    assert least < store.flops_per_query(queries) < most


def test_all_cells_searched_are_all_keys_counted(seed):
    torch.manual_seed(seed)
    store = Datastore(torch.randn(400, 4), torch.zeros(400, dtype=torch.int64), cells=5, probes=5, code_bytes=2)
    assert store.flops_per_query(torch.randn(3, 4)) == 2 * 4 * (5 + 256) + 2 * 400


def test_a_planted_mixture_is_found(seed):
    """Targets drawn from a known mixture of a model and neighbours: its share is found, and no other loses less."""
    torch.manual_seed(seed)
    count, share, temperature = 20_000, 0.3 + 0.4 * float(torch.rand(())), 2.0
    distances = 4 * torch.rand(count, 8).sort(1).values
    tokens = torch.randint(VOCABULARY, (count, 8))
    model = torch.rand(count, VOCABULARY, dtype=torch.float64).softmax(1)
    grid = [neighbour_probability(distances, tokens, torch.full((count,), t), temperature) for t in range(VOCABULARY)]
    targets = torch.multinomial(share * torch.stack(grid, 1) + (1 - share) * model, 1)[:, 0]
    lm = model.gather(1, targets[:, None])[:, 0]
    found, warmth = best_mixture(lm, distances, tokens, targets)
    assert abs(found - share) < 0.05 and 0.4 < warmth / temperature < 2.5
    truth = mixed_loss(lm, neighbour_probability(distances, tokens, targets, temperature), share).mean()
    mine = mixed_loss(lm, neighbour_probability(distances, tokens, targets, warmth), found).mean()
    assert abs(float(mine - truth)) < 0.01


def test_the_limits(seed):
    torch.manual_seed(seed)
    lm, neighbours = torch.rand(9, dtype=torch.float64), torch.rand(9, dtype=torch.float64)
    assert torch.equal(mixed_loss(lm, neighbours, 0.0), -lm.log())
    assert torch.equal(mixed_loss(lm, neighbours, 1.0), -neighbours.log())
    nobody = torch.full((9, 4), -1)
    assert neighbour_probability(torch.full((9, 4), 3e38), nobody, torch.zeros(9), 1.0).tolist() == [0.0] * 9
    targets = torch.randint(VOCABULARY, (9,))
    assert best_mixture(lm, torch.rand(9, 4), (targets[:, None] + 1).expand(9, 4), targets)[0] == 0.0


@pytest.mark.parametrize(
    "options, said",
    [
        ({"tokens": torch.zeros(3, dtype=torch.int64)}, "must be .n, d. and tokens"),
        ({"keys": torch.full((300, 6), math.nan)}, "not finite"),
        ({"tokens": torch.full((300,), -1)}, "negative"),
        ({"cells": 301}, "at least 256 keys"),
        ({"cells": 4, "probes": 5}, "as many cells as are searched"),
        ({"cells": 4, "probes": 2, "code_bytes": 4}, "must divide the width of the keys, 6"),
    ],
)
def test_what_cannot_be_stored_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        Datastore(**{"keys": torch.randn(300, 6), "tokens": torch.zeros(300, dtype=torch.int64)} | options)


def test_what_cannot_be_asked_is_refused():
    store = Datastore(torch.randn(30, 6).bfloat16().requires_grad_(), torch.zeros(30, dtype=torch.int32))
    distances, tokens = store.search(torch.randn(0, 6), 4)
    assert distances.shape == tokens.shape == (0, 4)
    assert (store.search(torch.randn(2, 6).double(), 40)[1][:, 30:] == -1).all(), "there are thirty"
    for queries, count in ((torch.randn(2, 5), 4), (torch.randn(6), 4), (torch.randn(2, 6), 0)):
        with pytest.raises(ValueError, match="queries must be"):
            store.search(queries, count)
    with pytest.raises(ValueError, match="a query is not finite"):
        store.search(torch.full((1, 6), math.nan), 4)
    one = torch.ones(1)
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="above 0"):
            neighbour_probability(one[None], one[None].long(), one.long(), temperature)
    for share in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="from 0 to 1"):
            mixed_loss(one, one, share)
