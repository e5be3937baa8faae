# Everything runs in a virtual environment of its own; `make demo` and `make test` need nothing beforehand.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN := $(BIN)/python

.PHONY: demo pictures report notebooks test test-slow bench bench-penalties zoo lint types docs clean

demo: $(VENV)/.tutorials
	$(RUN) tutorials/quickstart.py $(ARGS)

pictures: demo
	cp results/quickstart/samples.png results/quickstart/reconstructions.png docs/images/

# The picture of docs/diagnostics.md.
report: $(VENV)/.tutorials
	$(RUN) tutorials/report.py $(ARGS)
	cp results/report/report.png docs/images/

# Runs every notebook of tutorials/ and stores its outputs; ARGS=01 takes one, ARGS=--smoke stores nothing.
notebooks: $(VENV)/.notebooks
	$(RUN) tutorials/run_notebooks.py $(ARGS)

# A process for each core, and one thread in each: small tensors gain nothing from more.
test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --dist loadgroup -m "not slow" $(ARGS)

test-slow: $(VENV)/.test
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --dist loadgroup -m slow $(ARGS)

# Writes the table of docs/_generated/penalties.md anew; ARGS=--smoke runs in seconds and leaves it alone.
bench-penalties: $(VENV)/.bench
	$(RUN) benchmarks/penalties.py $(ARGS)

# The tables of docs/speed.md and docs/large_batches.md; on a machine that has nothing else to do.
bench: $(VENV)/.bench
	$(RUN) benchmarks/step.py
	$(RUN) benchmarks/kernel_penalty.py --gibibytes 0.5
	$(RUN) benchmarks/large_batches.py

# Trains with each prior of docs/zoo.md, and writes its table and picture anew; ARGS=--smoke leaves both alone.
zoo: $(VENV)/.tutorials
	$(RUN) benchmarks/zoo.py $(ARGS)

lint: $(VENV)/.dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

types: $(VENV)/.dev
	$(RUN) -m mypy

docs: $(VENV)/.docs
	$(RUN) -m sphinx -W --keep-going -b html docs docs/_build/html $(ARGS)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip

# One stamp for each extra, so that the demo does not wait for what only the tests need.
$(VENV)/.%: pyproject.toml | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --editable ".[$*]"
	touch $@

clean:
	rm -rf $(VENV) build dist docs/_build docs/tutorials results .mypy_cache .pytest_cache .ruff_cache
