# make train      create .venv, install, train on the embedded digits (CONFIG= and ARGS= choose otherwise)
# make test       create .venv, install what tests need, run all but the slow ones
# make test-slow  the same, but the slow tests
# make test-fast  the same, but only those of the core (in CI: on a second Python, VENV= and PYTHON= choose it)
# make lint       create .venv, install what tests need, check style and types

PYTHON ?= python3
VENV ?= .venv
CONFIG ?= configs/digits.py
ARGS ?=
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -n auto --dist worksteal -rs --durations=15
CORE := tests/ops/test_conv.py tests/ops/test_batch_norm.py tests/models tests/training/test_step.py \
  tests/training/test_optimizer.py tests/training/test_checkpoint.py tests/runtime/test_run_dir.py

.PHONY: train test test-slow test-fast lint clean

train: $(VENV)/installed
	$(BIN)/python -m mnist_flax.main --config=$(CONFIG) $(ARGS)

test: $(VENV)/installed-test
	$(PYTEST)

# Few and long: their programs are optimized, as users run them (see tests/conftest.py).
test-slow: $(VENV)/installed-test
	XLA_FLAGS= $(PYTEST) -m slow

test-fast: $(VENV)/installed-test
	XLA_FLAGS= $(PYTEST) $(CORE)

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

# The mark is written last, so an interrupted installation is taken up again.
$(VENV)/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

clean:
	rm -rf .venv .venv-*
