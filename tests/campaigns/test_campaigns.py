"""A small version of each campaign: nothing is lost, and nothing is silent."""

import pytest

from tests.campaigns.campaigns import CAMPAIGNS
from tests.conftest import SEED


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("campaigns")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * campaign.slow) for name, campaign in CAMPAIGNS.items()]
)
def test_nothing_is_lost_and_nothing_is_silent(name, folder):
    result = CAMPAIGNS[name].run(name, folder, range(CAMPAIGNS[name].small), SEED)
    assert result.injected and not result.failures, "\n".join(result.failures)
