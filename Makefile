# `make demo` classifies a photo, `make test` runs the tests. Both set up .venv once and re-use it.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: demo test test-full lint clean

demo: $(VENV)/.installed
	$(BIN)/cnn classify examples/cat.jpg

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m "not slow and not gpu"

# Everything, and the kernels once more as narrower CPUs would run them.
test-full: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m "not gpu"
	CNN_SIMD_LANES=8 $(BIN)/python -m pytest -q tests/test_conv.py tests/test_depthwise.py tests/test_matmul.py
	CNN_SIMD_LANES=4 $(BIN)/python -m pytest -q tests/test_conv.py tests/test_depthwise.py tests/test_matmul.py

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
