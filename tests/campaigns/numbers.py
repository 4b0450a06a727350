"""Campaign G: numbers that are not finite, in a step of a training."""

import itertools
import math
import shutil
import warnings
from pathlib import Path

import torch
from accelerate.state import AcceleratorState

from shunter.training.guards import NaNGuard
from tests.campaigns.campaign import drawn
from tests.campaigns.processes import in_child
from tests.helpers import on_ranks
from tests.training.test_guards import SITES, Plant, loop, make_model, train

STEPS = 6
VALUES = [math.nan, math.inf, -math.inf]
PLACES = [("trainer", 1, (0,)), ("loop", 1, (0,)), ("trainer", 2, (0,)), ("trainer", 2, (1,)), ("trainer", 2, (0, 1))]
PLACES += [("loop", 2, (1,))]
"""Who steps, on how many processes, and at which of them the value is."""
CASES = list(itertools.product(PLACES, [*SITES, "moment"], VALUES, [torch.float32, torch.bfloat16]))


def numbers(result, folder, cases, seed):
    """G: NaN and both infinities at six sites, in two dtypes, on one process and on two of which some have it."""
    order = drawn(seed, "order").sample(range(len(CASES)), len(CASES))
    for case in cases:
        if case >= len(CASES):
            break
        (who, processes, ranks), site, value, dtype = what = CASES[order[case]]
        step = drawn(seed, case).randrange(2, 5)
        if processes == 1:
            ended = in_child(lambda what=what, step=step, case=case: _told(_planted(folder, what, step, case)[0]))
            fault = "" if ended.code == 0 else f"{ended.code} {ended.line}"
        else:
            fault = _together(folder, what, step, case)
        where = f"{value} at {site} in {dtype}, step {step}, {who} of {processes}, at {ranks}"
        result.count(case, fault and f"{where}: {fault}")


def _together(folder, *known):
    try:
        found = on_ranks(_on_rank, 2, str(folder), *known)
    except Exception as error:  # of a rank, or it did not come
        return repr(error)
    different = "" if found[0] == found[1] else f"the ranks differ: {found}"
    return next((fault for fault, _ in found if fault), different)


def _told(fault):
    print(fault)
    return int(bool(fault))


def _on_rank(rank, folder, *known):
    AcceleratorState._reset_state(reset_partial_state=True)  # of the process that this one is forked from
    return _planted(folder, *known)


def _planted(folder, what, step, seed):
    """What is wrong after a training of six steps in which a value was planted; and what all ranks must agree on.

    A loss or gradient costs its step and nothing else. A moment spoils the parameters: the training goes back to
    before, and ends with finite ones.
    """
    (who, _, ranks), site, value, dtype = what
    lasting = site == "moment"
    torch.manual_seed(seed)
    with warnings.catch_warnings(action="ignore"):  # that it was rewound
        if who == "loop":
            options = {"strikes": 1, "within": 1, "rewinds": 1, "margin": 0, "every": 1} if lasting else {"rewinds": 0}
            states, admitted, guard = loop(site, value, [step], STEPS, options, dtype=dtype, ranks=ranks)
            last, skipped = states[STEPS], [i + 1 for i, taken in enumerate(admitted) if not taken]
            same = [i for i in range(1, STEPS + 1) if len(states[i]) == len(states[i - 1])
                    and all(map(torch.equal, states[i], states[i - 1]))]  # fmt: skip
        else:
            model, plant = make_model(dtype), Plant(site, value, [step], ranks)
            more, guard = {}, NaNGuard()
            if lasting:
                shutil.rmtree(Path(folder) / "trainer", ignore_errors=True)
                torch.distributed.is_initialized() and torch.distributed.barrier()
                guard, more = NaNGuard(1, 1, rewinds=1, margin=0), {"save_strategy": "steps", "save_steps": 1}
            train(Path(folder) / "trainer", model, plant, [guard], STEPS, **more)
            last, skipped = list(model.state_dict().values()), guard.skipped
            same = [at for at, unchanged in plant.same.items() if unchanged]
    fault = "" if all(bool(part.isfinite().all()) for part in last) else "the parameters are not finite at the end"
    whole = step - 1 if who == "trainer" else step - 2  # the loop's guard copies after the value was planted
    if lasting and guard.rewound != [(step + 1, whole)]:
        fault = fault or f"rewound {guard.rewound}"
    if not lasting and not skipped == same == [step]:
        fault = fault or f"skipped {skipped}, and {same} left the state as it was"
    return fault, [guard.rewound, skipped, [part.double().sum().item() for part in last]]
