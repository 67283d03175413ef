# make pretrain      trains a small LLaMA with GaLore on the Python standard library's text
# make test          lints, type-checks, runs the tests
# make test-slow     runs the slow tests: whole runs, meshes and hardware that is not there; and the code of the docstrings, the
#                    documentation, the notebooks, the examples and the benchmarks
# make test-newest   tests the core on the newest Python here with the newest jax
# make docs          builds the documentation site into build/site
# make package       builds the wheel and the sdist into dist, and tries each in an empty environment
# Each sets up the environment that it needs.  PYTHON=python3.12 chooses the interpreter, ARGS="--steps 50" adds flags to pretrain.

PYTHON ?= python3
ARGS ?=
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal
export JAX_PLATFORMS ?=

.PHONY: pretrain test test-slow test-newest docs package lint format clean

pretrain: $(VENV)/train
	$(BIN)/galore-jax pretrain --model demo --optimizer galore_adamw --data python $(ARGS)

test: $(VENV)/test lint
	$(PYTEST) -m "not slow and not pages"

test-slow: $(VENV)/test
	$(PYTEST) -m "slow or pages"

test-newest:
	.ci/newest

docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

package:
	PYTHON=$(PYTHON) .ci/package

lint: $(VENV)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

format: $(VENV)/test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# One stamp for each extra that is installed; pyproject.toml is what they depend on.
$(VENV)/%: pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@touch $@

clean:
	rm -rf .venv .venv-newest .venv-oldest build dist
