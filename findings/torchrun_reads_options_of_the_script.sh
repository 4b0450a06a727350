#!/usr/bin/env bash
# torch 2.13.0: torchrun refuses an option of the script that begins like two of torchrun's own.
#
# `torchrun [its options] script.py [options of the script]`: what stands after the script, or after `-m module`, is the
# script's. Its help says so, and options of the same names as torchrun's (`--role x`) are handed on.
#
# Seen: `torchrun script.py train --run here` and `--log 1` end in "ambiguous option: --run could match --run-path,
# --run_path" (exit code 2), although they stand after the script; no process is started. `--run-path`, `--role` and
# options that begin like none are handed on, and so is everything after `--` (`torchrun -m module -- train --run here`).
# Expected: every option after the script reaches it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
cd "$folder"
echo 'import sys; print("the script has", sys.argv[1:])' > script.py
export OMP_NUM_THREADS=1
venv/bin/python -c 'import torch; print("torch", torch.__version__)'
try() { # what is expected, then the arguments
  local expected=$1 said
  shift
  said=$(timeout 120 venv/bin/torchrun --nproc-per-node 1 "$@" 2>&1 | grep -E "the script has|torchrun: error" || true)
  echo "torchrun $*: $said"
  [[ $said == *"$expected"* ]] || { echo "the behaviour has changed; expected: $expected"; exit 1; }
}
try "ambiguous option: --run could match" script.py train --run here
try "ambiguous option: --log could match" script.py train --log here
try "ambiguous option: --run could match" -m script train --run here
try "'--role', 'here'" script.py train --role here
try "'--name', 'here'" script.py train --name here
try "'--run', 'here'" -m script -- train --run here
