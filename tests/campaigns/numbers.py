"""Campaigns G to I: numbers that are not finite, leaps of the loss, and loads that collapse."""

import torch

from shunter.training.alarms import LoadAlarm, SpikeAlarm
from tests.campaigns.campaign import drawn
from tests.campaigns.processes import in_child


def numbers(result, folder, cases, seed):
    """G: NaN, infinity and minus infinity at five places of a step, in two dtypes."""
    from shunter.training.guards import NaNGuard, not_finite
    from tests.training.test_guards import SITES, Plant, make_model, train

    for case in cases:
        draw = drawn(seed, case)
        site, value = draw.choice(SITES), draw.choice([float("nan"), float("inf"), -float("inf")])
        step, dtype = draw.randrange(1, 7), draw.choice([torch.float32, torch.bfloat16])

        def work(site=site, value=value, step=step, dtype=dtype, case=case):
            torch.manual_seed(case)
            model, guard, plant = make_model(dtype), NaNGuard(), Plant(site, value, [step])
            train(folder, model, plant, [guard])
            right = guard.skipped == [step] and plant.same[step] and not not_finite(model)
            return 0 if right and sum(plant.same.values()) == 1 else 1

        ended = in_child(work)
        result.count(case, "" if ended.code == 0 else f"{value} at {site} in {dtype}: {ended.code} {ended.line}")


def spikes(result, folder, cases, seed):
    """H: a leap planted in a falling, noisy loss; and as many losses without one."""
    for case in cases:
        draw = torch.Generator().manual_seed(seed + case)
        step = torch.arange(400, dtype=torch.float64)
        quiet = 2 + 5 * torch.exp(-step / 150) + 0.1 * torch.randn(400, dtype=torch.float64, generator=draw)
        at = 40 + int(torch.randint(360, (), generator=draw))
        leap = quiet.clone()
        leap[at] += 1.5
        found = []
        for values in (quiet, leap):
            alarm = SpikeAlarm()
            found.append([i for i, value in enumerate(values.tolist()) if alarm.note(value) is not None])
        result.count(case, "" if found == [[], [at]] else f"planted at {at}, heard at {found}", detected=True)


def loads(result, folder, cases, seed):
    """I: an expert that dies or a layer that collapses, heard within 50 steps; and as many healthy layers."""
    for case in cases:
        draw = torch.Generator().manual_seed(seed + case)
        experts, tokens = 8 << case % 3, 2048
        healthy = (0.3 * torch.randn(experts, generator=draw)).softmax(-1)
        planted = healthy.clone()
        planted[int(torch.randint(experts, (), generator=draw))] = 0.0 if case % 2 else 50.0
        heard = []
        for weights in (healthy, planted):
            alarm = LoadAlarm()
            heard.append(None)
            for step in range(50):
                load = torch.multinomial(weights, tokens, True, generator=draw).bincount(minlength=experts)
                if alarm.note("layer", load, 1) and heard[-1] is None:
                    heard[-1] = step
        right = heard[0] is None and heard[1] is not None
        result.count(case, "" if right else f"healthy heard at {heard[0]}, planted at {heard[1]}", detected=True)
