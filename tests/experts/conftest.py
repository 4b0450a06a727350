"""Small inputs go through the compiled loops too, which outside of tests take large ones alone."""

import pytest

from shunter.experts.backends.numba import bridge as numba
from shunter.experts.backends.numba.mkl import addresses

needs_loops = pytest.mark.skipif(not numba.INSTALLED or addresses() is None, reason="needs numba and MKL")


@pytest.fixture(autouse=True)
def small_inputs_too(monkeypatch):
    monkeypatch.setattr(numba, "SMALL", 0)
