"""Files and folders are whole or absent, whatever fails while they are written; damage to a sealed folder is found."""

import errno
import json
import os
import random
import re
import subprocess
import sys

import pytest

from shunter import durable
from shunter.durable import (
    MANIFEST,
    aside,
    make_folder,
    new_folder,
    only_process,
    publish,
    seal,
    verify,
    why_not_written,
    write,
    writing,
)
from shunter.errors import NotWritten, UserError
from tests.conftest import SEED
from tests.helpers import TIME_LIMIT


def entries(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.fixture
def folder(tmp_path):
    """A sealed folder of a few files."""
    draw = random.Random(SEED)
    out = tmp_path / "model"
    with new_folder(out, step=7) as part:
        (part / "inner").mkdir()
        for name in ("model.safetensors", "config.json", "inner/rows.json", "LICENSE"):
            (part / name).write_bytes(draw.randbytes(draw.randrange(1, 3000)))
    return out


@pytest.mark.parametrize("call", ["open", "fsync", "replace", "rename"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS, errno.EMFILE])
def test_what_cannot_be_written_leaves_what_was_there(tmp_path, monkeypatch, call, number):
    (tmp_path / "a").write_text("old")

    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    writers = [lambda: _new(tmp_path / "b")] + [lambda: write(tmp_path / "a", "new")] * (call != "rename")
    for make in writers:
        with monkeypatch.context() as patch, pytest.raises(NotWritten) as error:
            patch.setattr(os, call, fail)
            make()
        said = str(error.value)
        assert os.strerror(number) in said and said.startswith(str(tmp_path)) and "\n" not in said
    assert (tmp_path / "a").read_text() == "old"
    assert entries(tmp_path) == ["a"]
    _new(tmp_path / "b"), write(tmp_path / "a", "new")
    assert entries(tmp_path) == ["a", "b", "b/f", f"b/{MANIFEST}"] and (tmp_path / "a").read_text() == "new"


def _new(out):
    with new_folder(out) as part:
        (part / "f").write_text("x")


def test_an_error_leaves_neither_file_nor_folder(tmp_path):
    with pytest.raises(LookupError), writing(tmp_path / "a") as part:
        part.write_text("half")
        raise LookupError
    with pytest.raises(LookupError), new_folder(tmp_path / "b") as part:
        (part / "f").write_text("half")
        raise LookupError
    assert entries(tmp_path) == []


def test_folders_are_not_overwritten(folder, tmp_path):
    with pytest.raises(UserError, match="exists already"), new_folder(folder):
        pass
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotWritten, match="cannot be written: File exists"), new_folder(tmp_path / "file/below"):
        pass


def test_a_folder_that_is_read_only_is_told_when_it_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path or mode != os.W_OK)
    make_folder(tmp_path / "inner")
    with pytest.raises(NotWritten, match=f"^{re.escape(str(tmp_path))} cannot be written: it is read-only$"):
        make_folder(tmp_path)


def test_what_a_killed_process_left_goes_with_the_next_and_what_a_living_one_writes_stays(tmp_path):
    code = (
        "import os, sys, pathlib\nfrom shunter.durable import aside\n"
        "with aside(pathlib.Path(sys.argv[1]), folder=bool(int(sys.argv[2]))) as part:\n    os.kill(os.getpid(), 9)\n"
    )
    for folder in (0, 1):
        path = tmp_path / str(folder)
        subprocess.run([sys.executable, "-c", code, str(path), str(folder)], timeout=TIME_LIMIT, check=False)
        assert len(entries(tmp_path)) == 1
        with aside(path.with_name("other")) as living:
            assert entries(tmp_path) == [living.name]
            write(path, "whole")
            assert living.is_dir()
        assert entries(tmp_path) == [path.name]
        path.unlink()


@pytest.mark.parametrize("where", ["file system", "system"])
def test_without_locks_nothing_of_others_is_removed_and_it_is_said(where, tmp_path, monkeypatch):
    def none(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    if where == "system":
        monkeypatch.setattr(durable, "fcntl", None)
    else:
        monkeypatch.setattr(durable.fcntl, "flock", none)
    with aside(tmp_path / "a") as living, pytest.warns(match="has no file locks"), only_process(tmp_path):
        write(tmp_path / "b", "whole")
        assert living.is_dir() and (tmp_path / "b").read_text() == "whole"


def test_a_sealed_folder_says_its_facts(folder):
    assert verify(folder)["step"] == 7
    (folder / "README.md").write_text("other files may stand beside")
    assert verify(folder)["format"] == durable.FORMAT


@pytest.mark.parametrize("case", range(40))
def test_one_flipped_bit_or_cut_anywhere_is_found(folder, case):
    draw = random.Random(f"{SEED} {case}")
    file = draw.choice([path for path in sorted(folder.rglob("*")) if path.is_file()])
    content = bytearray(file.read_bytes())
    if case % 2:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    else:
        del content[draw.randrange(len(content)) :]
    file.write_bytes(content)
    with pytest.raises(UserError, match=str(folder)):
        verify(folder)


def test_missing_swapped_and_further_files_are_found(folder, tmp_path):
    def refused(match):
        with pytest.raises(UserError, match=match) as error:
            verify(folder)
        assert "\n" not in str(error.value)

    (folder / "model-2.safetensors").write_text("x")
    refused("model-2.safetensors: is not in")
    verify(folder, others=True)
    (folder / "model-2.safetensors").unlink()
    one, other = folder / "config.json", folder / "inner/rows.json"
    one.rename(tmp_path / "aside"), other.rename(one), (tmp_path / "aside").rename(other)
    refused("damaged or changed")
    one.rename(tmp_path / "aside"), other.rename(one), (tmp_path / "aside").rename(other)
    verify(folder)
    one.unlink()
    refused("config.json: No such file")
    os.mkfifo(one)
    refused("config.json: is a FIFO")
    one.unlink()
    one.symlink_to("/dev/zero")
    refused("config.json: leads to /dev/zero, outside")


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"sha256": 1}', '{"sha256": ""}', "[" * 10000])
def test_a_manifest_that_is_none_is_one_line(folder, content):
    (folder / MANIFEST).write_text(content)
    with pytest.raises(UserError, match="cannot be used") as error:
        verify(folder)
    assert "\n" not in str(error.value)
    (folder / MANIFEST).unlink()
    with pytest.raises(UserError, match="not written to its end"):
        verify(folder)


