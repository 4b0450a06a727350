"""Pages of the documentation as scripts: their code and commands run in order, what they show is what is printed.

A ```python block is executed. A ```console block holds lines `$ shunter …`, each run in a process of its own, with what
it prints to standard output below it, where the page shows that. A ```text block is what the python block before it
printed. A line `…` stands for any number of lines. Lines below a command that begin with `shunter VERB:` are an error:
the command must then exit with code 2 and print them to standard error.
"""

import contextlib
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

from shunter import routers

ROOT = Path(__file__).resolve().parent.parent
NOT_RUN = {"toml"}
TIME_LIMIT = 300  # seconds of one command
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def run_page(page, monkeypatch, folder, together=True):
    """Run a page in a folder; routers that it registers are forgotten afterwards.

    Args:
        page: the path of a Markdown file.
        monkeypatch: of pytest.
        folder: an empty one, in which code and commands run.
        together: whether the python blocks share their names, as one script; else each stands alone.

    Raises:
        AssertionError: naming the line, where a command fails or what is shown is not what is printed.
    """
    text = page.read_text(encoding="utf-8")
    registry = sys.modules[routers.register.__module__]
    monkeypatch.setattr(registry, "_ROUTERS", dict(registry._ROUTERS))
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.chdir(folder)
    names, printed = {}, None
    blocks = list(BLOCK.finditer(text))
    assert blocks, f"{page} has no block that could run"
    for block in blocks:
        kind, body = block.groups()
        line = text.count("\n", 0, block.start(2)) + 1
        where = f"{page.name}, line {line}"
        if kind == "python":
            code = compile("\n" * (line - 1) + body, str(page), "exec")
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(code, names if together else {})
            printed = out.getvalue()
        elif kind == "text":
            assert printed is not None, f"{where}: no code stands before the output"
            _compare(body, printed, where)
            printed = None
        elif kind == "console":
            _run_commands(body, where)
            printed = None
        else:
            assert kind in NOT_RUN, f"{where}: a block of {kind!r}; known are python, text, console, {NOT_RUN}"


def _run_commands(body, where):
    first, *commands = re.split(r"^\$ ", body, flags=re.MULTILINE)
    assert not first.strip() and commands, f"{where}: a console block begins with a line '$ shunter …'"
    for part in commands:
        command, shown = re.fullmatch(r"((?:.*\\\n)*.*)\n((?:.*\n?)*)", part).groups()
        program, *arguments = shlex.split(command.replace("\\\n", " "), comments=True)
        assert program == "shunter", f"{where}: {program!r} is not run here"
        ran = subprocess.run(
            [sys.executable, "-m", "shunter", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIME_LIMIT,
        )
        refused = re.match(r"shunter \w+:", shown) is not None
        assert ran.returncode == (2 if refused else 0), f"{where}: {command}\n{ran.stdout}\n{ran.stderr}"
        if shown.strip():
            _compare(shown, ran.stderr if refused else ran.stdout, where)


def _compare(shown, printed, where):
    shown, printed = _tidy(shown), _tidy(printed)
    pattern = "".join(r"(?:.*\n)*" if line == "…" else f"{re.escape(line)}\n" for line in shown.splitlines())
    assert re.fullmatch(pattern, printed), f"{where}: the page shows\n{shown}\nand this was printed\n{printed}"


def _tidy(text):
    return "".join(f"{line.rstrip()}\n" for line in text.strip("\n").split("\n"))
