# Everything a newcomer needs: `make train` and `make test`.  Both install into .venv first.
PYTHON ?= python3
SEED ?= 0
CONFIG ?= configs/quickstart.yaml
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install train test lint types check clean help

help:
	@echo "make train [SEED=0] [ARGS='key=value …']  install, then train the quickstart agent"
	@echo "make test                                install, then run the tests"
	@echo "make check                               formatting, lint and types"

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Espalier needs Python 3.11 or newer"'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { echo "python3-venv is missing: apt-get install python3-venv"; exit 1; }
	@echo "Installing into $(VENV) (a few minutes, once) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

install: $(VENV)/.installed

train: install
	$(BIN)/espalier train $(CONFIG) run.seed=$(SEED) $(ARGS)

test: install
	$(BIN)/python -m pytest -m "not gpu" $(ARGS)

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: install
	$(BIN)/pyright

check: lint types

clean:
	rm -rf $(VENV) runs build *.egg-info .pytest_cache .ruff_cache .hypothesis
