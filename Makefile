# make embed   embed FASTA with MODEL into OUT (ARGS: more options), in an environment made for it
# make lint    check style and types, in an environment made for it
# make test    run the tests, in the same environment
# make docs    build the documentation into build/site, in an environment without torch; warnings are errors
# make dist    build and check the wheel and the source archive in dist/

FASTA ?= examples/proteins.fasta
MODEL ?= demo
OUT ?= embeddings.h5
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
ARGS ?=
PYTEST_ARGS ?=
DOCS_VENV ?= .venv-docs
DIST_VENV ?= .venv-dist

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint $(CONSTRAINTS)

.PHONY: embed tree lint test docs dist clean

embed: $(VENV)/embed.stamp
	$(BIN)/esm-packed embed $(FASTA) --model $(MODEL) --output $(OUT) $(ARGS)
	@echo
	@echo "Read it in Python:   import h5py; h5py.File('$(OUT)')['embeddings'][:]"
	@echo "A real model:        make embed FASTA=your.fasta MODEL=esm2_t33_650M_UR50D OUT=your.h5"
	@echo "All options:         $(BIN)/esm-packed embed --help"

# What mypy and the documentation read: the directories as they are imported.
tree:
	rm -rf build/tree
	mkdir -p build/tree/esm_packed
	ln -s $(CURDIR)/esm_packed/* $(CURDIR)/kernels $(CURDIR)/reports $(CURDIR)/runners build/tree/esm_packed

lint: $(VENV)/test.stamp tree
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=build/tree:tests/support:benchmarks $(BIN)/mypy --explicit-package-bases build/tree/esm_packed tests

test: $(VENV)/test.stamp
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

docs: $(DOCS_VENV)/docs.stamp tree
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict --quiet
	@echo "build/site/index.html"

dist: $(DIST_VENV)/dist.stamp
	rm -rf dist build/lib
	$(DIST_VENV)/bin/python -m build --outdir dist
	$(DIST_VENV)/bin/twine check --strict dist/*

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(DOCS_VENV)/docs.stamp: docs/requirements.txt
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install --disable-pip-version-check --quiet --no-compile --requirement $<
	touch $@

$(DIST_VENV)/dist.stamp:
	$(PYTHON) -m venv $(DIST_VENV)
	$(DIST_VENV)/bin/python -m pip install --disable-pip-version-check --quiet build==1.6.1 twine==7.0.0
	touch $@

$(VENV)/embed.stamp: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	@echo "Installing esm-packed into $(VENV) (once, a few minutes)"
	$(INSTALL) --editable .
	touch $@

$(VENV)/test.stamp: $(VENV)/embed.stamp
	$(INSTALL) --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) $(DOCS_VENV) $(DIST_VENV) build dist *.egg-info
