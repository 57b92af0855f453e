PY ?= python3
VENV ?= .venv
STAMP := $(VENV)/.stamp
BIN := $(VENV)/bin
# Two processes, one thread each: the numbers of a test must not depend on how many cores there are.
JOBS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal

.PHONY: demo test check conformance test-long setup clean

demo: $(STAMP)
	$(BIN)/auxin demo

test: $(STAMP)
	$(PYTEST)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports --no-logo

conformance: $(STAMP)
	$(PYTEST) -m conformance

test-long: $(STAMP)
	$(PYTEST) -m long --timeout 1800

setup: $(STAMP)

$(STAMP): pyproject.toml constraints/dev.txt
	test -x $(BIN)/python || $(PY) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints/dev.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache .import_linter_cache .hypothesis
