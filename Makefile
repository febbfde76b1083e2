# One command each on a fresh machine: `make demo`, `make test`. CUDA=cuda12 picks DALI for CUDA 12.
# From another folder, as in a container: `make -f DIR/Makefile demo`, which then writes there.
PYTHON ?= python3
CUDA ?= cuda13
ROOT := $(patsubst ./,,$(dir $(lastword $(MAKEFILE_LIST))))
BIN := $(ROOT).venv/bin

.PHONY: install demo test lint

install: $(ROOT).venv/installed

$(ROOT).venv/installed: $(ROOT)pyproject.toml $(ROOT)constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(ROOT).venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '$(or $(ROOT),./)[$(CUDA),bench,demo,dev]' --constraint $(ROOT)constraints.txt
	touch $@

demo: install
	$(BIN)/pipeline demo

test: install
	$(BIN)/python -m pytest --quiet --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(ROOT)tests

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
