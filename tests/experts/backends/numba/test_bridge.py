"""The compiled loops: exact where they only widen, near float64 elsewhere, the same bits always, and optional."""

import os
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from shunter.experts import Weights, choose
from shunter.experts.backends.numba import bridge as numba
from shunter.experts.backends.numba.mkl import addresses
from shunter.experts.choice import get
from tests.experts.conftest import needs_loops
from tests.helpers import TIME_LIMIT, random_routing, random_weights, relative_error


def _products(x, index, matrices, counts):
    """The rows of x at an index, sorted by expert, times their experts' matrices, in float32."""
    out, counts = torch.empty(len(index), matrices.shape[1]), torch.tensor(counts)
    offsets = F.pad(counts.cumsum(0), (1, 0))
    with numba.ready() as loops:
        parts = (x.float()[index], matrices, counts.nonzero().view(-1), offsets, out)
        loops.products(*map(numba.array, parts))
    return out


needs_numba = pytest.mark.skipif(not numba.INSTALLED, reason="needs numba")
HALF = [torch.bfloat16, torch.float16]


def _every_value(dtype):
    """All 65,536 values of a half precision, as a square matrix."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    return bits.view(dtype).view(256, 256)


@needs_numba
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("n", range(1, 10))
def test_every_value_of_half_precision_is_widened_exactly(dtype, n):
    """Zeros of both signs, subnormals, infinities and NaN among them; each row picks one column."""
    matrix = _every_value(dtype)
    column = torch.randint(256, (n,))
    picked = matrix[:, column].float().T
    rows = F.one_hot(column, 256).to(dtype)
    found = _products(rows, torch.arange(n), matrix.nan_to_num(0.0, 0.0, 0.0)[None], [n])
    assert torch.equal(found, picked.nan_to_num(0.0, 0.0, 0.0))
    # What is not finite must be alone in its row, as 0 times it is NaN.
    found = _products(torch.ones(n, 1), torch.arange(n), matrix.reshape(1, -1, 1), [n])
    expected = matrix.float().view(1, -1).expand(n, -1)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))


@needs_numba
@settings(max_examples=60)
@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=6), p=st.integers(1, 70), q=st.integers(1, 140),
    dtype=st.sampled_from([torch.float32, *HALF]), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_products_of_any_shape(counts, p, q, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    matrices = torch.randn(len(counts), q, p, generator=generator).to(dtype)
    x = torch.randn(5, p, generator=generator).to(dtype)
    index = torch.randint(5, (sum(counts),), generator=generator)
    found = _products(x, index, matrices, counts)
    expert = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    exact = torch.einsum("np,nqp->nq", x[index].double(), matrices[expert].double())
    size = torch.einsum("np,nqp->nq", x[index].double().abs(), matrices[expert].double().abs())
    bound = (p + 1) * 2.0**-24  # of any order of p products and sums in float32
    assert found.shape == (sum(counts), q) and ((found.double() - exact).abs() <= bound * size).all()


@needs_numba
@pytest.mark.parametrize("name, tokens", [("numba", 200), ("decode", 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_from_every_thread_at_once(name, tokens, dtype):
    experts, routing = random_weights(6, 32, 24, dtype=dtype), random_routing(tokens, 6, dtype=torch.float32)
    x = torch.randn(tokens, 32, dtype=dtype)
    if name == "numba" and addresses() is None:
        pytest.skip("needs MKL")
    with torch.no_grad():
        expected = get(name).run(x, experts, routing)
    found = []

    def run():
        with torch.no_grad():
            for _ in range(10):
                found.append(get(name).run(x, experts, routing))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 40 and all(torch.equal(y, expected) for y in found)


@needs_numba
def test_the_number_of_threads_changes_no_bit_of_decoding():
    matrices, x = torch.randn(3, 200, 64), torch.randn(7, 64)
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2, 1000):
            torch.set_num_threads(number)
            found.append(_products(x, torch.arange(7), matrices, [2, 1, 4]))
            assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])


_ONE_THREAD = """
import torch
from shunter import Routing
from shunter.experts import Weights
from shunter.experts.backends.numba import bridge as numba
from shunter.experts.choice import get

torch.set_num_threads(1)
numba.SMALL = 0
weights = Weights(torch.randn(1, 4, 3), torch.randn(1, 3, 2))
with torch.no_grad():
    get("decode").run(torch.randn(2, 3), weights, Routing.from_topk(torch.zeros(2, 1).long(), torch.rand(2, 1), 1))
assert torch.get_num_threads() == 1, torch.get_num_threads()
"""


@needs_numba
def test_a_first_launch_leaves_torch_its_number_of_threads():
    """Numba's sets OpenMP's, which is torch's: small operations would then wait for other threads."""
    done = subprocess.run([sys.executable, "-c", _ONE_THREAD], capture_output=True, text=True, timeout=TIME_LIMIT)
    assert done.returncode == 0, done.stderr


_BITS = """
import hashlib, torch
from shunter import Routing
from shunter.experts import Weights
from shunter.experts.choice import get

torch.set_num_threads(2)
rand = torch.Generator().manual_seed(7)
x, up, down = (torch.randn(*shape, generator=rand) for shape in ((1024, 48), (8, 80, 48), (8, 48, 40)))
weight, index = torch.topk(torch.randn(1024, 8, generator=rand), 2)
for learned in (x, up, down, weight):
    learned.requires_grad_()
weights = Weights(up, down, activation="swiglu")
y = get("numba").run(x, weights, Routing.from_topk(index, weight, 8))
y.square().sum().backward()
with torch.no_grad():
    decoded = get("decode").run(x[:3], weights, Routing.from_topk(index[:3], weight[:3], 8))
for result in (y, x.grad, weight.grad, up.grad, down.grad, decoded):
    print(hashlib.sha256(result.detach().contiguous().numpy().tobytes()).hexdigest())
"""


