# `make demo` and `make test` need python3 (3.11 or newer) and nothing else; the first call creates .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
INSTALLED := $(VENV)/installed

.PHONY: demo test test-slow coverage lint clean

demo: $(INSTALLED)
	$(BIN)/ctvae demo --out demo

# Two processes of one thread each: twice as fast as one after the other, and no test waits for another's threads.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

# Of the modules that compute and do nothing else (pyproject.toml names them), by their own tests.
PURE := haar flow slabs wiener losses tiling intensity volume priors config preprocess optimizer velocity \
	recompute evaluation_distances evaluation_similarity
coverage: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m coverage run -m pytest -q $(PURE:%=tests/test_%.py)
	$(BIN)/python -m coverage report

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) demo

# torch first and by itself, so that the pinned build is the one that the rest finds.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than 3.11; make PYTHON=python3.12 ..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e '.[dev]'
	@touch $@
