"""Experts on other ranks compute what they did, in training and from checkpoints, and loads are even."""

import itertools
import random
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from shunter import moe_layers, parallel
from shunter.errors import UserError
from shunter.parallel.placement import even
from tests.conftest import SEED
from tests.helpers import on_ranks
from tests.parallel.models import DIM, EXPERTS, Model, difference, loss_of, twins, whole

NAMES = ("topk", "expert_choice")


def _steps(model, optimizer, batches):
    losses = []
    for x in batches:
        optimizer.zero_grad()
        loss = loss_of(model, x)
        loss.backward()
        losses.append(float(loss))
        optimizer.step()
    return losses


def placements(mesh, path):
    """A model whose experts move between steps, against its twin whose experts stay."""
    warnings.simplefilter("ignore")
    torch.manual_seed(SEED)
    rank = dist.get_rank()
    moved, stays = twins(Model(NAMES, num_shared_experts=1).train())
    found = {}
    torch.manual_seed(SEED + rank)
    batches = torch.randn(4, 3, 7, DIM, dtype=torch.float64)
    optimizers = []
    for model, dispatch in ((moved, "ranks"), (stays, "choices")):
        parallel.shard_model(model, mesh, dispatch=dispatch)
        optimizers.append(torch.optim.AdamW(parallel.parameter_groups(model), lr=1e-2))
        _steps(model, optimizers[-1], batches[:2])
    # The first two experts, of one place, have most of the load; each rank's tokens take the experts of the next place.
    part = mesh["ep"]
    loads = {
        name: torch.rand(EXPERTS).index_add(0, torch.arange(2), torch.full((2,), 20.0)) for name in moe_layers(moved)
    }
    order = parallel.place(moved, loads, optimizer=optimizers[0])
    first, last = list(order)
    here = torch.arange(EXPERTS) // (EXPERTS // part.size())
    wanted = torch.rand(EXPERTS) + 20.0 * (here == (part.get_local_rank() + 1) % part.size())
    again = parallel.place(moved, {last: wanted}, by="tokens", optimizer=optimizers[0])
    found["orders"], found["places"] = [order[first], again[last]], part.size()
    found["losses"] = [_steps(m, o, batches[2:]) for m, o in zip((moved, stays), optimizers, strict=True)]
    state, expected = ({k: whole(v) for k, v in m.state_dict().items()} for m in (moved, stays))
    found["state"] = difference(state, expected)
    found["explain"] = moe_layers(moved)[first].explain()
    parallel.save(moved, optimizers[0], path / "placed")
    for model, optimizer in ((stays, optimizers[1]), (moved, optimizers[0])):
        for parameter in model.parameters():
            parameter.data.mul_(2)
        parallel.load(model, optimizer, path / "placed")
    back = [{k: whole(v) for k, v in m.state_dict().items()} for m in (moved, stays)]
    found["loaded"] = max(difference(one, state) for one in back)
    found["goes on"] = [_steps(m, o, batches[:2]) for m, o in zip((moved, stays), optimizers, strict=True)]
    for case, call in {
        "shape": lambda: parallel.place(moved, {first: torch.ones(3)}),
        "name": lambda: parallel.place(moved, {"nowhere": torch.ones(EXPERTS)}),
        "record": lambda: parallel.place(moved, SimpleNamespace(experts=torch.zeros(4, 2, 2), layers=None)),
    }.items():
        with pytest.raises(UserError) as raised:
            call()
        found[case] = str(raised.value)
    return found


def placed_experts_compute_the_same(results):
    for found in results:
        for moved, stayed in (found["losses"], found["goes on"]):
            assert moved == pytest.approx(stayed, rel=1e-12)
        assert found["state"] < 1e-12 and found["loaded"] == 0
        for order in found["orders"]:
            assert order == results[0]["orders"][found["orders"].index(order)]
            assert sorted(order) == list(range(EXPERTS)) and (order != sorted(order)) == (found["places"] > 1)
        assert "it must be (8,)" in found["shape"] and "'nowhere' is no layer" in found["name"]
        assert "does not name its layers" in found["record"]


def _on_rank(rank, seed, expert_parallel, path):
    assert seed == SEED
    return placements(parallel.mesh(expert_parallel=expert_parallel), path)


@pytest.mark.slow
@pytest.mark.parametrize("size, expert_parallel", [(4, 2), (4, 4), (2, 1)])
def test_placement_in_every_layout(size, expert_parallel, tmp_path, monkeypatch):
    monkeypatch.setenv("SHUNTER_SEED", str(SEED))
    results = on_ranks(_on_rank, size, SEED, expert_parallel, tmp_path, start="spawn")
    placed_experts_compute_the_same(results)


def test_loads_are_even_as_far_as_they_can_be():
    """At most 7 / 6 of the best of all placements, which small cases try."""
    for _ in range(20):
        ranks, each = random.choice([(2, 2), (2, 3), (3, 2), (2, 4)])
        load = torch.rand(ranks * each).pow(random.choice([1, 4]))
        to = even(load, ranks)
        assert torch.bincount(to, minlength=ranks).tolist() == [each] * ranks
        fullest = float(torch.zeros(ranks).index_add(0, to, load).max())
        best = min(
            max(float(load[torch.tensor(own)].sum()) for own in _parts(order, each))
            for order in itertools.permutations(range(ranks * each))
            if all(list(own) == sorted(own) for own in _parts(order, each))
        )
        assert best - 1e-6 <= fullest <= 7 / 6 * best + 1e-6


def _parts(order, each):
    return [order[i : i + each] for i in range(0, len(order), each)]


def test_what_is_not_sharded_cannot_be_placed():
    with pytest.raises(UserError, match="no layer has sharded experts"):
        parallel.place(Model(("topk",)), {})
    with pytest.raises(ValueError, match='choose "load" or "tokens"'):
        parallel.place(Model(("topk",)), {}, by="chance")
