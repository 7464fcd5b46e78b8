# `make demo` and `make test` are all a fresh machine needs: they make the environment by themselves.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test test-faults lint format tensorboard clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'
	@echo "  PYTHON=python3.12 chooses the interpreter, VENV=path the environment"

$(STAMP): pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (torch is large: a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: $(STAMP)  ## train a small ViT on scikit-learn's digits, in under a minute on two CPU cores
	@$(BIN)/vit-train

test: $(STAMP)  ## run the tests, in two processes with one thread each
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

test-faults: $(STAMP)  ## interrupt, kill and damage runs in every way: about 20 minutes
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m faults

lint: $(STAMP)  ## check style and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(STAMP)  ## bring the code into its form
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

tensorboard: $(STAMP)  ## watch the curves of everything under runs/
	@$(BIN)/tensorboard --logdir runs

clean:  ## remove caches and build products; environment and runs stay
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
