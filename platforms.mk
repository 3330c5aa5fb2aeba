# Targets that build and try upcast for other platforms than this one, included by the Makefile. See docs/platforms.md.
PLATFORMS := build/platforms
TOOLS := $(PLATFORMS)/tools
ABI3 := torch_upcast-*-cp310-abi3
RELEASE ?=
BEGAN := $(shell date +%s)
TOOK = @echo "make $@ took $$(( $$(date +%s) - $(BEGAN) )) seconds"

# What runs under emulation: the story, kernels, fused forwards, Transformers, training and the KV cache.
EMULATED := -m "not real and not slow" tests/integrations/litgpt/test_models.py tests/kernels/test_linear.py tests/kernels/test_fused.py \
  tests/kernels/test_block.py tests/kernels/test_blocks.py tests/kernels/test_survey.py tests/kernels/test_digest.py \
  tests/tensor/test_half_weight.py tests/tensor/test_gradients.py tests/patching/test_patching.py \
  tests/patching/test_training.py tests/integrations/test_fused.py tests/integrations/test_fused_cache.py \
  tests/integrations/test_kv_cache_rule.py tests/integrations/transformers/test_layer.py \
  tests/integrations/transformers/test_models.py tests/integrations/transformers/test_cache.py

# What runs without a GIL: no LitGPT, no Transformers, and nothing that torch.compile needs triton for.
THREADED := -m "not real and not slow" tests/core tests/kernels tests/patching tests/policy tests/tensor \
  $(addprefix --ignore tests/,core/test_hostile.py tensor/test_compile.py tensor/test_tracers.py tensor/test_weight_property.py)

.PHONY: workflows wheels check-macos check-windows test-aarch64 test-free-threaded

# GitHub's workflows cannot run here: actionlint reads them.
workflows: $(TOOLS)/.installed
	$(TOOLS)/bin/actionlint

# The sdist, a wheel for each platform out of it, their checks; each that this machine runs is installed and tried.
wheels: setup workflows $(TOOLS)/.installed $(PLATFORMS)/python3.13t/bin/python3.13t
	$(TOOLS)/bin/python tools/wheels.py --page docs/platforms.md $(RELEASE)
	$(TOOK)

# Compiles and links everything for Apple silicon, and looks at the result; nothing of it runs here.
check-macos: $(TOOLS)/.installed
	$(TOOLS)/bin/python tools/wheels.py macos-arm64
	$(TOOK)

# The same for Windows, where the kernels are in no wheel yet.
check-windows: $(TOOLS)/.installed
	$(TOOLS)/bin/python tools/wheels.py windows-x86_64
	$(TOOK)

# The whole package on an emulated aarch64.
test-aarch64: $(TOOLS)/.installed
	$(TOOLS)/bin/python tools/wheels.py linux-aarch64
	$(PYTHON) tools/aarch64.py $(PLATFORMS)/dist/$(ABI3)-manylinux_2_28_aarch64.whl $(or $(ARGS),$(EMULATED))
	$(TOOK)

# Without a GIL: the native module from many threads, then the package with torch, as far as libraries have wheels.
test-free-threaded: $(TOOLS)/.installed $(PLATFORMS)/python3.13t/bin/python3.13t
	$(TOOLS)/bin/python tools/wheels.py free-threaded
	$(PYTHON) tools/without_gil.py $(or $(FREE_THREADED),$(PLATFORMS)/python3.13t/bin/python3.13t) \
	  $(PLATFORMS)/dist/torch_upcast-*-cp313-cp313t-manylinux_2_28_x86_64.whl $(or $(ARGS),$(THREADED))
	$(TOOK)

$(PLATFORMS)/python3.13t/bin/python3.13t:
	mkdir -p $(PLATFORMS)
	test -n "$(FREE_THREADED)" || $(PYTHON) tools/free_threaded.py $(PLATFORMS)/python3.13t

$(TOOLS)/.installed: tools/requirements.txt
	test -d $(TOOLS) || $(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip --disable-pip-version-check --quiet install -r tools/requirements.txt
	touch $@
