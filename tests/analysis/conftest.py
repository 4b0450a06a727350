"""Fixtures of the tests of analysis."""

import pytest


@pytest.fixture
def undrawn(monkeypatch):
    """Leaves the figures' drawing out, which takes most of the time, where only the words matter."""
    monkeypatch.setattr("shunter.analysis.pages.html.to_svg", lambda figure, name, title: "<svg></svg>")
