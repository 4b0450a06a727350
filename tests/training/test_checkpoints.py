"""The checkpoints of a training: what is called one and is none neither stops it nor takes anything else with it."""

import pytest

from shunter.durable import MANIFEST, verify
from shunter.training.checkpoints import _OF_ONE, _PARTS, Checkpoints


def add(checkpoints, step):
    part = checkpoints.partial / f"checkpoint-{step}"
    part.mkdir(parents=True)
    for name in (*_PARTS, *_OF_ONE):
        (part / name).write_text(str(step))
    checkpoints.add(part)


@pytest.mark.parametrize("what", ["file", "link to a file", "link to a folder", "dangling link", "no manifest"])
@pytest.mark.parametrize("seen", [True, False])
def test_what_is_no_checkpoint_is_passed_over_and_removed_itself(what, seen, tmp_path, capsys):
    checkpoints, other = Checkpoints(tmp_path / "run", {"model": "a"}), tmp_path / "run/checkpoint-3"
    aside = tmp_path / "aside"
    add(checkpoints, 1)
    aside.mkdir()
    (aside / "mine").write_text("mine")
    (tmp_path / "run/checkpoint-1-kept").mkdir()
    if what == "file":
        other.write_text("x")
    elif what == "no manifest":
        (other / MANIFEST).mkdir(parents=True)
    else:
        target = {"link to a file": aside / "mine", "link to a folder": aside, "dangling link": aside / "none"}[what]
        other.symlink_to(target)
    if seen:
        assert checkpoints.newest() == tmp_path / "run/checkpoint-1"
        assert f"{other} is passed over" in capsys.readouterr().err
    add(checkpoints, 3)
    add(checkpoints, 5)
    assert checkpoints.newest() == tmp_path / "run/checkpoint-5" and verify(other)["model"] == "a"
    assert {path.name for path in checkpoints.folder.iterdir()} == {"checkpoint-1-kept", "checkpoint-3", "checkpoint-5"}
    assert (aside / "mine").read_text() == "mine"
