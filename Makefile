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

.PHONY: FORCE help lib check-c cuda cuda-headers test-gpu gpu-extension gpu-75 demo test test-install test-build test-run \
        sanitize tsan oom fuzz san-extension clean
help: ## this text
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

lib: $(B)/libaccel.a ## the engine and its CPU kernels as a static library

$(B)/%.o: %.c
	@mkdir -p $(@D)
	$(CC) $(WARN) $(CFLAGS) $(PYFLAGS) -fPIC -MMD -MP -c $< -o $@

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
# Compute capabilities to build for, as in "75;80;90a" or "9.0a 12.0+PTX" (PTX: for later ones too);
# empty: from 75 on all that nvcc knows.
ACCEL_CUDA_ARCHS ?=
CUDA_SO          := python/accel/libaccel_cuda.so
# Headers of NVIDIA's libraries: those of nvcc, of the system, of `make cuda-headers`, of NVIDIA's pip
# packages; one of too old a version is passed over.  Without one what needs it is left out.
NVCC_PATH        := $(shell command -v $(NVCC))
CUDA_KNOWN       := $(if $(NVCC_PATH),$(patsubst compute_%,%,$(shell $(NVCC) --list-gpu-arch)))
CUDA_ALL         := $(foreach a,75 80 86 89 90a 100 120,$(if $(filter $(a:a=),$(CUDA_KNOWN)),$(a)))
CUDA_ALL         := $(filter-out $(lastword $(CUDA_ALL)),$(CUDA_ALL)) $(lastword $(CUDA_ALL))+PTX
CUDA_ARCHS       := $(or $(strip $(subst ;, ,$(subst .,,$(ACCEL_CUDA_ARCHS)))),$(CUDA_ALL))
GENCODE          := $(foreach a,$(CUDA_ARCHS:+PTX=),-gencode arch=compute_$(a),code=sm_$(a)) \
                    $(foreach a,$(patsubst %+PTX,%,$(filter %+PTX,$(CUDA_ARCHS))),-gencode arch=compute_$(a:a=),code=compute_$(a:a=))
