"""Every test draws fresh random numbers from a seed that is printed with a failure; SHUNTER_SEED=… repeats it."""

import os
import random

import pytest
import torch
from hypothesis import HealthCheck, settings

# Before anything imports the client of the hub, also in processes of tests: a name that is no folder is not looked up.
os.environ["HF_HUB_OFFLINE"] = "1"
# Before anything imports the kernels: without a GPU they run in Triton's interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

SEED = int(os.environ.get("SHUNTER_SEED", random.SystemRandom().randrange(2**31)))
torch.set_num_threads(1)
# However loaded the machine is: an example, and what draws it, may take its time.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


def pytest_report_header():
    return f"seed: SHUNTER_SEED={SEED}"


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(SEED)
    print(f"SHUNTER_SEED={SEED}")
    return SEED
