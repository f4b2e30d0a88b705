# make demo   set everything up and make the embedded CLIP forget a brand
# make test   install what the tests need, then check and test
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test quick check clean

demo: $(VENV)/.installed
	$(BIN)/slsgu demo $(CONCEPT)

test: check
	$(BIN)/python -m pytest --cov --cov-report=term

quick: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m "not slow"

check: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
