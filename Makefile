# Everything a newcomer needs: `make train` and `make test`.  Both install into .venv first.
PYTHON ?= python3
SEED ?= 0
CONFIG ?= configs/quickstart.yaml
ARGS ?=
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
SGLANG := .venv-sglang
SGLANG_NEEDS := system/engine/sglang/requirements
SGLANG_PIP = $(SGLANG)/bin/python -m pip install --quiet --disable-pip-version-check

.PHONY: install sglang train test test-sglang test-slurm lint types house check clean help

help:
	@echo "make train [SEED=0] [ARGS='key=value …']  install, then train the quickstart agent"
	@echo "make test                                install, then run the tests that need neither SGLang nor Slurm"
	@echo "make test-sglang, make test-slurm        the others; they install SGLang for CPU, and Slurm by apt as root"
	@echo "make sglang                              install SGLang into $(SGLANG), for engine=sglang"
	@echo "make check                               formatting, lint, types and the rules of the house"

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Espalier needs Python 3.11 or newer"'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { echo "python3-venv is missing: apt-get install python3-venv"; exit 1; }
	@echo "Installing into $(VENV) (a few minutes, once) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@if nvidia-smi -L >/dev/null 2>&1; then \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r $(SGLANG_NEEDS)-nccl.txt; \
	fi
	@touch $@

install: $(VENV)/.installed

# The real SGLang server, in an environment of its own: it pins other versions of PyTorch and transformers than
# Espalier does.  With its compiled kernels where there is an NVIDIA GPU, else over our shim for CPU.
$(SGLANG)/.installed: $(wildcard system/engine/sglang/requirements-*.txt)
	@test -x $(SGLANG)/bin/python || $(PYTHON) -m venv $(SGLANG)
	@if nvidia-smi -L >/dev/null 2>&1; then \
	  echo "Installing SGLang for GPU into $(SGLANG) (once) ..."; \
	  $(SGLANG_PIP) -r $(SGLANG_NEEDS)-gpu.txt && $(SGLANG_PIP) --no-deps -r $(SGLANG_NEEDS)-nccl.txt; \
	else \
	  echo "Installing SGLang for CPU into $(SGLANG) (two minutes, 1.6 GB, once) ..."; \
	  $(SGLANG_PIP) -r $(SGLANG_NEEDS)-cpu.txt && $(SGLANG_PIP) --no-deps -r $(SGLANG_NEEDS)-cpu-no-deps.txt; \
	fi
	@touch $@

sglang: $(SGLANG)/.installed

train: install
	$(BIN)/espalier train $(CONFIG) run.seed=$(SEED) $(ARGS)

# Whole files go to JOBS processes at once, in the order in which they are collected: a whole run of tests/e2e, which
# partly waits, beside everything else.  ARGS="-n 0" runs them in one process, as pytest alone does.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder \
	  -m "not gpu and not sglang and not slurm" $(ARGS)

# Against real SGLang servers on CPU (skipped by name where SGLang cannot be installed), and on a real Slurm.
test-sglang: install
	@$(MAKE) --no-print-directory sglang || \
	  echo "SKIP: SGLang cannot be installed into $(SGLANG) (see above): its tests are skipped by name"
	$(BIN)/python -m pytest -m "sglang and not gpu" $(ARGS)

test-slurm: install
	$(BIN)/python -m pytest -n $(JOBS) --maxschedchunk=1 -m "slurm and not gpu" $(ARGS)

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: install
	$(BIN)/pyright

# Who may import whom (pyproject.toml), and what no linter knows: dead code, long files, one name twice.
house: install
	$(BIN)/lint-imports --no-logo --no-cache
	$(BIN)/python tests/house.py

check: lint types house

clean:
	rm -rf $(VENV) $(SGLANG) runs build *.egg-info .pytest_cache .ruff_cache .hypothesis
