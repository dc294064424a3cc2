"""setup.build_cuda: a machine whose nvcc is unfit gets the CPU part and one line, unless asked."""

import os
import runpy
import sys
from pathlib import Path

import pytest
import setuptools
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parents[2]

# Says its version, and then what a host compiler that it refuses says.
REFUSES = """\
case "$*" in
*--version*) echo "Cuda compilation tools, release 13.0, V13.0.88" ;;
*) echo "In file included from <command-line>:" >&2
   echo "host_config.h:1: #error -- unsupported GNU version!" >&2; exit 1 ;;
esac
"""
OLD = 'echo "Cuda compilation tools, release 11.8, V11.8.89"\n'
COMPILES = 'case "$*" in *--version*) echo "release 13.0, V13.0.88" ;; esac\n'


@pytest.fixture
def build(tmp_path, monkeypatch):
    """build(nvcc, make, archs): build_cuda where PATH has these two scripts (None: none)."""
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    build_cuda = runpy.run_path(str(ROOT / "setup.py"))["build_cuda"]

    def run(nvcc, make="exit 0\n", archs=None):
        for name, script in {"nvcc": nvcc, "make": make}.items():
            if script is not None:
                (tmp_path / name).write_text("#!/bin/sh\n" + script)
                (tmp_path / name).chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setenv("CUDA_HOME", str(tmp_path / "none"))
        monkeypatch.delenv("ACCEL_CUDA_ARCHS", raising=False)
        if archs is not None:
            monkeypatch.setenv("ACCEL_CUDA_ARCHS", archs)
        build_cuda(tmp_path)

    return run


UNFIT = {
    "no nvcc was found": None,
    "found nvcc 11, expected 12 or later": OLD,
    "compiles nothing: host_config.h:1: #error -- unsupported GNU version!": REFUSES,
}


@pytest.mark.skipif(sys.platform == "win32", reason="scripts of a POSIX shell")
@pytest.mark.parametrize("reason", UNFIT)
def test_an_unfit_nvcc_is_one_line(build, capfd, reason):
    build(UNFIT[reason], make="echo made\n")
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 1 and lines[0].startswith("accel: skipped the GPU part: ")
    assert lines[0].endswith(reason)


@pytest.mark.parametrize("reason", UNFIT)
def test_who_names_architectures_gets_an_error(build, reason):
    with pytest.raises(CompileError) as caught:
        build(UNFIT[reason], archs="90a")
    message = str(caught.value)
    assert message.startswith("accel: ACCEL_CUDA_ARCHS=90a: the GPU part cannot be built: ")
    assert message.endswith(reason) and "\n" not in message


def test_none_is_none(build, capfd):
    build(COMPILES, make="echo made\n", archs="none")
    assert capfd.readouterr().out == "accel: skipped the GPU part: ACCEL_CUDA_ARCHS is none\n"


def test_a_fit_nvcc_builds(build, capfd):
    build(COMPILES, make='echo "$@"\n')
    assert "libaccel_cuda.so" in capfd.readouterr().out


def test_a_build_that_fails_is_one_line(build):
    with pytest.raises(CompileError, match="^accel: the GPU part did not build.*=none") as caught:
        build(COMPILES, make="exit 2\n")
    assert "\n" not in str(caught.value)


def test_headers_of_an_earlier_cudnn_are_passed_over(tmp_path):
    """The Makefile's choice: 8 is in many a /usr/include, before the pip package's 9."""
    for version in (8, 9):
        folder = tmp_path / str(version)
        folder.mkdir()
        (folder / "cudnn_backend.h").touch()
        (folder / "cudnn_version.h").write_text(f"#define CUDNN_MAJOR {version}\n")
    for version, taken in ((8, False), (9, True)):
        wanted = f"CUDNN_HEADER := {tmp_path}/{version}/cudnn_backend.h"
        command = f"make -pn help NVCC_PATH=nvcc CUDA_KNOWN=90 CUDNN_INCLUDE={tmp_path}/{version}"
        with os.popen(f"cd {ROOT} && {command} 2>/dev/null") as said:
            assert (wanted in said.read()) == taken
