"""Every quick case of several processes, in one group of two."""

import os
import warnings

import torch

from shunter import parallel
from tests.conftest import SEED
from tests.helpers import TIME_LIMIT, on_ranks
from tests.parallel import test_checkpoint, test_placement, test_scope, test_sharding


def _on_rank(rank, seed, path):
    assert seed == SEED, "the ranks draw alike"
    warnings.simplefilter("ignore")
    mesh = parallel.mesh(expert_parallel=2, timeout=TIME_LIMIT)
    found = {}
    for name, arguments in test_sharding.QUICK.items():
        torch.manual_seed(SEED)
        found[name] = getattr(test_sharding, name)(mesh, *arguments)
    decided = (
        test_scope.decisions(mesh),
        test_scope.in_training_alone(mesh),
        test_scope.shuffled(mesh),
        test_scope.shuffled_tokens(mesh),
    )
    placed = test_placement.placements(mesh, path)
    return found, decided, placed, test_checkpoint.folders(rank, seed, path)


def test_two_ranks(tmp_path, subtests):
    os.environ["SHUNTER_SEED"] = str(SEED)  # of the spawned processes
    sharded, decided, placed, saved = zip(*on_ranks(_on_rank, 2, SEED, tmp_path, start="spawn"), strict=True)
    for check in test_sharding.CHECKS:
        with subtests.test(msg=check.__name__):
            check(sharded)
    with subtests.test(msg="decide_as_one_process"):
        test_scope.decide_as_one_process([found for found, *_ in decided])
    with subtests.test(msg="evaluation_stays_on_the_rank"):
        test_scope.evaluation_stays_on_the_rank([found for _, found, *_ in decided])
    with subtests.test(msg="shuffled_assignments_are_balanced_and_better"):
        test_scope.shuffled_assignments_are_balanced_and_better([found for *_, found, _ in decided])
    with subtests.test(msg="shuffled_tokens_have_the_same_assignment"):
        test_scope.shuffled_tokens_have_the_same_assignment([found for *_, found in decided])
    with subtests.test(msg="placed_experts_compute_the_same"):
        test_placement.placed_experts_compute_the_same(placed)
    for check in test_checkpoint.CHECKS:
        with subtests.test(msg=check.__name__):
            check(tmp_path, saved)
