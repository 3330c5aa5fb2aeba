# Targets of the native kernels, included by the Makefile.
NATIVE := csrc
DRIVER := tests/kernels/driver.cpp
KERNEL_BUILD := build/kernels
KERNEL_FLAGS := -std=c++17 -Wall -Wextra -Werror -fno-exceptions -fno-rtti -ffp-contract=fast -I$(NATIVE)
V3 := -mavx2 -mfma -mf16c
V4 := $(V3) -mavx512f -mavx512bw -mavx512dq -mavx512vl
AMX := $(V4) -mamx-tile -mamx-bf16
AARCH64_FLAGS := -O3 -fPIC -fno-math-errno -fno-tree-loop-distribute-patterns -fno-schedule-insns
SANITIZE := -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all
FUZZ_SECONDS ?= 60
RELEASED := -O3 -fno-math-errno -fno-tree-loop-distribute-patterns -mprefer-vector-width=512
CROSS_CXX ?= aarch64-linux-gnu-g++
CROSS_RUN ?= qemu-aarch64-static

.PHONY: sanitize sanitize-library fuzz driver-aarch64 test-emulated check-libdispatch

# Every level the compiler knows and this machine runs, under AddressSanitizer and UBSan. AMX also on tiles in software.
sanitize: | $(KERNEL_BUILD)
	@for level in "1 -march=x86-64" "3 $(V3)" "4 $(V4)" "5 $(AMX)" "5 $(AMX) -DUPCAST_EMULATE_TILES" "6 $(AMX)" "6 $(AMX) -DUPCAST_EMULATE_TILES"; do set -- $$level; number=$$1; shift; \
	  echo "kernel driver, level $$*"; \
	  $(CXX) $(KERNEL_FLAGS) $(SANITIZE) $$* -DUPCAST_LEVEL=$$number $(DRIVER) -o $(KERNEL_BUILD)/driver-$$number \
	    && $(KERNEL_BUILD)/driver-$$number || exit 1; done

# The library itself, in an environment that borrows the other packages, under the tests of what holds files and memory.
ASAN := build/asan
ASAN_TESTS := tests/checkpoint/test_mapped.py tests/tensor/test_half_weight.py tests/kernels/test_block_spec.py tests/kernels/test_mixture.py
sanitize-library: setup
	rm -rf $(ASAN) && $(PYTHON) -m venv --without-pip $(ASAN)/venv
	CXXFLAGS="-O1 -g -fsanitize=address,undefined" $(PIP) wheel --no-deps --wheel-dir $(ASAN) .
	for site in $(ASAN)/venv/lib/python3*/site-packages; do \
	  $(PYTHON) -m zipfile -e $(ASAN)/*.whl $$site && echo $(CURDIR)/$(VENV)/lib/python3*/site-packages > $$site/borrowed.pth; done
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	  $(ASAN)/venv/bin/python -m pytest -m "not slow" $(ARGS) $(ASAN_TESTS)

# Random shapes, strides, alignments and values, each level in turn, for FUZZ_SECONDS in all; damaged files as long.
fuzz: setup | $(KERNEL_BUILD)
	@for level in "1 -march=x86-64" "3 $(V3)" "4 $(V4)" "5 $(AMX)" "6 $(AMX)"; do set -- $$level; number=$$1; shift; \
	  echo "kernel fuzz, level $$number"; \
	  $(CXX) $(KERNEL_FLAGS) $(SANITIZE) $$* -DUPCAST_LEVEL=$$number $(DRIVER) -o $(KERNEL_BUILD)/driver-$$number \
	    && $(KERNEL_BUILD)/driver-$$number $$(( $(FUZZ_SECONDS) / 10 )) || exit 1; done
	$(BIN)/python tests/kernels/fuzz.py $$(( $(FUZZ_SECONDS) / 2 ))
	$(BIN)/python -m tests.fuzz_files $(FUZZ_SECONDS)

# The kernels alone, compiled by gcc; `make test-aarch64` runs the whole package.
driver-aarch64: | $(KERNEL_BUILD)
	@command -v $(CROSS_CXX) >/dev/null || { echo "$(CROSS_CXX) is missing; Debian: g++-aarch64-linux-gnu" >&2; exit 1; }
	@command -v $(CROSS_RUN) >/dev/null || { echo "$(CROSS_RUN) is missing; Debian: qemu-user-static" >&2; exit 1; }
	$(CROSS_CXX) $(KERNEL_FLAGS) -O2 -static -DUPCAST_LEVEL=64 $(DRIVER) -o $(KERNEL_BUILD)/driver-aarch64
	$(CROSS_RUN) $(KERNEL_BUILD)/driver-aarch64
	$(CROSS_CXX) $(KERNEL_FLAGS) $(AARCH64_FLAGS) -S -DUPCAST_LEVEL=64 $(NATIVE)/simd/level.cpp -o $(KERNEL_BUILD)/level-aarch64.s
	$(PYTHON) tools/spills.py $(KERNEL_BUILD)/level-aarch64.s

# AVX-512 for machines without: the driver with the flags of a release, on the oldest processor that has it, in Bochs.
test-emulated: | $(KERNEL_BUILD)
	@for level in "4 $(V4)" "5 $(AMX) -DUPCAST_EMULATE_TILES" "6 $(AMX) -DUPCAST_EMULATE_TILES"; do set -- $$level; number=$$1; shift; \
	  $(CXX) $(KERNEL_FLAGS) $(RELEASED) -static $$* -DUPCAST_LEVEL=$$number $(DRIVER) \
	    -o $(KERNEL_BUILD)/driver-emulated-$$number || exit 1; done
	$(PYTHON) tools/bochs.py corei7_skylake_x $(addprefix $(KERNEL_BUILD)/driver-emulated-,4 5 6)
	$(TOOK)

# The macOS thread path cannot run here; it must keep compiling.
check-libdispatch:
	$(CXX) $(KERNEL_FLAGS) -DUPCAST_CHECK_LIBDISPATCH -fsyntax-only $(NATIVE)/runtime/threads.cpp

$(KERNEL_BUILD):
	mkdir -p $@
