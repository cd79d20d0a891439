# make demo    train on the built-in tasks, SFT -> reward model -> GRPO, and print what came of it
# make test    everything that must hold: lint, types, the C++ build, all tests, one short run
# make bench   time everything against its peers (bench-quick: in a few minutes)
#
# All do all their set-up, and little when it is done already. Variables:
#   PYTHON   the interpreter of the virtual environment (default python3, 3.10 or newer)
#   VENV     the virtual environment (default .venv; one that has torch keeps its torch)
#   TORCH    what pip installs as torch (see the README for a machine with a GPU)

PYTHON ?= python3
VENV ?= .venv
# Some package indexes serve this version without CUDA; with an NVIDIA GPU, the newest one.
TORCH ?= $(if $(shell command -v nvidia-smi),torch,torch==2.13.0)

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SEED ?= 0

.PHONY: demo test build dev lint format types pytest triton short-run bench bench-quick clean

demo: build
	$(BIN)/fastllm demo --seed $(SEED) --overwrite

test: lint types pytest triton short-run

build: $(VENV)/.built

dev: $(VENV)/.dev

$(VENV)/.torch:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(PIP) install -q $(TORCH)
	$(PIP) install -q "setuptools>=77" "ninja>=1.11" "pybind11>=2.13"
	touch $@

# The package, without its C++: that is built below, where make sees which sources are new.
$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	FASTLLM_NO_CPP=1 $(PIP) install -q --no-build-isolation -e .
	touch $@

$(VENV)/.built: $(VENV)/.installed setup.py $(wildcard csrc/*)
	$(BIN)/python setup.py -q build_ext --inplace
	touch $@

$(VENV)/.dev: $(VENV)/.built
	FASTLLM_NO_CPP=1 $(PIP) install -q --no-build-isolation -e ".[dev]"
	touch $@

lint: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: dev
	$(BIN)/mypy

pytest: dev
	$(BIN)/python -m pytest tests

# The interpreter is chosen when Triton is imported: a process of its own.
triton: dev
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/ops tests/invariants

short-run: dev
	folder=$$(mktemp -d) && $(BIN)/fastllm demo --quick --out $$folder/demo; \
	status=$$?; rm -rf "$$folder"; exit $$status

bench: dev
	$(BIN)/python -m bench --save

bench-quick: dev
	$(BIN)/python -m bench --quick

clean:
	rm -rf $(VENV) build fastllm.egg-info fastllm/*.so
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
