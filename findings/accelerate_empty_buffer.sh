#!/usr/bin/env bash
# accelerate 1.15.0 (torch 2.13.0): offloading with buffers fails on a module whose buffer has no value yet.
#
# torch documents that a buffer may be None (`register_buffer(name, None)`: it is then in no state dict, and `.to` and
# friends leave it alone); layers use it for state that only some options have. `cpu_offload(model)` takes such a module.
#
# Seen: with offload_buffers=True, and where the buffer is not persistent, AttributeError ('NoneType' object has no
# attribute 'device') while the hooks are attached, naming neither the buffer nor the module. A persistent one is fine.
# Expected: a buffer without a value is left alone, as a parameter without one is.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 accelerate==1.15.0
"$folder/venv/bin/python" - <<'PYTHON'
import accelerate
import torch


class Layer(torch.nn.Linear):
    def __init__(self, persistent):
        super().__init__(2, 2)
        self.register_buffer("count", None, persistent=persistent)


def offload(persistent, **options):
    layer = Layer(persistent)
    x = torch.randn(3, 2)
    expected = layer(x)
    try:
        accelerate.cpu_offload(layer, torch.device("cpu"), **options)
        return "equal" if torch.equal(layer(x), expected) else "different"
    except AttributeError as error:
        return f"AttributeError: {error}"


found = {
    "without buffers": offload(False),
    "a persistent one": offload(True, offload_buffers=True),
    "one that is not": offload(False, offload_buffers=True),
}
print(f"accelerate {accelerate.__version__}, torch {torch.__version__}", *found.items(), sep="\n")
assert found["without buffers"] == found["a persistent one"] == "equal", "the behaviour has changed"
assert found["one that is not"].startswith("AttributeError"), "the behaviour has changed"
PYTHON
