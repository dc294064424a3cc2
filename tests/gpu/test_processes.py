"""Results are the same bits in every process that has the same choices of library algorithms: those
of one cache, or the fixed ones of ACCEL_TUNE=off; replayed or not."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).with_name("_digest.py")


def start(**environment):
    names = ("ACCEL_TUNE", "ACCEL_GRAPH", "ACCEL_CACHE")
    inherited = {n: v for n, v in os.environ.items() if n not in names}
    return subprocess.Popen([sys.executable, SCRIPT], env=inherited | environment,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def digests(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-2000:]
    return json.loads(out.strip().splitlines()[-1])


def differing(a, b):
    assert a.keys() == b.keys() and len(a) >= 6
    return [name for name in a if a[name] != b[name]]


def choices(folder):
    """What the cache holds: each choice, without its time."""
    return {tuple(line.split("\t")[:2])
            for line in (folder / "cuda-1.txt").read_text().splitlines()}


def test_processes_with_the_same_cache_are_identical(tmp_path):
    cache = {"ACCEL_CACHE": str(tmp_path)}
    first = digests(start(**cache))
    chosen = choices(tmp_path)
    assert len(chosen) > 50, chosen
    others = [start(**cache), start(**cache, ACCEL_GRAPH="off")]
    again, eager = (digests(p) for p in others)
    assert not differing(again, first)
    assert not differing(eager, first)
    assert choices(tmp_path) == chosen
    # Other inputs give other digests: they do depend on what was computed.
    assert len(set(first.values())) == len(first)


def test_processes_that_do_not_measure_are_identical(tmp_path):
    off = {"ACCEL_TUNE": "off", "ACCEL_CACHE": str(tmp_path)}
    one, two = (digests(p) for p in [start(**off), start(**off)])
    assert not differing(one, two)
    assert not list(tmp_path.iterdir())


def test_the_script_sees_differences():
    with pytest.raises(AssertionError):
        differing({}, {})
    a = {str(i): str(i) for i in range(9)}
    assert differing(a, a | {"3": "x"}) == ["3"]
