"""Alarms hear what was planted, and nothing in healthy numbers."""

import json
import math

import pytest
import torch

from shunter.training.alarms import LoadAlarm, SpikeAlarm


def losses(steps):
    """A loss that falls as losses do, with the noise of small batches."""
    step = torch.arange(steps, dtype=torch.float64)
    return 2 + 5 * torch.exp(-step / 150) + 0.1 * torch.randn(steps, dtype=torch.float64)


def test_a_planted_spike_is_heard_and_a_falling_loss_is_quiet():
    heard = 0
    for _ in range(20):
        values = losses(400)
        at = 40 + int(torch.randint(360, ()))
        values[at] += 1.5 + float(torch.rand(()))
        alarm = SpikeAlarm()
        found = [step for step, value in enumerate(values.tolist()) if alarm.note(value) is not None]
        heard += found == [at]
    assert heard == 20


def test_a_spike_does_not_hide_the_next():
    alarm = SpikeAlarm()
    quiet = [alarm.note(value) for value in losses(60).tolist()]
    assert not any(quiet)
    assert alarm.note(50.0) is not None and alarm.note(50.0) is not None


def test_a_constant_loss_is_quiet_until_it_leaps():
    alarm = SpikeAlarm()
    assert not any(alarm.note(1.0) for _ in range(100))
    assert alarm.note(1.2) == pytest.approx(1.0) and alarm.note(math.nan) is None


@pytest.mark.parametrize("num_experts", range(2, 20))
def test_experts_that_every_token_takes_do_not_collapse(num_experts):
    alarm = LoadAlarm(patience=5)
    for tokens in torch.randint(20, 5000, (40,)).tolist():
        assert alarm.note("a", torch.full((num_experts,), tokens), num_experts) == []


def test_a_dead_expert_and_a_collapse_are_heard_once_and_healthy_loads_never():
    alarm = LoadAlarm(patience=5)
    even = torch.full((8,), 100)
    dead = even.clone()
    dead[3] = 0
    one = torch.zeros(8, dtype=torch.int64)
    one[2] = 800
    healthy = [
        alarm.note("a", torch.multinomial(torch.ones(8), 1600, True).bincount(minlength=8), 2) for _ in range(30)
    ]
    assert not any(healthy)
    said = [text for _ in range(12) for text in alarm.note("a", dead, 2)]
    assert len(said) == 1 and "expert 3" in said[0] and "dead" in said[0]
    collapse = [text for _ in range(12) for text in alarm.note("a", one, 1)]
    assert any("is collapsing" in text for text in collapse)
    again = LoadAlarm(patience=5)
    again.load_state_dict(json.loads(json.dumps(alarm.state_dict())))
    assert again.known == alarm.known and again.note("a", one, 1) == alarm.note("a", one, 1) == []
