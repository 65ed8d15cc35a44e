# Everything a person types. Each target sets up what it needs, and is quick when
# nothing changed.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
MODEL := build/models/random-llama
HOST ?= 127.0.0.1
PORT ?= 8000
# KV memory of `make serve` and `make bench`, in bytes: vLLM would take most of the machine's.
KV_BYTES ?= 1073741824
# PyTorch's own index, where the CPU build lives that other indexes may lack.
TORCH_INDEX := https://download.pytorch.org/whl/cpu

.DEFAULT_GOAL := help
.PHONY: help setup serve test lint bench clean

help: ## print this list
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(VENV)/.cpu $(VENV)/.test $(MODEL)/config.json ## make .venv with vLLM for CPUs, and the bundled model

serve: $(VENV)/.cpu $(MODEL)/config.json ## serve the bundled model under the razor policy
	$(BIN)/razor serve $(MODEL) --host $(HOST) --port $(PORT) --served-model-name bundled \
	  --razor-window 256 --kv-cache-memory-bytes $(KV_BYTES) $(ARGS)

test: $(VENV)/.cpu $(VENV)/.test ## run the whole test suite
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.cpu $(VENV)/.test ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.cpu $(MODEL)/config.json ## measure held memory, residents and speed, full against razor
	$(BIN)/python benchmarks/residency.py $(MODEL) --output build/residency.json $(ARGS)

clean: ## remove what was made: .venv, build, caches
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v == (3, 11) else f"make: the CPU set-up needs Python 3.11, $(PYTHON) is {v[0]}.{v[1]}; try make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel

# The configured indexes first; PyTorch's own only where they lack its CPU build.
$(VENV)/.cpu: setup.py | $(BIN)/python
	$(BIN)/python -m pip install --quiet torch==2.13.0+cpu \
	  || $(BIN)/python -m pip install --quiet torch==2.13.0+cpu --index-url $(TORCH_INDEX)
	$(BIN)/python -m pip install --quiet --no-build-isolation -e '.[cpu]'
	$(BIN)/razor cpu-setup
	touch $@

$(VENV)/.test: setup.py $(VENV)/.cpu
	$(BIN)/python -m pip install --quiet --no-build-isolation -e '.[test,lint]'
	touch $@

$(MODEL)/config.json: models/make_random_llama.py $(VENV)/.cpu
	$(BIN)/python models/make_random_llama.py $(MODEL)
