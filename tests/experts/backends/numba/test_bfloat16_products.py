"""Products in bfloat16 called from the loops: where the processor has them, and everywhere in an emulation.

The emulation takes the place of oneDNN's function in a process of its own: it reads what the loops packed, and
multiplies in float64. So what is packed, in which order, and with which strides is tested on every processor.
"""

import ctypes
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from shunter import Routing
from shunter.experts.autograd import Needs
from shunter.experts.backends import numba as loops_backend
from shunter.experts.backends.numba import bridge, onednn
from shunter.experts.choice import get
from tests.experts.conftest import needs_loops
from tests.helpers import TIME_LIMIT, random_routing, random_weights, relative_error

CASES = [
    # tokens, d, f, experts, triples a token (None: any number), rows at work at once
    (1, 16, 16, 1, 1, 512),
    (70, 16, 48, 3, 1, 512),
    (90, 32, 16, 5, 2, 512),
    (200, 48, 32, 2, None, 33),
    (130, 64, 80, 3, 1, 16),
    (40, 16, 16, 30, 2, 512),
]
WIDE = (24, 1088, 16, 2, 2, 512)  # more columns than are summed over, and rows than are packed, at once


def check(tokens, d, f, experts, k, rows):
    """The output and all gradients in bfloat16 are about as far from those in float64 as the reference's.

    Half a unit more is allowed; what is packed wrongly is off by tenths.
    """
    for activation, bias in (("swiglu", False), ("swiglu", True)):
        wide = random_weights(experts, d, f, activation, bias)
        weights = wide.to(torch.bfloat16)
        x, grad = torch.randn(tokens, d).bfloat16(), torch.randn(tokens, d).bfloat16()
        if k is None:
            routing = random_routing(tokens, experts, 0.4, torch.float32)
        else:
            index = torch.rand(tokens, experts).topk(min(k, experts)).indices
            routing = Routing.from_topk(index, torch.rand(index.shape) + 0.1, experts)
        block, loops_backend.BLOCK_ROWS = loops_backend.BLOCK_ROWS, rows
        try:
            assert bridge.operands(x, weights).dtype == torch.bfloat16
            found = _gradients("numba", x, weights, routing, grad)
            again = _gradients("numba", x, weights, routing, grad, recompute=True)
        finally:
            loops_backend.BLOCK_ROWS = block
        reference = _gradients("reference", x, weights, routing, grad)
        exact = _gradients("reference", x.double(), weights.to(torch.float64), routing, grad.double())
        for name, value in exact.items():
            if name == "weight" and tokens < 16:
                continue  # a few products of vectors that may cancel: no relative error is certain
            ours, theirs = relative_error(found[name], value), relative_error(reference[name], value)
            assert ours <= 1.5 * theirs + 2**-8, (name, activation, bias, tokens, d, f, ours, theirs)
            assert torch.equal(found[name], again[name]), name


def _gradients(backend, x, weights, routing, grad, **options):
    leaves = [x, *weights.learned(), routing.weight]
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    bias = len(leaves) > 4
    own = type(weights)(*leaves[1:3], *(leaves[3:5] if bias else (None, None)), weights.activation)
    y = get(backend).run(leaves[0], own, routing.with_weight(leaves[-1].to(x.dtype)), **options)
    y.backward(grad)
    names = ["x", "up", "down", *(["up_bias", "down_bias"] if bias else []), "weight"]
    return {"y": y.detach(), **{name: leaf.grad for name, leaf in zip(names, leaves, strict=True)}}


needs_products = pytest.mark.skipif(
    onednn.addresses() is None, reason="needs a processor with AVX-512 BF16 and torch's oneDNN; see the emulation"
)


@needs_loops
@needs_products
@pytest.mark.parametrize("case", [*CASES, WIDE], ids=str)
def test_errors_are_those_of_the_reference(case):
    check(*case)


@needs_loops
@needs_products
def test_only_the_gradients_that_are_wanted_are_computed():
    weights = random_weights(3, 16, 32, dtype=torch.bfloat16)
    x, grad, routing = torch.randn(50, 16).bfloat16(), torch.randn(50, 16).bfloat16(), random_routing(50, 3)
    kernel = loops_backend._Numba()
    plan = kernel.plan(x, weights, routing)
    _, h = kernel.forward(x, weights, routing, plan, True)
    whole = kernel.backward(grad, x, weights, routing, plan, h, Needs(True, True, True, True, False, False))
    for name in ("x", "up", "down"):
        needs = Needs(*(field in (name, "weight") for field in Needs._fields))
        one = kernel.backward(grad, x, weights, routing, plan, h, needs)
        assert torch.equal(getattr(one, name), getattr(whole, name))
        assert all(getattr(one, other) is None for other in {"x", "up", "down"} - {name})


@needs_loops
@needs_products
def test_widths_that_cannot_be_packed_and_a_forbidden_library_are_said():
    assert "multiples of 16, not d=24" in bridge.no_halves(torch.bfloat16, 24, 16)
    weights = random_weights(2, 32, 16, dtype=torch.bfloat16)
    x = torch.randn(40, 32).bfloat16()
    assert bridge.no_halves(x.dtype, 32, 16) is None
    with torch.backends.mkldnn.flags(enabled=False):  # oneDNN would end the process
        assert "other instructions" in bridge.no_halves(x.dtype, 32, 16)
        y = get("numba").run(x, weights, random_routing(40, 2))
    assert y.isfinite().all()


@needs_loops
def test_the_emulation_computes_what_the_reference_does():
    command = [
        sys.executable,
        "-m",
        "tests.experts.backends.numba.test_bfloat16_products",
        str(random.randrange(2**31)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT, check=False)
    assert done.returncode == 0 and done.stdout.endswith(f"{len(CASES)} cases\n"), done.stderr[-3000:]


def emulate():
    """From here on the loops multiply bfloat16 by the function below, on one thread, whatever the processor is."""
    from shunter.experts import cpu

    def brgemm(m, n, k, lda, ldb, ldc, add, a, b, c, packed):
        assert packed == 1 and lda >= k and ldb >= n and ldc >= n and k % 16 == 0
        first = _read(a, m, k, lda)
        pairs = _read(b, k // 2, 2 * n, 2 * ldb).reshape(k // 2, n, 2)
        product = first @ pairs.transpose(0, 2, 1).reshape(k, n)
        out = np.ctypeslib.as_array(ctypes.cast(c, ctypes.POINTER(ctypes.c_float)), ((m - 1) * ldc + n,))
        out = np.lib.stride_tricks.as_strided(out, (m, n), (4 * ldc, 4))
        out[:] = product + out if add else product

    kinds = [ctypes.CFUNCTYPE(None, *[ctypes.c_ssize_t] * count) for count in (11, 1)]
    functions = kinds[0](brgemm), kinds[1](lambda packed: None)
    where = [ctypes.cast(function, ctypes.c_void_p).value for function in functions]
    onednn.addresses = lambda: onednn.Addresses(*where)
    cpu.FAST[torch.bfloat16] = True
    torch.set_num_threads(1)  # others would wait for this one, which holds Python's lock
    return functions


def _read(address, rows, columns, step):
    """Numbers in bfloat16 at an address, rows `step` numbers apart, in float64."""
    bits = np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_uint16)), ((rows - 1) * step + columns,))
    rows = np.lib.stride_tricks.as_strided(bits, (rows, columns), (2 * step, 2))
    return (rows.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


if __name__ == "__main__":
    torch.manual_seed(int(sys.argv[1]))
    kept = emulate()
    for case in CASES:
        check(*case)
    print(f"{len(CASES)} cases")