def forge(folder, **changes):
    content = json.loads((folder / MANIFEST).read_text()) | changes
    content.pop("sha256")
    (folder / MANIFEST).write_text(json.dumps(content | {"sha256": durable._digest(content)}))


LIES = [[], "config.json", {"config.json": None}, {"config.json": []}, {"config.json": {"bytes": "1"}}]
OUTSIDE = ["../secret", "inner/../../secret", "inner", "", "a\0", "\ud800"]
LIES += [{name: {"bytes": 5, "sha256": ""}} for name in OUTSIDE]
LIES += [{"out/secret": {}}, {"model.safetensors/x": {}}, {"/dev/zero": {}}, {"a" * 300: {}}]


@pytest.mark.parametrize("files", LIES, ids=repr)
def test_a_manifest_that_lies_is_one_line_and_nothing_outside_of_the_folder_is_read(files, folder, monkeypatch):
    (folder.parent / "secret").write_text("12345")
    (folder / "out").symlink_to(folder.parent)
    forge(folder, files=files)
    opened = []
    inner = durable._entry
    monkeypatch.setattr(durable, "_entry", lambda file, **how: opened.append(file) or inner(file, **how))
    with pytest.raises(UserError) as error:
        verify(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
    assert all(file.resolve().is_relative_to(folder) for file in opened)


@pytest.mark.parametrize("how", ["link", "FIFO", "folder", "values"])
def test_what_is_no_manifest_does_not_count_as_none(how, folder):
    path = folder / MANIFEST
    content = path.read_text()
    path.unlink()
    if how == "link":
        (folder.parent / "manifest").write_text(content)
        path.symlink_to(folder.parent / "manifest")
    elif how == "values":
        path.write_text(f'{{"files": {"[" * 2_000_001}')
    else:
        os.mkfifo(path) if how == "FIFO" else path.mkdir()
    assert durable.sealed(folder)
    with pytest.raises(UserError, match=str(path)):
        verify(folder)


def test_another_format_is_named(folder):
    forge(folder, format=2)
    with pytest.raises(UserError, match="has the format 2, and this version reads 1"):
        verify(folder)


def test_publishing_takes_the_place_of_an_older_folder(folder, tmp_path):
    part = tmp_path / "part"
    part.mkdir()
    (part / "f").write_text("new")
    publish(part, folder, step=8)
    assert verify(folder)["step"] == 8 and entries(folder) == ["f", MANIFEST] and not part.exists()


def test_some_files_of_a_folder_are_sealed(tmp_path):
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text("1")
    seal(tmp_path, ["a.json"])
    (tmp_path / "b.json").write_text("2")
    verify(tmp_path, others=True)


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.lock").symlink_to(tmp_path / "mine")
    with pytest.raises(NotWritten, match="run/.lock cannot be written"), only_process(tmp_path / "run"):
        pass
    assert (tmp_path / "mine").read_text() == "mine"


def test_one_process_at_a_time(tmp_path):
    code = (
        f"import faulthandler\nfaulthandler.dump_traceback_later({TIME_LIMIT}, exit=True)\n"
        "import sys, pathlib\nfrom shunter.durable import only_process\n"
        "with only_process(pathlib.Path(sys.argv[1])):\n    print('in', flush=True)\n    sys.stdin.read()\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], text=True, **pipes)
    try:
        assert other.stdout.readline() == "in\n"
        with pytest.raises(UserError, match=f"process {other.pid} on .* is at work there"), only_process(tmp_path):
            pass
    finally:
        other.kill()
        other.communicate(timeout=TIME_LIMIT)
    with only_process(tmp_path):
        pass


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ENOSPC, errno.EACCES])
def test_data_that_cannot_be_read_are_not_a_disk_that_takes_nothing(number):
    said = os.strerror(number)
    assert why_not_written(OSError(number, said, "model.safetensors")) and why_not_written(RuntimeError(said))
    assert why_not_written(UserError(f"images/cat/3.png cannot be read: {said}")) == ""


def test_a_lock_that_was_removed_before_it_was_taken_is_none(tmp_path, monkeypatch):
    """By a process that removed the folder of a run which could not begin, while this one began it anew."""
    lock = durable._lock

    def removed(descriptor):
        monkeypatch.setattr(durable, "_lock", lock)
        (tmp_path / ".lock").unlink()
        return lock(descriptor)

    monkeypatch.setattr(durable, "_lock", removed)
    with only_process(tmp_path), pytest.raises(UserError, match="is at work there"), only_process(tmp_path):
        pass
