# make train   create .venv, install, train on the embedded digits (CONFIG= and ARGS= choose otherwise)
# make test    create .venv, install what tests need, run them
# make lint    create .venv, install what tests need, check style and types

PYTHON ?= python3
CONFIG ?= configs/digits.py
ARGS ?=
BIN := .venv/bin

.PHONY: train test lint clean

train: .venv/installed
	$(BIN)/python -m mnist_flax.main --config=$(CONFIG) $(ARGS)

test: .venv/installed-test
	$(BIN)/python -m pytest -n auto

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The mark is written last, so an interrupted installation is taken up again.
.venv/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

.venv/installed-test: .venv/installed
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

clean:
	rm -rf .venv
