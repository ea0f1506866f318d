# make demo: from a fresh checkout to separated audio.   make test: all checks and tests, as CI runs them.
# make docs: the documentation as a site, in site/.
PYTHON ?= python3
BIN := .venv/bin
DEMO_OUT ?= runs/demo

.PHONY: demo test docs setup

demo: setup
	$(BIN)/unbraid demo --out $(DEMO_OUT)

# The demo trains for three minutes, and is to learn as much as on a user's machine: it has the cores to itself.
test: setup node_modules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -n logical --dist loadfile --no-loadscope-reorder --ignore tests/test_demo.py --cov --cov-report=
	$(BIN)/python -m pytest tests/test_demo.py --cov --cov-append --cov-report=term

# Biome checks the dashboard's JavaScript and CSS; where npm is missing, its test is skipped.
node_modules: package.json package-lock.json
	@if command -v npm >/dev/null; then npm ci --no-audit --no-fund && touch node_modules; fi

# The variable silences an advertisement of the theme, which the build would print as a warning.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "The site is in site/. To read it with search: $(BIN)/python -m http.server --directory site"

setup: .venv/.ready

.venv/.ready: pyproject.toml scripts/setup.py
	$(PYTHON) scripts/setup.py
