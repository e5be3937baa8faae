# Everything runs in a virtual environment of its own; `make demo` and `make test` need nothing beforehand.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN := $(BIN)/python

.PHONY: demo test test-all lint types docs clean

demo: $(VENV)/.tutorials
	$(RUN) tutorials/quickstart.py $(ARGS)

test: $(VENV)/.test
	$(RUN) -m pytest -m "not slow" $(ARGS)

test-all: $(VENV)/.test
	$(RUN) -m pytest $(ARGS)

lint: $(VENV)/.dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

types: $(VENV)/.dev
	$(RUN) -m mypy

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip

# One stamp for each extra, so that the demo does not wait for what only the tests need.
$(VENV)/.%: pyproject.toml | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --editable ".[$*]"
	touch $@

clean:
	rm -rf $(VENV) build dist docs/_build results .mypy_cache .pytest_cache .ruff_cache
