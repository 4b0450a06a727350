"""A small version of each campaign: nothing is lost, and nothing is silent."""

import pytest

from tests.campaigns.campaigns import CAMPAIGNS
from tests.conftest import SEED

SMALL = {
    "kills": 4,
    "crash_points": 4,
    "chains": 1,
    "disks": 4,
    "damage": 5,
    "flips": 200,
    "numbers": 4,
    "spikes": 10,
    "loads": 6,
    "settings": 300,
}


@pytest.mark.parametrize("name", CAMPAIGNS)
def test_nothing_is_lost_and_nothing_is_silent(name, tmp_path):
    result = CAMPAIGNS[name][0](tmp_path, SMALL[name], SEED)
    assert result.injected >= SMALL[name] and not result.failures, "\n".join(result.failures)
