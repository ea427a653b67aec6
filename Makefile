# make demo: set up, then the main job on shapes that the project draws itself; make test: set up, then the tests;
# make quick: the tests that a change in a minute deserves; make test-long: tests of minutes each (processes killed, data sets exchanged);
# make zoo: the pruning library on many networks of others (about a quarter of an hour); make bench: slim's speed;
# make tables: the tables and plots of docs/ from the rows of experiments/results; make docs: the pages of docs/ as a site.
# Every one takes PYTHON=python3.13, say, and keeps an environment for it beside the default one.
PYTHON ?= python3
VENV := .venv$(if $(filter-out python3,$(PYTHON)),-$(notdir $(PYTHON)))
PY := $(VENV)/bin/python

.PHONY: demo test quick test-long zoo bench tables docs lint clean

# What each needs of setup.cfg's extras; $(VENV)/.demo is newer than setup.cfg where what the demo needs is installed.
EXTRAS_demo := train,deploy,experiments
EXTRAS_test := train,deploy,video,experiments,docs,test
EXTRAS_long := $(EXTRAS_test),bench,ray,slurm
EXTRAS_zoo := $(EXTRAS_test),zoo
EXTRAS_bench := train,bench
EXTRAS_docs := docs

$(VENV)/.%: setup.cfg
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip "setuptools>=77"
	$(PY) -m pip install --quiet --editable '.[$(EXTRAS_$*)]'
	touch $@

DEMO := dense slim
demo: $(VENV)/.demo
	$(PY) -m experiments.run experiments/grids/demo.yaml --store runs/demo --results runs/demo
	$(PY) benchmark.py --weights $(DEMO:%=runs/demo/by-name/demo/%-seed=0-shapes/weights/last.pt) --engine onnxruntime --img 96 \
		--project runs/demo --name benchmark
	$(PY) export.py --weights runs/demo/by-name/demo/slim-seed=0-shapes/weights/last.pt --img 96 --data data/shapes.yaml \
		--out runs/demo/slim.onnx --project runs/demo --name export
	@$(PY) -m experiments.demo

# Two test processes on two cores: a thread each, which doesn't spin where a test asks for more.
test quick test-long zoo: export OMP_NUM_THREADS = 1
test quick test-long zoo: export OMP_WAIT_POLICY = PASSIVE

test: $(VENV)/.test
	$(PY) -m pytest -n 2 --dist worksteal

# No folder whose tests export files or run scripts, but one script from end to end; nothing marked slow.
LENGTHY := $(addprefix tests/,benchmarks/ deploy/ experiments/ scripts/)
QUICK := $(filter-out $(LENGTHY),$(wildcard tests/*/)) tests/test_architecture.py
QUICK += tests/scripts/test_pipeline.py::test_sparse_training_fills_its_run_folder
quick: $(VENV)/.test
	$(PY) -m pytest -n 2 --dist worksteal -m "not slow and not long and not zoo" $(QUICK)

test-long: $(VENV)/.long
	$(PY) -m pytest -n 2 -m long

zoo: $(VENV)/.zoo
	$(PY) -m pytest -n 2 -m zoo

bench: $(VENV)/.bench
	$(PY) -m benchmarks.slim_speed

tables: $(VENV)/.demo
	$(PY) -m experiments.tables

# Material for MkDocs announces the end of its life, in 2027, where it isn't told not to.
docs: export NO_MKDOCS_2_WARNING = 1
docs: $(VENV)/.docs
	$(PY) -m mkdocs build --strict

lint: $(VENV)/.test
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

clean:
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
