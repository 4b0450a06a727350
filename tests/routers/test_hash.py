"""Hash layers: every table is what its name says, the same after saving, and blind to what it must not see."""

import io
import itertools
import math

import pytest
import torch

from shunter import MoE
from shunter.context import Context
from shunter.routers.registry import create

from ..helpers import by_tokens, deviation
from . import contract

VOCAB, POSITIONS = 40, 50


def _context(tokens):
    return Context(
        token_ids=torch.randint(VOCAB, (tokens,)),
        sequence=torch.arange(tokens) // 5,
        position=torch.arange(tokens) % 5,
    )


SORTS = [
    ("hash", {"vocab_size": VOCAB}),
    ("hash", {"vocab_size": VOCAB, "num_hashes": 4, "capacity_factor": 1.0}),
    ("hash", {"vocab_size": VOCAB, "frequencies": [1.0] * VOCAB, "capacity_factor": 0.5, "load_balancing_loss": 0.1}),
    ("previous_token_hash", {"vocab_size": VOCAB}),
    ("bigram_hash", {"vocab_size": VOCAB, "num_hashes": 2}),
    ("position_hash", {"num_positions": POSITIONS}),
]


@pytest.mark.parametrize("check", contract.CHECKS)
@pytest.mark.parametrize("name, options", SORTS)
def test_contract(name, options, check):
    check(name, options, _context)


def _experts(router, **known):
    """The experts (T, k) that tokens get, in order of expert."""
    tokens = len(next(iter(known.values())))
    routing = router.assign(router.score(torch.randn(tokens, router.dim)), Context(**known))
    assert routing.weight.eq(1).all()
    return [routing.expert[routing.token == t].tolist() for t in range(tokens)]


def _zipf(size):
    return 1 / torch.arange(1, size + 1).double() ** 1.1


def _share(table, frequency, experts):
    return torch.zeros(experts, dtype=torch.float64).index_add(0, table, frequency) / frequency.sum()


def test_an_id_has_its_expert_in_every_context_and_layer():
    layers = [create("hash", 6, 8, vocab_size=VOCAB, num_hashes=n) for n in (1, 1, 4)]
    ids = torch.randint(VOCAB, (200,))
    for router in layers:
        chosen = _experts(router, token_ids=ids)
        for token in range(VOCAB):
            assert len({tuple(chosen[t]) for t in (ids == token).nonzero().flatten().tolist()}) <= 1
    assert _experts(layers[0], token_ids=ids) == _experts(layers[1], token_ids=ids), "one seed, one table"


@pytest.mark.parametrize("name, options", SORTS)
def test_decisions_survive_saving_and_do_not_follow_the_seed_of_the_loader(name, options):
    router, other = (create(name, 6, 8, seed=seed, **options) for seed in (1, 2))
    stored = io.BytesIO()
    torch.save(router.state_dict(), stored)
    stored.seek(0)
    known = vars(_context(60))
    known = {key: value for key, value in known.items() if value is not None}
    wanted = _experts(router, **known)
    if "frequencies" not in options:
        assert _experts(other, **known) != wanted
    other.load_state_dict(torch.load(stored))
    assert _experts(other, **known) == wanted
    assert {"table"} <= set(router.state_dict()), "a table that is no buffer is neither saved nor moved"


def test_balanced_means_tokens_not_vocabulary():
    frequency = _zipf(400)[torch.randperm(400)]
    for experts in (4, 8):
        table = create("hash", 6, experts, vocab_size=400, frequencies=frequency).table
        share = _share(table, frequency, experts)
        assert share.max() <= 1 / experts + frequency.max() / frequency.sum() + 1e-12
        ids = torch.bincount(table, minlength=experts)
        assert ids.max() > ids.min() + 5, "the expert of the commonest id has fewer others"
        if experts == 4:  # no id alone is more than an even share, so the many rare ones fill the gaps
            assert share.max() - share.min() < 1e-3


