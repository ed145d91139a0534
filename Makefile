# From a fresh checkout to anything: needs Python 3.11, 3.12 or 3.13, make and git. `make help` lists the targets.
#
#   PYTHON=...     the interpreter to build .venv with; otherwise the first suitable one is used
#   PIP_FLAGS=...  passed to pip. Without a GPU, the CPU build of torch saves gigabytes:
#                  PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
PIP_FLAGS ?=
PYTHON ?=

.PHONY: help demo test bench bench-quick lint docs clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /\1\t/' | expand -t 14

demo: $(VENV)/runtime.stamp  ## a small league trains on this machine and loses a worker
	@$(BIN)/koinon demo

test: $(VENV)/dev.stamp  ## all tests
	$(BIN)/python -m pytest

bench: $(VENV)/dev.stamp  ## every benchmark in full; rewrites docs/benchmarks.md
	$(BIN)/python -m bench

bench-quick: $(VENV)/dev.stamp  ## every benchmark for a minute at most; writes nothing
	$(BIN)/python -m bench --quick

lint: $(VENV)/dev.stamp  ## style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/dev.stamp  ## the documentation site, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "The pages are in site/index.html."

clean:  ## remove what the targets made; runs are kept
	rm -rf $(VENV) site build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One install per change of the requirements, not one per call. `demo` needs no development tools.
$(VENV)/runtime.stamp: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing Koinon (once)..."
	@$(BIN)/python -m pip install --quiet $(PIP_FLAGS) -c constraints.txt -e .
	@touch $@

$(VENV)/dev.stamp: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing Koinon and the development tools (once)..."
	@$(BIN)/python -m pip install --quiet $(PIP_FLAGS) -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/runtime.stamp

# An interpreter counts only if it starts, has the right version and can make an environment: a shim may do neither.
$(BIN)/python:
	@suits='import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))'; \
	for candidate in $(or $(PYTHON),python3 python3.13 python3.12 python3.11); do \
		if "$$candidate" -c "$$suits" 2>/dev/null; then \
			echo "Making $(VENV) with $$("$$candidate" --version)."; \
			"$$candidate" -m venv $(VENV); \
			exit 0; \
		fi; \
	done; \
	echo "Koinon needs Python 3.11, 3.12 or 3.13 with the venv module, and none was found" >&2; \
	echo "(tried: $(or $(PYTHON),python3 python3.13 python3.12 python3.11))." >&2; \
	echo "On Debian or Ubuntu: apt install python3 python3-venv. Or name one: make PYTHON=/path/to/python3.12 ..." >&2; \
	exit 1
