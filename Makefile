# Every command of a developer's day. `make demo` and `make test` are each enough alone on a fresh machine.

# The first interpreter that is new enough; PYTHON=... overrides it.
ifndef PYTHON
PYTHON := $(shell for python in python3 python3.13 python3.12 python3.11; do \
  "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$python" && break; done)
PYTHON := $(or $(PYTHON),python3)
endif
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

# One stamp a setting: asking for another one builds again.
SPKFAST_CUDA ?= auto
export SPKFAST_CUDA
BUILT := $(VENV)/.built-cuda-$(SPKFAST_CUDA)

DATA ?=
OPS ?= all
RESULTS ?= gpu-results
CASES ?= 100000
OP_SECONDS ?= inf
SEED ?= 0
CASE ?=
ARGS ?=
# One thread in each of as many processes as there are cores; tests of threads set their own number.
JOBS ?= $(shell env -u OMP_NUM_THREADS nproc)
# Interpreted kernels multiply by numpy, whose OpenBLAS has products for the newest CPUs that round a row by the rows beside
# it; those of the first with AVX-512 do not.
OPENBLAS := $(shell grep -qs avx512f /proc/cpuinfo && echo OPENBLAS_CORETYPE=SkylakeX)
PYTEST = $(OPENBLAS) OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

# Folders are listed too: adding or removing a file changes them.
SOURCES := setup.py CMakeLists.txt $(shell find csrc kernels/cuda 2>/dev/null)
CPP_FILES = $(shell find csrc kernels tests examples -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help setup build lint format test test-full sanitize demo bench gpu-check gpu-status docs wheel clean
.DELETE_ON_ERROR:

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(BIN)/python:
	@tools/check_machine.sh "$(PYTHON)"
	@echo "making $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV)

# torch comes first, pinned: nothing that follows can bring another one.
$(VENV)/.torch: constraints.txt | $(BIN)/python
	@echo "installing torch and the build tools"
	@$(PIP) torch numpy setuptools cmake ninja pybind11
	@touch $@

$(BUILT): $(VENV)/.torch pyproject.toml $(SOURCES)
	@echo "building spkfast and installing what its commands and checks need"
	@PATH="$(abspath $(BIN)):$$PATH" $(PIP) --no-build-isolation --editable ".[dev]"
	@# Python started beside the checkout would take the folder for the package; a path entry comes before that.
	@pwd > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/spkfast-checkout.pth"
	@rm -f $(VENV)/.built-cuda-*
	@touch $@

setup: build  ## make .venv, install everything, build

build: $(BUILT)  ## build the extension (nothing to do when no source changed)

LINT := lint-format lint-python lint-types lint-cpp lint-layers lint-spelling lint-headers
.PHONY: $(LINT)

lint: build  ## every static check
	@$(MAKE) --no-print-directory --keep-going $(LINT)

lint-format:
	$(BIN)/ruff format --check .
lint-python:
	$(BIN)/ruff check .
lint-types:
	$(BIN)/mypy
lint-cpp:
	@echo "$(BIN)/clang-format --dry-run -Werror (C++ and CUDA files)"
	@$(BIN)/clang-format --dry-run -Werror $(CPP_FILES)
lint-layers:
	$(BIN)/lint-imports --no-logo
lint-spelling:
	$(BIN)/codespell
lint-headers:
	@echo "no torch header in kernels/cuda"
	@! grep -rnE '#[[:space:]]*include[[:space:]]*[<"](torch|ATen|c10)/' kernels/cuda

format: build  ## rewrite Python and C++ in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(CPP_FILES)

test: build  ## the everyday tests, on all cores: JOBS=0 for one process, ARGS="tests/ops -k parity"
	$(PYTEST) $(ARGS)

test-full: build  ## the long tests that `make test` leaves out
	$(PYTEST) -m full $(ARGS)

sanitize: build  ## random cases under AddressSanitizer: OPS="..." CASES=100000 OP_SECONDS=60 SEED=0, or one CASE=N
	tools/sanitize.sh $(BIN)/python $(OPS) --seed $(SEED) --seconds $(OP_SECONDS) \
	  $(if $(CASE),--case $(CASE),--cases $(CASES))

demo: build  ## train, embed, evaluate, report; DATA=FOLDER for speech of your own
	$(BIN)/spkfast demo $(if $(DATA),--data "$(DATA)") --out demo

bench: build  ## every benchmark beside its peers: ARGS="ops --quick", ARGS="all --list"
	$(BIN)/spkfast bench $(ARGS)

# Runs where only the system's Python with torch, triton, pytest, numpy and a CUDA compiler exist, without the network.
gpu-check:  ## verify and time kernels on an NVIDIA GPU: OPS="..." RESULTS=FOLDER
	$(PYTHON) -m benchmarks.gpu_check --ops "$(OPS)" --results "$(RESULTS)"

gpu-status: build  ## regenerate docs/gpu-status.md from the recorded GPU results
	$(BIN)/python -m benchmarks.gpu_status

$(VENV)/.docs: $(BUILT)
	@$(PIP) mkdocs-material
	@touch $@

docs: $(VENV)/.docs  ## build the documentation into build/docs
	$(BIN)/mkdocs build --strict

wheel: build  ## build a wheel into dist
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m build --wheel --no-isolation

clean:  ## remove everything that make made
	rm -rf $(VENV) $(VENV)-bench build dist demo *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	find spkfast -name '*.so' -delete
