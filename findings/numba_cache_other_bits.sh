#!/usr/bin/env bash
# numba 0.68.1 (llvmlite 0.50.0): a function that was compiled in this process and the same one from the cache on disk
# give different bits, on one machine, for one input, without threads.
#
# `cache=True` promises that the compiled function is kept on disk, so that later processes need not compile it.
#
# Seen: with fastmath flags that let the compiler choose (here reassoc, contract and nsz) float32 results differ in last
# bits between the process that compiled and all later ones, which agree with each other. A function that another calls
# has code of its own in the process that compiles it; what is kept of the caller holds a copy of it, optimised once more,
# where other products are fused or reordered. Without the flags all processes agree.
# Expected: what is kept is what ran.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check numba==0.68.1 llvmlite==0.50.0 numpy==2.4.6
cat > "$folder/swiglu.py" <<'PYTHON'
import hashlib
import sys

import numba
import numpy as np

some, more = ({"contract"}, {"reassoc", "contract", "nsz"}) if sys.argv[1] == "fast" else (False, False)


@numba.njit(fastmath=some, error_model="numpy", cache=True)
def silu(x):
    s = np.float32(1) / (np.float32(1) + np.exp(-x))
    return x * s, s * (np.float32(1) + x * (np.float32(1) - s))


@numba.njit(fastmath=more, error_model="numpy", cache=True)
def backward(h, da, weight, a, dh, grad_weight):
    f = da.shape[1]
    for r in range(da.shape[0]):
        row, grad, result, hidden, w, total = h[r], da[r], dh[r], a[r], weight[r], np.float32(0)
        for i in range(f):
            up = row[f + i]
            acted, slope = silu(row[i])
            total += grad[i] * (acted * up)
            hidden[i] = w * (acted * up)
            result[i] = w * grad[i] * up * slope
            result[f + i] = w * grad[i] * acted
        grad_weight[r] = total


@numba.njit(fastmath=more, error_model="numpy", cache=True)
def by_parts(h, da, weight, a, dh, grad_weight):
    n = h.shape[0] // 4
    for t in range(4):
        s, e = t * n, (t + 1) * n
        backward(h[s:e], da[s:e], weight[s:e], a[s:e], dh[s:e], grad_weight[s:e])


rand = np.random.default_rng(0)
h, da = rand.standard_normal((64, 96), np.float32), rand.standard_normal((64, 48), np.float32)
weight = rand.standard_normal(64).astype(np.float32)
a, dh, grad_weight = np.empty_like(da), np.empty_like(h), np.empty_like(weight)
by_parts(h, da, weight, a, dh, grad_weight)
print(hashlib.sha256(dh.tobytes()).hexdigest()[:12])
PYTHON
# One processor for all machines that have AVX2.
export NUMBA_CPU_NAME=haswell NUMBA_CPU_FEATURES=+avx,+avx2,+fma
run() { NUMBA_CACHE_DIR="$folder/$1" "$folder/venv/bin/python" "$folder/swiglu.py" "$1"; }
fast="$(run fast) $(run fast) $(run fast)"
exact="$(run exact) $(run exact) $(run exact)"
echo "numba 0.68.1, compiled and twice from disk: fast $fast, exact $exact"
read -r compiled kept again <<< "$fast"
[ "$compiled" != "$kept" ] && [ "$kept" = "$again" ] || { echo "the behaviour has changed"; exit 1; }
[ "$(tr ' ' '\n' <<< "$exact" | sort -u | wc -l)" = 1 ] || { echo "the behaviour has changed"; exit 1; }
