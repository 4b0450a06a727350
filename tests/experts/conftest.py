"""Small inputs go through the compiled loops too, which outside of tests take large ones alone."""

import pytest

from shunter.experts import numba


@pytest.fixture(autouse=True)
def small_inputs_too(monkeypatch):
    monkeypatch.setattr(numba, "SMALL", 0)
