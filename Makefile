# accel: `make` prints this help.
.DEFAULT_GOAL := help

CC      ?= gcc
CFLAGS  ?= -O2 -g
WARN    := -std=c11 -Wall -Wextra -Werror -D_GNU_SOURCE
B       := build/c

CSRC    := $(wildcard csrc/*.c csrc/models/*.c csrc/passes/*.c csrc/schedulers/*.c \
             kernels/cpu/*.c kernels/null/*.c)
OBJ     := $(CSRC:%.c=$(B)/%.o)
CTESTS  := $(patsubst tests/c/%.c,$(B)/tests/%,$(wildcard tests/c/test_*.c))

.PHONY: help lib check-c cuda test-gpu demo test test-install test-build test-run clean
help: ## this text
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

lib: $(B)/libaccel.a ## the engine and its CPU kernels as a static library

$(B)/%.o: %.c
	@mkdir -p $(@D)
	$(CC) $(WARN) $(CFLAGS) -fPIC -MMD -MP -c $< -o $@

$(B)/libaccel.a: $(OBJ)
	@rm -f $@
	ar rcs $@ $^

$(B)/tests/%: tests/c/%.c $(B)/libaccel.a
	@mkdir -p $(@D)
	$(CC) $(WARN) $(CFLAGS) -MMD -MP $< $(B)/libaccel.a -lm -lpthread -ldl -o $@

check-c: $(CTESTS) ## build and run the C tests
	@for t in $(CTESTS); do echo "== $$t"; $$t || exit 1; done

# ---- CUDA: the second library, built only where nvcc is -------------------------------------------

NVCC             ?= nvcc
# "75;80;86;89;90a;100;120" or "9.0a 12.0"; CI builds 90a alone.
ACCEL_CUDA_ARCHS ?= 90a
CUDA_SO          := python/accel/libaccel_cuda.so
GENCODE          := $(foreach a,$(subst ;, ,$(subst .,,$(ACCEL_CUDA_ARCHS))),-gencode arch=compute_$(a),code=sm_$(a))
CUDA_OBJ         := $(patsubst %.cu,$(B)/%.cu.o,$(wildcard kernels/cuda/*.cu)) \
                    $(patsubst %.c,$(B)/cuda/%.o,$(wildcard kernels/cuda/*.c) csrc/tensor.c)
CUDA_HOST_FLAGS  := -fPIC,-fvisibility=hidden

$(B)/%.cu.o: %.cu $(wildcard kernels/cuda/*.cuh kernels/cuda/*.h csrc/*.h)
	@mkdir -p $(@D)
	$(NVCC) -std=c++20 -O3 $(GENCODE) -Xcompiler $(CUDA_HOST_FLAGS),-Wall -c $< -o $@

$(B)/cuda/%.o: %.c $(wildcard kernels/cuda/*.h csrc/*.h)
	@mkdir -p $(@D)
	$(NVCC) -O2 -x c -Xcompiler -std=c11,-D_GNU_SOURCE,-Wall,-Wextra,$(CUDA_HOST_FLAGS) -c $< -o $@

$(CUDA_SO): $(CUDA_OBJ)
	@mkdir -p $(@D)
	$(NVCC) -shared -cudart static $(GENCODE) $^ -o $@

cuda: ## the CUDA library, where nvcc is found
	@if command -v $(NVCC) >/dev/null; then $(MAKE) --no-print-directory $(CUDA_SO); \
	else echo "cuda: skipped, no nvcc was found"; fi

test-gpu: ## the checks that need a GPU; installs nothing
	$(MAKE) --no-print-directory cuda $(B)/tests/test_seam
	$(B)/tests/test_seam | tee $(B)/test_seam.log
	@grep -q "ran on cuda" $(B)/test_seam.log || { echo "test-gpu: nothing ran on a GPU"; exit 1; }

# ---- a picture, and the tests, from a fresh clone -------------------------------------------------

PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip --quiet --disable-pip-version-check
# The pinned packages that the tests compare with; pyproject.toml has them once.
EXTRA   = $(shell $(PYTHON) -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; print(*p["dependencies"], *p["optional-dependencies"]["test"])' | sed -E 's/[^ ]+/"&"/g')

export HF_HUB_OFFLINE := 1

$(PY):
	$(PYTHON) -m venv $(VENV)

demo: $(PY) ## install accel into .venv and make a picture
	$(PIP) install .
	$(VENV)/bin/accel generate "a red house by a lake at sunset" --seed 1 -o demo.png
	@echo "the picture is $(CURDIR)/demo.png"

test: test-install test-build test-run ## everything CI runs: sets up, builds, passes the tests

test-install: $(PY) ## what the tests need, into .venv
	$(PIP) install "setuptools>=77" wheel build $(EXTRA)

test-build: $(PY) ## the extension, the C tests, and the GPU library where nvcc is
	ACCEL_CUDA_ARCHS=$(ACCEL_CUDA_ARCHS) $(PIP) install --no-build-isolation --no-deps -e .
	$(MAKE) --no-print-directory -j$(shell nproc) $(CTESTS)

test-run: check-c ## lint, C tests, Python tests, and both ways to install
	$(PY) tools/lint.py
	$(VENV)/bin/ruff check --quiet .
	$(PY) -m pytest -q -n 2 tests
	tools/check_install.sh $(PYTHON)

clean: ## remove what was built
	rm -rf build

-include $(OBJ:.o=.d) $(CTESTS:=.d)
