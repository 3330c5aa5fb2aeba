# Two commands on a fresh machine: `make bench` and `make test`. Both set everything up in .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
STAMP := $(VENV)/.installed
JOBS ?= 2
# A worker per core, each with its files' fixtures; threads that wait give their core to the other worker.
PARALLEL := --numprocesses $(JOBS) --dist loadfile
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

include kernels.mk
include platforms.mk

.DEFAULT_GOAL := help
.PHONY: help setup bench bench-quick test test-fast test-slow test-versions coverage-table check format clean

help:
	@echo "make bench        set up, run the benchmark, write its table, JSON and picture to benchmarks/results"
	@echo "make bench-quick  the same in under a minute"
	@echo "make test         set up, then lint, types, layers and tests (what CI runs; JOBS=2 tests at a time)"
	@echo "make check        lint, types and layers only"
	@echo "make test-fast    tests without the real model"
	@echo "make test-slow    the checks that take minutes each"
	@echo "make coverage-table  every architecture against float32, written to docs/coverage.md (about 3 minutes)"
	@echo "make test-versions    Transformers 4.51.3 and 4.57.6 in environments of their own (about 5 minutes)"
	@echo "make sanitize     the native kernels under AddressSanitizer and UBSan"
	@echo "make wheels       the sdist and wheels for every platform that can be built here, checked and tried"
	@echo "make workflows    read the GitHub workflows with actionlint"
	@echo "make test-aarch64 the whole package on aarch64, under qemu (half an hour)"
	@echo "make check-macos  compile and link for Apple silicon, and look at the result"
	@echo "make test-free-threaded  the native module under a Python without a GIL"
	@echo "make fuzz         random shapes, strides and values for a minute, damaged files for another"
	@echo "make format       format and sort imports"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt CMakeLists.txt $(wildcard src/*.py src/*.pth src/*.start csrc/* csrc/*/*)
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(PIP) install --constraint constraints.txt torch
	$(PIP) uninstall --yes upcast # its name until it was published; or the other project of that name
	$(PIP) install --constraint constraints.txt --editable '.[dev]'
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

coverage-table: setup
	$(BIN)/python -m tests.coverage_table

# Each with the tokenizers it wants; everything else is that of .venv. Compiled, 4.57 meets a warning of torch's own.
VERSIONS := 4.51.3-0.21.4 4.57.6-0.22.2

test-versions: setup
	for pair in $(VERSIONS); do \
		old=build/transformers-$$pair && $(PYTHON) -m venv $$old && \
		$$old/bin/python -m pip --disable-pip-version-check --quiet install --no-deps \
			transformers==$${pair%-*} tokenizers==$${pair#*-} huggingface-hub==0.36.0 && \
		for site in $$old/lib/python3*/site-packages; do \
			echo "import site; site.addsitedir('$$(echo $(CURDIR)/$(VENV)/lib/python3*/site-packages)')" > $$site/zz_venv.pth; \
		done && \
		$$old/bin/python -m pytest tests/integrations/transformers/test_versions.py tests/patching/test_training.py -k "not compiled" \
			|| exit 1; \
	done

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build
