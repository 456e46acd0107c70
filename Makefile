# Everything runs in .venv, which is created on first use and updated when the project file changes.
# Python 3.11 or later and a package index are all that is needed.

PYTHON ?= python3
WORKERS ?= 2
FUZZ_SECONDS ?= 3600
POINTS ?= 50

BIN := .venv/bin
INSTALLED := .venv/installed

# No network access beyond the installation: pyright and pip would look for newer versions of themselves.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test lint bench interop fuzz torture clean

# Compress the sample model four ways and compare the results.
demo: $(INSTALLED)
	$(BIN)/python examples/demo.py

# One torch thread per worker: more threads would compete for the same cores.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses $(WORKERS) --dist loadfile

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# Compare the solver with the published algorithm on a 4096 x 4096 layer; takes minutes.
bench: $(INSTALLED)
	$(BIN)/python benchmarks/solver.py

# Load every export in its runtime, each in an environment of its own; takes many minutes.
interop: $(INSTALLED)
	$(BIN)/python benchmarks/others/interop.py --docs docs/interop.md --readme README.md

# Changed checkpoints, recipes and texts for an hour, or FUZZ_SECONDS; the faults by their kind, each with a case that shows it.
fuzz: $(INSTALLED)
	$(BIN)/python tests/robustness/fuzz.py --seconds $(FUZZ_SECONDS)

# Kills and failing disks at POINTS operations of each command; takes most of an hour.
torture: $(INSTALLED)
	$(BIN)/python tests/robustness/torture.py --points $(POINTS)

clean:
	rm -rf .venv .ruff_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first and pinned, so that no dependency of another package can install another build of it.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "lmpress needs Python 3.11 or later: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv .venv || \
		{ echo "python3 cannot make a virtual environment: on Debian or Ubuntu, apt install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	@touch $@
