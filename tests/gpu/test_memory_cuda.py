"""Memory of whole pipelines, as the fall of the GPU's free memory in fresh processes, that of the
libraries included: a compiled one needs no more than PyTorch's."""

import json
import pathlib
import subprocess
import sys

import pytest
from _gpu import note

SCRIPT = pathlib.Path(__file__).parents[2] / "benchmarks" / "gpu.py"


def fall(kind, who):
    result = subprocess.run([sys.executable, SCRIPT, "--memory-of", kind, who],
                            capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout.strip().splitlines()[-1])
    note("MEMORY", f"{kind} pipeline, {who}", ", ".join(
        f"{key} {value / 1e6:.0f} MB" for key, value in found.items()), **found)
    return found


@pytest.mark.alone
def test_a_compiled_pipeline_takes_no_more_than_eager():
    ours, theirs = fall("sdxl", "accel"), fall("sdxl", "stock")
    assert theirs["fall"] > 6e9  # the weights alone
    assert ours["fall"] <= theirs["fall"], (ours, theirs)
    # What stays after `del pipe` is the libraries' own.
    assert ours["after_del"] <= theirs["after_del"], (ours, theirs)
