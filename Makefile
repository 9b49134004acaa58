# Nouns. `make` alone says what there is. Everything lives in .venv at the project's root; nothing else is
# touched but the user's model cache (STAGEMESH_HOME).
.DEFAULT_GOAL := help
SHELL := /bin/bash

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do command -v $$p >/dev/null 2>&1 && \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null && { command -v $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --progress-bar off -c constraints.txt

PROMPT ?= Why is the sky blue? Answer in two sentences.
STAGES ?= 2
MODEL ?= smollm2
TESTS ?= tests
export STAGES MODEL

.PHONY: help run chat test test-long check style format types rooms protos protos-check house bench setup setup-dev clean distclean

help: ## what there is
	@echo "stagemesh: make TARGET"
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# ---- environment: stamps make the second time instant
$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "stagemesh needs Python 3.11, 3.12 or 3.13 on the PATH (or PYTHON=/path/to/python3.11)" >&2; exit 2; }
	@echo "· creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.worker-stamp: pyproject.toml constraints.txt | $(BIN)/python
	@echo "· installing stagemesh and MLX into $(VENV) (once; about a minute)"
	@$(PIP) -e '.[worker]'
	@touch $@

$(VENV)/.dev-stamp: pyproject.toml constraints.txt $(VENV)/.worker-stamp
	@echo "· installing the development tools (once)"
	@$(PIP) -e '.[worker,dev]'
	@touch $@

setup: $(VENV)/.worker-stamp ## the environment that runs the mesh
setup-dev: $(VENV)/.dev-stamp ## and what tests and checks need

# ---- use
run: export MESH_PROMPT := $(PROMPT)
run: $(VENV)/.worker-stamp ## start a mesh, answer PROMPT="…" over STAGES=2, stop it
	@$(BIN)/stagemesh run --model "$$MODEL" --stages "$$STAGES" --prompt "$$MESH_PROMPT"

chat: $(VENV)/.worker-stamp ## talk to the model over STAGES=2
	@$(BIN)/stagemesh chat --model "$$MODEL" --stages "$$STAGES"

bench: $(VENV)/.worker-stamp ## measure this machine
	@$(BIN)/stagemesh bench

# ---- checks
test: $(VENV)/.dev-stamp ## every test (TESTS=tests/stagemesh for some)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(TESTS)

test-long: $(VENV)/.dev-stamp ## and a longer stress run with every fault
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --long $(TESTS)

check: style types rooms protos-check test ## what CI runs

style: $(VENV)/.dev-stamp ## lint and format, checked
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: $(VENV)/.dev-stamp ## lint and format, done
	@$(BIN)/ruff check --fix-only --quiet . ; $(BIN)/ruff format .

types: $(VENV)/.dev-stamp ## mypy, strict
	@$(BIN)/mypy

rooms: $(VENV)/.dev-stamp ## who may import what
	@$(BIN)/lint-imports

protos: $(VENV)/.dev-stamp ## generate stagemesh/v1 from protos/
	@$(BIN)/python scripts/generate_protos.py

protos-check: $(VENV)/.dev-stamp ## generated code is fresh; buf lint, format and breaking changes
	@$(BIN)/python scripts/generate_protos.py --check
	@$(BIN)/python scripts/check_protos.py

house: $(VENV)/.dev-stamp ## the tests of the house itself
	@$(BIN)/python -m pytest tests/house

clean: ## caches and build leftovers
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis reports
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## and the environment
	@rm -rf $(VENV)
