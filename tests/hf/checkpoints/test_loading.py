"""Damaged folders and from_pretrained: one line, and no code run."""

import shutil

import pytest

import shunter
from tests.hf.checkpoints.damage import DAMAGE, OTHER, SPARSE


@pytest.mark.parametrize("damage", [name for name in DAMAGE | SPARSE | OTHER if name != "NaN"])
def test_from_pretrained_says_it_too(damage, whole, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asked whether to run code"))
    folder = tmp_path / "sparse"
    shutil.copytree(whole["sparse"], folder)
    (DAMAGE | SPARSE | OTHER)[damage](folder, tmp_path / "marker")
    with pytest.raises(ValueError) as caught:
        shunter.from_pretrained(str(folder))
    assert str(folder) in str(caught.value) and len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "marker").exists()
