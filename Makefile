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
VERIFIERS := .venv-verifiers
VERIFIERS_NEEDS := system/agents/verifiers/requirements.txt
DOCS := .venv-docs
TRL := .venv-trl
TRL_NEEDS := system/bench/trl-requirements.txt
SGLANG_PIP = $(SGLANG)/bin/python -m pip install --quiet --disable-pip-version-check

# Which build of SGLang: what is asked for, what is there already, or what this machine suggests.  A login node, which
# has no GPU while its cluster has, has to be told.
BUILD ?=
HELD = $(shell cat $(SGLANG)/.installed 2>/dev/null)
SUGGESTED = $(shell if nvidia-smi -L >/dev/null 2>&1; then echo gpu; \
  elif command -v sbatch >/dev/null 2>&1; then echo ask; else echo cpu; fi)
SGLANG_BUILD = $(or $(BUILD),$(HELD),$(SUGGESTED))

PROMTOOL := .promtool/usr/bin/promtool

# The files that hold tests of a mark: for a few of them, nobody imports all others.
MARKED = $(shell grep -rlE --include='*.py' 'mark\.$(1)\b' tests | sort)

.PHONY: install gpu sglang sglang-build verifiers bench-trl promtool train test test-sglang test-slurm test-verifiers test-browser \
  docs lint types house check clean help

help:
	@echo "make train [SEED=0] [ARGS='key=value …']  install, then train the quickstart agent"
	@echo "make test                                install, then run the tests that need nothing else"
	@echo "make test-sglang, make test-slurm        others; they install SGLang for CPU, and Slurm by apt as root"
	@echo "make test-verifiers                      those with the real verifiers, which it installs"
	@echo "make test-browser                        those with a browser, chromium, which it installs by apt as root"
	@echo "make sglang [BUILD=gpu|cpu]              install SGLang into $(SGLANG), for engine=sglang"
	@echo "make verifiers                           install verifiers into $(VERIFIERS), for agent.run=verifiers"
	@echo "make bench-trl                           install TRL into $(TRL), for espalier bench trl"
	@echo "make promtool                            fetch Prometheus' linter by apt, for the tests of the endpoint"
	@echo "make gpu                                 install everything for GPUs, also where there is none (a login node)"
	@echo "make docs                                the documents as a site, in site/"
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

# The learner's part for GPUs, the NCCL that both environments share, and SGLang.
gpu: install
	@$(BIN)/python -c 'import sys, torch; sys.exit(not torch.version.cuda)' || { \
	  echo "$(VENV) holds a CPU build of PyTorch: let pip fetch from PyPI (unset PIP_INDEX_URL), rm -r $(VENV), and" \
	    "again: make gpu" >&2; exit 2; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev,gpu]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r $(SGLANG_NEEDS)-nccl.txt
	@$(MAKE) --no-print-directory sglang BUILD=gpu

# The real SGLang server, in an environment of its own: it pins other versions of PyTorch and transformers than
# Espalier does.  With its compiled kernels for NVIDIA's GPUs, or over our shim for CPU.
$(SGLANG)/.installed: $(wildcard system/engine/sglang/requirements-*.txt) | sglang-build
	@test -x $(SGLANG)/bin/python || $(PYTHON) -m venv $(SGLANG)
	@if [ "$(SGLANG_BUILD)" = gpu ]; then \
	  echo "Installing SGLang for GPU into $(SGLANG) (once) ..."; \
	  $(SGLANG_PIP) -r $(SGLANG_NEEDS)-gpu.txt && $(SGLANG_PIP) --no-deps -r $(SGLANG_NEEDS)-nccl.txt; \
	else \
	  echo "Installing SGLang for CPU into $(SGLANG) (two minutes, 1.6 GB, once) ..."; \
	  $(SGLANG_PIP) -r $(SGLANG_NEEDS)-cpu.txt && $(SGLANG_PIP) --no-deps -r $(SGLANG_NEEDS)-cpu-no-deps.txt; \
	fi
	@echo $(SGLANG_BUILD) > $@

sglang: $(SGLANG)/.installed

