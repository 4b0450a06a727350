# Each target does all the set-up it needs, in .venv; it takes Python 3.11 or newer, pip, and nothing else.
PYTHON ?= python3
BIN := .venv/bin

# Where there is no NVIDIA driver the CPU build of torch is enough; the default build brings gigabytes of CUDA.
.venv/ready: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Shunter needs Python 3.11 or newer: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python tools/install.py
	touch $@

.PHONY: train test lint docs release bench-gpu test-slow campaigns
train: .venv/ready
	$(BIN)/shunter train text

test: lint docs
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

# What every commit is checked by, here and in .pre-commit-config.yaml.
lint: .venv/ready
	$(BIN)/ruff check src tests tools
	$(BIN)/ruff format --check src tests tools
	$(BIN)/mypy

# The site, in build/site; every warning is an error.
docs: .venv/ready
	$(BIN)/python tools/docs.py

# A wheel and a source distribution in dist/, checked, and tried in an empty environment; nothing is published.
release: .venv/ready
	$(BIN)/python -m pip install --quiet --editable '.[release]'
	$(BIN)/python tools/release.py

# What is too slow for every change: more routers stopped and resumed, real weights.
test-slow: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m slow

# Thousands of kills, power losses, full disks and damaged files against small runs; the results go to the documentation.
# One that was interrupted goes on.
campaigns: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.campaigns --keep runs/campaigns --out docs/results

# Needs an NVIDIA GPU; without one it says so.
bench-gpu: .venv/ready
	$(BIN)/shunter bench gpu --out runs/bench
