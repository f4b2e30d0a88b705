# make demo   set everything up and make the embedded CLIP forget a brand
# make test   install what the tests need, then check and test
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
FETCH := .venv-img2dataset
# How many tests run side by side: as many as there are cores. Each takes up to 5 GB.
JOBS ?= 2
# Tests start many processes: compiled once, the package need not be compiled by each.
export PYTHONDONTWRITEBYTECODE :=
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

.PHONY: demo test coverage quick check clean

demo: $(VENV)/.installed
	$(BIN)/slsgu demo $(CONCEPT)

# img2dataset has old versions of its own, so it gets an environment of its own.
test: check $(FETCH)/.installed
	SLSGU_IMG2DATASET=$(CURDIR)/$(FETCH)/bin/img2dataset $(PYTEST)

# Counting lines makes the tests a third slower.
coverage: check $(FETCH)/.installed
	SLSGU_IMG2DATASET=$(CURDIR)/$(FETCH)/bin/img2dataset $(PYTEST) --cov --cov-report=term

quick: $(VENV)/.installed-test
	$(PYTEST) -m "not slow"

check: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	MYPYPATH=tests/bench:tests/support $(BIN)/mypy --config-file=tests/bench/mypy.ini tests/bench/*.py
	$(BIN)/lint-imports

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -e ".[test]"
	touch $@

$(FETCH)/.installed:
	$(PYTHON) -m venv $(FETCH)
	$(FETCH)/bin/python -m pip install --quiet img2dataset
	touch $@

clean:
	rm -rf $(VENV) $(FETCH) build *.egg-info
