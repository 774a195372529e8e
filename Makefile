# `make demo` classifies a photo, `make test` runs the tests. Both set up .venv once and re-use it.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: demo test test-full test-slow test-portable lint clean

demo: $(VENV)/.installed
	$(BIN)/cnn classify examples/cat.jpg

# Most of a first run is compiling kernels. `build` compiles those of the GPU on all cores, but for
# the many convolutions, of which the tests need few; test files then go to two processes.
test: $(VENV)/.installed-test
	$(BIN)/python -m kernels.cuda.build --arch sm_90a --dtype float32 --dtype float16 --skip conv_
	$(BIN)/python -m pytest -m "not slow and not gpu" -n 2 --dist loadfile

test-slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m "slow and not gpu" -n 2 --dist loadfile

test-full: test test-portable test-slow

# The CPU's kernels as other CPUs run them: AVX2, SSE without fused multiply-adds, and the tiles of
# 64-bit ARM, which has registers as narrow and twice as many.
PORTABLE := -q -m "not slow" $(addprefix tests/test_,conv.py winograd.py depthwise.py matmul.py \
	attention.py pool.py elementwise.py softmax.py norm.py copy.py functional.py parallel.py \
	traced.py int8_conv.py int8_values.py int8_winograd.py codes.py \
	executor.py)
TILED := -q -m "not slow" $(addprefix tests/test_,conv.py winograd.py matmul.py attention.py norm.py)
test-portable: $(VENV)/.installed-test
	NUMBA_CPU_NAME=haswell NUMBA_CPU_FEATURES=+avx2 CNN_SIMD_LANES=8 $(BIN)/python -m pytest $(PORTABLE)
	NUMBA_CPU_NAME=nehalem NUMBA_CPU_FEATURES= CNN_SIMD_LANES=4 $(BIN)/python -m pytest $(PORTABLE)
	NUMBA_CPU_NAME=haswell NUMBA_CPU_FEATURES= CNN_SIMD_LANES=4 CNN_SIMD_REGISTERS=32 \
		$(BIN)/python -m pytest $(TILED)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "numba-cnn needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version)." \
		     "Name another: make demo PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.installed-test: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@ $(VENV)/.installed
