# Everything a newcomer needs: `make train` and `make test`.  Both install into .venv first.
PYTHON ?= python3
SEED ?= 0
CONFIG ?= configs/quickstart.yaml
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
SGLANG := .venv-sglang
SGLANG_NEEDS := system/engine/sglang/requirements-cpu.txt system/engine/sglang/requirements-cpu-no-deps.txt

.PHONY: install sglang train test lint types check clean help

help:
	@echo "make train [SEED=0] [ARGS='key=value …']  install, then train the quickstart agent"
	@echo "make test                                install (SGLang for CPU, too), then run the tests"
	@echo "make sglang                              install SGLang for CPU into $(SGLANG), for engine=sglang"
	@echo "make check                               formatting, lint and types"

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Espalier needs Python 3.11 or newer"'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { echo "python3-venv is missing: apt-get install python3-venv"; exit 1; }
	@echo "Installing into $(VENV) (a few minutes, once) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

install: $(VENV)/.installed

# The real SGLang server on a machine without a GPU, in an environment of its own: it and Espalier need not agree on
# versions.  On a GPU machine install it beside Espalier instead: pip install '.[sglang]'.
$(SGLANG)/.installed: $(SGLANG_NEEDS)
	@test -x $(SGLANG)/bin/python || $(PYTHON) -m venv $(SGLANG)
	@echo "Installing SGLang for CPU into $(SGLANG) (two minutes, 1.6 GB, once) ..."
	@$(SGLANG)/bin/python -m pip install --quiet --disable-pip-version-check -r $(word 1,$(SGLANG_NEEDS))
	@$(SGLANG)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $(word 2,$(SGLANG_NEEDS))
	@touch $@

sglang: $(SGLANG)/.installed

train: install
	$(BIN)/espalier train $(CONFIG) run.seed=$(SEED) $(ARGS)

test: install
	@$(MAKE) --no-print-directory sglang || \
	  echo "SKIP: SGLang cannot be installed into $(SGLANG) (see above): its tests are skipped by name"
	$(BIN)/python -m pytest -m "not gpu" $(ARGS)

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: install
	$(BIN)/pyright

check: lint types

clean:
	rm -rf $(VENV) $(SGLANG) runs build *.egg-info .pytest_cache .ruff_cache .hypothesis
