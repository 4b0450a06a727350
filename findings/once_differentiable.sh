#!/usr/bin/env bash
# torch 2.13.0: `once_differentiable` does not refuse every second derivative.
#
# The decorator is there so that a backward written without autograd is refused when it is differentiated. It refuses
# where the gradient that comes in requires one itself (of a square, say). Where that gradient is constant, as of a sum,
# the result comes out detached, and what a penalty on it should teach the inputs is silently missing.
#
# Seen: for y = x^3 by such a function, d/dx of (dy/dx)^2 is refused for y.square().sum() and missing for y.sum(), whose
# gradient does not even require one. Expected: refused in both cases.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from torch.autograd.function import once_differentiable


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


def second(outer):
    x = torch.tensor([2.0], requires_grad=True)
    (grad,) = torch.autograd.grad(outer(Cube.apply(x)), x, create_graph=True)
    if not grad.requires_grad:
        return "no graph: a penalty on the gradient teaches nothing"
    try:
        grad.square().sum().backward()
        return f"{x.grad.item()}"
    except RuntimeError as error:
        return f"refused: {str(error).splitlines()[0]}"


square, plain = second(lambda y: y.square().sum()), second(lambda y: y.sum())
print(f"torch {torch.__version__}\nof a square: {square}\nof a sum: {plain}")
assert square.startswith("refused") and plain.startswith("no graph"), "the behaviour has changed"
PYTHON
