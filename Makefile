# make demo: from a bare checkout to separated sound.   make test: all checks and tests, as CI runs them.
PYTHON ?= python3
BIN := .venv/bin
DEMO_OUT ?= runs/demo

.PHONY: demo test setup

demo: setup
	$(BIN)/unbraid demo --out $(DEMO_OUT)

test: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest --cov --cov-report=term

setup: .venv/.ready

.venv/.ready: pyproject.toml scripts/setup.py
	$(PYTHON) scripts/setup.py
