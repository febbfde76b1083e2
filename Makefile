# One command each on a fresh machine: `make demo`, `make test`. CUDA=cuda12 picks DALI for CUDA 12.
PYTHON ?= python3
CUDA ?= cuda13
BIN := .venv/bin

.PHONY: install demo test lint

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[$(CUDA),bench,demo,dev]' --constraint constraints.txt
	touch $@

demo: install
	$(BIN)/pipeline demo

test: install
	$(BIN)/python -m pytest --quiet --numprocesses auto --maxprocesses 4 --dist loadfile

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
