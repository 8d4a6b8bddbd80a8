# Everything runs in $(VENV), which is made on first use and brought up to date whenever pyproject.toml changes.
PYTHON ?= python3
VENV ?= .venv
# CONSTRAINTS=constraints.txt installs the versions that the tests were last run with, else the newest ones.
CONSTRAINTS ?=
BIN := $(VENV)/bin
TEST_ENV := $(VENV)/.installed-test
DEV_ENV := $(VENV)/.installed-dev
DOCS_ENV := $(VENV)/.installed-docs
# A process for every core (at most 8), each with whole files: what a file's tests share is made once.
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile

.PHONY: help demo deploy-demo test test-all check bench docs env clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z-]+):.*## (.*)/\1|\2/' | column -t -s '|'

demo: $(TEST_ENV) ## train on the digits with and without a codec and compare
	$(BIN)/fedlight fit --config configs/digits.yaml --baseline true

deploy-demo: $(TEST_ENV) ## run a SuperLink and three nodes on this machine, train, and stop them
	$(BIN)/fedlight flower demo

test: $(TEST_ENV) ## run the tests, but for those marked slow
	$(PYTEST) -m "not slow" --hypothesis-profile quick

test-all: $(TEST_ENV) ## run all the tests
	$(PYTEST)

check: $(DEV_ENV) ## run ruff, mypy and all the tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST)

bench: $(TEST_ENV) ## run the benchmarks
	$(BIN)/python tests/benchmarks/run.py

docs: $(DOCS_ENV) ## build the documentation site into build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict
	@echo "build/site/index.html"

env: $(TEST_ENV) ## make the environment that demo, test and bench use

clean: ## remove caches and build outputs; the environment, data and logs stay
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find fedlight tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(TEST_ENV) $(DEV_ENV) $(DOCS_ENV): $(VENV)/.installed-%: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]' $(addprefix --constraint ,$(CONSTRAINTS))
	@touch $@
