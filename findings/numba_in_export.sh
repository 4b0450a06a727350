#!/usr/bin/env bash
# torch 2.13.0 and numba 0.68.1: numba cannot be imported for the first time inside of torch.export.
#
# A model that takes a compiled loop where numba is installed will import it when it first needs it. Under torch.compile
# that works. torch.export (strict=False, its default) replaces functions of the module math while it traces, and numba
# looks these up by their names when it is imported.
#
# Seen: the import raises AttributeError (a module of torch has no attribute '<lambda>') while a graph is exported, and
# works before it. Expected: an import inside of a traced function does what it does outside.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numba==0.68.1
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import torch


class Lazy(torch.nn.Module):
    def forward(self, x):
        import numba

        numba.njit(lambda value: value + 1)(1)
        return x + 1


def export(strict):
    try:
        return torch.export.export(Lazy(), (torch.ones(2),), strict=strict).module()(torch.ones(2)).tolist()
    except AttributeError as error:
        return f"AttributeError: {error}"


first = export(False)
print(f"torch {torch.__version__}, numba {version('numba')}\nin a fresh process: {first}")
assert isinstance(first, str) and "<lambda>" in first, "the behaviour has changed"
PYTHON
