# Everything runs in a virtual environment of its own; `make demo` and `make test` need nothing beforehand.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN := $(BIN)/python

# What the core tests leave out: benchmarks, documents, notebooks and packages, and what starts processes or trains nets.
APART := benchmarks bibliography classifier_test distributed docs links notebooks packaging demo report scale zoo
CORE := $(filter-out $(APART:%=tests/test_%.py),$(wildcard tests/test_*.py))

.PHONY: demo pictures report notebook notebooks test test-core test-float64 test-device test-defaults test-oldest test-scvi test-slow
.PHONY: bench bench-compare zoo figures lint spell types docs wheel clean

demo: $(VENV)/.tutorials
	$(RUN) -m pyro_wae.demo $(ARGS)

# The picture of README and start page.
pictures: demo
	cp results/demo/overview.png docs/images/

# The report of docs/diagnostics.md and its figure.
report: $(VENV)/.tutorials
	$(RUN) tutorials/report.py $(ARGS)
	cp results/report/report.png docs/images/
	cp results/report/report.txt docs/_generated/

# Opens Jupyter on the notebooks of tutorials/.
notebook: $(VENV)/.notebooks
	$(RUN) -m jupyterlab --notebook-dir=tutorials $(ARGS)

# Runs every notebook of tutorials/ and stores its outputs; ARGS=01 takes one, ARGS=--smoke stores nothing.
notebooks: $(VENV)/.notebooks
	$(RUN) tutorials/run_notebooks.py $(ARGS)

# A process for each core, and one thread in each: small tensors gain nothing from more. A file stays in one process, where its
# tests share their runs.
test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --dist loadfile -m "not slow" $(ARGS)

# The tests of what `pip install .` brings, in a minute and with few packages beside it; what needs others is skipped.
test-core: $(if $(INSTALLED),,$(VENV)/.test-core)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --dist loadfile -m "not slow" $(CORE) $(ARGS)

# The core tests where torch makes float64 by default, and where what the package makes without naming a device is lost;
# FILES takes some of them.
FILES = $(CORE)
test-float64: $(VENV)/.test-core
	PYRO_WAE_TEST_DTYPE=float64 OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --dist loadfile -m "not slow" $(FILES) $(ARGS)

test-device: $(VENV)/.test-core
	PYRO_WAE_TEST_DEVICE=meta OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --dist loadfile -m "not slow" $(FILES) $(ARGS)

# A part of both, in some 90 seconds of one core each: every kind of program, every cost, the contract of every penalty.
DEFAULTS := programs costs penalty_contract
test-defaults:
	$(MAKE) test-float64 test-device FILES="$(DEFAULTS:%=tests/test_%.py)"

# The core tests with the oldest versions that pyproject.toml promises, in an environment of their own.
test-oldest:
	tools/oldest.sh

# The model of scvi-tools, which pins its own versions, and the benchmark with real cells, in an environment of their own:
# some minutes. The picture of docs/works_with.md is drawn anew by PYRO_WAE_UMAP=docs/images/scvi_umap.png.
test-scvi:
	$(MAKE) build/scvi/.test-scvi VENV=build/scvi
	OMP_NUM_THREADS=1 build/scvi/bin/python -m pytest -s tests/test_scvi.py tests/test_benchmarks.py -k "scvi or single_cell" $(ARGS)

test-slow: $(VENV)/.test
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --dist worksteal -m slow $(ARGS)

# The tables and pictures of docs/speed.md, docs/large_batches.md and docs/scale.md, with rows for CUDA where it is there;
# on a machine that has nothing else to do. ARGS=--smoke runs in seconds and leaves them alone.
bench: $(VENV)/.bench
	$(RUN) benchmarks/step.py $(ARGS)
	$(RUN) benchmarks/kernel_penalty.py $(ARGS)
	$(RUN) benchmarks/large_batches.py $(ARGS)
	$(RUN) benchmarks/scale.py $(ARGS)
	$(RUN) benchmarks/goals.py $(if $(ARGS),--results results/benchmarks)

# What `make bench` has found slower than the numbers that are committed; ARGS=REVISION, a folder or a file takes others.
bench-compare: $(VENV)/.bench
	$(RUN) benchmarks/compare.py $(ARGS)

# Trains with each prior of docs/zoo.md, and writes its table and picture anew; ARGS=--smoke leaves both alone.
zoo: $(VENV)/.tutorials
	$(RUN) benchmarks/zoo.py $(ARGS)

lint: spell
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff format --check --line-length 88 tutorials/*.ipynb

spell: $(VENV)/.dev
	$(RUN) -m codespell_lib .

types: $(VENV)/.dev
	$(RUN) -m mypy

docs: $(VENV)/.docs
	$(RUN) -m sphinx -W --keep-going -b html docs docs/_build/html $(ARGS)

# Draws the figures of docs/theory.md, docs/bound.md, docs/hyperparameters.md and of the quick start; ARGS=balls draws one.
figures: $(VENV)/.docs
	set -e; for script in $(if $(ARGS),$(ARGS:%=docs/figures/%.py),$(filter-out %/common.py,$(wildcard docs/figures/*.py))); do \
		$(RUN) $$script; \
	done

# Builds the wheel, and runs the README's quick start in an environment that holds it and what it requires, and nothing else.
wheel: $(VENV)/.test
	rm -rf dist build/wheel
	$(RUN) -m hatchling build
	$(PYTHON) -m venv build/wheel
	build/wheel/bin/python -m pip install --quiet dist/*.whl
	awk '/^```python$$/ { inside = 1; next } /^```$$/ { inside = 0 } inside' README.md > build/wheel/quick_start.py
	build/wheel/bin/python build/wheel/quick_start.py

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip

# One stamp for each extra, so that the demo does not wait for what only the tests need.
$(VENV)/.%: pyproject.toml | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --editable ".[$*]"
	touch $@

clean:
	rm -rf $(VENV) build dist docs/_build docs/tutorials results .mypy_cache .pytest_cache .ruff_cache
