# Every target does all of its own set-up: a virtual environment in .venv, installed once and again when
# pyproject.toml or constraints.txt change. Use another interpreter with `make PYTHON=python3.12 test`.
.POSIX:
.DEFAULT_GOAL := help

PYTHON = python3
VENV = .venv
BIN = $(VENV)/bin
WORKERS = 2
# One thread per test worker: the models of the tests are tiny, and threads that wait for each other cost more than they give.
THREADS = OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
PINS = constraints.txt
PIP_INSTALL = $(BIN)/python -m pip install -qq --disable-pip-version-check -c $(PINS)
PYTEST = $(THREADS) $(BIN)/python -m pytest
# What leans on transformers, for `make test-oldest` and `make test-newest`, each in an environment of its own.
RANGE = tests/parity tests/models tests/integrations

.PHONY: help quickstart test test-oldest test-newest versions lint types check nightly reference matrix format clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | while IFS='|' read -r name text; do printf '%-18s %s\n' "$$name" "$$text"; done

quickstart: $(VENV)/.base ## train a prompt on the bundled model and show before and after, offline
	@$(BIN)/softprompts quickstart

test: $(VENV)/.dev ## the quick tests (no network, no GPU)
	@$(PYTEST) -n $(WORKERS) $(ARGS)

test-oldest: .venv-oldest.txt ## what leans on transformers, with its oldest supported release
	@$(MAKE) -s VENV=.venv-oldest PINS=.venv-oldest.txt ARGS='$(RANGE) $(ARGS)' versions test

test-newest: .venv-newest.txt ## the same with the newest 5.x of the registry
	@$(MAKE) -s VENV=.venv-newest PINS=.venv-newest.txt .venv-newest/.dev
	@.venv-newest/bin/python -m pip install -qq --disable-pip-version-check -U -c .venv-newest.txt 'transformers<6'
	@$(MAKE) -s VENV=.venv-newest PINS=.venv-newest.txt ARGS='$(RANGE) $(ARGS)' versions test

versions: $(VENV)/.dev
	@$(BIN)/python -c 'import torch, transformers; print("transformers", transformers.__version__, "torch", torch.__version__)'

lint: $(VENV)/.dev ## ruff
	@$(BIN)/ruff check src tests scripts benchmarks

types: $(VENV)/.dev ## mypy, strict, on src
	@$(BIN)/mypy

check: lint types test ## lint, types and test

nightly: $(VENV)/.dev ## every test that needs no network and no GPU, the slow ones included
	@$(PYTEST) -m "not gpu and not network" $(ARGS)

reference: $(VENV)/.dev ## write docs/reference anew from the code
	@$(BIN)/python scripts/generate_reference.py

matrix: $(VENV)/.dev ## run every contract on every family, PEFT beside it, and write docs/reference/families.md
	@$(THREADS) $(BIN)/python scripts/family_matrix.py --peft

format: $(VENV)/.dev ## let ruff mend what it can
	@$(BIN)/ruff check --fix src tests scripts benchmarks

clean: ## remove the virtual environment and every cache
	rm -rf $(VENV) .venv-oldest* .venv-newest* .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
	find src tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "softprompts needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || echo missing)." >&2; \
	  echo "Name another interpreter: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "Making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/.base: $(VENV)/.python pyproject.toml $(PINS)
	@echo "Installing softprompts into $(VENV) (a few minutes the first time)"
	@$(PIP_INSTALL) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.python pyproject.toml $(PINS)
	@echo "Installing softprompts and what its tests need into $(VENV) (a few minutes the first time)"
	@$(PIP_INSTALL) -e '.[dev]'
	@touch $(VENV)/.base $@

# The pins of constraints.txt without those that constraints-oldest.txt gives: in their place these, or none.
.venv-oldest.txt .venv-newest.txt: constraints.txt constraints-oldest.txt
	@grep -v $$(sed -n 's/^\([A-Za-z_]*==\).*/-e ^\1/p' constraints-oldest.txt) constraints.txt > $@
	@test $@ = .venv-newest.txt || cat constraints-oldest.txt >> $@
