# Two commands on a fresh machine: `make bench` and `make test`. Both set everything up in .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
STAMP := $(VENV)/.installed
LIGHT := $(VENV)/.installed-to-try
JOBS ?= 2
# A worker per core, each with its files' fixtures; threads that wait give their core to the other worker.
PARALLEL := --numprocesses $(JOBS) --dist loadfile
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

# An environment that was begun and not finished, for want of Debian's python3-venv, is made again.
READY := $(BIN)/python -m pip --version > /dev/null 2>&1
OLD := upcast needs Python 3.10 or newer, and $(PYTHON) is older. Name another one: make PYTHON=python3.12 ...
RECENT := $(PYTHON) -c 'import sys; sys.exit("$(OLD)" if sys.version_info < (3, 10) else 0)'

include kernels.mk
include platforms.mk

.DEFAULT_GOAL := help
.PHONY: help setup try bench bench-quick test test-fast test-slow test-versions coverage-table docs check format clean

help:
	@echo "make try          set up what it takes, and have a patched SmolLM2-135M answer; ARGS='--prompt \"...\"'"
	@echo "make bench        set up, run the benchmark, write its table, JSON and picture to benchmarks/results"
	@echo "make bench-quick  the same in under a minute"
	@echo "make test         set up, then lint, types, layers and tests (what CI runs; JOBS=2 tests at a time)"
	@echo "make check        lint, types and layers only"
	@echo "make test-fast    tests without the real model"
	@echo "make test-slow    the checks that take minutes each"
	@echo "make docs         the documentation as a site in build/site; what leads nowhere is an error"
	@echo "make coverage-table  every architecture against float32, written to docs/coverage.md (about 3 minutes)"
	@echo "make test-versions  every supported version of every library in an environment of its own (about an hour)"
	@echo "make sanitize     the native kernels under AddressSanitizer and UBSan"
	@echo "make sanitize-library  the same for the library itself, under the tests of what holds files (about 20 minutes)"
	@echo "make wheels       the sdist and wheels for every platform that can be built here, checked and tried"
	@echo "make workflows    read the GitHub workflows with actionlint"
	@echo "make test-aarch64 the whole package on aarch64, under qemu (half an hour)"
	@echo "make test-emulated  the kernels for AVX-512, and AMX in software, on an emulated processor (about 20 minutes)"
	@echo "make check-macos  compile and link for Apple silicon, and look at the result"
	@echo "make check-windows  the same for Windows, which runs on torch's own operations until somebody has tried the kernels there"
	@echo "make test-free-threaded  under a Python without a GIL: the native module, and the package with torch"
	@echo "make fuzz         random shapes, strides and values for a minute, damaged files for another"
	@echo "make format       format and sort imports"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt CMakeLists.txt $(wildcard src/*.py src/*.pth src/*.start csrc/* csrc/*/*)
	@$(READY) || { $(RECENT) && $(PYTHON) -m venv $(VENV); }
	@echo "Setting up $(VENV): torch for the CPU, the libraries, and upcast's kernels, compiled here; some minutes."
	@$(PIP) uninstall --yes upcast 2> /dev/null # its name until it was published; or the other project of that name
	@# Side by side: the kernels, which the second line finds compiled, and Python's own files, which pip does one by one.
	$(PIP) wheel --no-deps --wheel-dir build/first . & \
	  $(PIP) install --no-compile --requirement constraints.txt || exit 1; wait
	$(BIN)/python -m compileall -q -j $(JOBS) $(VENV) src tests benchmarks > /dev/null 2>&1 & \
	  $(PIP) install --no-compile --constraint constraints.txt --editable '.[dev]' || exit 1; wait
	touch $@

# Less is installed for it than for the rest, and nothing again once the rest is there.
try: $(if $(wildcard $(STAMP)),setup,$(LIGHT))
	@model=$$($(BIN)/python -m benchmarks.models.smollm2_transformers) && \
		$(BIN)/python examples/inference.py --model "$$model" $(ARGS)

$(LIGHT): pyproject.toml constraints.txt
	@echo "Setting up $(VENV): torch for the CPU, LitGPT, Transformers, and upcast's kernels, compiled here."
	@$(READY) || { $(RECENT) && $(PYTHON) -m venv $(VENV); }
	$(PIP) install --constraint constraints.txt torch
	$(PIP) install --constraint constraints.txt --editable '.[litgpt,transformers]' gguf rich
	touch $@

bench: setup
	$(BIN)/python benchmarks/run.py $(ARGS)

bench-quick: setup
	$(BIN)/python benchmarks/run.py --quick $(ARGS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

test: check
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -m "not slow" $(PARALLEL) $(ARGS)

test-fast: setup
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -m "not slow and not real" $(PARALLEL) $(ARGS)

test-slow: setup
	$(BIN)/python -m pytest -m slow $(ARGS)

docs: setup
	$(BIN)/python tools/errors_page.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "build/site/index.html; to search in it: $(BIN)/python -m http.server --directory build/site"

coverage-table: setup
	$(BIN)/python -m tests.coverage_table

# ROWS=litgpt-0.4.11 for one, ROWS="litgpt peft" for two libraries; those of torch take 6 GB each while they run.
test-versions: setup
	$(BIN)/python -m tests.versions $(ROWS)
	$(TOOK)

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build