@needs_loops
def test_the_compiler_may_choose_nothing_but_the_order_of_decodings_sums():
    """What it may choose it chooses otherwise in code that it compiles than in what it keeps on disk."""
    with numba.ready() as loops:
        compiled = {name: loop for name, loop in vars(loops).items() if hasattr(loop, "targetoptions")}
    assert len(compiled) > 40 and {"forward", "backward", "_sum"} <= set(compiled)
    assert {name for name, loop in compiled.items() if loop.targetoptions.get("fastmath")} == {"products"}


@needs_loops
@pytest.mark.slow
def test_loops_give_the_same_bits_when_they_were_compiled_just_now_and_when_they_come_from_disk(tmp_path):
    """Else a run that goes on in another process ends otherwise than one that never stopped."""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    bits = []
    for _ in range(2):
        call = [sys.executable, "-c", _BITS]
        done = subprocess.run(call, capture_output=True, text=True, timeout=TIME_LIMIT, env=environment)
        assert done.returncode == 0, done.stderr
        bits.append(done.stdout.split())
    assert list(tmp_path.rglob("*.nbi")), "nothing was kept on disk"
    assert len(bits[0]) == 6
    assert bits[0] == bits[1]


_FORK = """
import os, torch
from shunter import Routing
from shunter.experts import Weights, choice as backends
from shunter.experts.backends.numba import bridge as numba
from shunter.experts.choice import choose

def run():
    with torch.no_grad():
        return [choose(name, x, weights)[0].run(x, weights, routing) for name in ("decode", "auto")]

numba.SMALL, backends.FEW_TOKENS = 0, 4
x, weights = torch.randn(9, 6), Weights(torch.randn(4, 10, 6), torch.randn(4, 6, 5))
routing = Routing.from_topk(torch.randint(4, (9, 1)), torch.rand(9, 1), 4)
expected = run()
assert numba.usable(x)
child = os.fork()
torch.set_num_threads(1)
found = run()
assert numba.usable(x) == bool(child) and all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected))
if child:
    raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@needs_numba
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_goes_without_them():
    """Where the parent's threads were, numba would end it."""
    done = subprocess.run([sys.executable, "-c", _FORK], capture_output=True, text=True, timeout=TIME_LIMIT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("installed", [False, pytest.param(True, marks=needs_numba)])
def test_explain_says_whether_they_run(installed, monkeypatch):
    monkeypatch.setattr(numba, "INSTALLED", installed)
    weights = random_weights(4, 6, 5, dtype=torch.float32)
    with torch.no_grad():
        assert ("compiled by numba" in choose("auto", torch.randn(3, 6), weights)[1]) == installed
        assert ("pip install shunter[numba]" in choose("auto", torch.randn(3, 6), weights)[1]) == (not installed)
    backend, why = choose("auto", torch.randn(99, 6), weights)
    assert backend.name == ("numba" if installed and addresses() else "padded")
    assert installed or "(numba: numba is not installed (pip install shunter[numba]))" in why


def test_a_numba_that_does_not_import_costs_a_warning_and_no_result(monkeypatch):
    weights, routing = random_weights(4, 6, 5, dtype=torch.float32), random_routing(9, 4, dtype=torch.float32)
    x = torch.randn(9, 6)
    monkeypatch.setattr(numba, "INSTALLED", True)
    monkeypatch.setitem(sys.modules, "numba", None)  # importing it raises
    monkeypatch.delitem(sys.modules, "shunter.experts.backends.numba.loops", raising=False)
    monkeypatch.delattr("shunter.experts.backends.numba.loops", raising=False)
    numba._loops.cache_clear()
    try:
        with warnings.catch_warnings(record=True) as told, torch.no_grad():
            warnings.simplefilter("always")
            found = [choose(name, x, weights)[0].run(x, weights, routing) for name in ("decode", "auto", "decode")]
    finally:
        numba._loops.cache_clear()
    assert [str(w.message) for w in told if "numba" in str(w.message)] == [str(told[0].message)]
    assert "installed but cannot be used" in str(told[0].message)
    for y in found:
        assert torch.allclose(y, get("reference").run(x, weights, routing), atol=1e-5)


def test_few_numbers_stay_in_one_thread(monkeypatch):
    monkeypatch.undo()
    assert not numba.usable(torch.randn(numba.SMALL - 1))
    assert numba.usable(torch.randn(numba.SMALL)) == numba.INSTALLED


@pytest.mark.parametrize("strided", ["up", "down", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_they_do_not_take_goes_to_torch(strided, dtype):
    up, down = torch.randn(4, 10, 6, dtype=dtype), torch.randn(4, 6, 5, dtype=dtype)
    weights = Weights(
        up.mT.contiguous().mT if strided != "down" else up, down.mT.contiguous().mT if strided != "up" else down
    )
    routing, x = random_routing(9, 4, dtype=torch.float32), torch.randn(9, 6, dtype=dtype)
    assert not numba.usable(weights.up, weights.down) and not numba.usable(torch.randn(2, 2, dtype=torch.float64))
    with torch.no_grad():
        found = get("decode").run(x, weights, routing)
        assert relative_error(found, get("reference").run(x, weights, routing)) < 4 * torch.finfo(dtype).eps
