"""Decisions over all ranks' tokens are those of one process with the whole batch."""

import copy
import os
import warnings

import pytest
import torch
import torch.distributed as dist

import shunter
from shunter import parallel
from shunter.errors import UserError
from tests.conftest import SEED
from tests.helpers import on_ranks
from tests.parallel.models import DIM, Exchanges, difference, gradients, layer

BALANCED = {"load_balancing_loss": 0.1, "z_loss": 0.01, "importance_loss": 0.1}
CASES = {
    "base": {},
    "sinkhorn": {},
    "expert_choice": {"capacity_factor": 2.0},
    "two_sided": {},
    "gshard": {"load_balancing_loss": 0.1},
    "switch": {"capacity_factor": 0.75, "jitter": 0.0, **BALANCED},
    "topk": {"top_k": 2, "capacity_factor": 0.75, "capacity_order": "batch", **BALANCED},
    "topk, random": {"top_k": 2, "capacity_factor": 0.75, "capacity_order": "random", **BALANCED},
    "topk, probability": {"top_k": 2, "capacity_factor": 0.75, "capacity_order": "probability", **BALANCED},
    "deepseek": {"top_k": 2, "selection_bias": True},
}
SHARES = {2: (5, 0), 4: (4, 7, 0, 3)}  # sequences of a rank


def _known(batches, rank):
    """What a rank's layer is told: the padding of its sequences, where it has some."""
    return {"mask": batches[rank][1]} if rank % 2 == 0 or len(batches) == 2 else {}


def _compare(mesh, name, options):
    rank, size = dist.get_rank(), dist.get_world_size()
    moe = layer(name.split(",")[0], **options).train()
    alone = copy.deepcopy(moe)
    batches = []
    for sequences in SHARES[size]:
        mask = torch.rand(sequences, 6) < 0.8
        batches.append((torch.randn(sequences, 6, DIM, dtype=torch.float64), mask))
    parallel.shard_experts(parallel.decide_globally(moe), mesh)
    state = torch.get_rng_state()
    drawn = int(torch.randint(2**62, ()))
    torch.set_rng_state(state)
    assign = alone.router.assign

    def seeded(logits, context):
        with torch.random.fork_rng():
            torch.manual_seed(drawn)
            return assign(logits, context)

    alone.router.assign = seeded
    whole = torch.cat([x for x, _ in batches]).requires_grad_()
    told = {}
    if any(_known(batches, r) for r in range(size)):
        masks = [_known(batches, r).get("mask", torch.ones_like(batches[r][1])) for r in range(size)]
        told = {"mask": torch.cat(masks)}
    y = alone(whole, **told)
    (y.square().sum() / whole[..., 0].numel() + shunter.aux_loss(alone)).backward()
    x = batches[rank][0].clone().requires_grad_()
    out = moe(x, **_known(batches, rank))
    (size * out.square().sum() / whole[..., 0].numel() + shunter.aux_loss(moe)).backward()
    parallel.average_gradients(moe, mesh)
    first = sum(SHARES[size][:rank])
    rows = slice(first, first + SHARES[size][rank])
    triples = _triples(alone.routing, 6 * first, 6 * rows.stop) == _triples(moe.routing, 0, 6 * len(x), 6 * first)
    losses = {key: (float(value), float(moe.losses[key])) for key, value in alone.losses.items()}
    gap = max([0.0, *(abs(a - b) / max(abs(a), 1e-9) for a, b in losses.values())])
    found = {"out": out.detach(), "x": x.grad / size}
    expected = {"out": y.detach()[rows], "x": whole.grad[rows]}
    return triples, max(gap, difference(found, expected), difference(gradients(moe), gradients(alone)))


def _triples(routing, first, last, shift=0):
    parts = [routing] if routing.dropped is None else [routing, routing.dropped]
    return [
        [
            (t + shift, e)
            for t, e in zip(part.token.tolist(), part.expert.tolist(), strict=True)
            if first <= t < last or shift
        ]
        for part in parts
    ]


def decisions(mesh):
    """By router: whether this rank keeps the triples of one process, and how far outputs, losses and gradients are."""
    found = {}
    for name, options in CASES.items():
        torch.manual_seed(SEED)
        found[name] = _compare(mesh, name, options)
    return found


def in_training_alone(mesh):
    """How far a layer that decides over all ranks in training alone is from its own rank's, in evaluation."""
    torch.manual_seed(SEED)
    moe = layer("expert_choice", capacity_factor=0.5)
    own = copy.deepcopy(moe)
    parallel.decide_globally(moe, evaluation=False)
    x = torch.randn(4, 6, DIM, dtype=torch.float64).roll(dist.get_rank(), 0)  # other tokens on each rank
    x = x[: 4 - 3 * dist.get_rank()]
    gaps = {}
    for training in (True, False):
        out, expected = moe.train(training)(x), own.train(training)(x)
        gaps[training] = float((out - expected).abs().max())
    return gaps


