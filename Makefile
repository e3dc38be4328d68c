# Each target sets up what it needs, once: a virtual environment, the packages, the run.
#   make train    the embedded model learns arithmetic (a few minutes on a CPU)
#   make test     format, lint, types and tests
#   make test-lowest  the tests with the oldest packages that pyproject.toml allows
#   make torture  runs that are killed 50 times end in the same bits (minutes)
#   make tpu-check  programs as compiled for TPUs, compared with those kept (an hour)
#   make docs     the pages as a site, in docs/_build/html
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=
JOBS ?= auto

.PHONY: train test unit test-lowest torture tpu-check check lint format types docs clean

train: $(VENV)/.train
	$(BIN)/grpo-jax train --run-dir runs/arithmetic $(ARGS)

# Types are checked on one core: the tests need not wait for it.
test: $(VENV)/.test
	$(MAKE) --no-print-directory --jobs 2 check unit

unit: $(VENV)/.test
	$(BIN)/python -m pytest -n $(JOBS) $(ARGS)

# Direct dependencies only: what those need in turn is theirs to bound.
test-lowest:
	$(PYTHON) -m venv --clear .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet uv
	.venv-lowest/bin/uv pip install --quiet --python .venv-lowest/bin/python \
		--resolution lowest-direct --editable '.[test]'
	.venv-lowest/bin/python -m pytest -n $(JOBS) $(ARGS)

torture: $(VENV)/.test
	$(BIN)/python tests/training/torture.py --kills 50 $(ARGS)

# libtpu lies beside the environment: JAX would look for a TPU if it were in it.
LIBTPU ?= $(VENV)/libtpu/libtpu/libtpu.so

tpu-check: $(VENV)/.test $(LIBTPU)
	TPU_LIBRARY_PATH=$(LIBTPU) $(BIN)/python benchmarks/tpu_check.py $(ARGS)

# JAX cannot read all programs of a libtpu that is newer than the one it asks for.
$(VENV)/libtpu/libtpu/libtpu.so: $(VENV)/.test
	$(BIN)/python -m pip install --quiet --upgrade --no-deps --target $(VENV)/libtpu \
		"$$($(BIN)/python -c 'from grpo_jax.planning.slices import wanted_library as x; print(x())')"

check: lint types

lint: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.test
	$(BIN)/pyright

format: $(VENV)/.test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Anew each time: API pages follow docstrings, which Sphinx does not watch.
docs: $(VENV)/.docs
	$(BIN)/python -m sphinx -EW --keep-going -q -b html -c docs -d docs/_build/trees . docs/_build/html
	@echo "docs/_build/html/docs/index.html"

clean:
	rm -rf $(VENV) .venv-* build dist *.egg-info docs/_build

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.train: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.test: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@$(BIN)/python -m pip install --quiet --editable '.[gcs]' >/dev/null 2>&1 \
		|| echo "gcsfs could not be installed; the tests of runs in buckets are skipped"
	@$(BIN)/python -m pip install --quiet --editable '.[tasks]' >/dev/null 2>&1 \
		|| echo "reasoning-gym could not be installed (pycosat needs a C compiler); its tests are skipped"
	@$(BIN)/python -m pip install --quiet --editable '.[environments]' >/dev/null 2>&1 \
		|| echo "textarena and skyrl-gym could not be installed; their tests are skipped"
	touch $@ $(VENV)/.train

$(VENV)/.docs: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@ $(VENV)/.train
