"""The command line: whatever goes wrong is a line."""

import argparse
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import shunter
from shunter.cli import _parser, look, main
from tests.campaigns.processes import in_child
from tests.helpers import TIME_LIMIT


def test_a_warning_is_one_line(capsys, monkeypatch):
    before = warnings.formatwarning

    def warn(args):
        print(end=warnings.formatwarning(UserWarning("look\nhere"), UserWarning, "file.py", 3), file=sys.stderr)
        return 0

    monkeypatch.setattr(look, "_routers", warn)
    assert main(["routers"]) == 0
    assert capsys.readouterr().err == "shunter: look here\n"
    assert warnings.formatwarning is before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("words", [["routers"], ["simulate", "--list"]])  # more than a buffer, and less
def test_standard_output_that_takes_nothing_is_one_line(words):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "shunter", *words]
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=TIME_LIMIT, check=False)
    assert (ended.returncode, ended.stderr) == (1, f"shunter {words[0]}: No space left on device\n")


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
def test_a_standard_stream_that_is_closed_is_none_for_files_to_take(closed, tmp_path):
    def work():
        for descriptor in closed:
            os.close(descriptor)
            setattr(sys, ("stdin", "stdout", "stderr")[descriptor], None)  # as Python begins then
        code = main(["routers"])
        with open(tmp_path / "file", "w") as file:
            return code or file.fileno() < 3 or main(["roles", str(tmp_path)]) != 2

    assert in_child(work).code == 0


@pytest.mark.parametrize("name", ["missing", "s" * 300])
def test_an_error_of_the_file_system_is_a_sentence(name, capsys, tmp_path):
    missing = tmp_path / name / "runs.csv"
    assert main(["roles", str(missing)]) == 2
    assert re.fullmatch(rf"shunter roles: {re.escape(str(missing))}.*: [^\[\]]+\n", capsys.readouterr().err)


def test_a_verb_is_named_once(capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    assert main(["quantize", str(tmp_path / "empty"), "--out", str(tmp_path / "out")]) == 2
    assert main(["prune", str(tmp_path / "empty"), "--out", str(tmp_path / "out"), "--keep", "1"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and all(line.count(line.split(":")[0].split()[1] + ":") == 1 for line in said)


@pytest.mark.parametrize("module,extra", [("peft.tuners", "lora"), ("sklearn.datasets", "tasks"), ("jinja2", "train")])
def test_a_package_that_is_not_installed_is_one_line_with_what_to_install(monkeypatch, capsys, module, extra):
    def verb(args):
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr(look, "_routers", verb)
    assert main(["routers"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"pip install 'shunter[{extra}]'" in said, said


def test_a_module_of_our_own_that_is_missing_is_no_package_to_install(monkeypatch):
    def verb(args):
        raise ModuleNotFoundError("No module named 'shunter.lost'", name="shunter.lost")

    monkeypatch.setattr(look, "_routers", verb)
    with pytest.raises(ModuleNotFoundError):
        main(["routers"])


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        MemoryError("Unable to allocate 2.00 GiB for an array"),
        RuntimeError(
            "[enforce fail at a.cpp:1] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        ),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 bytes"),
    ],
)
def test_too_little_memory_is_one_line(error, monkeypatch, capsys):
    def full(*given):
        raise error

    monkeypatch.setattr(look, "_routers", full)
    assert main(["routers"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("shunter routers: memory does not suffice; give fewer data") and said.count("\n") == 1
    assert str(error) in said
    monkeypatch.setattr(look, "_routers", lambda *given: [][1])
    with pytest.raises(IndexError):
        main(["routers"])


def _parsers(parser):
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from _parsers(inner)


def test_help_says_what_each_argument_is_and_its_default():
    for parser in _parsers(_parser()):
        text = " ".join(parser.format_help().split())
        for action in parser._actions:
            if not isinstance(action, argparse._SubParsersAction):
                assert action.help, f"{parser.prog}: {action.option_strings or action.dest}"
            if isinstance(action.default, int | float) and not isinstance(action.default, bool):
                said = [f"default: {action.default}", f"default: {action.default:g}"]
                assert any(words in text for words in said), f"{parser.prog}: {action.option_strings}"


def test_without_arguments_there_is_help(capsys):
    assert main([]) == 2
    said = capsys.readouterr().err
    assert "shunter train text" in said and "inspect" in said


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.strip() == f"shunter {shunter.__version__}"


@pytest.mark.parametrize("verb", ["generate run", "finetune run", "upcycle m --out o", "prune m --keep 2 --out o"])
@pytest.mark.parametrize("seed", ["-1", str(2**63), str(10**30), "1.5", ""])
def test_a_seed_that_torch_does_not_take_is_said_first(verb, seed, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*verb.split(), f"--seed={seed}"])
    assert ended.value.code == 2 and "argument --seed: " in capsys.readouterr().err
