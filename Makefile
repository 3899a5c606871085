# make embed   embed FASTA with MODEL into OUT (ARGS: more options), in an environment made for it
# make test    lint, type-check and test, in an environment made for it

FASTA ?= examples/proteins.fasta
MODEL ?= demo
OUT ?= embeddings.h5
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
ARGS ?=
PYTEST_ARGS ?=

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint $(CONSTRAINTS)

.PHONY: embed test clean

embed: $(VENV)/embed.stamp
	$(BIN)/esm-packed embed $(FASTA) --model $(MODEL) --output $(OUT) $(ARGS)
	@echo
	@echo "Read it in Python:   import h5py; h5py.File('$(OUT)')['embeddings'][:]"
	@echo "A real model:        make embed FASTA=your.fasta MODEL=esm2_t33_650M_UR50D OUT=your.h5"
	@echo "All options:         $(BIN)/esm-packed embed --help"

test: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/typed build/lib
	$(INSTALL) --no-deps --target build/typed .
	MYPYPATH=build/typed:tests/support:benchmarks $(BIN)/mypy --explicit-package-bases build/typed/esm_packed tests
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/embed.stamp: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	@echo "Installing esm-packed into $(VENV) (once, a few minutes)"
	$(INSTALL) --editable .
	touch $@

$(VENV)/test.stamp: $(VENV)/embed.stamp
	$(INSTALL) --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
