# Everything runs in a virtual environment of its own; `make demo` and `make test` need nothing beforehand.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN := $(BIN)/python

.PHONY: demo pictures report notebooks test test-slow bench bench-penalties zoo lint types docs wheel clean

demo: $(VENV)/.tutorials
	$(RUN) tutorials/quickstart.py $(ARGS)

# The picture of README and start page.
pictures: demo
	cp results/quickstart/overview.png docs/images/

# The picture of docs/diagnostics.md.
report: $(VENV)/.tutorials
	$(RUN) tutorials/report.py $(ARGS)
	cp results/report/report.png docs/images/

# Runs every notebook of tutorials/ and stores its outputs; ARGS=01 takes one, ARGS=--smoke stores nothing.
notebooks: $(VENV)/.notebooks
	$(RUN) tutorials/run_notebooks.py $(ARGS)

# A process for each core, and one thread in each: small tensors gain nothing from more. A file stays in one process, where its
# tests share their runs.
test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --dist loadfile -m "not slow" $(ARGS)

test-slow: $(VENV)/.test
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto -m slow $(ARGS)

# Writes the table of docs/_generated/penalties.md anew; ARGS=--smoke runs in seconds and leaves it alone.
bench-penalties: $(VENV)/.bench
	$(RUN) benchmarks/penalties.py $(ARGS)

# The tables and pictures of docs/speed.md and docs/large_batches.md, with rows for CUDA where it is there; on a machine
# that has nothing else to do. ARGS=--smoke runs in seconds and leaves them alone.
bench: $(VENV)/.bench
	$(RUN) benchmarks/step.py $(ARGS)
	$(RUN) benchmarks/kernel_penalty.py $(ARGS)
	$(RUN) benchmarks/large_batches.py $(ARGS)
	$(RUN) benchmarks/goals.py $(if $(ARGS),--results results/benchmarks)

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

# Builds the wheel, and runs the README's ten lines in an environment that holds it and what it requires, and nothing else.
wheel: $(VENV)/.test
	rm -rf dist build/wheel
	$(RUN) -m hatchling build
	$(PYTHON) -m venv build/wheel
	build/wheel/bin/python -m pip install --quiet dist/*.whl
	awk '/^```python$$/ { inside = 1; next } /^```$$/ { inside = 0 } inside' README.md > build/wheel/ten_lines.py
	cd build/wheel && bin/python ten_lines.py

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip

# One stamp for each extra, so that the demo does not wait for what only the tests need.
$(VENV)/.%: pyproject.toml | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --editable ".[$*]"
	touch $@

clean:
	rm -rf $(VENV) build dist docs/_build docs/tutorials results .mypy_cache .pytest_cache .ruff_cache