@pytest.mark.parametrize("hashes", [2, 4])
def test_every_hash_of_a_balanced_multi_hash_is_balanced_and_another(hashes):
    frequency = _zipf(400)
    router = create("hash", 6, 8, vocab_size=400, frequencies=frequency, num_hashes=hashes)
    assert router.table.shape == (hashes, 400)
    for table in router.table:
        share = _share(table, frequency, 8 // hashes)
        assert share.max() <= hashes / 8 + frequency.max() / frequency.sum() + 1e-12
    assert not torch.equal(router.table[0], router.table[1])


def test_random_tables_are_uniform():
    table = create("hash", 6, 8, vocab_size=20000, seed=int(torch.randint(2**31, ()))).table
    assert (torch.bincount(table, minlength=8) / 20000 - 1 / 8).abs().max() < deviation(20000, 8)


def test_multi_hash_is_a_feed_forward_layer_whose_hidden_segments_are_hashed():
    """y = W_down relu(W_up x), where segment n of the hidden vector has the weights of bin h_n(id) of segment n."""
    moe = MoE(6, 5, 8, router="hash", vocab_size=VOCAB, num_hashes=4, activation="relu", backend="reference").double()
    ids = torch.randint(VOCAB, (30,))
    x = torch.randn(30, 6, dtype=torch.float64)
    out = moe(x, token_ids=ids)
    bins = moe.router.table[:, ids]
    for t in range(30):
        segments = [2 * n + int(bins[n, t]) for n in range(4)]
        hidden = torch.cat([moe.experts.up_proj[e] @ x[t] for e in segments]).relu()
        whole = torch.cat([moe.experts.down_proj[e] for e in segments], 1)
        assert torch.allclose(out[t], whole @ hidden, atol=1e-12)


def test_the_layer_is_the_expert_itself_without_a_gate():
    moe = MoE(6, 5, 8, router="hash", vocab_size=VOCAB, backend="reference").double()
    ids = torch.randint(VOCAB, (20,))
    x = torch.randn(20, 6, dtype=torch.float64, requires_grad=True)
    matrix = torch.nn.functional.one_hot(moe.router.table[ids], 8).double()
    out = moe(x, token_ids=ids)
    expected = by_tokens(x, moe.experts.weights, matrix)
    assert torch.allclose(out, expected, atol=1e-12)
    grads = [torch.autograd.grad(y.square().sum(), x, retain_graph=True)[0] for y in (out, expected)]
    assert torch.allclose(*grads, atol=1e-12)
    assert not moe.losses and not list(moe.router.parameters())


def _previous_by_loop(ids, sequence, mask):
    last, out = {}, []
    for token, number, real in zip(ids.tolist(), sequence.tolist(), mask.tolist(), strict=True):
        out.append(last.get(number, -1) if real else -1)
        if real:
            last[number] = token
    return out


@pytest.mark.parametrize("name", ["previous_token_hash", "bigram_hash"])
@pytest.mark.parametrize("hashes", [1, 2])
def test_the_token_before_is_that_of_the_same_sequence_without_padding(name, hashes):
    router = create(name, 6, 8, vocab_size=VOCAB, num_hashes=hashes)
    bins = 8 // hashes
    ids = torch.randint(VOCAB, (60,))
    mask = torch.rand(60) < 0.7
    sequence = torch.randint(4, (60,)) * 3  # interleaved: rows need not be together
    ids = torch.where(mask, ids, -100)  # what stands at padding is not looked at
    chosen = _experts(router, token_ids=ids, sequence=sequence, mask=mask)
    own = router.table.reshape(hashes, VOCAB)
    before = (router.previous_table if name == "bigram_hash" else router.table).reshape(hashes, VOCAB)
    for t, previous in enumerate(_previous_by_loop(ids, sequence, mask)):
        if not mask[t]:
            assert chosen[t] == []
            continue
        expected = []
        for n in range(hashes):
            value = int(router.first[n] if previous < 0 else before[n, previous])
            if name == "bigram_hash":
                value = (value + int(own[n, ids[t]])) % bins
            expected.append(n * bins + value)
        assert chosen[t] == expected


def test_bigrams_are_pairwise_independent_over_tables():
    """Over the draws of the tables any two different bigrams meet in one expert once in E times."""
    pairs = [((1, 2), (1, 3)), ((1, 2), (3, 2)), ((1, 2), (2, 1)), ((0, 0), (1, 1))]
    draws, experts = 3000, 4
    meet = torch.zeros(len(pairs))
    start = int(torch.randint(2**30, ()))
    for draw in range(draws):
        router = create("bigram_hash", 6, experts, vocab_size=4, seed=start + draw)
        ids = torch.tensor([token for both in pairs for pair in both for token in pair])
        sequence = torch.arange(len(pairs) * 2).repeat_interleave(2)
        chosen = router.experts_of(Context(token_ids=ids, sequence=sequence)).flatten()[1::2]
        meet += chosen[::2] == chosen[1::2]
    assert (meet / draws - 1 / experts).abs().max() < deviation(draws, len(pairs))


def test_a_bigram_decides_and_nothing_else():
    router = create("bigram_hash", 6, 8, vocab_size=5)
    ids = torch.randint(5, (300,))
    chosen = _experts(router, token_ids=ids, sequence=torch.zeros(300, dtype=torch.int64))
    for pair in itertools.product(range(5), repeat=2):
        places = [t for t in range(1, 300) if (int(ids[t - 1]), int(ids[t])) == pair]
        assert len({tuple(chosen[t]) for t in places}) <= 1


def test_positions_are_dealt_evenly_and_ids_do_not_matter():
    router = create("position_hash", 6, 8, num_positions=POSITIONS)
    counts = torch.bincount(router.table, minlength=8)
    assert counts.max() - counts.min() <= 1
    moe = MoE(6, 5, 8, router=router)
    moe(torch.randn(3, 12, 6))
    assert torch.equal(moe.routing.expert[moe.routing.token.argsort()], router.table[:12].repeat(3))


def _blobs(clusters, each, width=3):
    centres = 20 * torch.eye(clusters, width) + torch.arange(clusters)[:, None] * 20
    label = torch.arange(clusters).repeat_interleave(each)[torch.randperm(clusters * each)]
    return centres[label] + torch.randn(clusters * each, width), label


def test_dispersed_ids_of_a_cluster_spread_evenly():
    points, _ = _blobs(4, 24)
    options = {"vocab_size": 96, "embeddings": points, "seed": int(torch.randint(2**31, ()))}
    clustered = create("hash", 6, 4, spread="clustered", **options).table
    dispersed = create("hash", 6, 4, spread="dispersed", **options).table
    assert torch.bincount(dispersed, minlength=4).tolist() == [24] * 4
    for cluster in range(4):
        counts = torch.bincount(dispersed[clustered == cluster], minlength=4)
        assert counts.max() - counts.min() <= 1, "one seed, one clustering"


def test_clusters_are_a_local_optimum_of_k_means():
    """Every id is with its nearest centre, every centre is the mean of its ids, no expert is without ids."""
    for _ in range(10):
        points = torch.randn(120, 3, dtype=torch.float64)
        points[60:] = points[:60]  # equal points empty clusters
        table = create("hash", 6, 8, vocab_size=120, embeddings=points, spread="clustered").table
        assert torch.bincount(table, minlength=8).min() >= 1
        centres = torch.stack([points[table == e].mean(0) for e in range(8)])
        nearest = (points[:, None] - centres).norm(dim=-1).amin(1)
        assert torch.allclose(nearest, (points - centres[table]).norm(dim=1), atol=1e-9)


def test_clusters_survive_more_experts_than_different_points():
    points = torch.zeros(12, 2)
    table = create("hash", 6, 4, vocab_size=12, embeddings=points, spread="clustered").table
    assert torch.bincount(table, minlength=4).min() >= 1


def test_capacity_of_multi_hash_is_that_of_each_hash():
    router = create("hash", 6, 8, vocab_size=VOCAB, num_hashes=4, capacity_factor=1.0)
    assert router.capacity(100) == 50 and router.leak is None
    context = Context(token_ids=torch.zeros(100, dtype=torch.int64))
    routing = router.assign(torch.zeros(100, 8), context)
    assert routing.counts[routing.counts > 0].tolist() == [50] * 4
    assert torch.equal(routing.token.unique(), torch.arange(50)), "earlier tokens keep their slots"
    assert create("hash", 6, 8, vocab_size=VOCAB, capacity_factor=1.0, capacity_order="random").leak


@pytest.mark.parametrize("name", ["hash", "previous_token_hash", "bigram_hash", "position_hash"])
def test_later_tokens_do_not_matter(name):
    size = {"num_positions": POSITIONS} if name == "position_hash" else {"vocab_size": VOCAB}
    router = create(name, 6, 8, **size)
    first = _context(30)
    other = Context(
        token_ids=torch.cat([first.token_ids[:20], torch.randint(VOCAB, (10,))]),
        sequence=first.sequence,
        position=first.position,
    )
    chosen = [router.experts_of(context)[:20] for context in (first, other)]
    assert torch.equal(*chosen) and router.leak is None


SHORT = Context(token_ids=torch.tensor([0, VOCAB]), sequence=torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: create("hash", 6, 4), "Hash needs vocab_size="),
        (lambda: create("position_hash", 6, 4), "PositionHash needs num_positions="),
        (lambda: create("hash", 6, 4, vocab_size=9, num_hashes=3), "num_hashes 3 must divide num_experts, 4"),
        (lambda: create("hash", 6, 4, vocab_size=9, spread="near"), "choose from dispersed, clustered"),
        (lambda: create("hash", 6, 4, vocab_size=2, frequencies=[1, -1]), "one non-negative number"),
        (lambda: create("hash", 6, 4, vocab_size=2, frequencies=[1, math.nan]), "one non-negative number"),
        (lambda: create("hash", 6, 4, vocab_size=9, embeddings=torch.zeros(8, 2)), r"shape \(8, 2\).* 9 token ids"),
        (
            lambda: create("hash", 6, 4, vocab_size=2, embeddings=torch.zeros(2, 2)),
            "do not make 4 clusters",
        ),
        (
            lambda: create("hash", 6, 4, vocab_size=2, embeddings=torch.zeros(2, 2), frequencies=[1, 1]),
            "give one of them",
        ),
        (lambda: create("bigram_hash", 6, 4, vocab_size=VOCAB).assign(torch.zeros(2, 4)), "needs token_ids"),
        (
            lambda: create("bigram_hash", 6, 4, vocab_size=VOCAB).assign(
                torch.zeros(2, 4), Context(token_ids=SHORT.token_ids)
            ),
            "BigramHash needs sequence",
        ),
        (
            lambda: create("bigram_hash", 6, 4, vocab_size=VOCAB).assign(torch.zeros(2, 4), SHORT),
            f"token_ids {VOCAB} is out of range; ids are 0 to {VOCAB - 1}",
        ),
        (
            lambda: MoE(6, 5, 4, "position_hash", num_positions=3)(torch.zeros(1, 4, 6)),
            "position 3 is out of range; ids are 0 to 2",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
