#!/usr/bin/env bash
# torch 2.13.0: torch.compile drops a cast to bfloat16 and back that the code asks for.
#
# `x.bfloat16().float()` rounds to 8 bits of mantissa: it is how one simulates weights or router logits as a model in
# bfloat16 has them, fits scales that will be stored so, or compares two such computations.
#
# Seen: compiled, it returns x itself, bit by bit; float16 likewise, where 1e6 should become inf. A step through
# float8 is kept. Where the rounded tensor is returned as well, it is rounded, and its own conversion to float32 is not:
# two outputs of one function contradict each other. TORCHINDUCTOR_EMULATE_PRECISION_CASTS=1 gives what eager gives.
# Expected: casts between operations may go (fusing keeps more bits); those that stand in the code are part of it.
# (Needs a C++ compiler, as torch.compile does on a CPU.)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
cat > "$folder/cast.py" <<'PYTHON'
import torch


def through(dtype):
    return lambda x: x.to(dtype).float()


def both(x):
    rounded = x.bfloat16()
    return rounded, rounded.float()


x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
kept = {}
for dtype in (torch.bfloat16, torch.float16, torch.float8_e4m3fn):
    kept[dtype] = torch.equal(torch.compile(through(dtype))(x), through(dtype)(x))
rounded, back = torch.compile(both)(x)
agree = torch.equal(rounded.float(), back)
large = torch.compile(through(torch.float16))(torch.full((64,), 1e6))[0].item()
print(f"torch {torch.__version__}: equal to eager {kept}, two outputs agree {agree}, 1e6 through float16 {large}")
print([*kept.values(), agree, large])
PYTHON
run() {
    TORCHINDUCTOR_CACHE_DIR="$folder/$1" TORCHINDUCTOR_EMULATE_PRECISION_CASTS=$1 "$folder/venv/bin/python" "$folder/cast.py"
}
plain=$(run 0)
emulated=$(run 1)
echo "as it is:
$plain
with casts emulated:
$emulated"
[ "$(tail -1 <<< "$plain")" = "[False, False, True, False, 1000000.0]" ] || { echo "the behaviour has changed"; exit 1; }
[ "$(tail -1 <<< "$emulated")" = "[True, True, True, True, inf]" ] || { echo "the behaviour has changed"; exit 1; }
