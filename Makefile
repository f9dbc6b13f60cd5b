# Two commands do all their own set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test unit fuzz check format clean help browser compiler slurm slurm-cluster

help:
	@echo "make demo           install into $(VENV), then train the digits example on 2 nodes x 2 ranks"
	@echo "make test           install into $(VENV), then run all tests"
	@echo "make unit           the tests of one process each, in a few minutes"
	@echo "make fuzz           try the tests that draw their examples on others, until Ctrl-C"
	@echo "make check          format, lint, types"
	@echo "make slurm-cluster  start a real Slurm cluster on this machine, until Ctrl-C"
	@echo "make format         rewrite the sources as 'make check' wants them"

demo: $(VENV)/.demo
	$(BIN)/dtrain launch --nodes 2 --procs 2 examples/digits/job.yaml

# More workers than cores: many tests wait, for a cluster or for time to pass.
WORKERS ?= 5
# Compiled, since PYTHONDONTWRITEBYTECODE may be set: each cold node would compile dtrain, for 0.4 s.
test: $(VENV)/.dev slurm compiler browser
	@$(BIN)/python -m compileall -q src slurm/cluster
	@rm -f $(VENV)/.pytest-exit
	$(BIN)/python -m pytest $(or $(TESTS),-n $(WORKERS) tests) || \
	  { echo $$? > $(VENV)/.pytest-exit; false; }

unit: $(VENV)/.dev
	$(BIN)/python -m pytest -n 3 tests/unit

# Until Ctrl-C: other examples each time, and more of them.
fuzz: $(VENV)/.dev
	while $(BIN)/python -m pytest -q -m hypothesis --hypothesis-profile=fuzz tests; do :; done

# For torch.compile on the CPU.
PYTHON_H = $(shell $(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h
compiler:
	@{ command -v g++ && test -e "$(PYTHON_H)"; } >/dev/null || { \
	  echo "installing g++ and Python's headers, from Debian's packages"; \
	  apt-get update -qq && apt-get install -y -qq --no-install-recommends g++ python3-dev; }

# For the pages of `dtrain report` and `dtrain verify`.
browser:
	@command -v chromium >/dev/null || { echo "installing chromium, from Debian's packages"; \
	  apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core; }

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
