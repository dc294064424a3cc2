#!/usr/bin/env python3
"""Checks what compilers and ruff do not: the shape of the house.

Include direction, one home for Python.h, a header comment in every file, lengths, headers that
compile alone, and a plain CPU kernel with a check for every op.  csrc/README.md says why.

    python tools/lint.py [--root FOLDER] [--no-compile]

Prints one line a finding, "file:line: what", and exits 1 when there are any.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

MAX_COLUMNS = 100
# "About 600" and "about 70": beyond these there are usually two ideas.
MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 70

# Bottom to top; a file includes its own layer and those below.  Stems in csrc/, or "folder/".
LAYERS = [
    ("base", ["base", "lock", "tensor", "sampler"]),
    (
        "graph",
        [
            "ops",
            "ops_text",
            "graph",
            "graph_edit",
            "json",
            "safetensors",
            "weights",
            "weights_files",
        ],
    ),
    ("models, passes", ["models/", "passes/"]),
    (
        "plan",
        [
            "kernel",
            "device",
            "device_memory",
            "backend_cuda",
            "plan",
            "plan_internal",
            "plan_place",
            "plan_views",
            "explain",
            "memory",
            "tune",
            "exec",
            "exec_internal",
            "exec_edges",
            "exec_weights",
            "exec_record",
            "model",
            "profile",
            "profile_text",
        ],
    ),
    ("loop", ["rng", "rng_philox", "scheduler", "schedulers/", "denoise"]),
    ("py", ["py/"]),
]
# All that a kernel may know of the engine.
KERNELS_SEE = {
    f"csrc/{name}"
    for name in ("base.h", "tensor.h", "sampler.h", "ops.h", "ops.def", "kernel.h", "device.h")
}
# What the boundary may know of a backend: the number of threads is a setting.
PY_SEES = {"kernels/cpu/pool.h"}

C_SUFFIXES = {".c", ".h", ".inc", ".def", ".cu", ".cuh"}
FOLDERS = ["csrc", "kernels", "python", "tests", "tools", "benchmarks"]

INCLUDE = re.compile(r'\s*#\s*include\s+(?:"([^"]+)"|<([^>]+)>)')
FUNCTION = re.compile(r"(\w+)\(")
OP_ROW = re.compile(r"X\((\w+), (\w+), ([01]),")

Finding = tuple[Path, int, str]


def layer_of(path: Path) -> int | None:
    """Index into LAYERS of a file under csrc/, None when it has no layer."""
    parts = path.parts[1:]
    name = f"{parts[0]}/" if len(parts) > 1 else path.stem
    for index, (_, members) in enumerate(LAYERS):
        if name in members:
            return index
    return None


def included(path: Path, target: str) -> Path:
    """The file that `#include "target"` in `path` names, relative to the root."""
    return Path(os.path.normpath(path.parent / target))


def check_include(path: Path, target: Path) -> str | None:
    """What is wrong with `path` including `target`, both relative to the root."""
    if path.parts[0] == "kernels":
        same_backend = target.parts[:2] == path.parts[:2]
        if not same_backend and target.as_posix() not in KERNELS_SEE:
            return f"a kernel includes {target}; it may see {', '.join(sorted(KERNELS_SEE))}"
        return None
    if path.parts[0] != "csrc":
        return None
    own = layer_of(path)
    if own is None:
        return "this file is in no layer; add it to LAYERS in tools/lint.py"
    if target.parts[0] == "kernels":
        if path.parts[1] == "py" and target.as_posix() in PY_SEES:
            return None
        return f"includes {target}; the engine does not know its kernels"
    other = layer_of(target)
    if other is None or other > own:
        above = "no layer" if other is None else f"layer '{LAYERS[other][0]}'"
        return f"layer '{LAYERS[own][0]}' includes {target} of {above}"
    return None


def check_includes(path: Path, lines: list[str]) -> Iterator[Finding]:
    """Direction of includes, and Python.h in csrc/py alone."""
    for number, line in enumerate(lines, 1):
        match = INCLUDE.match(line)
        if not match:
            continue
        if match[1]:
            wrong = check_include(path, included(path, match[1]))
            if wrong:
                yield path, number, wrong
        elif match[2] == "Python.h" and path.parts[:2] != ("csrc", "py"):
            yield path, number, "includes Python.h; only csrc/py may"


def check_text(path: Path, lines: list[str]) -> Iterator[Finding]:
    """Header comment, columns, tabs, lines in the file."""
    first = next((line for line in lines if line.strip() and not line.startswith("#!")), "")
    opening = ('"""', 'r"""') if path.suffix == ".py" else ("/*", "//")
    if lines and not first.startswith(opening):
        yield path, 1, "found no header comment, expected what the file does and where it sits"
    for number, line in enumerate(lines, 1):
        if len(line) > MAX_COLUMNS:
            yield path, number, f"found {len(line)} columns, expected at most {MAX_COLUMNS}"
        if "\t" in line:
            yield path, number, "found a tab"
        if line != line.rstrip():
            yield path, number, "found white space at the end"
    if len(lines) > MAX_FILE_LINES:
        yield path, len(lines), f"found {len(lines)} lines, expected about 600: two ideas?"


def check_functions(path: Path, lines: list[str]) -> Iterator[Finding]:
    """Length of C functions: from the name at the start of a line to the brace at one."""
    name, start = None, 0
    for number, line in enumerate(lines, 1):
        match = FUNCTION.match(line)
        if match:
            name, start = match[1], number
        elif line == "}" and name:
            if number - start + 1 > MAX_FUNCTION_LINES:
                yield path, start, f"{name} has {number - start + 1} lines, expected about 70"
            name = None


def check_ops(root: Path) -> Iterator[Finding]:
    """Every op that is no view: a plain CPU kernel, last of its kind in the list, and a check."""
    listing, cases = Path("kernels/cpu/list.c"), Path("tests/c/check_cases.h")
    listed = re.findall(r"X\(ac_cpu_(\w+)\)", (root / listing).read_text())
    checked = (root / cases).read_text()
    for name_upper, name, view in OP_ROW.findall((root / "csrc/ops.def").read_text()):
        if view == "1":
            continue
        mine = [k for k in listed if re.fullmatch(rf"{name}_(plain|base|avx2|avx512)\w*", k)]
        if not (root / "kernels/cpu" / f"{name}.c").exists():
            yield Path("csrc/ops.def"), 1, f"{name}: found no kernels/cpu/{name}.c"
        if not mine or mine[-1] != f"{name}_plain":
            yield listing, 1, f"{name}: expected ac_cpu_{name}_plain as the last of its kernels"
        if not re.search(rf"\bAC_OP_{name_upper}\b", checked):
            yield cases, 1, f"{name}: found no case"


def check_headers(root: Path) -> Iterator[Finding]:
    """Every header of the engine and the host backends compiles on its own."""
    compiler = shlex.split(os.environ.get("CC", "cc"))
    flags = ["-std=c11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
    python = sysconfig.get_paths()["include"]
    for folder in ("csrc", "kernels/cpu", "kernels/null"):
        for header in sorted((root / folder).rglob("*.h")):
            path = header.relative_to(root)
            more = ["-I", python] if path.parts[:2] == ("csrc", "py") else []
            if more and not (Path(python) / "Python.h").exists():
                continue
            source = f'#include "{path.as_posix()}"\n'
            result = subprocess.run(
                [*compiler, *flags, *more, "-x", "c", "-"],
                cwd=root,
                input=source,
                capture_output=True,
                text=True,
                check=False,
            )
            if result.returncode:
                first = next((t for t in result.stderr.splitlines() if "error" in t), "")
                yield path, 1, f"does not compile alone: {first.strip()}"


def sources(root: Path) -> Iterator[Path]:
    """C, CUDA and Python files that are ours, relative to the root."""
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*")):
            relative = path.relative_to(root)
            hidden = any(part.startswith(".") or part == "__pycache__" for part in relative.parts)
            if path.is_file() and not hidden and path.suffix in C_SUFFIXES | {".py"}:
                yield relative


def findings(root: Path, *, compile_headers: bool) -> Iterator[Finding]:
    """All findings, file by file."""
    for path in sources(root):
        lines = (root / path).read_text().splitlines()
        yield from check_text(path, lines)
        if path.suffix in C_SUFFIXES:
            yield from check_includes(path, lines)
            yield from check_functions(path, lines)
    yield from check_ops(root)
    if compile_headers:
        yield from check_headers(root)


def main() -> int:
    """Prints the findings; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parent.parent)
    parser.add_argument("--no-compile", action="store_true", help="leave out the header check")
    arguments = parser.parse_args()
    count = 0
    for path, line, what in findings(arguments.root, compile_headers=not arguments.no_compile):
        print(f"{path}:{line}: {what}")
        count += 1
    print(f"lint: {count} findings" if count else "lint: ok")
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main())
