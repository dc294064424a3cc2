"""Builds accel._core: the engine, its CPU kernels and the Python boundary in one extension.

Kernel files ask for AVX2 or AVX-512 by function attributes and are chosen at run time, so there is
no -march here and one build serves every x86-64; other machines use the plain kernels.  The
extension keeps to the stable ABI: one build serves every Python from 3.11 on.
"""

import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def c_sources():
    """The engine, the boundary and the backends that are always linked in."""
    patterns = ["csrc/**/*.c", "kernels/cpu/*.c", "kernels/null/*.c"]
    return sorted(str(f.relative_to(ROOT)) for p in patterns for f in ROOT.glob(p))


def headers():
    folders = [ROOT / "csrc", ROOT / "kernels"]
    return sorted(
        str(f.relative_to(ROOT)) for d in folders for f in d.rglob("*") if f.suffix in HEADERS
    )


HEADERS = {".h", ".def", ".inc"}
CUDA_LIBRARY = "libaccel_cuda.so"


def why_no_cuda(nvcc, make):
    """The reason not to build the GPU part, or None."""
    if nvcc is None or make is None:
        return f"no {'make' if nvcc else 'nvcc'} was found"
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.", told)
    if release and int(release[1]) < 12:
        return f"found nvcc {release[1]}, expected 12 or later"
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder) / "probe.cu"
        probe.write_text("#include <cuda_runtime_api.h>\n__global__ void probe() {}\n")
        tried = subprocess.run([nvcc, "-std=c++20", "-c", probe, "-o", probe.with_suffix(".o")],
                               capture_output=True, text=True)
    said = (tried.stderr + tried.stdout).strip().splitlines()
    first = next((line for line in said if "error" in line.lower()), (said or ["no output"])[0])
    return f"{nvcc} compiles nothing: {first.strip()}" if tried.returncode else None


def build_cuda(folder):
    """Builds libaccel_cuda.so into `folder` where nvcc can; says in one line when it cannot, which
    is an error where ACCEL_CUDA_ARCHS asks for it.

    The Makefile has the rules and reads ACCEL_CUDA_ARCHS.  The host part does not depend on it.
    """
    archs = os.environ.get("ACCEL_CUDA_ARCHS", "").strip()
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    make = shutil.which("make")
    reason = "ACCEL_CUDA_ARCHS is none" if archs == "none" else why_no_cuda(nvcc, make)
    if reason and archs not in ("", "none"):
        raise CompileError(f"accel: ACCEL_CUDA_ARCHS={archs}: the GPU part cannot be built: "
                           f"{reason}")
    if reason:
        print(f"accel: skipped the GPU part: {reason}")
        return
    target = str(Path(folder).resolve() / CUDA_LIBRARY)
    # NVIDIA's headers may lie beside the user's PyTorch, which pip's isolation does not see.
    site = sysconfig.get_path("purelib")
    status = subprocess.call([make, f"-j{os.cpu_count() or 1}", f"NVCC={nvcc}", f"SITE={site}",
                              f"CUDA_SO={target}", target], cwd=ROOT)
    if status:
        raise CompileError("accel: the GPU part did not build, the compiler's words are above; "
                           "ACCEL_CUDA_ARCHS=none installs without it")


def newer(source, target, also):
    """True when `target` is missing or older than its source or any header."""
    if not os.path.exists(target):
        return True
    made = os.path.getmtime(target)
    return any(os.path.getmtime(f) > made for f in [source, *also])


class BuildExt(build_ext):
    """Compiles sources side by side, and only those that changed."""

    def build_extension(self, ext):
        compile_one = self.compiler.compile
        depends = [*ext.depends, str(ROOT / "setup.py")]

        def compile_all(sources, output_dir=None, **options):
            def run(source):
                target = self.compiler.object_filenames([source], output_dir=output_dir)[0]
                if self.force or newer(source, target, depends):
                    compile_one([source], output_dir=output_dir, **options)
                return target

            with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
                return list(pool.map(run, sources))

        self.compiler.compile = compile_all
        try:
            super().build_extension(ext)
        finally:
            self.compiler.compile = compile_one

    def run(self):
        super().run()
        folder = (ROOT / "python" if self.inplace else Path(self.build_lib)) / "accel"
        if not self.inplace:  # an earlier build's would go into the wheel
            (folder / CUDA_LIBRARY).unlink(missing_ok=True)
        build_cuda(folder)


readme = ROOT / "README.md"
setup(
    long_description=readme.read_text() if readme.exists() else "",
    long_description_content_type="text/markdown",
    ext_modules=[
        Extension(
            "accel._core",
            sources=c_sources(),
            depends=headers(),
            define_macros=[
                ("Py_LIMITED_API", "0x030B0000"),
                ("_GNU_SOURCE", None),
                ("ACCEL_VERSION", f'"{PROJECT["version"]}"'),
            ],
            extra_compile_args=[
                *["-std=c11", "-O3", "-g1", "-fvisibility=hidden", "-Wall", "-Wextra"],
                *["-fno-math-errno", "-fno-trapping-math"],
            ],
            libraries=["m", "pthread", "dl"],
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": BuildExt},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
