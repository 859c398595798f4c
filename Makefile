# Each target works alone on a fresh machine with Python, make and a C++ compiler: it makes .venv and installs first.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# What is tested together. torchvision must match torch; the newest pair for aarch64 on PyPI without CUDA is older.
TORCH  ?= $(if $(filter aarch64 arm64,$(shell uname -m)),torch==2.9.1 torchvision==0.24.1,torch==2.14.1 torchvision==0.29.1)

# The demonstration runs on the CPU where there is no GPU, and does not wait for CUDA kernels to compile.
CUDA   := $(shell command -v nvidia-smi >/dev/null 2>&1 && echo 1 || echo 0)

# What the C++ kernels, and the CUDA kernels built for the host, are run with: out-of-bounds access and undefined behaviour.
# The C++ kernels are then run once more, in four threads, with ThreadSanitizer.
SANITIZE := address,undefined

SOURCES := $(shell find csrc -type f 2>/dev/null)
FORMATTED := $(filter %.h %.cpp %.cu,$(SOURCES))

.PHONY: FORCE help demo test test-slow test-all fuzz test-gpu check check-native fix bench install clean

help:
	@echo "demo      compress the embedded model and compare methods, over 5 few-shot sets"
	@echo "test      run the tests but for the slow ones"
	@echo "test-slow run the slow ones"
	@echo "test-all  run all of them"
	@echo "fuzz      ask each reader of files and values 30,000 times"
	@echo "test-gpu  run the tests that need a GPU; a skipped one fails"
	@echo "check     formatting, lint and types; changes nothing"
	@echo "check-native  run the tests of the ops on builds with sanitizers"
	@echo "fix       formatting and lint, repaired"
	@echo "bench     kernel benchmarks"
	@echo "install   .venv with all that tests and benchmarks need, the compiled extension included"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel ninja

FORCE:

# What was asked for; it changes, and what depends on it is made again, only when TORCH does.
$(VENV)/.wanted: $(BIN)/python FORCE
	@echo '$(TORCH)' | cmp -s - $@ || echo '$(TORCH)' > $@

$(VENV)/.torch: $(VENV)/.wanted
	$(BIN)/python -m pip install --quiet $(TORCH)
	@touch $@

# Without build isolation the extension is compiled against the torch that is installed.
$(VENV)/.demo: $(VENV)/.torch pyproject.toml setup.py $(SOURCES)
	DCVIT_CUDA=$(CUDA) $(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[demo]'
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml setup.py $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[dev]'
	@touch $@

install: $(VENV)/.dev

demo: $(VENV)/.demo
	$(BIN)/dcvit demo --seeds 5 --out dcvit-demo --overwrite

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not slow"

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto --dist worksteal -m slow

test-all: test test-slow

fuzz: $(VENV)/.dev
	DCVIT_FUZZ=$${DCVIT_FUZZ:-30000} $(BIN)/python -m pytest -n auto --dist worksteal tests/artifacts/test_fuzz.py

test-gpu: $(VENV)/.dev
	DCVIT_TEST_GPU=1 $(BIN)/python -m pytest -m gpu

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED)
	$(BIN)/ruff check .
	$(BIN)/mypy

# CUDA is left out: nothing could run it. Python itself is not built with sanitizers, so they are loaded before it; what it
# leaks at its end is not ours to find.
check-native: $(VENV)/.dev
	DCVIT_CUDA=0 DCVIT_SANITIZE=$(SANITIZE) $(BIN)/python setup.py --quiet build_ext \
		--build-lib build/native --build-temp build/native/objects
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0:handle_segv=0 UBSAN_OPTIONS=print_stacktrace=1 \
	DCVIT_SANITIZE=$(SANITIZE) DCVIT_KERNELS=build/native/dcvit \
		$(BIN)/python -m pytest tests/ops -m native --capture=sys
	DCVIT_CUDA=0 DCVIT_SANITIZE=thread $(BIN)/python setup.py --quiet build_ext \
		--build-lib build/threads --build-temp build/threads/objects
	LD_PRELOAD="$$($(CXX) -print-file-name=libtsan.so)" \
	TSAN_OPTIONS=ignore_noninstrumented_modules=1:exitcode=66 \
	DCVIT_KERNELS=build/threads/dcvit DCVIT_TEST_THREADS=4 \
		$(BIN)/python -m pytest tests/ops -k cpp --capture=sys

fix: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)
	$(BIN)/ruff check --fix .

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks kernels

clean:
	rm -rf build dist *.egg-info dcvit/_C* dcvit-demo
