# Each target does all the set-up it needs, in .venv; it takes Python 3.11 or newer, pip, and nothing else.
PYTHON ?= python3
BIN := .venv/bin

# Where there is no NVIDIA driver the CPU build of torch is enough; the default build brings gigabytes of CUDA.
.venv/ready: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Shunter needs Python 3.11 or newer: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python tools/install.py
	touch $@

.PHONY: train test bench-gpu test-slow
train: .venv/ready
	$(BIN)/shunter train text

test: .venv/ready
	$(BIN)/ruff check src tests tools
	$(BIN)/ruff format --check src tests tools
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

# What is too slow for every change: more routers stopped and resumed, real weights.
test-slow: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m slow

# Needs an NVIDIA GPU; without one it says so.
bench-gpu: .venv/ready
	$(BIN)/shunter bench gpu --out runs/bench
