# make demo       optimise a real model on this machine, prove it, and say what to type next
# make test       every test that a CPU can run
# make lint       ruff and mypy
# make bench      beside other engines; the result goes to benchmarks/results (installs them once, 10 minutes)
# make nightly    the C++ engine's checks under the thread sanitizer, and these and the kernels' tests under the address
#                 and undefined-behaviour sanitizers
# make aarch64    the C++ engine's checks here and on an emulated ARM processor, which must give the same bits
#                 (needs the Debian packages g++-aarch64-linux-gnu and qemu-user-static)
# make extension  the C++ extension built into src/flatout, for work without installing
# make clean      everything that make has made
#
# All of it lives in .venv, which the first target creates. Nothing is repeated unless what it depends on changed.

PYTHON ?= python3
MODEL := smollm2-135m
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
SOURCES := $(shell find src -type f -not -name '*.pyc' -not -name '*.so' -not -path '*/.*')

# Requirements of pyproject.toml at the given keys, as arguments for pip.
requirements = $$($(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))$(1))')

configure = $(BIN)/cmake -S . -B $(1) -G Ninja -DCMAKE_MAKE_PROGRAM="$(CURDIR)/$(BIN)/ninja" \
	-DPython_EXECUTABLE="$(CURDIR)/$(BIN)/python"

.PHONY: demo test lint bench nightly aarch64 extension clean
.DELETE_ON_ERROR:
.NOTPARALLEL:  # timings must not compete; the compiler uses all cores by itself

demo: demo/result.json
	@$(BIN)/python -c 'import json, sys; from flatout.cli.optimize import summary; \
		result = json.load(open("demo/result.json")); print(summary(result)); \
		print("flatout is $(BIN)/flatout; to measure again: rm demo/result.json && make demo"); \
		sys.exit(0 if result["passed"] else 3)'

# Exit code 3 is a result too: the folder then holds the original.
demo/result.json: $(VENV)/package
	mkdir -p demo
	$(BIN)/flatout optimize $(MODEL) --max-loss 1% --out demo/artifact --json > $@ || \
		{ code=$$?; test $$code -eq 3 || exit $$code; }

demo/native/report.html: $(VENV)/package
	$(BIN)/flatout optimize $(MODEL) --recipe native-s8 --max-loss 1% --out demo/native

demo/prompts/report.html: $(VENV)/package
	$(BIN)/flatout optimize $(MODEL) --recipe 'w8a8/smooth,layers.*.down=w8a16' --max-loss 1% --out demo/prompts

test: $(VENV)/dev
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

PEERS := llama.cpp,openvino,onnxruntime,ctranslate2,transformers
# Ours twice, each certified at 1%: 8 bits, which read prompts fastest, and the file's own codes, which decode fastest.
bench: $(VENV)/package demo/prompts/report.html demo/native/report.html
	mkdir -p build
	$(BIN)/flatout bench demo/prompts demo/native --original $(MODEL) --against $(PEERS) --out build/bench.json
	$(BIN)/python benchmarks/record.py bench build/bench.json

# The thread sanitizer does not know Python's locks, so it sees the C++ checks only. With Python, the sanitizers' runtimes
# must come before Python's own libraries, and leaks are not looked for: it never frees some of what it allocates. With -O3
# the compiler takes many minutes for a sanitized file of unrolled kernels.
CHECKS := check_kernels check_model
THREADS := build/threads
SANITIZED := build/sanitized
nightly: $(VENV)/dev
	$(call configure,$(THREADS)) -DFLATOUT_EXTENSION=OFF -DFLATOUT_LEVEL=-O1 -DCMAKE_CXX_FLAGS="-g1 -fno-omit-frame-pointer -fsanitize=thread"
	$(BIN)/cmake --build $(THREADS) --target $(CHECKS)
	set -e; for check in $(CHECKS); do $(THREADS)/$$check; done
	$(call configure,$(SANITIZED)) -DFLATOUT_LEVEL=-O1 -DCMAKE_CXX_FLAGS="-g1 -fno-omit-frame-pointer \
		-fsanitize=address,undefined -fno-sanitize-recover=undefined"
	$(BIN)/cmake --build $(SANITIZED) --target all $(CHECKS)
	set -e; for check in $(CHECKS); do UBSAN_OPTIONS=print_stacktrace=1 $(SANITIZED)/$$check; done
	rm -rf $(SANITIZED)/site
	mkdir -p $(SANITIZED)/site
	cp -r src/flatout $(SANITIZED)/site/
	rm -f $(SANITIZED)/site/flatout/_cpu*.so
	cp $(SANITIZED)/_cpu*.so $(SANITIZED)/site/flatout/
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
		UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=$(SANITIZED)/site $(BIN)/python -m pytest -s tests/kernels \
		$(addprefix --ignore-glob=*,fpga* cuda* triton* gpu*) $(ARGS)

ARM := -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ \
	-DCMAKE_EXE_LINKER_FLAGS=-static
aarch64: $(VENV)/tools
	$(call configure,build/check) -DFLATOUT_EXTENSION=OFF
	$(BIN)/cmake --build build/check --target $(CHECKS)
	$(call configure,build/aarch64) -DFLATOUT_EXTENSION=OFF $(ARM)
	$(BIN)/cmake --build build/aarch64 --target $(CHECKS)
	set -e; for check in $(CHECKS); do \
		build/check/$$check > build/check/$$check.digest; \
		qemu-aarch64-static build/aarch64/$$check > build/aarch64/$$check.digest; \
		cmp build/check/$$check.digest build/aarch64/$$check.digest; done

extension: $(VENV)/tools
	$(call configure,build/extension)
	$(BIN)/cmake --build build/extension
	cp build/extension/_cpu*.so src/flatout/

clean:
	rm -rf $(VENV) build demo src/flatout/_cpu*.so

# The virtual environment with the tools that build the extension; they stay, so that a rebuild compiles only what changed.
$(VENV)/tools: constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit( \
		"flatout needs Python 3.11 or newer, not " + sys.version.split()[0] + "; try: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) cmake ninja $(call requirements,["build-system"]["requires"])
	touch $@

$(VENV)/package: $(VENV)/tools pyproject.toml CMakeLists.txt $(SOURCES)
	$(INSTALL) --no-build-isolation '.[baselines]'
	touch $@

$(VENV)/dev: $(VENV)/package
	$(INSTALL) $(call requirements,["project"]["optional-dependencies"]["dev"])
	-$(INSTALL) $(call requirements,["project"]["optional-dependencies"]["fpga"])  # x86-64 only: its tests skip
	-$(INSTALL) triton  # the GPU kernels under its interpreter; a PyTorch for GPUs brings its own
	touch $@
