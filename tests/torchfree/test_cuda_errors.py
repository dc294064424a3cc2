"""What a machine without a usable GPU says: no library, another one, no driver, an old one, no GPU.

Each in a process of its own, over a copy of the package or a driver made here: one exception with
one sentence, the same each time, and the CPU goes on working.
"""

import ctypes
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

import accel

PACKAGE = pathlib.Path(accel.__file__).parent
LIBRARY = PACKAGE / "libaccel_cuda.so"
SOURCES = pathlib.Path(__file__).parents[2]
needs_gcc = pytest.mark.skipif(not shutil.which("gcc"), reason="no gcc")
needs_library = pytest.mark.skipif(not LIBRARY.exists(), reason="no libaccel_cuda.so here")

CHILD = """
import json, sys
import accel
from accel import _core, info
said = []
for make in (lambda: accel.Pipeline.from_pretrained(sys.argv[1], device="cuda"),
             lambda: accel.UNet.from_pretrained(sys.argv[1], device="cuda:0"),
             lambda: _core.trim("cuda")):
    try:
        make()
        said.append(["nothing", ""])
    except Exception as error:
        said.append([type(error).__name__, str(error)])
info.self_test()
listed = [text for name, text, _ in info._devices() if name == "cuda"]
print(json.dumps({"said": said, "listed": listed, "from": accel.__file__}))
"""

# What libaccel_cuda.so needs of libcuda.so.1 to count devices.
DRIVER = """
#include <stdint.h>
#include <string.h>
int cuInit(unsigned flags) { (void)flags; return INIT; }
int cuDriverGetVersion(int *version) { *version = VERSION; return 0; }
static int count(int *n) { *n = 0; return INIT; }
static int other(void) { return 100; }
int cuGetProcAddress_v2(const char *name, void **out, int version, uint64_t flags, int *how)
{
    (void)version, (void)flags;
    *out = !strcmp(name, "cuInit") ? (void *)cuInit
         : !strcmp(name, "cuDriverGetVersion") ? (void *)cuDriverGetVersion
         : !strcmp(name, "cuDeviceGetCount") ? (void *)count
         : !strcmp(name, "cuGetProcAddress") ? (void *)cuGetProcAddress_v2 : (void *)other;
    if (how) { *how = 0; }
    return 0;
}
"""

# A library of another build: it does not look at the number it is given, or refuses it.
STRANGER = """
#include "csrc/device.h"
ac_status ac_backend_cuda(uint32_t abi, const ac_host *host, ac_backend *out);
ac_status ac_backend_cuda(uint32_t abi, const ac_host *host, ac_backend *out)
{
    (void)abi, (void)host;
    if (REFUSES) {
        out->abi = AC_ABI + 1;
        return AC_E_DEVICE;
    }
    *out = (ac_backend){.abi = AC_ABI + 1, .name = "cuda"};
    return AC_OK;
}
"""


def compile_library(target, text, *flags):
    source = target.with_suffix(".c")
    source.write_text(text)
    subprocess.run(["gcc", "-shared", "-fPIC", f"-I{SOURCES}", *flags, source, "-o", target],
                   check=True)


@pytest.fixture
def package(tmp_path):
    """A copy of the package without the CUDA library; links, so that it costs nothing."""
    copy = tmp_path / "copy" / "accel"
    copy.mkdir(parents=True)
    for file in PACKAGE.iterdir():
        if file.name not in (LIBRARY.name, "__pycache__"):
            (copy / file.name).symlink_to(file)
    return copy


def run(model, package=PACKAGE, **environment):
    """What a child said: [[class, message], ...] and info's line; it must have ended well."""
    env = os.environ | {"PYTHONPATH": str(package.parent)} | environment
    child = subprocess.run([sys.executable, "-c", CHILD, str(model)], env=env, text=True,
                           capture_output=True, timeout=60)
    assert child.returncode == 0, child.stderr
    told = json.loads(child.stdout)
    assert pathlib.Path(told["from"]).parent == package
    return told


def check(told, *words):
    """One exception, one sentence, the same from every door."""
    kind, message = told["said"][0]
    assert told["said"] == [[kind, message]] * 3
    assert kind == "DeviceError" and "\n" not in message
    assert message.startswith(("cuda: ", "libaccel_cuda.so: "))
    for word in words:
        assert word in message, message
    assert told["listed"] == [message]


def test_no_library(sd_folder, package):
    check(run(sd_folder, package), "libaccel_cuda.so", "No such file", "where nvcc is found")


@needs_gcc
def test_a_library_that_is_not_ours(sd_folder, package):
    compile_library(package / LIBRARY.name, "int nothing;")
    check(run(sd_folder, package), "does not export ac_backend_cuda")


@needs_gcc
@pytest.mark.parametrize("refuses", [0, 1])
def test_a_library_of_another_build(sd_folder, package, refuses):
    compile_library(package / LIBRARY.name, STRANGER, f"-DREFUSES={refuses}")
    check(run(sd_folder, package), "found ABI ", ", expected ", "one build")


@needs_library
def test_our_library_refuses_another_number():
    """The real one, as a newer engine would ask it: it says its own number, and looks at nothing
    else, as both sides may have other things there."""
    child = """
import ctypes, sys
out = (ctypes.c_uint32 * 256)(*[77] * 256)
ask = ctypes.CDLL(sys.argv[1]).ac_backend_cuda
assert ask(ctypes.c_uint32(999), ctypes.c_void_p(8), out) < 0
print(out[0], set(out[1:]))
"""
    said = subprocess.run([sys.executable, "-c", child, str(LIBRARY)], text=True,
                          capture_output=True)
    number = re.search(r"AC_ABI (\d+)", (SOURCES / "csrc/device.h").read_text())[1]
    assert said.returncode == 0 and said.stdout.split("{")[0].strip() == number, said
    assert "{77}" in said.stdout


@needs_library
def test_no_driver(sd_folder):
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        check(run(sd_folder), "no NVIDIA driver", "libcuda.so.1", "CUDA ")
    else:
        pytest.skip("there is a driver")


@needs_gcc
@needs_library
@pytest.mark.parametrize(("version", "init", "words"), [
    (11020, 0, ("driver for CUDA 11.2", "expected one for ", "update the driver")),
    (99000, 100, ("driver (CUDA 99.0) found no GPU", "CUDA_VISIBLE_DEVICES is 7")),
    (99000, 803, ("cudaErrorSystemDriverMismatch",)),
])
def test_drivers(sd_folder, tmp_path, version, init, words):
    compile_library(tmp_path / "libcuda.so.1", DRIVER, f"-DVERSION={version}", f"-DINIT={init}")
    check(run(sd_folder, LD_LIBRARY_PATH=str(tmp_path), CUDA_VISIBLE_DEVICES="7"), *words)
