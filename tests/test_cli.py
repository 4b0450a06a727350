"""The command line: whatever goes wrong is a line."""

import sys
import warnings

from shunter.cli import look, main


def test_a_warning_is_one_line(capsys, monkeypatch):
    before = warnings.formatwarning

    def warn(args):
        print(end=warnings.formatwarning(UserWarning("look\nhere"), UserWarning, "file.py", 3), file=sys.stderr)
        return 0

    monkeypatch.setattr(look, "_routers", warn)
    assert main(["routers"]) == 0
    assert capsys.readouterr().err == "shunter: look here\n"
    assert warnings.formatwarning is before
