"""Fixtures of the tests of inspection."""

import json

import pytest

from shunter import routers
from tests.analysis.inspect.subjects import Planted, random_documents


@pytest.fixture
def plant(monkeypatch):
    """Makes Planted a router by name, going by a rule."""
    monkeypatch.setitem(routers.registry._ROUTERS, "planted", Planted)
    return lambda rule: monkeypatch.setattr(Planted, "rule", staticmethod(rule))


@pytest.fixture
def text_file(tmp_path):
    file = tmp_path / "text.jsonl"
    hostile = ["</script><script>alert(1)</script>", "\u202eevil", "{{ 7 * 7 }}", "\x00"]
    rows = [
        {"text": text, "domain": domain.name, "language": domain.languages[i] if domain.languages else None}
        for domain in random_documents()
        for i, text in enumerate(domain.documents)
    ]
    rows += [{"text": text * 20, "domain": text.strip("\x00") or "nul"} for text in hostile]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file