CUDA_INCLUDES    := $(if $(NVCC_PATH),$(dir $(realpath $(NVCC_PATH)))../include /usr/local/cuda/include /usr/include \
                      $(wildcard build/headers/nvidia/*/include $(SITE)/nvidia/*/include $(or $(VENV),.venv)/lib/python3*/site-packages/nvidia/*/include) \
                      $(shell python3 -c 'import glob, nvidia; [print(f) for p in nvidia.__path__ for f in glob.glob(p + "/*/include")]' 2>/dev/null))
# Its name, a folder to look in first; the header beside it that defines the version's macro, the least.
cuda_header       = $(if $(NVCC_PATH),$(firstword $(foreach h,$(foreach d,$(2) $(CUDA_INCLUDES),$(wildcard $(d)/$(1))), \
                      $(if $(shell awk '$$2 == "$(4)" && $$3 >= $(5)' $(dir $(h))$(3) 2>/dev/null),$(h)))))
CUBLAS_HEADER    := $(call cuda_header,cublasLt.h,$(CUBLAS_INCLUDE),cublas_api.h,CUBLAS_VER_MAJOR,12)
CUDNN_HEADER     := $(call cuda_header,cudnn_backend.h,$(CUDNN_INCLUDE),cudnn_version.h,CUDNN_MAJOR,9)
CUDA_FLAGS       := $(if $(CUBLAS_HEADER),-DAC_HAVE_CUBLASLT -isystem $(dir $(CUBLAS_HEADER))) \
                    $(if $(CUDNN_HEADER),-DAC_HAVE_CUDNN -isystem $(dir $(CUDNN_HEADER)))
CUDA_C           := $(filter-out $(if $(CUBLAS_HEADER),,$(wildcard kernels/cuda/cublaslt*)) $(if $(CUDNN_HEADER),,$(wildcard kernels/cuda/cudnn*)),$(wildcard kernels/cuda/*.c))
CUDA_OBJ         := $(patsubst %.cu,$(B)/%.cu.o,$(wildcard kernels/cuda/*.cu)) \
                    $(patsubst %.c,$(B)/cuda/%.o,$(CUDA_C) csrc/tensor.c)
CUDA_HOST_FLAGS  := -fPIC,-fvisibility=hidden

# What objects were built for: another list builds them anew.
CUDA_BUILT       := $(CUDA_ARCHS) $(filter -D%,$(CUDA_FLAGS))
$(B)/cuda/archs: FORCE
	@mkdir -p $(@D)
	@echo '$(CUDA_BUILT)' | cmp -s - $@ || echo '$(CUDA_BUILT)' > $@
FORCE:

$(B)/%.cu.o: %.cu $(B)/cuda/archs $(wildcard kernels/cuda/*.cuh kernels/cuda/*.h) csrc/base.h csrc/tensor.h csrc/ops.h csrc/ops.def csrc/kernel.h csrc/device.h csrc/sampler.h
	@mkdir -p $(@D)
	$(NVCC) -std=c++20 -O3 $(GENCODE) -Xcompiler $(CUDA_HOST_FLAGS),-Wall -c $< -o $@

$(B)/cuda/%.o: %.c $(B)/cuda/archs $(wildcard kernels/cuda/*.h) csrc/base.h csrc/tensor.h csrc/ops.h csrc/ops.def csrc/kernel.h csrc/device.h csrc/sampler.h
	@mkdir -p $(@D)
	$(NVCC) -O2 -x c $(CUDA_FLAGS) -DAC_CUDA_ARCHS='"$(CUDA_ARCHS)"' -Xcompiler -std=c11,-D_GNU_SOURCE,-Wall,-Wextra,$(CUDA_HOST_FLAGS) -c $< -o $@

$(CUDA_SO): $(CUDA_OBJ)
	@mkdir -p $(@D)
	$(if $(CUBLAS_HEADER),,@echo "cuda: WITHOUT cuBLASLt: no cublasLt.h of 12 or later was found; make cuda-headers fetches it")
	$(if $(CUDNN_HEADER),,@echo "cuda: WITHOUT cuDNN: no cudnn_backend.h of 9 or later was found; make cuda-headers fetches it")
	$(NVCC) -shared -cudart static $(GENCODE) $^ -ldl -lpthread -o $@

cuda: ## the CUDA library, where nvcc is found
	@if command -v $(NVCC) >/dev/null; then $(MAKE) --no-print-directory $(CUDA_SO); \
	else echo "cuda: skipped, no nvcc was found"; fi

# NVIDIA's wheels are 770 MB, their headers 1: the rest is thrown away (10 to 30 s).
cuda-headers: $(PY) ## cuBLASLt's and cuDNN's headers into build/headers, from NVIDIA's pip packages
	@rm -rf build/headers && mkdir -p build/headers/wheels
	timeout 150 $(PIP) download --no-cache-dir --no-deps --only-binary=:all: -d build/headers/wheels \
	    "nvidia-cublas==13.1.*" "nvidia-cudnn-cu13==9.19.*"
	@cd build/headers && $(CURDIR)/$(PY) -c 'import glob, zipfile as z; [w.extractall(members=[n for n in w.namelist() if "/include/" in n]) for w in map(z.ZipFile, glob.glob("wheels/*.whl"))]'
	@rm -rf build/headers/wheels

GPU_TESTS := $(patsubst tests/c/%.c,$(B)/tests/%,$(wildcard tests/c/test_cuda*.c)) \
             $(addprefix $(B)/tests/,test_seam test_kernels test_fused test_fused_random cuda_own)

# The backend's objects, not its library, which hides what this calls.
$(B)/tests/cuda_own: $(B)/cuda/tests/c/cuda_own.o $(CUDA_OBJ) $(B)/libaccel.a
	@mkdir -p $(@D)
	$(NVCC) -cudart static $(GENCODE) $^ -lm -ldl -lpthread -o $@
$(B)/cuda/tests/c/cuda_own.o: tests/c/test.h

# RECORD: the file of the record; ONLY: parts by a regex; LIMIT: seconds, stops what runs longer.
test-gpu: ## the checks that need a GPU, and their record; installs nothing
	$(MAKE) --no-print-directory -j$(shell nproc) cuda gpu-extension gpu-75 $(GPU_TESTS)
	$(PYTHON) tools/gpu_test.py $(if $(RECORD),--record "$(RECORD)") $(if $(ONLY),--only "$(ONLY)") \
	    $(if $(LIMIT),--seconds $(LIMIT))

gpu-extension:
	ACCEL_CUDA_ARCHS=none $(PYTHON) setup.py -q build_ext --inplace

# The package with the code of compute capability 7.5 alone, as PTX: what ACCEL_FORCE_ARCH=75 then
# chooses is what such a card would run, compiled by the driver for the one that is here.
PTX_75 := build/arch75/python/accel/libaccel_cuda.so
gpu-75: gpu-extension
	$(MAKE) --no-print-directory B=build/c75 CUDA_SO=$(PTX_75) ACCEL_CUDA_ARCHS=75+PTX \
	    GENCODE="-gencode arch=compute_75,code=compute_75" $(PTX_75)
	tar -C python/accel --exclude=libaccel_cuda.so --exclude=__pycache__ -cf - . | tar -C build/arch75/python/accel -xf -

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
	@if command -v $(NVCC) >/dev/null && [ -z "$(CUBLAS_HEADER)" -o -z "$(CUDNN_HEADER)" ]; then \
	    $(MAKE) --no-print-directory cuda-headers || \
	    echo "cuda: NO HEADERS of cuBLASLt and cuDNN: what calls them is not compiled"; fi

# That all compiles is seen with one; an nvcc that is too old for it is passed over.
TEST_ARCHS := $(or $(ACCEL_CUDA_ARCHS),$(if $(filter 90,$(CUDA_KNOWN)),90a))
test-build: $(PY) ## the extension, the C tests, and the GPU library where nvcc is
	CPPFLAGS=-Werror ACCEL_CUDA_ARCHS="$(TEST_ARCHS)" $(PIP) install --no-build-isolation --no-deps -e .
	$(MAKE) --no-print-directory -j$(shell nproc) ACCEL_CUDA_ARCHS="$(TEST_ARCHS)" $(CTESTS) \
	    $(if $(NVCC_PATH),$(if $(filter-out none,$(TEST_ARCHS)),$(B)/tests/cuda_own))

test-run: check-c ## lint, C tests, Python tests, and both ways to install
	$(PY) tools/lint.py
	$(VENV)/bin/ruff check --quiet .
	$(PY) -m pytest -q -n 2 tests
	tools/check_install.sh $(PYTHON)

# ---- sanitizers, failing allocations, fuzzers -----------------------------------------------------

SAN        := -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined \
              -fno-sanitize-recover=all -Wno-error=maybe-uninitialized
SAN_MAKE    = $(MAKE) --no-print-directory -j$(shell nproc) CFLAGS="$(SAN)$(1)" B=$(2)
SAN_RUN    := ASAN_OPTIONS=detect_leaks=1:strict_string_checks=1 \
              UBSAN_OPTIONS=print_stacktrace=1
# Python leaks by itself; its own checks of leaks are in tests/.
SAN_PYTHON  = LD_PRELOAD="$(foreach l,libasan.so libubsan.so libstdc++.so,$(shell $(CC) -print-file-name=$(l)))" \
              ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=build/san
TORCHFREE  := $(wildcard tests/torchfree/test_*.py)
OOM_TESTS   = $(patsubst tests/c/%.c,build/san/tests/%,$(shell grep -l test_oom tests/c/test_*.c))
FUZZERS    := $(patsubst tests/fuzz/%.c,%,$(wildcard tests/fuzz/fuzz_*.c))
FUZZ_SECONDS ?= 60

TSAN       := -O1 -g -fno-omit-frame-pointer -fsanitize=thread
TSAN_TESTS := $(addprefix build/tsan/tests/,test_life test_weights test_pool)

tsan: ## the C tests with threads under the thread sanitizer
	$(MAKE) --no-print-directory -j$(shell nproc) CFLAGS="$(TSAN)" B=build/tsan $(TSAN_TESTS)
	@for t in $(TSAN_TESTS); do echo "== $$t"; \
	    TSAN_OPTIONS=halt_on_error=1:die_after_fork=0 $$t || exit 1; done

sanitize: tsan ## C tests and torch-free Python tests under all sanitizers
	$(SAN_RUN) $(call SAN_MAKE,,build/san) check-c
	$(if $(TORCHFREE),$(call SAN_MAKE,,build/san) san-extension)
	$(if $(TORCHFREE),$(SAN_PYTHON) $(PY) -c 'import accel; assert "build/san" in accel.__file__')
	$(if $(TORCHFREE),$(SAN_PYTHON) $(PY) -m pytest -q -p no:cacheprovider $(TORCHFREE))

oom: ## the C tests that fail each allocation in turn, under the sanitizers
	$(call SAN_MAKE,,build/san) $(OOM_TESTS)
	@for t in $(OOM_TESTS); do echo "== $$t"; $(SAN_RUN) $$t --oom || exit 1; done

fuzz: ## every parser, FUZZ_SECONDS (60) in all, under the sanitizers
	$(call SAN_MAKE, -fsanitize-coverage=trace-pc,build/fuzz) $(FUZZERS:%=build/fuzz/%)
	@cd build/fuzz && for f in $(FUZZERS); do $(SAN_RUN) \
	    ./$$f --seconds $$(($(FUZZ_SECONDS) / $(words $(FUZZERS)))) || exit 1; done

build/fuzz/fuzz_%: tests/fuzz/fuzz_%.c build/fuzz/driver.o build/fuzz/libaccel.a tests/fuzz/fuzz.h
	$(CC) $(WARN) $(CFLAGS) -MMD -MP $< build/fuzz/driver.o build/fuzz/libaccel.a \
	    -lm -lpthread -ldl -o $@

# Not instrumented for coverage: it is what counts.
build/fuzz/driver.o: tests/fuzz/driver.c tests/fuzz/fuzz.h
	@mkdir -p $(@D)
	$(CC) $(WARN) $(SAN) -c $< -o $@

# The extension as setup.py builds it, but with the sanitizers, beside a copy of the package.
PYOBJ := $(patsubst %.c,$(B)/%.o,$(wildcard csrc/py/*.c))
$(PYOBJ): PYFLAGS = -I$(shell $(PY) -c 'import sysconfig; print(sysconfig.get_path("include"))') \
    -DPy_LIMITED_API=0x030B0000 -DACCEL_VERSION='"0"' -Wno-error

san-extension: $(OBJ) $(PYOBJ)
	rm -rf $(B)/accel && mkdir -p $(B)/accel && cp -r $(filter-out %.so python/accel/__pycache__,$(wildcard python/accel/*)) $(B)/accel/
	$(CC) $(CFLAGS) -shared $^ -lm -lpthread -ldl -o $(B)/accel/_core.abi3.so

clean: ## remove what was built
	rm -rf build

-include $(OBJ:.o=.d) $(PYOBJ:.o=.d) $(CTESTS:=.d) $(FUZZERS:%=build/fuzz/%.d)
