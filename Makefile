# make demo: from a bare checkout to separated sound.   make test: all checks and tests, as CI runs them.
PYTHON ?= python3
BIN := .venv/bin
DEMO_OUT ?= runs/demo

.PHONY: demo test setup

demo: setup
	$(BIN)/unbraid demo --out $(DEMO_OUT)

test: setup node_modules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest --cov --cov-report=term

# Biome checks the dashboard's JavaScript and CSS; where npm is missing, its test is skipped.
node_modules: package.json package-lock.json
	@if command -v npm >/dev/null; then npm ci --no-audit --no-fund && touch node_modules; fi

setup: .venv/.ready

.venv/.ready: pyproject.toml scripts/setup.py
	$(PYTHON) scripts/setup.py
