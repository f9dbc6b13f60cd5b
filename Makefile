# Two commands do all their own set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test check format clean help slurm slurm-cluster

help:
	@echo "make demo           install into $(VENV), then train the digits example on 2 nodes x 2 ranks"
	@echo "make test           install into $(VENV), then run all tests"
	@echo "make check          format, lint, types"
	@echo "make slurm-cluster  start a real Slurm cluster on this machine, until Ctrl-C"
	@echo "make format         rewrite the sources as 'make check' wants them"

demo: $(VENV)/.demo
	$(BIN)/dtrain launch --nodes 2 --procs 2 examples/digits/job.yaml

# The clusters' tests mostly wait for a cluster, so they run beside the others; they are shown last.
RAY := $(wildcard tests/cluster/test_ray_*.py)
SLURM := $(wildcard tests/cluster/test_slurm_*.py)
test: $(VENV)/.dev slurm
ifdef TESTS
	$(BIN)/python -m pytest $(TESTS)
else
	@$(BIN)/python -m pytest $(SLURM) > $(VENV)/slurm.log 2>&1 & slurm=$$!; \
	$(BIN)/python -m pytest $(RAY) > $(VENV)/ray.log 2>&1 & ray=$$!; \
	$(BIN)/python -m pytest tests --ignore tests/cluster; failed=$$?; \
	wait $$ray || failed=$$?; \
	wait $$slurm || failed=$$?; \
	cat $(VENV)/ray.log $(VENV)/slurm.log; exit $$failed
endif

# What of Slurm cannot be installed is told, and its tests are skipped.
slurm:
	@slurm/cluster/install.sh

# make slurm-cluster UP='--nodes 8 --gpus-per-node 4 --accounting'
slurm-cluster: slurm
	$(PYTHON) slurm/cluster up $(UP)

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Debian splits venv from python3; where it is missing and we may install, we do.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV) || { \
	  rm -rf $(VENV); \
	  test "$$(id -u)" = 0 && apt-get update -qq && apt-get install -y -qq python3-venv && \
	  $(PYTHON) -m venv $(VENV); }

$(VENV)/.demo: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[examples]'
	@touch $@

$(VENV)/.dev: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