sglang-build:
	@case "$(SGLANG_BUILD)/$(BUILD)/$(HELD)" in \
	  gpu/gpu/cpu | cpu/cpu/gpu) \
	    echo "SGLang: $(SGLANG) holds the $(HELD) build: rm -r $(SGLANG), and again: make sglang BUILD=$(BUILD)" >&2; \
	    exit 2;; \
	  gpu/gpu/* | cpu/cpu/*) echo "SGLang: the $(BUILD) build, as BUILD=$(BUILD) says";; \
	  gpu/*/gpu | cpu/*/cpu) echo "SGLang: the $(HELD) build, which $(SGLANG) holds";; \
	  gpu/*) echo "SGLang: the gpu build, since nvidia-smi lists a GPU";; \
	  cpu/*) echo "SGLang: the cpu build, a shim for tests, since nvidia-smi lists no GPU here; BUILD=gpu for others";; \
	  ask/*) \
	    echo "SGLang: no GPU here (nvidia-smi), but a Slurm cluster (sbatch): is this its login node?  Say which:" >&2; \
	    echo "  make sglang BUILD=gpu    for its nodes with NVIDIA GPUs; make gpu: that, and the learner's part" >&2; \
	    echo "  make sglang BUILD=cpu    over a shim of pure PyTorch: for tests, far too slow to train with" >&2; \
	    exit 2;; \
	  *) echo "SGLang: BUILD=$(BUILD): it is gpu or cpu" >&2; exit 2;; \
	esac

# Prime Intellect's verifiers, in an environment of its own: it pins other versions of openai and mcp.
$(VERIFIERS)/.installed: $(VERIFIERS_NEEDS)
	@test -x $(VERIFIERS)/bin/python || $(PYTHON) -m venv $(VERIFIERS)
	@echo "Installing verifiers into $(VERIFIERS) (a minute, 0.6 GB, once) ..."
	@$(VERIFIERS)/bin/python -m pip install --quiet --disable-pip-version-check -r $(VERIFIERS_NEEDS)
	@touch $@

verifiers: $(VERIFIERS)/.installed

# TRL, in an environment of its own, which nothing but a benchmark and its tests need: it has versions of its own.
$(TRL)/.installed: $(TRL_NEEDS)
	@test -x $(TRL)/bin/python || $(PYTHON) -m venv $(TRL)
	@echo "Installing TRL into $(TRL) (two minutes, 2 GB, once) ..."
	@$(TRL)/bin/python -m pip install --quiet --disable-pip-version-check -r $(TRL_NEEDS)
	@touch $@

bench-trl: $(TRL)/.installed

# Prometheus' own linter, out of Debian's package, which is unpacked here and not installed: no service is started.
$(PROMTOOL):
	@rm -rf .promtool && mkdir .promtool
	@cd .promtool && apt-get -qq download prometheus && dpkg -x prometheus_*.deb . && \
	  rm -f prometheus_*.deb usr/bin/prometheus || \
	  { cd .. && rm -rf .promtool; echo "promtool: Debian's package prometheus cannot be fetched by apt-get" >&2; exit 1; }

promtool: $(PROMTOOL)

train: install
	$(BIN)/espalier train $(CONFIG) run.seed=$(SEED) $(ARGS)

# Whole files go to JOBS processes at once, in the order in which they are collected: a whole run of tests/e2e, which
# partly waits, beside everything else.  ARGS="-n 0" runs them in one process, as pytest alone does.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder \
	  -m "not gpu and not sglang and not slurm and not verifiers and not browser" $(ARGS)

# Against real SGLang servers on CPU (skipped by name where SGLang cannot be installed), and on a real Slurm.
test-sglang: install
	@$(MAKE) --no-print-directory sglang BUILD=$(SGLANG_BUILD:ask=cpu) || \
	  echo "SKIP: SGLang cannot be installed into $(SGLANG) (see above): its tests are skipped by name"
	$(BIN)/python -m pytest -m "sglang and not gpu" $(or $(ARGS),$(call MARKED,sglang))

# With the real verifiers (skipped by name where it cannot be installed).
test-verifiers: install
	@$(MAKE) --no-print-directory verifiers || \
	  echo "SKIP: verifiers cannot be installed into $(VERIFIERS) (see above): its tests are skipped by name"
	$(BIN)/python -m pytest -m "verifiers and not gpu" $(or $(ARGS),$(call MARKED,verifiers))

test-slurm: install
	$(BIN)/python -m pytest -n $(JOBS) --maxschedchunk=1 -m "slurm and not gpu" \
	  $(or $(ARGS),$(call MARKED,slurm))

# The pages of `espalier watch` in Debian's chromium (skipped by name where it cannot be installed).
test-browser: install
	$(BIN)/python -m pytest -m browser $(or $(ARGS),$(call MARKED,browser))

# The documents as a site; mkdocs, whose pins pyproject.toml has, in an environment of its own, without Espalier.
$(DOCS)/.installed: pyproject.toml
	@test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	@echo "Installing mkdocs into $(DOCS) (seconds, once) ..."
	@$(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check $$($(PYTHON) -c 'import tomllib; \
	  print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])')
	@touch $@

# Strictly: a link or an anchor that leads nowhere, a page that is not listed or asks another host, is an error.
docs: $(DOCS)/.installed
	@NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/python -m mkdocs build --strict --quiet
	@echo "site/index.html is the first page; for the search, serve it: $(PYTHON) -m http.server -d site"

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
	rm -rf $(VENV) $(SGLANG) $(VERIFIERS) $(TRL) $(DOCS) .promtool runs site build *.egg-info
	rm -rf .pytest_cache .ruff_cache .hypothesis
