# make help prints this file's targets. GPU: `make install CONSTRAINT=` installs torch's CUDA build.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINT ?= -c constraints/cpu.txt
BIN := $(VENV)/bin
PROCESSES ?= 1
LAUNCH := $(BIN)/accelerate launch --quiet --num_processes $(PROCESSES) --num_machines 1 --mixed_precision no --dynamo_backend no

.DEFAULT_GOAL := help
.PHONY: help install train test test-all smoke lint nano bench clean

help:           ## this list
	@grep -hE '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

install: $(BIN)/.installed  ## .venv with what training needs

train: install  ## the embedded default: search over this Python's documentation, a few minutes on two cores
	$(LAUNCH) train/biencoder.py experiment=pydocs resume=true

test: $(BIN)/.installed-dev  ## all tests that should pass before a commit
	$(BIN)/python -m pytest -q -m "not slow and not gpu"

test-all: $(BIN)/.installed-dev  ## the slow ones too
	$(BIN)/python -m pytest -q -m "not gpu"

smoke: install  ## the embedded default shrunk to seconds
	$(LAUNCH) train/biencoder.py experiment=pydocs debug=tiny name=smoke resume=true

lint: $(BIN)/.installed-dev  ## ruff
	$(BIN)/ruff check .

nano: install  ## pretrain the small base model again from open text (TEXT=<folder>); hours on a CPU
	$(LAUNCH) train/pretrain.py $(if $(TEXT),text=$(TEXT))

bench: $(BIN)/.installed-dev  ## compare with sentence-transformers, same data and steps
	$(BIN)/python benchmarks/parity_sentence_transformers.py

clean:          ## remove runs, harvested and cached data, keep .venv
	rm -rf runs data/raw data/cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; found $$($(PYTHON) --version). Use make PYTHON=<path>"; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(BIN)/.installed: pyproject.toml constraints/cpu.txt | $(BIN)/python
	$(BIN)/pip install --disable-pip-version-check -q -e . $(CONSTRAINT)
	@touch $@

$(BIN)/.installed-dev: $(BIN)/.installed
	$(BIN)/pip install --disable-pip-version-check -q -e ".[dev]" $(CONSTRAINT)
	@touch $@
