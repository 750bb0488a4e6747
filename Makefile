# Discreet. On a fresh machine with python3 (3.10 or newer), make and a C compiler:
#
#     make demo     set everything up, train privately on scikit-learn's digits, print the result
#     make test     set everything up, run all tests

PYTHON ?= python3
VENV   ?= .venv
PIP     = $(VENV)/bin/python -m pip --disable-pip-version-check
STAMP   = $(VENV)/.ready
ZOO     = $(VENV)/.zoo

# Worker processes for the tests; `make test WORKERS=0` runs them in one.
WORKERS ?= auto
PYTEST_ARGS ?=

# One thread per process: these models are small, and waiting threads cost more than they bring when cores are shared
# (measured on two busy cores: the demo takes 16 s with one thread and 167 s with two).
THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format clean distclean

help:
	@echo "make demo    train privately on digits: the whole path, set-up included"
	@echo "make test    run every test, set-up included   (PYTEST_ARGS='-k clipping' passes options on)"
	@echo "make lint    check style and imports"
	@echo "make format  rewrite style"
	@echo "make clean   remove builds, caches and runs    (make distclean: the environment too)"

setup: $(STAMP)

# torch goes first and pinned, so that no later requirement can choose another one.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "python %d.%d: Discreet needs 3.10 or newer; run make PYTHON=python3.11" % sys.version_info[:2])'
	@$(VENV)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(PIP) install --constraint constraints.txt torch==2.13.0
	$(PIP) install --constraint constraints.txt --editable '.[dev]'
	@touch $@

# Other people's models, which the tests compare with, and Triton's interpreter; the demo does without them.
$(ZOO): $(STAMP)
	$(PIP) install --constraint constraints.txt --editable '.[zoo,gpu]'
	@touch $@

demo: $(STAMP)
	OMP_NUM_THREADS=$(THREADS) $(VENV)/bin/discreet demo

test: $(STAMP) $(ZOO)
	OMP_NUM_THREADS=$(THREADS) $(VENV)/bin/python -m pytest -n $(WORKERS) --maxprocesses 4 $(PYTEST_ARGS)

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(STAMP)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf build dist runs bench/out .pytest_cache .ruff_cache .hypothesis src/*.egg-info
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
