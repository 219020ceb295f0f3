# Every target sets up .venv first if it has to; nothing needs activating. `make help` lists the targets.
#
#   PYTHON=python3.12   the interpreter to make .venv with (default: the first of python3, python3.13 .. 3.10 that fits)
#   PYTEST_WORKERS=4    processes for the tests (default 3)

SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
PYTEST_WORKERS ?= 3
SOURCES := megatron_itt tools tests setup.py

# One thread per process: the tests and the CPU runs bring their own processes.
export OMP_NUM_THREADS ?= 1
export PYTHON

.PHONY: help install quickstart test test-versions test-parallel lint types format docs bench gpu-check clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

$(STAMP): setup.py requirements/constraints.txt tools/install.sh
	@bash tools/install.sh

install: $(STAMP)  ## set up .venv only

quickstart: $(STAMP)  ## the whole line on this machine: text, data, training, export, evaluation, report
	@$(PY) tools/quickstart.py

test: lint types  ## lint, types and all fast tests
	@$(PY) -m pytest -n $(PYTEST_WORKERS) --dist loadfile

test-parallel: $(STAMP)  ## the full matrix of parallel layouts (gloo, long)
	@$(PY) -m pytest tests/distributed --slow --timeout 3600

test-versions: $(STAMP)  ## version-dependent tests under the other tested Python and megatron-core (OTHER_PYTHON=python3.13)
	@bash tools/test_versions.sh

lint: $(STAMP)  ## formatting, lint rules, spelling
	@$(PY) -m ruff format --check --quiet $(SOURCES) || { $(PY) -m ruff format --diff --quiet $(SOURCES); \
		echo "lint: formatting differs; run make format" >&2; exit 1; }
	@$(PY) -m ruff check --quiet $(SOURCES)
	@$(PY) -m codespell_lib $$(git ls-files 2>/dev/null || echo $(SOURCES) docs)

types: $(STAMP)  ## static types
	@$(PY) -m mypy --no-error-summary

format: $(STAMP)  ## rewrite the sources in the house format
	@$(PY) -m ruff check --fix --quiet $(SOURCES)
	@$(PY) -m ruff format --quiet $(SOURCES)

docs: $(STAMP)  ## build the documentation site into site/; a warning fails
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

bench: $(STAMP)  ## measure throughput on this machine
	@$(PY) tools/benchmark.py --threads $$(nproc)

gpu-check:  ## check the GPU parts on a machine that has a GPU; with .venv or, without it, $(PYTHON) as it is
	@if [ -x $(PY) ]; then $(PY) -m megatron_itt.benchmark; else PYTHONPATH=. $(PYTHON) -m megatron_itt.benchmark; fi

clean:  ## remove caches and build products; .venv and runs/ stay
	@rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache
	@find megatron_itt tools tests -name __pycache__ -type d -prune -exec rm -rf {} +
