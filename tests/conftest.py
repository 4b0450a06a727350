"""Every test draws fresh random numbers from a seed that is printed with a failure; SHUNTER_SEED=… repeats it."""

import os
import random

import pytest
import torch

SEED = int(os.environ.get("SHUNTER_SEED", random.SystemRandom().randrange(2**31)))
torch.set_num_threads(1)


def pytest_report_header():
    return f"seed: SHUNTER_SEED={SEED}"


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(SEED)
    print(f"SHUNTER_SEED={SEED}")
    return SEED