def shuffled(mesh):
    """Tokens that want the same experts on one rank: their scores and counts, and gradients of the same decisions."""
    rank, size = dist.get_rank(), dist.get_world_size()
    found = {}
    for name in ("base", "sinkhorn"):
        torch.manual_seed(SEED)
        moe = layer(name, jitter=0.0).train()
        alone, copied = copy.deepcopy(moe), copy.deepcopy(moe)
        with torch.random.fork_rng():
            torch.manual_seed(SEED + rank)
            x = torch.randn(16 * 8, DIM, dtype=torch.float64) + 10 * moe.router.weight.detach()[rank]
            none = x[: 16 * rank]  # the first rank has none
        parallel.shard_experts(parallel.shuffle_assignments(moe), mesh)
        chosen = []
        solve = moe.router.solve
        moe.router.solve = lambda logits, solve=solve, chosen=chosen: chosen.append(solve(logits)) or chosen[-1]
        copied.router.solve = lambda logits, chosen=chosen: chosen[-1]
        gap = 0.0
        for given in (none, x):
            results = []
            for one in (moe, copied):
                rows = given.clone().requires_grad_()
                out = one(rows)
                out.square().sum().backward()
                results.append({"out": out.detach(), "x": rows.grad})
            gap = max(gap, difference(*results))
        parallel.average_gradients(moe, mesh)
        gap = max(gap, difference(gradients(moe), gradients(copied, averaged=True)))
        alone(x)
        totals = torch.zeros(2, dtype=torch.float64)
        for i, routing in enumerate((moe.routing, alone.routing)):
            logits = alone.router.score(x)
            totals[i] = logits[routing.token, routing.expert].sum()
        counts = moe.routing.counts.double()
        dist.all_reduce(totals)
        dist.all_reduce(counts)
        found[name] = (gap, totals.tolist(), (counts / (16 * size)).tolist())
    return found


def shuffled_tokens(mesh):
    """Tokens shuffled, against logits shuffled: outputs, gradients, the exchanges of each way, and evaluation."""
    rank, found = dist.get_rank(), {}
    for name in ("base", "sinkhorn"):
        torch.manual_seed(SEED)
        moe = layer(name, jitter=0.0, num_shared_experts=1).train()
        results = []
        with torch.random.fork_rng():
            torch.manual_seed(SEED + rank)
            x = torch.randn(5, 9, DIM, dtype=torch.float64)[: 5 - 2 * rank]
            mask = torch.rand(x.shape[:-1]) < 0.7
        for rows in ("logits", "tokens"):
            one = copy.deepcopy(moe)
            parallel.shard_experts(parallel.shuffle_assignments(one, rows=rows), mesh)
            given = x.clone().requires_grad_()
            torch.manual_seed(SEED + rank)
            with Exchanges() as exchanges:
                out = _told(one, given, mask)
                forward = exchanges.of_rows
                (out * mask[..., None]).square().sum().backward()
            counts = forward, exchanges.of_rows - forward
            torch.manual_seed(SEED + rank)
            again = _told(copy.deepcopy(one), given, mask)
            parallel.average_gradients(one, mesh)
            parts = {"out": (out * mask[..., None]).detach(), "x": given.grad, **gradients(one)}
            results.append((parts, counts, one.eval()(x).detach(), bool(torch.equal(again, out))))
        (logits, by_logits, plain, _), (tokens, by_tokens, greedy, copied) = results
        found[name] = difference(tokens, logits), by_logits, by_tokens, bool(torch.equal(plain, greedy)), copied
    return found


def _told(moe, x, mask):
    """The output where a scope around the layer, not its call, knows the padding."""
    with shunter.tell(moe, mask=mask):
        return moe(x)


def shuffled_tokens_have_the_same_assignment(results):
    for found in results:
        for name, (gap, by_logits, by_tokens, same, copied) in found.items():
            assert gap < 1e-12 and same and copied, (name, gap)
            # The logits are a row's exchange without a gradient.
            assert (by_logits, by_tokens) == ((3, 2), (4, 4)), name


def shuffled_assignments_are_balanced_and_better(results):
    for found in results:
        for name, (gap, (together, apart), counts) in found.items():
            assert gap < 1e-12, name
            assert together > apart, f"{name}: tokens that want the same experts are not all on one rank"
            assert name != "base" or set(counts) == {1.0}, counts


def evaluation_stays_on_the_rank(results):
    for gaps in results:
        assert gaps[False] == 0
    assert max(gaps[True] for gaps in results) > 1e-6


def _on_rank(rank, seed, expert_parallel):
    warnings.simplefilter("ignore")
    return decisions(parallel.mesh(expert_parallel=expert_parallel))


def decide_as_one_process(results):
    for rank, found in enumerate(results):
        for name, (triples, gap) in found.items():
            assert triples, f"{name}: rank {rank} keeps other triples"
            assert gap < 1e-12, (rank, name, gap)


@pytest.mark.slow
@pytest.mark.parametrize("expert_parallel", [1, 2, 4])
def test_four_ranks_decide_as_one_process(expert_parallel):
    os.environ["SHUNTER_SEED"] = str(SEED)
    decide_as_one_process(on_ranks(_on_rank, 4, SEED, expert_parallel, start="spawn"))


def test_what_assigns_nothing_together_is_not_shuffled():
    with pytest.raises(UserError, match="no router assigns all tokens together"):
        parallel.shuffle_assignments(layer("topk"))
    with pytest.raises(ValueError, match='choose "logits" or "tokens"'):
        parallel.shuffle_assignments(layer("base"), rows="experts")
    by_tokens = parallel.shuffle_assignments(layer("base"), rows="tokens")
    for again in (parallel.shuffle_assignments, parallel.decide_globally):
        with pytest.raises(UserError, match="decides over all ranks already"):
            again(by_tokens)
    router = layer("base")
    vars(router.router)["solve"] = None
    with pytest.raises(UserError, match="decides over all ranks already"):
        parallel.decide_globally(router)


@pytest.mark.parametrize("name, words", [("soft_moe", "mixes tokens into slots"), ("reinforce", "learns by reward")])
def test_what_has_no_scope_of_all_ranks_is_refused(name, words):
    with pytest.raises(UserError, match=words):
        parallel.decide_globally(layer(name))
