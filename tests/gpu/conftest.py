"""Tests that need an NVIDIA GPU, PyTorch for CUDA and diffusers: `make test-gpu`.

Skipped, with one line, where there is no GPU.  The truth is PyTorch in float32 without TF32.  Tests
that are marked `alone` look at the memory of the whole GPU: nothing else may run beside them.
"""

import gc
import json
import os
import pathlib

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402

torch = pytest.importorskip("torch")
HERE = pathlib.Path(__file__).parent


def pytest_configure(config):
    from diffusers.utils import logging

    logging.set_verbosity_error()  # a warning at each module.to(dtype)
    config.addinivalue_line("markers", "alone: looks at the memory of the whole GPU")


def pytest_collection_modifyitems(items):
    missing = pytest.mark.skip(reason="no GPU")
    for item in items:
        if HERE in item.path.parents and not torch.cuda.is_available():
            item.add_marker(missing)


def pytest_runtest_logreport(report):
    """One line a test for tools/gpu_test.py: its outcome and its seconds."""
    path = os.environ.get("ACCEL_TEST_FIGURES")
    if not path or (report.when != "call" and report.outcome == "passed"):
        return
    why = report.longrepr if report.outcome != "passed" else ""
    why = why[2] if isinstance(why, tuple) else str(why).strip().splitlines()[-1:]
    with open(path, "a") as file:
        file.write(json.dumps({"kind": "TEST", "what": report.nodeid, "outcome": report.outcome,
                               "why": why if isinstance(why, str) else "".join(why)[-300:],
                               "seconds": round(report.duration, 2)}) + "\n")


@pytest.fixture(autouse=True)
def _exact_and_clean():
    """No gradients, no TF32, and nothing of one test in the next one's memory."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    with torch.no_grad():
        yield
    gc.collect()
    torch.cuda.empty_cache()
