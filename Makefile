# Every target works on a machine with only git, make and Python >= 3.10. The first one that needs it makes .venv.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
OLDEST_TRITON := .cache/triton-3.6.0
WORKERS ?= 2

.PHONY: demo test bench check install test-oldest-triton clean

demo: $(INSTALLED)  ## swap fused layers into a LLaMA: parity, throughput, latency
	@$(BIN)/llama-fast demo

test: $(INSTALLED)  ## PyTorch path and ahead-of-time binaries, then the Triton kernels in the interpreter
	@echo "== tests 1/2: ops as this machine runs them, fuse, packaging, binaries for GPUs that are not here"
	@$(BIN)/python -m pytest -q -n $(WORKERS)
	@echo "== tests 2/2: Triton kernels in the interpreter"
	@TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -n $(WORKERS) tests/kernels tests/fusion tests/engine/test_engine.py

bench: $(INSTALLED)  ## every kernel, layer and whole model beside PyTorch and the best alternatives: few sizes, little time
	@$(BIN)/llama-fast bench --quick

check: $(INSTALLED)  ## lint, format, types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

test-oldest-triton: $(INSTALLED) $(OLDEST_TRITON)  ## the binaries again, compiled by Triton 3.6.0
	@PYTHONPATH=$(OLDEST_TRITON) $(BIN)/python -m pytest -q -n $(WORKERS) tests/kernels/test_binaries.py

install: $(INSTALLED)

$(INSTALLED): pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "llama-fast needs Python 3.10 or newer, and $(PYTHON) is " + sys.version.split()[0] + ": make PYTHON=/path/to/python3.12 ...")'
	@test -x $(BIN)/python || { echo "== install 1/3: creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "== install 2/3: $(TORCH) (some 200 MB, more with CUDA)"
	@$(BIN)/python -m pip install -q "$(TORCH)"
	@echo "== install 3/3: llama-fast and its tools"
	@$(BIN)/python -m pip install -q -e ".[dev]"
	@touch $@

$(OLDEST_TRITON):
	@echo "== installing Triton 3.6.0 beside the environment"
	@$(BIN)/python -m pip install -q --no-deps --target $@ triton==3.6.0

clean:  ## remove what was installed and built
	rm -rf $(VENV) .cache build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
